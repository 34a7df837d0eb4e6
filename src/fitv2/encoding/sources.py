"""What lies at a path or URL: the files of a collection of images, and their names."""

import hashlib
import os
import posixpath
import re
import stat
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from fitv2.data.storage import is_local
from fitv2.encoding.images import UnusableImage

# Endings of images, also of such as cannot be read: those are to be missed.
IMAGES = frozenset([
    ".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".jp2", ".webp", ".avif", ".bmp", ".dib",
    ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".tga", ".ico", ".pcx", ".sgi", ".qoi",
    ".psd", ".dds", ".svg", ".svgz", ".eps", ".heic", ".heif", ".jxl", ".xcf", ".dng", ".cr2", ".nef", ".arw",
])  # fmt: skip
SPLITS = {
    "train": "train", "training": "train",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
    "eval": "validation", "evaluation": "validation", "holdout": "validation", "heldout": "validation",
    "test": "test", "testing": "test",
}  # fmt: skip
# Folders and files that systems make for themselves.
SYSTEM = frozenset([
    "@eadir", "__macosx", "#recycle", "$recycle.bin", "lost+found", "system volume information",
    "thumbs.db", "ehthumbs.db", "desktop.ini",
])  # fmt: skip
CAPTION_COLUMNS = ("caption", "captions", "text", "prompt", "description")
WORDS = re.compile(r"[-_.\s]+")  # what lies between the words of a name
DIGITS = "0123456789"
SAYS_NOTHING = frozenset(["", "data", "image", "images", "img", "imgs", "photos", "pictures", "set", "split"])
BEGINNINGS = (
    b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"RIFF", b"BM", b"II*\0", b"MM\0*", b"P1\n", b"P2\n", b"P3\n",
    b"P4\n", b"P5\n", b"P6\n", b"8BPS", b"qoif", b"\0\0\1\0", b"DDS ", b"\1\xda", b"\xff\x4f\xff\x51",
)  # fmt: skip
LABEL_COLUMNS = ("label", "labels", "class", "cls", "fine_label", "category", "target")
NO_LABEL = "image"
WHOLE, BROKEN, UNUSED = -1, -2, -3  # places in a file: all of it, none of it, or what is not to be read


class Listing(NamedTuple):
    """What a source holds."""

    labels: tuple[str, ...]  # where it says them, in their order
    images: Iterable["ImageRef"]
    origin: str = ""  # of the labels, in words
    others: Sequence[dict[str, Any]] = ()  # files that are no images, as `others_of` counts them


class ImageRef(NamedTuple):
    """One image of a source, not yet read."""

    split: str
    label: str  # empty for none where others have one: such an image is not used
    source: str  # its name, as a person would look for it
    path: bytes  # of the file that holds it, as the operating system has it
    at: int  # its first byte or its row there
    size: int = 0  # bytes
    detail: str = ""  # the column of a table; what is wrong with an archive; why it is not to be read
    group: int = 0  # of rows of a Parquet file; `at` counts in it
    caption: str = ""  # empty for none
    mask: bytes = b""  # the file, or the column of a table, that says what of it is learned; empty for none


@dataclass(frozen=True)
class Source:
    """The files of a source, of one kind."""

    url: str
    kind: str
    files: dict[str, int]  # path in its file system → bytes
    root: str
    image_column: str | None = None
    label_column: str | None = None
    caption_column: str | None = None
    mask_column: str | None = None
    split: str | None = None  # that all images are to be of
    outside: tuple[str, ...] = ()  # links that lead out of it, which are not followed

    @property
    def fingerprint(self) -> str:
        """Names and sizes of all files in a few letters, to tell when a source has changed."""
        digest = hashlib.sha256()
        for path in sorted(self.files):
            digest.update(os.fsencode(f"{self.name(path)}\0{self.files[path]}\0"))
        return f"{len(self.files)} files, {sum(self.files.values())} bytes, {digest.hexdigest()[:16]}"

    def name(self, path: str) -> str:
        """A file's name within the source; the folder's for a source of one file."""
        return posixpath.relpath(path, self.root)


def files_below(system: Any, path: str, outside: list[str] | None = None) -> Iterator[tuple[str, int]]:
    """All files below a folder, or that a pattern or a path names, but hidden ones; and their sizes.

    On this machine's disks: whole files alone, no pipes and devices. With `outside` no link that leads
    out of the folder is followed; it is put there.
    """
    local = is_local(system)
    root = root_of(system, path)
    inside = os.path.realpath(root) if local and outside is not None else None
    if local and os.path.isdir(path):  # noqa: PTH112 (a path may be no text)
        yield from _local_files(path, inside, outside)
        return
    if "*" in path:
        found = system.glob(path.replace("[", "[[]"), detail=True)  # * and ? alone have a meaning
    elif system.isfile(path):
        found, inside = {path: system.info(path)}, None  # whoever names a link means what it leads to
    else:
        found = system.find(path, detail=True) if system.isdir(path) else {}
    for name, info in sorted(found.items()):
        if info["type"] == "directory" or is_hidden(
            posixpath.relpath(name, path if "*" not in path else root)
        ):
            continue
        if local and not stat.S_ISREG(os.stat(name).st_mode):  # noqa: PTH116
            continue
        if inside is not None and outside is not None and not _lies_in(name, inside):
            outside.append(name)
            continue
        yield name, int(info["size"] or 0)


