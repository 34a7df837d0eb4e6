"""Images in tables: Parquet files, and folders that the library `datasets` saved."""

import json
import math
import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple
from unicodedata import normalize

from fitv2.data.storage import filesystem
from fitv2.encoding.rows import unpacked_bytes
from fitv2.encoding.saved import check_saved
from fitv2.encoding.sources import (
    CAPTION_COLUMNS,
    HEAD_BYTES,
    LABEL_COLUMNS,
    NO_LABEL,
    SPLITS,
    ImageRef,
    Listing,
    Source,
    readable,
    split_of,
    what_it_is,
)
from fitv2.errors import UserError, in_one_line, reading
from fitv2.text_encoder import caption_of

IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp", "picture", "pixel_values")
LONGEST_TEXT = 10_000  # bytes of a label or of a name
MOST_CAPTION = 1 << 20
LITTLE = 64 << 20  # bytes, of which nobody minds how they were packed
SUSPICIOUS = 200  # times as large as its file: images are compressed already


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
    label_column: str | None = None
    captions: Sequence[str] = ()  # of each row, where there is such a column
    mask_column: str = ""


def in_tables(tables: list[Table]) -> tuple[tuple[str, ...], Iterator[ImageRef]]:
    """The names of the labels, where the tables say them, and the images."""

    def pictures() -> Iterator[ImageRef]:
        for table in tables:
            places = ((group, at) for group, rows in enumerate(table.groups) for at in range(rows))
            captions = table.captions or [""] * len(table.labels)
            told = zip(table.labels, table.sources, captions, places, strict=True)
            for label, source, caption, (group, at) in told:
                yield ImageRef(
                    table.split, label, source, table.path, at, detail=table.image_column, group=group,
                    caption=caption, mask=table.mask_column.encode(),
                )  # fmt: skip

    return tables[0].names, pictures()


def list_parquet(source: Source) -> Listing:
    """The images of Parquet files."""
    return listing(parquet_tables(source))


def list_datasets(source: Source) -> Listing:
    """The images of a folder that `datasets` saved."""
    return listing(datasets_tables(source))


def listing(tables: list[Table]) -> Listing:
    """The images of tables, and which column their labels are from."""
    tables = agreed(tables)
    columns = sorted({table.label_column for table in tables if table.label_column})
    return Listing(*in_tables(tables), origin=f"column {' and '.join(columns)}" if columns else "no column")


def agreed(tables: list[Table]) -> list[Table]:
    """Tables of one collection: names of classes hold for all, and if one has labels, others lack them."""
    names = next((table.names for table in tables if table.names), ())
    labelled = any(table.label_column for table in tables)

    def with_names(table: Table) -> list[str]:
        if labelled and not table.label_column:
            return [""] * len(table.labels)
        if table.names or not names:
            return table.labels
        numbers = {str(number): name for number, name in enumerate(names)} | {"-1": ""}
        return [numbers.get(label, label) for label in table.labels]

    return [table._replace(names=names, labels=with_names(table)) for table in tables]


def parquet_tables(source: Source) -> list[Table]:
    """The Parquet files of a source, read but for their images. Raises UserError."""
    system, _ = filesystem(source.url)
    tables = []
    for path in sorted(source.files):
        name = readable(source.name(path))
        with reading(f"{source.url}: {name}"), system.open(path, "rb") as file:
            tables.append(parquet_table(source, name, path, file))
    if not any(sum(table.groups) for table in tables):
        raise UserError(f"{source.url} has no rows")
    return tables


