"""Pictures in tables: Parquet files, and folders that the library `datasets` saved."""

import json
import os
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fitv2.errors import UserError
from fitv2.images import UnusableImage
from fitv2.sources import NO_LABEL, Picture, Source, readable, split_of
from fitv2.stores import filesystem

IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp", "picture", "pixel_values")
LABEL_COLUMNS = ("label", "labels", "class", "cls", "fine_label", "category", "target")


class Table(NamedTuple):
    """Rows of pictures, of one file or of one split of a `datasets` folder."""

    split: str
    name: str
    path: bytes
    image_column: str
    names: tuple[str, ...]  # of the labels, where the table says them
    labels: list[Any]
    sources: list[str] | None


def in_tables(tables: list[Table]) -> tuple[tuple[str, ...], Iterator[Picture]]:
    """The names of the labels, where the tables say them, and the pictures."""

    def pictures() -> Iterator[Picture]:
        for table in tables:
            for row, label in enumerate(table.labels):
                source = table.sources[row] if table.sources else f"{table.name}:{row}"
                yield Picture(table.split, label, source, table.path, row, column=table.image_column)

    return tables[0].names, pictures()


def parquet_tables(source: Source) -> list[Table]:
    """The Parquet files of a source, read but for their images. Raises UserError."""
    import pyarrow.parquet as pq

    system, _ = filesystem(source.url)
    tables = []
    for path in sorted(source.files):
        name = readable(source.name(path))
        try:
            with system.open(path, "rb") as file:
                parquet = pq.ParquetFile(file)
                image, label, names = columns_of(source, parquet.schema_arrow, name)
                others = [c for c in (label, "source") if c in parquet.schema_arrow.names]
                rows = parquet.read(others)
        except (OSError, ValueError) as error:
            raise UserError(
                f"{source.url}: {name} is not a Parquet file that can be read: {error}"
            ) from error
        labels = label_texts(rows[label].to_pylist() if label else [None] * parquet.metadata.num_rows, names)
        sources = rows["source"].to_pylist() if "source" in others else None
        tables.append(Table(split_of(name), name, os.fsencode(path), image, names, labels, sources))
    return tables


def datasets_tables(source: Source) -> list[Table]:
    """The splits of a `datasets` folder, read but for their images. Raises UserError."""
    import datasets

    try:
        loaded = datasets.load_from_disk(source.url)
    except (OSError, ValueError) as error:
        raise UserError(f"{source.url} is no `datasets` folder that can be read: {error}") from error
    parts = loaded if isinstance(loaded, datasets.DatasetDict) else {"": loaded}
    tables = []
    for part, rows in parts.items():
        split = split_of(part or str(rows.split or ""))
        image, label, names = columns_of(source, rows.features.arrow_schema, part or "dataset")
        labels = label_texts(
            rows.with_format("arrow")[label].to_pylist() if label else [None] * len(rows), names
        )
        tables.append(Table(split, part or split, part.encode(), image, names, labels, None))
    return tables


def columns_of(source: Source, schema: Any, name: str) -> tuple[str, str | None, tuple[str, ...]]:
    """The image column of a table, its label column, and the names of its labels.

    As the options say, or what `datasets` noted in the table, or the columns' names.
    """
    import pyarrow as pa

    said = json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    kinds = {column: feature.get("_type") for column, feature in said.items() if isinstance(feature, dict)}
    held = [f.name for f in schema if pa.types.is_struct(f.type) or pa.types.is_binary(f.type)
            or pa.types.is_large_binary(f.type)]  # fmt: skip
    marked = [column for column, kind in kinds.items() if kind == "Image"]
    usual = [column for column in IMAGE_COLUMNS if column in held]
    image = source.image_column or next(iter(marked or usual or (held if len(held) == 1 else [])), None)
    if image is None or image not in schema.names:
        wanted = f"no column {image}" if image else "no column of images that could be recognized"
        raise UserError(
            f"{source.url}: {name} has {wanted}, but {', '.join(schema.names)}: give --image-column"
        )
    classes = [column for column, kind in kinds.items() if kind == "ClassLabel"]
    usual = [column for column in (*LABEL_COLUMNS, *classes) if column in schema.names]
    label = source.label_column or next(iter(usual), None)
    if label and label not in schema.names:
        raise UserError(f"{source.url}: {name} has no column {label}, but {', '.join(schema.names)}")
    return image, label, tuple(said.get(label, {}).get("names") or ())


def label_texts(labels: list[Any], names: tuple[str, ...]) -> list[str]:
    """Labels as text: by their names where they are numbers of them."""

    def text(label: Any) -> str:
        if label is None:
            return NO_LABEL
        return names[label] if names and isinstance(label, int) and 0 <= label < len(names) else str(label)

    return [text(label) for label in labels]


def parquet_row(url: str, picture: Picture) -> bytes:
    """The bytes of a picture in a Parquet file. Neighbours come from the same row group, read once."""
    ends = _group_ends(url, picture.path, os.getpid())
    group = int(np.searchsorted(ends, picture.at, side="right"))
    first = int(ends[group - 1]) if group else 0
    images = _images_of(url, picture.path, group, picture.column, os.getpid())
    return image_bytes(images[picture.at - first].as_py())


# Each process opens files of its own: a file that was open before a fork has one position for both.


@lru_cache(1024)
def _group_ends(url: str, path: bytes, process: int) -> np.ndarray:
    metadata = _parquet(url, path, process).metadata
    return np.cumsum([metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)])


@lru_cache(1)
def _images_of(url: str, path: bytes, group: int, column: str, process: int) -> Any:
    return _parquet(url, path, process).read_row_group(group, [column])[column]


@lru_cache(4)
def _parquet(url: str, path: bytes, process: int) -> Any:
    import pyarrow.parquet as pq

    return pq.ParquetFile(filesystem(url)[0].open(os.fsdecode(path), "rb"))


def datasets_row(url: str, picture: Picture) -> bytes:
    """The bytes of a picture in a `datasets` folder."""
    row = _datasets_part(url, picture.path.decode(), os.getpid())[picture.at]
    return image_bytes(row[picture.column][0].as_py())


@lru_cache(8)
def _datasets_part(url: str, part: str, process: int) -> Any:
    import datasets

    loaded = datasets.load_from_disk(url)
    return (loaded[part] if part else loaded).with_format("arrow")


def image_bytes(value: Any) -> bytes:
    """The bytes of an image column's value: bytes, or {bytes, path} as `datasets` has it."""
    if isinstance(value, dict):
        if value.get("bytes") is None and value.get("path"):
            return Path(value["path"]).read_bytes()
        value = value.get("bytes")
    if value is None:
        raise UnusableImage("empty")
    if not isinstance(value, bytes):
        raise UnusableImage(f"the image column holds {type(value).__name__}")
    return value
