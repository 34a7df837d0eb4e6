"""What lies at a path or URL: the files of a collection of pictures, and of which kind it is."""

import hashlib
import os
import posixpath
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from fitv2.data.storage import filesystem, is_local
from fitv2.errors import UserError

# Endings of pictures, also of such as cannot be read: those are to be missed.
IMAGES = frozenset([
    ".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".jp2", ".webp", ".avif", ".bmp", ".dib",
    ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".tga", ".ico", ".pcx", ".sgi", ".qoi",
    ".psd", ".dds", ".svg", ".svgz", ".eps", ".heic", ".heif", ".jxl", ".xcf", ".dng", ".cr2", ".nef", ".arw",
])  # fmt: skip
ENDINGS = {
    "parquet": (".parquet",),
    "tars": (".tar",),
    "compressed archives": (".tar.gz", ".tgz", ".tar.xz", ".tar.bz2", ".tar.zst"),
    "images": tuple(IMAGES),
}
SPLITS = {
    "train": "train", "training": "train",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
    "test": "test", "testing": "test",
}  # fmt: skip
NO_LABEL = "image"
WHOLE, BROKEN = -1, -2  # places in a file: all of it, or none


class Picture(NamedTuple):
    """One picture of a source, not yet read."""

    split: str
    label: str  # empty for none where others have one: such a picture is not used
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


def open_source(url: str, image_column: str | None = None, label_column: str | None = None) -> Source:
    """What lies at a path, a URL or a pattern such as folder/*.tar.

    Raises UserError when it is nothing that holds pictures.
    """
    if not url:
        raise UserError("the source has no name")
    system, path = filesystem(url)
    try:
        files = dict(files_below(system, path))
    except Exception as error:  # libraries of remote stores have errors of their own
        if is_local(system) and not isinstance(error, OSError):
            raise
        raise UserError(f"{url} cannot be read: {' '.join(str(error).split())[:300]}") from error
    if not files:
        there = "*" in path or system.exists(path)
        hint = (
            f" (for a dataset of the hub: hf://datasets/{url})"
            if re.fullmatch(r"[\w.-]+/[\w.-]+", url)
            else ""
        )
        raise UserError(f"{url} {'has no pictures' if there else 'does not exist'}{hint}")
    single = len(files) == 1 and path in files
    root = posixpath.dirname(path) if single or "*" in path else path
    while "*" in root:
        root = posixpath.dirname(root)
    return of_its_kind(Source(url, "", files, root, image_column, label_column))


def of_its_kind(source: Source) -> Source:
    """A source whose kind is seen from its files. Raises UserError when they are of several."""
    url, files = source.url, source.files
    if {"dataset_dict.json", "state.json"} & {source.name(name) for name in files}:
        return replace(source, kind="datasets")
    by_kind = {kind: {path: size for path, size in files.items() if path.lower().endswith(endings)}
               for kind, endings in ENDINGS.items()}  # fmt: skip
    held = [kind for kind, found in by_kind.items() if found]
    if len(held) > 1:
        pattern = f"{url.rstrip('/')}/**/*{ENDINGS[held[0]][0]}"
        raise UserError(f"{url} holds {' and '.join(held)}: say which, such as '{pattern}'")
    if held == ["compressed archives"]:
        raise UserError(f"{url} holds {held[0]}, which have to be read in order: decompress them to .tar")
    if (source.image_column or source.label_column) and held != ["parquet"]:
        what = held[0] if held else "no images"
        raise UserError(f"--image-column and --label-column are for tables; {url} holds {what}")
    if held in ([], ["images"]):  # with all else that lies beside them
        return replace(source, kind="files")
    return replace(source, kind=held[0], files=by_kind[held[0]])


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
    """The same for a folder of this machine. Follows links to folders, but not to one that it is in."""
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
