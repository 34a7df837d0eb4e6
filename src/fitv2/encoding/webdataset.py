"""Images in tar archives, as WebDataset lays them out; read in place."""

import json
import os
import posixpath
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import IO, NamedTuple

from fitv2.data.storage import filesystem, read_range
from fitv2.encoding.folders import MOST_BYTES
from fitv2.encoding.images import UnusableImage
from fitv2.encoding.rules import Folders, labels_of_archives, pictures_of_sample
from fitv2.encoding.sources import (
    BROKEN,
    CAPTION_COLUMNS,
    UNUSED,
    ImageRef,
    Listing,
    Source,
    caption_of,
    is_hidden,
    is_image_name,
    readable,
    split_of,
)
from fitv2.errors import in_one_line

MOST_TEXT = 1 << 20  # bytes of a label's file
MOST_NAME = 4_096  # letters of a member's name


class Member(NamedTuple):
    """A file in an archive."""

    name: str
    at: int
    size: int


@dataclass
class Sample:
    """Members of one name."""

    pictures: list[Member] = field(default_factory=list)
    label: str | None = None  # as a member of its own says it
    caption: str = ""


@dataclass
class Archive:
    """What an archive holds."""

    name: str
    path: bytes
    samples: dict[str, Sample] = field(default_factory=dict)  # by name up to the first dot
    broken: str = ""  # what is wrong with it

    def of(self, name: str) -> Sample:
        """The sample that a member belongs to."""
        folder, _, base = name.rpartition("/")
        return self.samples.setdefault(f"{folder}/{base.partition('.')[0]}", Sample())


def in_tars(source: Source) -> Iterator[ImageRef]:
    """The images of `list_tars`."""
    yield from list_tars(source).images


def list_tars(source: Source) -> Listing:
    """WebDataset: members that share a name up to its first dot are one image and what is said of it.

    The label is that of NAME.cls or of "label" in NAME.json; where no image has one, the member's folder, or
    the archive, if each is of a class. An archive that breaks off gives what it holds before, and an image
    that is BROKEN; images beside the picture of a sample are UNUSED. Raises UserError when folders can mean
    two things.
    """
    system, _ = filesystem(source.url)
    archives = []
    for path in sorted(source.files):
        archive = Archive(readable(source.name(path)), os.fsencode(path))
        with system.open(path, "rb") as file:
            read_archive(archive, file)
        archives.append(archive)
    stated = any(sample.label for archive in archives for sample in archive.samples.values())
    folders = Folders(
        source.url, (_above(m) for a in archives for s in a.samples.values() for m in s.pictures)
    )
    names = [archive.name for archive in archives]
    named = None if stated or folders.labelled else labels_of_archives(names)
    origin = "NAME.cls and NAME.json" if stated else "the names of the archives" if named else "folder names"
    images = [
        image
        for number, archive in enumerate(archives)
        for image in _images(archive, folders, stated, named[number] if named else None)
    ]
    return Listing((), images, origin)


def _above(member: Member) -> list[str]:
    return readable(posixpath.normpath(member.name)).lstrip("/").split("/")[:-1]


def read_archive(archive: Archive, file: IO[bytes]) -> None:
    """List an archive. What is wrong with it is noted: whoever made it may have meant harm."""
    files: dict[str, Member] = {}
    tars = 0
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for info in tar:
                if len(info.name) > MOST_NAME:
                    raise tarfile.ReadError("a name in it has no end")
                if info.isfile():
                    files[info.name] = Member(info.name, info.offset_data, info.size)
                elif info.islnk() and info.linkname in files:  # another name of a file before it
                    files[info.name] = files[info.linkname]._replace(name=info.name)
                else:
                    continue
                tars += info.name.lower().endswith((".tar", ".tar.gz", ".tgz"))
                vars(tar)["members"] = []  # else it would keep all that was read
                _add(file, files[info.name], archive)
            file.seek(tar.offset)  # tarfile takes a damaged header for the end
            if file.read(512) != bytes(512):
                raise tarfile.ReadError("it breaks off")
    except Exception as error:
        archive.broken = f"the archive is damaged: {in_one_line(error, 100)}"
    if tars and not any(sample.pictures for sample in archive.samples.values()):
        archive.broken = "it holds archives, not images: unpack it first"


def _add(file: IO[bytes], member: Member, archive: Archive) -> None:
    """A member to its sample."""
    if is_hidden(member.name):
        return
    base = posixpath.basename(member.name)
    ending = base.partition(".")[2].lower()
    if ending in ("cls", "json", "txt"):
        _read_said(file, member, ending, archive.of(member.name))
    elif is_image_name(base) and "." in base:
        archive.of(member.name).pictures.append(member)


def _read_said(file: IO[bytes], member: Member, ending: str, sample: Sample) -> None:
    """What a member says of its sample; nothing, if that cannot be read."""
    if member.size > MOST_TEXT:
        return
    file.seek(member.at)
    text = file.read(member.size).decode("utf-8", "replace").strip("\ufeff \t\r\n\0")
    if ending == "cls":
        sample.label = text or sample.label
    elif ending == "txt":
        sample.caption = caption_of(text) or sample.caption
    else:
        try:
            said = json.loads(text)
        except (ValueError, RecursionError):
            return
        if isinstance(said, dict):
            label = said.get("label")
            if isinstance(label, str | int) and not isinstance(label, bool):
                sample.label = str(label) or sample.label
            captions = (caption_of(said.get(column)) for column in CAPTION_COLUMNS)
            sample.caption = sample.caption or next(filter(None, captions), "")


def _images(archive: Archive, folders: Folders, stated: bool, named: str | None) -> Iterator[ImageRef]:
    """The images of an archive. `stated`: labels are said by members; `named`: the archive's own label."""
    by_name = split_of(archive.name)
    for sample in archive.samples.values():
        used, reasons = pictures_of_sample([member.name for member in sample.pictures])
        for number in sorted([*used, *reasons]):
            member = sample.pictures[number]
            place = folders.place(_above(member))
            label = named or place.label
            source = f"{archive.name}/{readable(member.name).removeprefix('./')}"
            ref = ImageRef(
                place.split or by_name, (sample.label or "") if stated else label, source, archive.path,
                member.at, member.size, caption=sample.caption,
            )  # fmt: skip
            yield ref if number in used else ref._replace(at=UNUSED, detail=reasons[number])
    if archive.broken:
        yield ImageRef(by_name, "", archive.name, archive.path, BROKEN, detail=archive.broken)


def tar_member(url: str, picture: ImageRef) -> bytes:
    """The bytes of an image in an archive."""
    system, path = filesystem(url)[0], os.fsdecode(picture.path)
    if picture.size > MOST_BYTES:
        raise UnusableImage(f"its file has {picture.size >> 20} MB; at most {MOST_BYTES >> 20} are read")
    return read_range(system, path, picture.at, picture.at + picture.size)
