"""Files of a folder, on a disk or in any store that fsspec reaches."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from fitv2.errors import UserError

OPEN_FILES = 256  # the usual limit of a process is 1024
REQUESTS = 16  # to a remote store at once


def filesystem(url: str) -> tuple[Any, str]:
    """The fsspec file system that a path or URL means, and the path in it. Raises UserError."""
    import fsspec

    if "://" not in url:
        system = fsspec.filesystem("file")
        return system, system._strip_protocol(url)  # absolute; a name may have anything in it
    try:
        return fsspec.url_to_fs(url)
    except (ImportError, ValueError) as error:  # a protocol that needs a package, or that there is none of
        raise UserError(f"{url} cannot be reached: {error}") from error


def read_range(system: Any, path: str, start: int, end: int) -> bytes:
    """Some bytes of a file, and no others: without this, many file systems fetch blocks of megabytes."""
    whole_blocks = not (system.async_impl or is_local(system))
    return system.cat_file(path, start=start, end=end, **({"cache_type": "none"} if whole_blocks else {}))


def is_local(system: Any) -> bool:
    """Whether files of this file system lie on this machine's disks."""
    return "file" in ([system.protocol] if isinstance(system.protocol, str) else system.protocol)


class Store:
    """A folder to read from: a path, or a URL such as s3://bucket/folder.

    It can be sent to other processes: nothing is opened before it is needed, and again in each of them.
    """

    def __init__(self, folder: Path | str) -> None:
        self.url = str(folder)
        self.is_local = "://" not in self.url
        self._files = lru_cache(OPEN_FILES)(self._open)

    def __reduce__(self) -> tuple[Any, ...]:
        return Store, (self.url,)

    def __str__(self) -> str:
        return self.url

    def path(self, name: str) -> str:
        """The whole path or URL of a file."""
        return f"{self.url.rstrip('/')}/{name}"

    def _open(self, name: str) -> Any:
        return Path(self.path(name)).open("rb", buffering=0)

    def _remote(self) -> tuple[Any, str]:
        return filesystem(self.url)  # fsspec keeps one a process, and makes it anew after a fork

    def sizes(self) -> dict[str, int]:
        """Bytes of each file of the folder; none if there is no such folder."""
        if self.is_local:
            folder = Path(self.url)
            return (
                {p.name: p.stat().st_size for p in folder.iterdir() if p.is_file()} if folder.is_dir() else {}
            )
        system, path = self._remote()
        if not system.isdir(path):
            return {}
        found = system.ls(path, detail=True)
        return {info["name"].rpartition("/")[2]: info["size"] for info in found if info["type"] == "file"}

    def read(self, name: str) -> Any:
        """A file as an Arrow buffer, memory-mapped where it lies on a disk."""
        import pyarrow as pa

        if self.is_local:
            return pa.memory_map(self.path(name)).read_buffer()
        system, path = self._remote()
        return pa.py_buffer(system.cat_file(f"{path}/{name}"))

    def fill(self, out: np.ndarray, places: Sequence[tuple[str, int]], sizes: Sequence[int]) -> None:
        """Read pieces of so many bytes, each at a (file, byte), one after another into `out`.

        Read, not mapped: pages of a map would count as this process's memory, all of the dataset in the
        end. Raises UserError naming a file that ends too early.
        """
        view, at = memoryview(out.data), 0
        if not self.is_local:
            contents = self._ranges(places, sizes)
        for i, ((name, start), size) in enumerate(zip(places, sizes, strict=True)):
            into = view[at : at + size]
            if self.is_local:
                got = os.preadv(self._files(name).fileno(), [into], start)
            else:
                got = len(contents[i])
                into[:got] = contents[i]
            if got != size:
                raise UserError(f"{self.path(name)} is damaged: it ends too early")
            at += size

    def _ranges(self, places: Sequence[tuple[str, int]], sizes: Sequence[int]) -> list[bytes]:
        """All pieces at once: remote stores answer many requests at a time."""
        system, path = self._remote()
        names, starts = [f"{path}/{name}" for name, _ in places], [start for _, start in places]
        ends = [start + size for start, size in zip(starts, sizes, strict=True)]
        if system.async_impl:
            return system.cat_ranges(names, starts, ends, on_error="raise")
        with ThreadPoolExecutor(REQUESTS) as pool:
            return list(pool.map(partial(read_range, system), names, starts, ends))