def root_of(system: Any, path: str) -> str:
    """The folder that a path or a pattern is of."""
    while "*" in path:
        path = posixpath.dirname(path)
    return posixpath.dirname(path) if system.isfile(path) else path


def _lies_in(path: str, inside: str) -> bool:
    real = os.path.realpath(path)
    return real == inside or real.startswith(inside.rstrip("/") + "/")


def _local_files(
    folder: str,
    inside: str | None,
    outside: list[str] | None,
    above: frozenset[tuple[int, int]] = frozenset(),
) -> Iterator[tuple[str, int]]:
    """All files below a folder of this machine and their sizes, as `files_below`.

    Follows links to folders, but not to one that it is in.
    """
    status = os.stat(folder)  # noqa: PTH116 (here and below a path may be no text)
    here = (status.st_dev, status.st_ino)
    if here in above:
        return
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if is_hidden(entry.name):
                continue
            is_folder, is_file = entry.is_dir(), entry.is_file()  # no pipe or socket, no broken link
            leads_out = inside is not None and entry.is_symlink() and not _lies_in(entry.path, inside)
            if leads_out and outside is not None and (is_folder or is_file):
                outside.append(entry.path)
            elif is_folder:
                yield from _local_files(entry.path, inside, outside, above | {here})
            elif is_file:
                yield entry.path, entry.stat().st_size


def is_hidden(name: str) -> bool:
    """Whether a path has a part that starts with a dot, or that a system made for itself."""
    parts = [part for part in name.split("/") if part not in (".", "..")]
    return any(part.startswith(".") or part.lower() in SYSTEM for part in parts)


def read_whole(path: str, within: str | None = None, most: int | None = None) -> bytes:
    """The content of a file of this machine: a whole file, no pipe or device, and of at most so many bytes.

    `within` names the folder that it has to lie in, links followed. Raises UnusableImage with the reason.
    """
    if within is not None and not _lies_in(path, os.path.realpath(within)):
        raise UnusableImage("it lies outside the folder of the collection, where nothing is read")
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe would wait for its writer
    with open(descriptor, "rb") as file:  # noqa: PTH123
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise UnusableImage("it is a pipe, a device or a folder, not a file")
        if most is not None and status.st_size > most:
            raise UnusableImage(f"its file has {status.st_size >> 20} MB; at most {most >> 20} are read")
        return file.read()


def head_of(path: str) -> bytes:
    """The first bytes of a file of this machine; none if it cannot be read."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return b""
    with open(descriptor, "rb") as file:  # noqa: PTH123
        return file.read(HEAD_BYTES) if stat.S_ISREG(os.fstat(descriptor).st_mode) else b""


def is_image_name(name: str) -> bool:
    """Whether a file may be an image by its name: one without an ending may be any."""
    suffix = posixpath.splitext(name)[1].lower()
    return not suffix or suffix in IMAGES


def readable(name: str) -> str:
    """A file name as text. One that is not UTF-8 would fail only when it is written, at the very end."""
    return os.fsencode(name).decode("utf-8", "replace")


def split_of(name: str) -> str:
    """The split that a file's name or its folder's tells: data/train-00000.parquet, val/0.tar; else train."""
    for part in reversed(name.lower().split("/")):
        for word in WORDS.split(part):
            if word.rstrip(DIGITS) in SPLITS:
                return SPLITS[word.rstrip(DIGITS)]
    return "train"


def split_of_folder(name: str) -> str | None:
    """The split that a folder is named by and by nothing else: val, train2017, test_images, Trainset."""
    words = [word.rstrip(DIGITS) for word in WORDS.split(name.lower())]
    telling = [word.removesuffix("set") for word in words if word not in SAYS_NOTHING]
    return SPLITS.get(telling[0]) if len(telling) == 1 else None


def starts_as_image(head: bytes) -> bool:
    """Whether a file without an ending is an image, by its first bytes."""
    return head.startswith(BEGINNINGS) or head[4:8] in (b"ftyp", b"jP  ")


def others_of(reasons: Iterable[tuple[str, str]]) -> list[dict[str, Any]]:
    """Files that are not used, as (name, reason), counted by their reasons, with one of each."""
    alike: dict[str, list[str]] = defaultdict(list)
    for name, reason in reasons:
        alike[reason].append(name)
    return [
        {"source": readable(min(names)), "reason": reason, "files_like_it": len(names)}
        for reason, names in sorted(alike.items())
    ]


def no_image(name: str) -> str:
    """Why a file is not used that is no image by its name."""
    ending = posixpath.splitext(name)[1].lower()
    return f"no image by its name, which ends in {ending}" if ending else "no image by its first bytes"


HEAD_BYTES = 512


def what_it_is(head: bytes) -> str | None:
    """What a file is that is not what its name says, by its first bytes; None if they tell nothing."""
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the file itself: run git lfs pull"
    if head.startswith(b"\x1f\x8b"):
        return "compressed by gzip under another name: decompress it"
    if (
        head.lstrip(b"\xef\xbb\xbf \t\r\n")[:14]
        .lower()
        .startswith((b"<!doctype html", b"<html", b"<head", b"<body"))
    ):
        return "a page of HTML, perhaps what a server said in place of the file"
    if head.startswith((b"PK\x03\x04", b"7z\xbc\xaf", b"Rar!", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")):
        return "a compressed archive: unpack it"
    return None
