"""Images in folders that are named by their label."""

import os
from collections.abc import Iterable, Iterator

from fitv2.data.storage import filesystem
from fitv2.encoding.sources import NO_LABEL, SPLITS, WHOLE, ImageRef, Source, is_image_name, readable


def list_folders(source: Source) -> tuple[tuple[str, ...], Iterable[ImageRef]]:
    """The images of a folder; it has no list of labels."""
    return (), in_folders(source)


def in_folders(source: Source) -> Iterator[ImageRef]:
    """Folders are labels; top-level ones named train, val, … are splits, if all are."""
    names = {path: readable(source.name(path)) for path in source.files if is_image_name(path)}
    tops = {name.split("/")[0] for name in names.values() if "/" in name}
    in_splits = bool(tops) and all(top.lower() in SPLITS for top in tops)
    for path in sorted(names, key=lambda path: names[path].split("/")):
        folders = names[path].split("/")[:-1]
        split = SPLITS[folders.pop(0).lower()] if in_splits and folders else "train"
        label = folders[0] if folders else NO_LABEL
        yield ImageRef(split, label, names[path], os.fsencode(path), WHOLE, source.files[path])


def read_file(url: str, picture: ImageRef) -> bytes:
    """The bytes of an image that is a file of its own."""
    return filesystem(url)[0].cat_file(os.fsdecode(picture.path))
