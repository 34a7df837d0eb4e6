"""Images in folders that are named by their label, or beside a table that says it."""

import csv
import io
import json
import os
import posixpath
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any
from unicodedata import normalize

from fitv2.data.storage import filesystem, is_local
from fitv2.encoding.parquet import label_texts
from fitv2.encoding.rules import Folders, about_others
from fitv2.encoding.sources import (
    BROKEN,
    CAPTION_COLUMNS,
    LABEL_COLUMNS,
    UNUSED,
    WHOLE,
    ImageRef,
    Listing,
    Source,
    head_of,
    is_image_name,
    no_image,
    others_of,
    read_whole,
    readable,
    starts_as_image,
)
from fitv2.errors import UserError, reading
from fitv2.text_encoder import caption_of

METADATA = ("metadata.csv", "metadata.jsonl")
BESIDE = "_file_name"  # ends the name of a column of other images, as the library `datasets` has it
MOST_BYTES = 512 << 20  # of a file
MOST_METADATA = 1 << 30
MOST_CAPTION = 1 << 20


@dataclass(frozen=True)
class Said:
    """What metadata files say, by the name of an image."""

    labels: dict[str, str]
    captions: dict[str, str]
    masks: dict[str, str]  # the name of each one's
    others: set[str]  # images that are about others: those of all columns such as mask_file_name
    of_labels: bool  # whether any has a column of labels


NOTHING_SAID = Said({}, {}, {}, set(), of_labels=False)


def list_folders(source: Source) -> Listing:
    """The images of a folder and where their labels are from; it has no list of labels."""
    said = read_metadata(source)
    images = image_files(source)
    read = {*images, *map(caption_file, images)}
    used = METADATA if said.of_labels or said.captions or said.others else ()
    others = [
        (source.name(path), no_image(path))
        for path in source.files
        if path not in read and posixpath.basename(path) not in used
    ]
    origin = "metadata" if said.of_labels else "folder names"
    return Listing((), in_folders(source, said), origin, others_of(others))


def image_files(source: Source) -> list[str]:
    """The files that are images by their names; those without an ending by their first bytes.

    Of a store elsewhere those without an ending are images if no other file is.
    """
    system, _ = filesystem(source.url)
    named = [path for path in source.files if is_image_name(path)]
    with_ending = [path for path in named if posixpath.splitext(path)[1]]
    if not is_local(system):  # a request for each would take too long
        return with_ending or named
    return [path for path in named if posixpath.splitext(path)[1] or starts_as_image(head_of(path))]


def in_folders(source: Source, said: Said | None = None) -> Iterator[ImageRef]:
    """The images of a folder in the order of their names, with their labels as `said`, or by their folders.

    The caption of a.png is that of a.txt beside it, or as `said`. Raises UserError when the folders can mean
    two things.
    """
    said = said or NOTHING_SAID
    names = {path: readable(source.name(path)) for path in image_files(source)}
    above = {path: tuple(name.split("/")[:-1]) for path, name in names.items()}
    about = about_others(names.values())
    masks = masks_of(names.values(), said, source.mask_column)
    if source.mask_column and not masks:
        raise UserError(f"{source.url} has no mask of any image for `mask_column` {source.mask_column}")
    paths = {name: os.fsencode(path) for path, name in names.items()}
    others = {*masks.values(), *(name for name in paths if normalize("NFC", name) in said.others)}
    names = {path: name for path, name in names.items() if name not in others}
    folders = Folders(source.url, (above[path] for path in names))
    for path in sorted(names, key=lambda path: names[path].split("/")):
        name, place = names[path], folders.place(above[path])
        unused, key = place.unused or about.get(name, ""), normalize("NFC", name)
        label = said.labels.get(key, "") if said.of_labels else place.label
        at, mask = UNUSED if unused else WHOLE, masks.get(name, "")
        if mask and mask not in paths:
            at, unused = BROKEN, f"its mask {mask} is missing"
        beside = caption_file(path)
        caption = said.captions.get(key, "")
        if beside in source.files:
            caption = caption_of(read_file_at(source.url, beside, MOST_CAPTION))
        yield ImageRef(
            place.split or "train",
            label,
            name,
            os.fsencode(path),
            at,
            source.files[path],
            unused,
            caption=caption,
            mask=paths.get(mask, b""),
        )


