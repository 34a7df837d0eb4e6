"""Images in tables: Parquet files, and folders that the library `datasets` saved."""

import json
import math
import os
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from fitv2.data.storage import filesystem
from fitv2.encoding.images import UnusableImage
from fitv2.encoding.sources import NO_LABEL, SPLITS, ImageRef, Source, readable, split_of
from fitv2.errors import UserError

IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp", "picture", "pixel_values")
LABEL_COLUMNS = ("label", "labels", "class", "cls", "fine_label", "category", "target")


class Table(NamedTuple):
    """Rows of images, of one file or of one split of a `datasets` folder."""

    split: str
    name: str
    path: bytes
    image_column: str
    names: tuple[str, ...]  # of the labels, where the table says them
    labels: list[str]
    sources: list[str]
    groups: list[int]  # rows of each group of a Parquet file


def in_tables(tables: list[Table]) -> tuple[tuple[str, ...], Iterator[ImageRef]]:
    """The names of the labels, where the tables say them, and the images."""

    def pictures() -> Iterator[ImageRef]:
        for table in tables:
            places = ((group, at) for group, rows in enumerate(table.groups) for at in range(rows))
            for label, source, (group, at) in zip(table.labels, table.sources, places, strict=True):
                yield ImageRef(
                    table.split, label, source, table.path, at, detail=table.image_column, group=group
                )

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
                columns = columns_of(source, parquet.schema_arrow, name)
                rows = parquet.read([c for c in (columns.label, "source") if c in parquet.schema_arrow.names])
        except UserError:
            raise
        except (OSError, ValueError) as error:
            raise UserError(
                f"{source.url}: {name} is not a Parquet file that can be read: {error}"
            ) from error
        metadata = parquet.metadata
        labels = rows[columns.label].to_pylist() if columns.label else [NO_LABEL] * metadata.num_rows
        groups = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        tables.append(Table(
            split_of(name), name, os.fsencode(path), columns.image, columns.names,
            label_texts(labels, columns.names), names_of(rows, name, metadata.num_rows), groups,
        ))  # fmt: skip
    return tables


def names_of(rows: Any, name: str, count: int) -> list[str]:
    """What the images are called: a column `source`, if that is text and tells them apart; else row."""
    import pyarrow as pa

    if "source" in rows.column_names and pa.types.is_string(rows.schema.field("source").type):
        said = rows["source"].to_pylist()
        if None not in said and len(set(said)) == count:
            return said
    return [f"{name}:{row}" for row in range(count)]


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
        split = SPLITS.get(part.lower(), part) or split_of(str(rows.split or ""))
        columns = columns_of(source, rows.features.arrow_schema, part or "dataset")
        labels = rows.with_format("arrow")[columns.label] if columns.label else None
        texts = label_texts(labels.to_pylist() if labels else [NO_LABEL] * len(rows), columns.names)
        sources = [f"{part or split}:{row}" for row in range(len(rows))]
        tables.append(Table(
            split, part or split, part.encode(), columns.image, columns.names, texts, sources, [len(rows)]
        ))  # fmt: skip
    return tables


class Columns(NamedTuple):
    """What is where in a table."""

    image: str
    label: str | None
    names: tuple[str, ...]  # of the labels, if it says them


def columns_of(source: Source, schema: Any, name: str) -> Columns:
    """As the options say, or what `datasets` noted in the table, or the columns' names. Raises UserError."""
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
            f"{source.url}: {name} has {wanted}, but {', '.join(schema.names)}: give `image_column`"
        )
    classes = [column for column, kind in kinds.items() if kind == "ClassLabel"]
    usual = [column for column in (*LABEL_COLUMNS, *classes) if column in schema.names]
    label = source.label_column or next(iter(usual), None)
    if label and label not in schema.names:
        raise UserError(f"{source.url}: {name} has no column {label}, but {', '.join(schema.names)}")
    return Columns(image, label, tuple(said.get(label, {}).get("names") or ()))


def label_texts(labels: list[Any], names: tuple[str, ...]) -> list[str]:
    """Labels as text: by their names where they are numbers of them. Empty for null, NaN, and the hub's −1.

    Raises UserError for a label that is several.
    """

    def text(label: Any) -> str:
        nothing = label is None or (isinstance(label, float) and math.isnan(label))
        if nothing or (names and label == -1):
            return ""
        if isinstance(label, list | dict):
            raise UserError(f"a label is {str(label)[:60]}, not one name or number: give `label_column`")
        if isinstance(label, bytes):
            return label.decode("utf-8", "replace")
        return names[label] if names and isinstance(label, int) and 0 <= label < len(names) else str(label)

    return [text(label) for label in labels]


def parquet_row(url: str, picture: ImageRef) -> bytes:
    """The bytes of an image in a Parquet file. Neighbours come from the same row group, read once."""
    images = _images_of(url, picture.path, picture.group, picture.detail, os.getpid())
    return image_bytes(images[picture.at].as_py())


# Each process opens files of its own: a file that was open before a fork has one position for both.


@lru_cache(1)
def _images_of(url: str, path: bytes, group: int, column: str, process: int) -> Any:
    return _parquet(url, path, process).read_row_group(group, [column])[column]


@lru_cache(4)
def _parquet(url: str, path: bytes, process: int) -> Any:
    import pyarrow.parquet as pq

    return pq.ParquetFile(filesystem(url)[0].open(os.fsdecode(path), "rb"))


def datasets_row(url: str, picture: ImageRef) -> bytes:
    """The bytes of an image in a `datasets` folder."""
    row = _datasets_part(url, picture.path.decode(), os.getpid())[picture.at]
    return image_bytes(row[picture.detail][0].as_py())


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
