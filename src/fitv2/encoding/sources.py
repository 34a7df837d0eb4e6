"""What lies at a path or URL: the files of a collection of images, and their names."""

import hashlib
import os
import posixpath
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from fitv2.data.storage import is_local

# Endings of images, also of such as cannot be read: those are to be missed.
IMAGES = frozenset([
    ".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".jp2", ".webp", ".avif", ".bmp", ".dib",
    ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".tga", ".ico", ".pcx", ".sgi", ".qoi",
    ".psd", ".dds", ".svg", ".svgz", ".eps", ".heic", ".heif", ".jxl", ".xcf", ".dng", ".cr2", ".nef", ".arw",
])  # fmt: skip
SPLITS = {
    "train": "train", "training": "train",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
    "test": "test", "testing": "test",
}  # fmt: skip
NO_LABEL = "image"
WHOLE, BROKEN = -1, -2  # places in a file: all of it, or none


class ImageRef(NamedTuple):
    """One image of a source, not yet read."""

    split: str
    label: str  # empty for none where others have one: such an image is not used
    source: str  # its name, as a person would look for it
    path: bytes  # of the file that holds it, as the operating system has it
    at: int  # its first byte or its row there
    size: int = 0  # bytes
    detail: str = ""  # the column of a table; what is wrong with an archive
    group: int = 0  # of rows of a Parquet file; `at` counts in it


@dataclass(frozen=True)
class Source:
    """The files of a source, of one kind."""

    url: str
    kind: str
    files: dict[str, int]  # path in its file system → bytes
    root: str
    image_column: str | None = None
    label_column: str | None = None

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


def files_below(system: Any, path: str) -> Iterator[tuple[str, int]]:
    """All files below a folder, or that a pattern or a path names, but hidden ones; and their sizes."""
    if is_local(system) and os.path.isdir(path):  # noqa: PTH112 (a path may be no text)
        yield from _local_files(path)
        return
    if "*" in path:
        found = system.glob(path.replace("[", "[[]"), detail=True)  # * and ? alone have a meaning
    elif system.isfile(path):
        found = {path: system.info(path)}
    else:
        found = system.find(path, detail=True) if system.isdir(path) else {}
    for name, info in sorted(found.items()):
        if info["type"] != "directory" and not is_hidden(posixpath.relpath(name, path)):
            yield name, int(info["size"] or 0)


def _local_files(folder: str, above: frozenset[tuple[int, int]] = frozenset()) -> Iterator[tuple[str, int]]:
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
            if entry.is_dir():
                yield from _local_files(entry.path, above | {here})
            elif entry.is_file():  # no pipe or socket, no broken link
                yield entry.path, entry.stat().st_size


def is_hidden(name: str) -> bool:
    """Whether a path has a part that starts with a dot."""
    return any(part.startswith(".") and part not in (".", "..") for part in name.split("/"))


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
        words = part.replace("_", "-").replace(".", "-").split("-")
        for word in words:
            if word in SPLITS:
                return SPLITS[word]
    return "train"
