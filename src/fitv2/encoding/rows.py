"""One row of a table: the bytes of the image that it holds."""

import os
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Any

from fitv2.data.storage import filesystem, is_local
from fitv2.encoding.images import NoImage, UnusableImage
from fitv2.encoding.sources import ImageRef, read_whole, root_of
from fitv2.errors import in_one_line

MOST_BYTES = 512 << 20  # of an image
SUSPICIOUS_GROUP = 8  # times that a row group, of hundreds of megabytes, is as large as the whole file


def parquet_row(url: str, picture: ImageRef) -> bytes:
    """The bytes of an image in a Parquet file. The next ones are read on from there."""
    rows = _rows_of(url, picture.path, picture.group, picture.detail, os.getpid())
    return image_bytes(rows.at(picture.at), folder_of(url))


def folder_of(url: str) -> str | None:
    """The folder on this machine that a source is, or lies in; None for one elsewhere."""
    system, path = filesystem(url)
    return root_of(system, path) if is_local(system) else None


# Each process opens files of its own: a file that was open before a fork has one position for both.


class Rows:
    """The image column of a row group, read row by row: how large a row gets is only seen when it is read."""

    def __init__(self, parquet: Any, size: int, group: int, column: str) -> None:
        self.parquet, self.group, self.column = parquet, group, column
        unpacked = unpacked_bytes(parquet.metadata, [group])
        if unpacked > MOST_BYTES and unpacked > SUSPICIOUS_GROUP * size:
            raise UnusableImage(f"its row group would unpack to {unpacked >> 20} MB")
        self.next = 0
        self.batches: Iterator[Any] = iter(())

    def at(self, row: int) -> Any:
        """The value of a row. Raises UnusableImage when there is none."""
        if row < self.next or self.next == 0:
            self.next = 0
            self.batches = self.parquet.iter_batches(1, row_groups=[self.group], columns=[self.column])
        batch: Any = None
        while self.next <= row:
            batch = next(self.batches, None)
            if batch is None:
                raise UnusableImage("its row is missing")
            self.next += 1
        batch.validate(full=True)
        return image_value(batch.column(0))


def image_value(column: Any) -> Any:
    """The value of an image column of one row. Raises UnusableImage for one larger than any image."""
    if column.nbytes > MOST_BYTES:
        raise UnusableImage(f"it has {column.nbytes >> 20} MB; at most {MOST_BYTES >> 20} are read")
    return column[0].as_py()


@lru_cache(2)  # of images, and of masks
def _rows_of(url: str, path: bytes, group: int, column: str, process: int) -> Rows:
    return Rows(*_parquet(url, path, process), group, column)


@lru_cache(4)
def _parquet(url: str, path: bytes, process: int) -> tuple[Any, int]:
    """A Parquet file, and its bytes."""
    import pyarrow.parquet as pq

    file = filesystem(url)[0].open(os.fsdecode(path), "rb")
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    return pq.ParquetFile(file), size


def datasets_row(url: str, picture: ImageRef) -> bytes:
    """The bytes of an image in a `datasets` folder."""
    rows = _datasets_part(url, picture.path.decode(), os.getpid())
    column = rows[picture.at : picture.at + 1][picture.detail].combine_chunks()
    column.validate(full=True)
    return image_bytes(image_value(column), folder_of(url))


@lru_cache(8)
def _datasets_part(url: str, part: str, process: int) -> Any:
    import datasets

    loaded = datasets.load_from_disk(url)
    return (loaded[part] if part else loaded).with_format("arrow")


def image_bytes(value: Any, folder: str | None) -> bytes:
    """The bytes of an image column's value: bytes, or {bytes, path} as `datasets` has it.

    A path is read if it leads to a file in `folder`, that of the collection. Raises UnusableImage.
    """
    if isinstance(value, dict):
        if value.get("bytes") is None and isinstance(value.get("path"), str):
            if folder is None:
                raise UnusableImage("it is held by its path alone, which is not looked for elsewhere")
            path = os.path.join(folder, value["path"])  # noqa: PTH118
            try:
                return read_whole(path, within=folder, most=MOST_BYTES)
            except OSError as error:
                raise UnusableImage(f"its file cannot be read: {in_one_line(error)}") from error
        value = value.get("bytes")
    if value is None:
        raise NoImage("empty")
    if not isinstance(value, bytes):
        raise UnusableImage(f"the image column holds {type(value).__name__}")
    return value


def unpacked_bytes(metadata: Any, groups: Iterable[int] | None = None) -> int:
    """Bytes of row groups of a Parquet file when they are unpacked, as the file says [default: of all].

    Of whole groups: pyarrow ends the process when the metadata of a single column is damaged.
    """
    every = range(metadata.num_row_groups) if groups is None else groups
    return sum(metadata.row_group(group).total_byte_size for group in every)