def parquet_table(source: Source, name: str, path: str, file: Any) -> Table:
    """One Parquet file, read but for its images. Raises UserError."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    where = f"{source.url}: {name}"
    if what := what_it_is(file.read(HEAD_BYTES)):
        raise UserError(f"{where} is {what}")
    file.seek(0)
    try:
        parquet = pq.ParquetFile(file)
    except (OSError, ValueError) as error:
        raise UserError(f"{where} is not a Parquet file that can be read: {in_one_line(error)}") from error
    columns = columns_of(source, parquet.schema_arrow, name)
    wanted = dict.fromkeys((columns.label, "source", columns.caption))
    texts = [c for c in wanted if c and c in parquet.schema_arrow.names]
    metadata = parquet.metadata
    if metadata.num_rows > source.files[path]:
        raise UserError(
            f"{where} has {metadata.num_rows} rows in {source.files[path]} bytes: those are no images"
        )
    unpacked = unpacked_bytes(metadata)
    if unpacked > LITTLE and unpacked > SUSPICIOUS * source.files[path]:
        raise UserError(f"{where} would unpack to {unpacked >> 20} MB, from {source.files[path]} bytes")
    # As dictionaries: a text that is in every row is held once.
    plain = [text for text in texts if is_text(parquet.schema_arrow.field(text).type)]
    dictionaries = pq.ParquetFile(file, read_dictionary=plain)
    rows = dictionaries.read(texts)
    rows.validate(full=True)
    for text in texts:
        check_texts(where, text, rows[text], MOST_CAPTION if text == columns.caption else LONGEST_TEXT)
    labels = values_of(rows[columns.label]) if columns.label else [NO_LABEL] * metadata.num_rows
    groups = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    rows = pa.table({text: rows[text] for text in texts})
    return Table(
        split_of(name), name, os.fsencode(path), columns.image, columns.names,
        label_texts(labels, columns.names), names_of(rows, name, metadata.num_rows), groups, columns.label,
        [caption_of(text) for text in rows[columns.caption].to_pylist()] if columns.caption else (),
        columns.mask,
    )  # fmt: skip


def names_of(rows: Any, name: str, count: int) -> list[str]:
    """What the images are called: a column `source`, if that is text and tells them apart; else row."""
    import pyarrow as pa

    kind = rows.schema.field("source").type if "source" in rows.column_names else None
    if kind is not None and pa.types.is_string(getattr(kind, "value_type", kind)):
        said = rows["source"].to_pylist()
        if None not in said and len(set(said)) == count:
            return said
    return [f"{name}:{row}" for row in range(count)]


def values_of(column: Any) -> list[Any]:
    """The values of a column; those of a dictionary are held once, however many rows have them."""
    import pyarrow as pa

    values: list[Any] = []
    for chunk in column.chunks:
        if not pa.types.is_dictionary(chunk.type):
            values += chunk.to_pylist()
            continue
        held = chunk.dictionary.to_pylist()
        values += [None if index is None else held[index] for index in chunk.indices.to_pylist()]
    return values


def is_text(kind: Any) -> bool:
    """Whether an Arrow type is that of texts, not of lists of them."""
    import pyarrow as pa

    return any(test(kind) for test in (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary))


def check_texts(where: str, name: str, column: Any, most: int) -> None:
    """UserError for a column with a text of more bytes than any label or caption."""
    import pyarrow as pa
    import pyarrow.compute as pc

    for chunk in column.chunks:
        values = chunk.dictionary if pa.types.is_dictionary(chunk.type) else chunk
        if is_text(values.type):
            longest = pc.max(pc.binary_length(values)).as_py() or 0
            if longest > most:
                raise UserError(f"{where}: column {name} holds a text of {longest} bytes: at most {most}")


def datasets_tables(source: Source) -> list[Table]:
    """The splits of a `datasets` folder, read but for their images. Raises UserError."""
    import datasets

    with reading(source.url):
        check_saved(source)
        loaded = datasets.load_from_disk(source.url)
    parts = loaded if isinstance(loaded, datasets.DatasetDict) else {"": loaded}
    tables = []
    for part, rows in parts.items():
        split = SPLITS.get(part.lower(), part) or split_of(str(rows.split or ""))
        columns = columns_of(source, rows.features.arrow_schema, part or "dataset")
        texts = [NO_LABEL] * len(rows)
        if columns.label:
            with reading(source.url):
                held = rows.with_format("arrow").select_columns(columns.label)[:][columns.label]
                held.validate(full=True)
                check_texts(source.url, columns.label, held, LONGEST_TEXT)
                texts = label_texts(held.to_pylist(), columns.names)
        captions: list[str] = []
        if columns.caption:
            with reading(source.url):
                held = rows.with_format("arrow").select_columns(columns.caption)[:][columns.caption]
                held.validate(full=True)
                check_texts(source.url, columns.caption, held, MOST_CAPTION)
                captions = [caption_of(text) for text in held.to_pylist()]
        sources = [f"{part or split}:{row}" for row in range(len(rows))]
        tables.append(Table(
            split, part or split, part.encode(), columns.image, columns.names, texts, sources, [len(rows)],
            columns.label, captions, columns.mask,
        ))  # fmt: skip
    if not any(sum(table.groups) for table in tables):
        raise UserError(f"{source.url} has no rows")
    return tables


class Columns(NamedTuple):
    """What is where in a table."""

    image: str
    label: str | None
    names: tuple[str, ...]  # of the labels, if it says them
    caption: str | None = None
    mask: str = ""


def columns_of(source: Source, schema: Any, name: str) -> Columns:
    """As the options say, or what `datasets` noted in the table, or the columns' names. Raises UserError."""
    import pyarrow as pa

    said = noted_features(schema)
    kinds = {column: feature.get("_type") for column, feature in said.items() if isinstance(feature, dict)}
    held = [f.name for f in schema if pa.types.is_struct(f.type) or pa.types.is_binary(f.type)
            or pa.types.is_large_binary(f.type)]  # fmt: skip
    held = [column for column in held if column != source.mask_column]
    marked = [column for column, kind in kinds.items() if kind == "Image" and column in held]
    usual = [column for column in IMAGE_COLUMNS if column in held]
    image = source.image_column or next(iter(marked or usual or (held if len(held) == 1 else [])), None)
    if image is None or image not in schema.names:
        wanted = f"no column {image}" if image else "no column of images that could be recognized"
        raise UserError(
            f"{source.url}: {name} has {wanted}, but {', '.join(schema.names)}: give `image_column`"
        )
    classes = [column for column, kind in kinds.items() if kind == "ClassLabel" and column in schema.names]
    usual = [column for column in (*LABEL_COLUMNS, *classes) if column in schema.names]
    label = source.label_column or next(iter(usual), None)
    if label and label not in schema.names:
        raise UserError(f"{source.url}: {name} has no column {label}, but {', '.join(schema.names)}")
    if label and pa.types.is_nested(schema.field(label).type):
        raise UserError(
            f"{source.url}: {name} has lists in its column {label}, not one name or number:"
            " give `label_column`"
        )
    feature = said.get(label or "")
    names = feature.get("names") if isinstance(feature, dict) else None
    if not isinstance(names, list) or not all(isinstance(text, str) for text in names):
        names = []
    for chosen in (source.caption_column, source.mask_column):
        if chosen and chosen not in schema.names:
            raise UserError(f"{source.url}: {name} has no column {chosen}, but {', '.join(schema.names)}")
    usual = [column for column in CAPTION_COLUMNS if column in schema.names and column != label]
    caption = source.caption_column or next(iter(usual), None)
    return Columns(image, label, unique(names), caption, source.mask_column or "")


