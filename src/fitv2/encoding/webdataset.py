"""Images in tar archives, as WebDataset lays them out; read in place."""

import json
import os
import tarfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import IO

from fitv2.data.storage import filesystem, read_range
from fitv2.encoding.sources import (
    BROKEN,
    NO_LABEL,
    SPLITS,
    ImageRef,
    Source,
    is_hidden,
    is_image_name,
    readable,
    split_of,
)


@dataclass
class Sample:
    """Members of one name."""

    pictures: list[tarfile.TarInfo] = field(default_factory=list)
    label: str | None = None


def in_tars(source: Source) -> Iterator[ImageRef]:
    """WebDataset: members that share a name up to its first dot are one image and what is said of it.

    The label is that of NAME.cls, of "label" in NAME.json, or the member's folder. An archive that
    breaks off gives what it holds before, and an image that is BROKEN.
    """
    system, _ = filesystem(source.url)
    for path in sorted(source.files):
        place = (split_of(source.name(path)), readable(source.name(path)), os.fsencode(path))
        with system.open(path, "rb") as file:
            yield from _pictures(file, *place)


def _pictures(file: IO[bytes], split: str, name: str, path: bytes) -> Iterator[ImageRef]:
    samples: dict[str, Sample] = defaultdict(Sample)  # by name up to the first dot
    files: dict[str, tarfile.TarInfo] = {}
    broken = None
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                if member.isfile():
                    files[member.name] = member
                elif member.islnk() and member.linkname in files:  # another name of a file before it
                    original = files[member.linkname]
                    member.offset_data, member.size = original.offset_data, original.size
                else:
                    continue
                _add(tar, member, samples)
            file.seek(tar.offset)  # tarfile takes a damaged header for the end
            if file.read(512) != bytes(512):
                raise tarfile.ReadError("it breaks off")
    except (tarfile.TarError, EOFError) as error:
        broken = ImageRef(split, NO_LABEL, name, path, BROKEN, detail=str(error))
    for sample in samples.values():
        yield from _labelled(sample, split, name, path)
    if broken:
        yield broken


def _add(tar: tarfile.TarFile, member: tarfile.TarInfo, samples: dict[str, Sample]) -> None:
    """A member to its sample."""
    if is_hidden(member.name):
        return
    folder, _, base = member.name.rpartition("/")
    stem, _, ending = base.partition(".")
    if ending.lower() in ("cls", "json"):
        sample = samples[f"{folder}/{stem}"]
        sample.label = _stated_label(tar, member, ending.lower()) or sample.label
    elif is_image_name(base):
        samples[f"{folder}/{stem}"].pictures.append(member)


def _labelled(sample: Sample, split: str, name: str, path: bytes) -> Iterator[ImageRef]:
    """The images of a sample: a.jpg rather than a.mask.png, if there are both."""
    plain = [m for m in sample.pictures if m.name.rpartition("/")[2].count(".") < 2]
    for member in plain or sample.pictures:
        *above, folder = member.name.removeprefix("./").split("/")[:-1] or [""]
        inside = SPLITS.get(above[0].lower(), split) if above else split
        source = f"{name}/{readable(member.name)}"
        stated = sample.label or readable(folder) or NO_LABEL
        yield ImageRef(inside, stated, source, path, member.offset_data, member.size)


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
    return str(label) if isinstance(label, str | int) else None


def tar_member(url: str, picture: ImageRef) -> bytes:
    """The bytes of an image in an archive."""
    end = picture.at + picture.size
    return read_range(filesystem(url)[0], os.fsdecode(picture.path), picture.at, end)
