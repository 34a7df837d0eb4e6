"""Every kind of source, how it is told from its files, and how it is listed and read.

A new kind is an entry of `KINDS`: endings of file names, a function that lists the images of a source, and
one that reads the bytes of one of them.
"""

import posixpath
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from fitv2.data.storage import filesystem
from fitv2.encoding.folders import METADATA, list_folders, read_file
from fitv2.encoding.parquet import list_datasets, list_parquet
from fitv2.encoding.rows import datasets_row, parquet_row
from fitv2.encoding.sources import IMAGES, ImageRef, Listing, Source, files_below, root_of
from fitv2.encoding.webdataset import list_tars, mask_in_tar, tar_member
from fitv2.errors import UserError, reading


@dataclass(frozen=True)
class Kind:
    """How sources of a kind are handled."""

    endings: tuple[str, ...]  # of its files, in lower case
    # Labels, where it says them; images; and where the labels are from, which may be left out.
    list: Callable[[Source], Listing | tuple[tuple[str, ...], Iterable[ImageRef]]]
    read: Callable[[str, ImageRef], bytes]  # the bytes of one image, given the source's URL
    mask: Callable[[ImageRef], ImageRef] | None = None  # where the mask of an image lies, if any can have one


def mask_in_row(picture: ImageRef) -> ImageRef:
    """The mask of an image of a table: another column of its row."""
    return picture._replace(detail=picture.mask.decode())


def mask_in_file(picture: ImageRef) -> ImageRef:
    """The mask of an image that is a file: another file."""
    return picture._replace(path=picture.mask)


KINDS = {
    "parquet": Kind((".parquet",), list_parquet, parquet_row, mask_in_row),
    "tars": Kind((".tar",), list_tars, tar_member, mask_in_tar),
    "images": Kind(tuple(IMAGES), list_folders, read_file, mask_in_file),
    "datasets": Kind((), list_datasets, datasets_row, mask_in_row),
}
COMPRESSED = {"compressed archives": (".tar.gz", ".tgz", ".tar.xz", ".tar.bz2", ".tar.zst")}


def open_source(
    url: str,
    image_column: str | None = None,
    label_column: str | None = None,
    caption_column: str | None = None,
    mask_column: str | None = None,
    *,
    split: str | None = None,
    follow_links: bool = False,
) -> Source:
    """What lies at a path, a URL or a pattern such as folder/*.tar.

    With `split` all images are to be of that split; without, their names tell. Links that lead out of the
    folder are followed with `follow_links` alone: a collection cannot have the rest of the disk read.
    Raises UserError when it is nothing that holds images.
    """
    if not url:
        raise UserError("the source has no name")
    outside: list[str] = []
    with reading(url):  # libraries of remote stores have errors of their own
        system, path = filesystem(url)
        files = dict(files_below(system, path, None if follow_links else outside))
    if not files:
        if outside:
            raise UserError(f"{url} has links alone, which lead out of it: see `follow_links`")
        there = "*" in path or system.exists(path)
        hint = (
            f" (for a dataset of the hub: hf://datasets/{url})"
            if re.fullmatch(r"[\w.-]+/[\w.-]+", url)
            else ""
        )
        raise UserError(f"{url} {'has no images' if there else 'does not exist'}{hint}")
    root = root_of(system, path)
    columns = image_column, label_column, caption_column, mask_column
    return detect_kind(Source(url, "", files, root, *columns, split, tuple(outside)))


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
    tables = held == ["parquet"] or (not source.image_column and any(
        posixpath.basename(path) in METADATA for path in files
    ))  # fmt: skip
    if (source.image_column or source.label_column or source.caption_column) and not tables:
        what = held[0] if held else "no images"
        raise UserError(
            f"`image_column`, `label_column` and `caption_column` are for tables; {url} holds {what}"
        )
    if source.mask_column and held and KINDS[held[0]].mask is None:
        raise UserError(f"`mask_column` is not for {held[0]}, which {url} holds")
    if held in ([], ["images"]):  # with all else that lies beside them
        return replace(source, kind="images")
    return replace(source, kind=held[0], files=by_kind[held[0]])
