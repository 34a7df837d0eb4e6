"""Images in folders that are named by their label, or beside a table that says it."""

import csv
import io
import json
import os
import posixpath
from collections.abc import Iterator
from typing import Any

from fitv2.data.storage import filesystem, is_local
from fitv2.encoding.parquet import label_texts
from fitv2.encoding.rules import Folders
from fitv2.encoding.sources import (
    LABEL_COLUMNS,
    WHOLE,
    ImageRef,
    Listing,
    Source,
    is_image_name,
    read_whole,
    readable,
)
from fitv2.errors import UserError, reading

METADATA = ("metadata.csv", "metadata.jsonl")
MOST_BYTES = 512 << 20  # of a file
MOST_METADATA = 1 << 30


def list_folders(source: Source) -> Listing:
    """The images of a folder and where their labels are from; it has no list of labels."""
    said = metadata_labels(source)
    return Listing((), in_folders(source, said), "metadata" if said is not None else "folder names")


def image_files(source: Source) -> list[str]:
    """The files that are images by their names; those without an ending, if no other is."""
    named = [path for path in source.files if is_image_name(path)]
    with_ending = [path for path in named if posixpath.splitext(path)[1]]
    return with_ending or named


def in_folders(source: Source, said: dict[str, str] | None = None) -> Iterator[ImageRef]:
    """The images of a folder in the order of their names, with their labels as `said`, or by their folders.

    Raises UserError when the folders can mean two things.
    """
    names = {path: readable(source.name(path)) for path in image_files(source)}
    above = {path: tuple(name.split("/")[:-1]) for path, name in names.items()}
    folders = Folders(source.url, above.values())
    for path in sorted(names, key=lambda path: names[path].split("/")):
        place = folders.place(above[path])
        label = place.label if said is None else said.get(names[path], "")
        yield ImageRef(
            place.split or "train", label, names[path], os.fsencode(path), WHOLE, source.files[path]
        )


def metadata_labels(source: Source) -> dict[str, str] | None:
    """Labels by the name of an image, as `metadata.csv` or `metadata.jsonl` beside the images say them.

    A column `file_name` names the image from there, as the library `datasets` has it. None if no such file
    says labels. Raises UserError for one that cannot be read.
    """
    said: dict[str, str] = {}
    found = False
    for path in source.files:
        if posixpath.basename(path) not in METADATA:
            continue
        name = readable(source.name(path))
        with reading(f"{source.url}: {name}"):
            rows = metadata_rows(name, read_file_at(source.url, path, MOST_METADATA))
        columns = {column for row in rows for column in row}
        label = source.label_column or next((c for c in LABEL_COLUMNS if c in columns), None)
        if source.label_column and label not in columns:
            raise UserError(f"{source.url}: {name} has no column {label}, but {', '.join(sorted(columns))}")
        if label is None or "file_name" not in columns:
            continue
        found = True
        texts = label_texts([row.get(label) for row in rows], ())
        for row, text in zip(rows, texts, strict=True):
            place = posixpath.join(posixpath.dirname(name), str(row.get("file_name") or ""))
            said[posixpath.normpath(place)] = text
    if source.label_column and not found:
        raise UserError(f"{source.url} has no metadata.csv or metadata.jsonl for `label_column`")
    return said if found else None


def metadata_rows(name: str, content: bytes) -> list[dict[str, Any]]:
    """The rows of a metadata file. Raises UserError naming a line that is none."""
    text = content.decode("utf-8-sig", "replace")
    if name.endswith(".csv"):
        return list(csv.DictReader(io.StringIO(text, newline="")))
    rows = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            raise UserError(f"line {number} of {name} is no json object")
        rows.append(row)
    return rows


def read_file(url: str, picture: ImageRef) -> bytes:
    """The bytes of an image that is a file of its own."""
    return read_file_at(url, os.fsdecode(picture.path), MOST_BYTES)


def read_file_at(url: str, path: str, most: int) -> bytes:
    """The bytes of a file of a source, wherever it lies."""
    system, _ = filesystem(url)
    return read_whole(path, most=most) if is_local(system) else system.cat_file(path)
