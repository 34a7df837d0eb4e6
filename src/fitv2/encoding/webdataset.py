"""Images in tar archives, as WebDataset lays them out; read in place."""

import json
import os
import posixpath
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import IO, Any, NamedTuple

from fitv2.data.storage import filesystem, read_range
from fitv2.encoding.folders import MOST_BYTES, NOTHING_SAID, masks_of
from fitv2.encoding.images import UnusableImage
from fitv2.encoding.parquet import label_texts
from fitv2.encoding.rules import (
    Folders,
    about_others,
    labels_of_archives,
    labels_of_folders,
    pictures_of_sample,
)
from fitv2.encoding.sources import (
    BROKEN,
    CAPTION_COLUMNS,
    HEAD_BYTES,
    UNUSED,
    ImageRef,
    Listing,
    Source,
    is_hidden,
    is_image_name,
    no_image,
    others_of,
    readable,
    split_of,
    starts_as_image,
    what_it_is,
)
from fitv2.errors import UserError, in_one_line
from fitv2.text_encoder import caption_of

MOST_TEXT = 1 << 20  # bytes of a label's file
MOST_LABEL = 1_000  # letters of a label
MOST_NAME = 4_096  # letters of a member's name
MOST_HEADER = 1 << 20  # bytes of a header: what it says of one member


class Member(NamedTuple):
    """A file in an archive."""

    name: str
    at: int
    size: int


class Headers:
    """A file of which tarfile reads headers alone: one of gigabytes would be read whole."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.seek, self.tell = file, file.seek, file.tell

    def read(self, size: int = -1) -> bytes:
        """Some bytes. Raises ReadError for more than any header has."""
        if not 0 <= size <= MOST_HEADER:
            raise tarfile.ReadError("a header in it is too long")
        return self.file.read(size)


@dataclass
class Sample:
    """Members of one name."""

    pictures: list[Member] = field(default_factory=list)
    labels: dict[str, str] = field(default_factory=dict)  # as members say them, by all but their endings
    captions: dict[str, str] = field(default_factory=dict)  # the same

    def said_of(self, picture: Member, said: dict[str, str]) -> str:
        """What is said of one of its pictures: of a.v1.jpg in a.v1.cls, in a.v1.jpg.cls, or in a.cls."""
        base = posixpath.basename(picture.name)
        told = (said.get(key) for key in (base.rpartition(".")[0], base, base.partition(".")[0]))
        return next((text for text in told if text), "")


@dataclass
class Archive:
    """What an archive holds."""

    name: str
    path: bytes
    samples: dict[str, Sample] = field(default_factory=dict)  # by name up to the first dot
    masks: dict[str, Member] = field(default_factory=dict)  # by the name of the picture that each is of
    others: list[tuple[str, str]] = field(default_factory=list)  # members that are not used, and why
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
    that is BROKEN; images beside the picture of a sample are UNUSED, but for its mask. Raises UserError when
    folders can mean two things, and where masks were asked for and there are none.
    """
    system, _ = filesystem(source.url)
    archives = []
    for path in sorted(source.files):
        archive = Archive(readable(source.name(path)), os.fsencode(path))
        with system.open(path, "rb") as file:
            read_archive(archive, file)
        archives.append(archive)
    for archive in archives:
        set_masks_apart(archive, source.mask_column)
    if source.mask_column and not any(archive.masks for archive in archives):
        raise UserError(f"{source.url} has no mask of any image for `mask_column` {source.mask_column}")
    stated = any(sample.labels for archive in archives for sample in archive.samples.values())
    folders = Folders(
        source.url, (_above(m) for a in archives for s in a.samples.values() for m in s.pictures)
    )
    names = [archive.name for archive in archives]
    named = None
    if not stated and not folders.labelled:
        named = labels_of_archives(names) or labels_of_folders(source.url, names)
    origin = "NAME.cls and NAME.json" if stated else "the names of the archives" if named else "folder names"
    others = others_of((f"{a.name}/{name}", reason) for a in archives for name, reason in a.others)
    images = [
        image
        for number, archive in enumerate(archives)
        for image in _images(archive, folders, stated, named[number] if named else None)
    ]
    return Listing((), images, origin, others)


def _above(member: Member) -> list[str]:
    parts = readable(posixpath.normpath(member.name)).split("/")[:-1]
    return [part for part in parts if part not in ("", "..")]