def masks_of(names: Iterable[str], said: Said, column: str | None) -> dict[str, str]:
    """The name of the mask of each image that has one: as `said`, or of a file that is named so.

    Names are compared as NFC, and those of files without regard to capitals.
    """
    if not column:
        return {}
    names = [*names]
    spelled = {normalize("NFC", name): name for name in names}
    stems = {stem_of(name).casefold(): name for name in names}
    found = {}
    for name in names:
        named = said.masks.get(normalize("NFC", name))
        beside = (stems.get(each.casefold()) for each in mask_names(stem_of(name), column))
        mask = spelled.get(named, named) if named else next(filter(None, beside), None)
        if mask and mask != name:
            found[name] = mask
    return found


def stem_of(name: str) -> str:
    """The name of a file without its ending, as NFC."""
    return posixpath.splitext(normalize("NFC", name))[0]


def mask_names(stem: str, column: str) -> Iterator[str]:
    """How the mask of an image may be called: a.mask, a_mask, a-mask; mask/a or masks/a for a or images/a."""
    yield from (f"{stem}{join}{column}" for join in "._-")
    parts = stem.split("/")
    for folder in (column, f"{column}s"):
        for i in range(len(parts)):
            yield "/".join([*parts[:i], folder, *parts[i:]])
            if i < len(parts) - 1:
                yield "/".join([*parts[:i], folder, *parts[i + 1 :]])


def caption_file(path: str) -> str:
    """Where the caption of an image may lie."""
    return f"{posixpath.splitext(path)[0]}.txt"


def read_metadata(source: Source) -> Said:
    """What `metadata.csv` or `metadata.jsonl` beside the images say of them.

    A column `file_name` names the image from there, as the library `datasets` has it. Raises UserError for
    one that cannot be read, and when columns that were asked for are in none.
    """
    said = Said({}, {}, {}, set(), of_labels=False)
    for path in source.files:
        if posixpath.basename(path) not in METADATA:
            continue
        name = readable(source.name(path))
        with reading(f"{source.url}: {name}"):
            rows = metadata_rows(name, read_file_at(source.url, path, MOST_METADATA))
        columns = list(dict.fromkeys(column for row in rows for column in row))
        label = chosen_column(source, name, columns, source.label_column, LABEL_COLUMNS)
        caption = chosen_column(source, name, columns, source.caption_column, CAPTION_COLUMNS)
        if "file_name" not in columns:
            continue
        places = [beside_metadata(name, str(row.get("file_name") or "")) for row in rows]
        if label:
            said = replace(said, of_labels=True)
            for place, text in zip(places, texts_of(name, label, rows), strict=True):
                one = said.labels.get(place, text) == text
                said.labels[place] = text if one else ""  # two labels are none
        for column in (column for column in columns if column.endswith(BESIDE)):
            given = [beside_metadata(name, row.get(column)) for row in rows]
            said.others.update(filter(None, given))
            if column == f"{source.mask_column}{BESIDE}":
                note_masks(name, said.masks, zip(places, given, strict=True))
        if caption:
            said.captions.update(
                (p, caption_of(row.get(caption))) for p, row in zip(places, rows, strict=True)
            )
    if source.label_column and not said.of_labels:
        raise UserError(f"{source.url} has no metadata.csv or metadata.jsonl for `label_column`")
    return said


def beside_metadata(name: str, value: Any) -> str:
    """The name, as NFC, of a file that a metadata file names from where it lies; empty for none."""
    if not (isinstance(value, str) and value):
        return ""
    return normalize("NFC", posixpath.normpath(posixpath.join(posixpath.dirname(name), value)))


def note_masks(name: str, masks: dict[str, str], pairs: Iterable[tuple[str, str]]) -> None:
    """Note the masks of images. Raises UserError for an image that has two."""
    for place, mask in pairs:
        if mask and masks.setdefault(place, mask) != mask:
            raise UserError(f"{name} names two masks of {place}")


def chosen_column(
    source: Source, name: str, columns: list[str], wanted: str | None, usual: Sequence[str]
) -> str | None:
    """The column that is wanted, or else a usual one. Raises UserError when the wanted one is not there."""
    if wanted and wanted not in columns:
        raise UserError(f"{source.url}: {name} has no column {wanted}, but {', '.join(sorted(columns))}")
    return wanted or next((column for column in usual if column in columns), None)


def texts_of(name: str, label: str, rows: list[dict[str, Any]]) -> list[str]:
    """The labels of rows as text; empty for those that have several. Raises UserError if all have."""
    held = [row.get(label) for row in rows]
    several = [isinstance(value, list | dict) for value in held]
    if several and all(several):
        raise UserError(f"{name}: column {label} holds lists, not names or numbers: give `label_column`")
    return label_texts([None if many else value for many, value in zip(several, held, strict=True)], ())


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
