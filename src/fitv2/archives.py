"""Pictures in tar archives, as WebDataset lays them out; read in place."""

import json
import os
import tarfile
from collections.abc import Iterator
from typing import IO

from fitv2.sources import BROKEN, IMAGES, NO_LABEL, Picture, Source, is_hidden, readable, split_of
from fitv2.stores import filesystem


def in_tars(source: Source) -> Iterator[Picture]:
    """WebDataset: members that share a name up to its first dot are one picture and what is said of it.

    The label is that of NAME.cls, of "label" in NAME.json, or the member's folder. An archive that
    breaks off gives what it holds before, and a picture that is BROKEN.
    """
    system, _ = filesystem(source.url)
    for path in sorted(source.files):
        place = (split_of(source.name(path)), readable(source.name(path)), os.fsencode(path))
        with system.open(path, "rb") as file:
            yield from _pictures(file, *place)


def _pictures(file: IO[bytes], split: str, name: str, path: bytes) -> Iterator[Picture]:
    members: list[tarfile.TarInfo] = []
    key, label, broken = None, None, None
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                if not member.isfile() or is_hidden(member.name):
                    continue
                folder, _, base = member.name.rpartition("/")
                stem, _, ending = base.partition(".")
                if (folder, stem) != key:
                    yield from _labelled(members, label, split, name, path)
                    key, label, members = (folder, stem), None, []
                if ending.lower() in ("cls", "json"):
                    label = _stated_label(tar, member, ending.lower()) or label
                elif f".{ending.rpartition('.')[2].lower()}" in IMAGES:
                    members.append(member)
    except (tarfile.TarError, EOFError) as error:
        broken = Picture(split, NO_LABEL, f"{name}: {error}", path, BROKEN)
    yield from _labelled(members, label, split, name, path)
    if broken:
        yield broken


def _labelled(
    members: list[tarfile.TarInfo], label: str | None, split: str, name: str, path: bytes
) -> Iterator[Picture]:
    for member in members:
        folder = member.name.removeprefix("./").rpartition("/")[0].rpartition("/")[2]
        source = f"{name}/{readable(member.name)}"
        yield Picture(
            split, label or readable(folder) or NO_LABEL, source, path, member.offset_data, member.size
        )


def _stated_label(tar: tarfile.TarFile, member: tarfile.TarInfo, ending: str) -> str | None:
    file = tar.extractfile(member)
    text = file.read().decode("utf-8", "replace").strip() if file else ""
    if ending == "cls":
        return text or None
    try:
        said = json.loads(text)
    except json.JSONDecodeError:
        return None
    label = said.get("label") if isinstance(said, dict) else None
    return None if label is None else str(label)


def tar_member(url: str, picture: Picture) -> bytes:
    """The bytes of a picture in an archive."""
    end = picture.at + picture.size
    return filesystem(url)[0].cat_file(os.fsdecode(picture.path), start=picture.at, end=end)