def read_archive(archive: Archive, file: IO[bytes]) -> None:
    """List an archive. What is wrong with it is noted: whoever made it may have meant harm."""
    files: dict[str, Member] = {}
    tars = 0
    try:
        if what := what_it_is(file.read(HEAD_BYTES)):
            raise tarfile.ReadError(f"it is {what}")
        file.seek(0)
        headers: Any = Headers(file)  # all of a file that tarfile asks for
        with tarfile.open(fileobj=headers, mode="r:") as tar:
            for info in tar:
                if len(info.name) > MOST_NAME:
                    raise tarfile.ReadError("a name in it has no end")
                if info.isfile():
                    files[info.name] = Member(info.name, info.offset_data, info.size)
                elif info.islnk() and info.linkname in files:  # another name of a file before it
                    files[info.name] = files[info.linkname]._replace(name=info.name)
                elif info.isdir():
                    continue
                else:
                    archive.others.append((info.name, "a link or a device in an archive"))
                    continue
                if info.size < 0 or info.issparse():
                    raise tarfile.ReadError("a file in it has no size")
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
    stem, _, ending = posixpath.basename(member.name).rpartition(".")
    if stem and ending.lower() in ("cls", "json", "txt"):
        _read_said(file, member, ending.lower(), stem, archive.of(member.name))
    elif is_image_name(member.name) and (stem or _starts_as_image(file, member)):
        archive.of(member.name).pictures.append(member)
    else:
        archive.others.append((member.name, no_image(member.name)))


def set_masks_apart(archive: Archive, column: str | None) -> None:
    """Find the masks of an archive's pictures, which are no pictures themselves then.

    That of a.jpg is named as in a folder of images, such as a.mask.png or masks/a.png; a.mask.png is also
    that of a.image.png, of the same sample.
    """
    if not column:
        return
    samples = archive.samples.values()
    members = {member.name: member for sample in samples for member in sample.pictures}
    named = masks_of(members, NOTHING_SAID, column)
    for sample in samples:
        whole = [m.name for m in sample.pictures if _parts(m)[:-1] == [column.casefold()]]
        for member in sample.pictures if whole else ():
            if member.name not in whole:
                named.setdefault(member.name, whole[0])
    archive.masks = {name: members[mask] for name, mask in named.items() if mask in members}
    apart = set(named.values())
    for sample in samples:
        sample.pictures = [member for member in sample.pictures if member.name not in apart]


def _parts(member: Member) -> list[str]:
    """What follows the name of its sample: mask and png of a.mask.png."""
    return posixpath.basename(member.name).casefold().split(".")[1:]


def _starts_as_image(file: IO[bytes], member: Member) -> bool:
    file.seek(member.at)
    return starts_as_image(file.read(min(HEAD_BYTES, member.size)))


def _read_said(file: IO[bytes], member: Member, ending: str, stem: str, sample: Sample) -> None:
    """What a member says of its sample; nothing, if that cannot be read."""
    if member.size > MOST_TEXT:
        return
    file.seek(member.at)
    text = file.read(member.size).decode("utf-8", "replace").strip("\ufeff \t\r\n\0")
    label: Any
    if ending == "cls":
        label, caption = text, ""
    elif ending == "txt":
        label, caption = None, caption_of(text)
    else:
        try:
            said = json.loads(text)
        except (ValueError, RecursionError):
            return
        if not isinstance(said, dict):
            return
        label = said.get("label")
        captions = (caption_of(said.get(column)) for column in CAPTION_COLUMNS)
        caption = next(filter(None, captions), "")
    if isinstance(label, str | int | float) and not isinstance(label, bool):
        (label,) = label_texts([label], ())
        if 0 < len(label) <= MOST_LABEL and "\n" not in label:
            sample.labels[stem] = label
    if caption:
        sample.captions[stem] = sample.captions.get(stem) or caption


def _images(archive: Archive, folders: Folders, stated: bool, named: str | None) -> Iterator[ImageRef]:
    """The images of an archive. `stated`: labels are said by members; `named`: the archive's own label."""
    by_name = split_of(archive.name)
    about = about_others(m.name for sample in archive.samples.values() for m in sample.pictures)
    for sample in archive.samples.values():
        _, reasons = pictures_of_sample([member.name for member in sample.pictures])
        for number, member in enumerate(sample.pictures):
            place = folders.place(_above(member))
            label = named if named is not None else place.label
            reason = reasons.get(number) or about.get(member.name) or place.unused
            source = f"{archive.name}/{readable(member.name).removeprefix('./')}"
            ref = ImageRef(
                place.split or by_name, sample.said_of(member, sample.labels) if stated else label, source,
                archive.path, member.at, member.size, caption=sample.said_of(member, sample.captions),
                mask=_place_of(archive.masks.get(member.name)),
            )  # fmt: skip
            yield ref._replace(at=UNUSED, detail=reason) if reason else ref
    if archive.broken:
        yield ImageRef(by_name, "", archive.name, archive.path, BROKEN, detail=archive.broken)


def _place_of(mask: Member | None) -> bytes:
    return b"%d %d" % (mask.at, mask.size) if mask else b""


def mask_in_tar(picture: ImageRef) -> ImageRef:
    """The mask of an image in an archive: other bytes of it."""
    at, size = map(int, picture.mask.split())
    return picture._replace(at=at, size=size)


def tar_member(url: str, picture: ImageRef) -> bytes:
    """The bytes of an image in an archive."""
    system, path = filesystem(url)[0], os.fsdecode(picture.path)
    if picture.size > MOST_BYTES:
        raise UnusableImage(f"its file has {picture.size >> 20} MB; at most {MOST_BYTES >> 20} are read")
    return read_range(system, path, picture.at, picture.at + picture.size)
