"""Every kind of source, how it is told from its files, and how it is listed and read.

A new kind is an entry of `KINDS`: endings of file names, a function that lists the images of a source, and
one that reads the bytes of one of them.
"""

import posixpath
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from fitv2.data.storage import filesystem, is_local
from fitv2.encoding.folders import list_folders, read_file
from fitv2.encoding.parquet import datasets_row, datasets_tables, in_tables, parquet_row, parquet_tables
from fitv2.encoding.sources import IMAGES, ImageRef, Source, files_below
from fitv2.encoding.webdataset import in_tars, tar_member
from fitv2.errors import UserError


@dataclass(frozen=True)
class Kind:
    """How sources of a kind are handled."""

    endings: tuple[str, ...]  # of its files, in lower case
    list: Callable[[Source], tuple[tuple[str, ...], Iterable[ImageRef]]]  # labels, where it says them; images
    read: Callable[[str, ImageRef], bytes]  # the bytes of one image, given the source's URL


KINDS = {
    "parquet": Kind((".parquet",), lambda source: in_tables(parquet_tables(source)), parquet_row),
    "tars": Kind((".tar",), lambda source: ((), in_tars(source)), tar_member),
    "images": Kind(tuple(IMAGES), list_folders, read_file),
    "datasets": Kind((), lambda source: in_tables(datasets_tables(source)), datasets_row),
}
COMPRESSED = {"compressed archives": (".tar.gz", ".tgz", ".tar.xz", ".tar.bz2", ".tar.zst")}


def open_source(url: str, image_column: str | None = None, label_column: str | None = None) -> Source:
    """What lies at a path, a URL or a pattern such as folder/*.tar.

    Raises UserError when it is nothing that holds images.
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
        raise UserError(f"{url} {'has no images' if there else 'does not exist'}{hint}")
    single = len(files) == 1 and path in files
    root = posixpath.dirname(path) if single or "*" in path else path
    while "*" in root:
        root = posixpath.dirname(root)
    return detect_kind(Source(url, "", files, root, image_column, label_column))


def detect_kind(source: Source) -> Source:
    """A source whose kind is seen from its files. Raises UserError when they are of several."""
    url, files = source.url, source.files
    if {"dataset_dict.json", "state.json"} & {source.name(name) for name in files}:
        return replace(source, kind="datasets")
    endings = {name: kind.endings for name, kind in KINDS.items() if kind.endings} | COMPRESSED
    by_kind = {name: {path: size for path, size in files.items() if path.lower().endswith(ends)}
               for name, ends in endings.items()}  # fmt: skip
    held = [name for name, found in by_kind.items() if found]
    if len(held) > 1:
        pattern = f"{url.rstrip('/')}/**/*{endings[held[0]][0]}"
        raise UserError(f"{url} holds {' and '.join(held)}: say which, such as '{pattern}'")
    if held == ["compressed archives"]:
        raise UserError(f"{url} holds {held[0]}, which have to be read in order: decompress them to .tar")
    if (source.image_column or source.label_column) and held != ["parquet"]:
        what = held[0] if held else "no images"
        raise UserError(f"`image_column` and `label_column` are for tables; {url} holds {what}")
    if held in ([], ["images"]):  # with all else that lies beside them
        return replace(source, kind="images")
    return replace(source, kind=held[0], files=by_kind[held[0]])