def noted_features(schema: Any) -> dict[str, Any]:
    """What `datasets` noted of a table's columns; nothing if that cannot be read."""
    try:
        noted = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        features = noted["info"]["features"]
    except (ValueError, RecursionError, KeyError, TypeError, IndexError):
        return {}
    return features if isinstance(features, dict) else {}


def unique(names: Sequence[str]) -> tuple[str, ...]:
    """Names of classes as NFC, no two alike: one that is there again gets its number behind it."""
    seen: dict[str, int] = {}
    made = []
    for number, name in enumerate(normalize("NFC", name) for name in names):
        again = name in seen
        seen[name] = number
        made.append(f"{name} ({number})" if again else name)
    return tuple(made)


def label_texts(labels: list[Any], names: tuple[str, ...]) -> list[str]:
    """Labels as text: by their names where they are numbers of them. Empty for null, NaN, and the hub's −1.

    Raises UserError for a label that is several.
    """

    def text(label: Any) -> str:
        nothing = label is None or (isinstance(label, float) and not math.isfinite(label))
        if nothing or (names and label == -1):
            return ""
        if isinstance(label, list | dict):
            raise UserError(f"a label is {str(label)[:60]}, not one name or number: give `label_column`")
        if isinstance(label, bytes):
            return label.decode("utf-8", "replace")
        if isinstance(label, float) and label == int(label):  # so tables of other programs hold whole numbers
            label = int(label)
        known = names and isinstance(label, int) and not isinstance(label, bool) and 0 <= label < len(names)
        return names[label] if known else str(label)

    return [text(label) for label in labels]
