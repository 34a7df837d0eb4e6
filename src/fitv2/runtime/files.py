"""Writes that happen whole or not at all, folders with one writer, and what may be removed.

What is half-written lies in a folder `.fitv2-…` beside its place, which the process that writes holds
locked. One that nobody holds was left by a process that was killed; the next start removes it.
"""

import errno
import fcntl
import hashlib
import json
import os
import secrets
import shutil
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from itertools import count
from pathlib import Path
from threading import RLock
from typing import Any

from fitv2.errors import UserError

FULL = 1 << 20  # bytes free, below which an error is put down to the disk
SAID_OF_FULL = ("No space left", "Disk quota exceeded", "os error 28", "errno 28", "errno 122")
SCRATCH = ".fitv2-"
LIVE: set[Path] = set()  # scratch folders of this process
ENDING = RLock()  # held while one is made, and from when the process is about to end
HELD: set[int] = set()  # open files that hold a lock


# Whole or not at all ----------------------------------------------------------------------------


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """A new folder, flushed to the disk and renamed to `target` on success, removed on any failure.

    Raises UserError when `target` already holds something.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} already exists and is not empty: remove it or choose another")
    target.parent.mkdir(parents=True, exist_ok=True)
    with scratch_folder(target.parent) as scratch, name_full_disk(target):
        partial = scratch / target.name
        partial.mkdir()
        yield partial
        flush_tree(partial)
        partial.rename(target)
        flush(target.parent)


@contextmanager
def atomic_file(target: Path, scratch: Path | None = None) -> Iterator[Path]:
    """A path to write to, flushed and renamed to `target` on success, removed on any failure.

    It lies in `scratch`, a folder on the same disk [default: beside `target`].
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with scratch_folder(scratch or target.parent) as folder, name_full_disk(target):
        partial = folder / target.name  # image and array writers choose their format by it
        yield partial
        flush(partial)  # on the disk before it has its name: power may fail
        partial.replace(target)
        flush(target.parent)


@contextmanager
def scratch_folder(beside: Path) -> Iterator[Path]:
    """A folder for what is half-written, held by this process and removed in the end."""
    remove_leftovers(beside)
    folder = beside / f"{SCRATCH}{secrets.token_hex(8)}"
    LIVE.add(folder)  # before it is there: a signal may come at any time
    held = None
    try:
        while held is None:  # another process may take it for a leftover before it is locked
            with ENDING:
                folder.mkdir(mode=0o700, exist_ok=True)
            held = _lock(folder)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        LIVE.discard(folder)
        if held is not None:
            _unlock(held)


@lru_cache(1024)  # once a process: a folder of many images is not listed for each
def remove_leftovers(folder: Path) -> None:
    """Remove what processes that were killed left half-written in a folder."""
    for left in folder.glob(f"{SCRATCH}*"):
        with suppress(OSError):  # perhaps another user's
            held = None if left.is_symlink() or not left.is_dir() else _lock(left)
            if held is not None:
                shutil.rmtree(left, ignore_errors=True)
                _unlock(held)


def remove_live_scratch() -> None:
    """Remove what this process is writing, and let none of its threads begin anew: it is about to end."""
    ENDING.acquire(timeout=1)
    for folder in list(LIVE):
        shutil.rmtree(folder, ignore_errors=True)


def flush(path: Path) -> None:
    """Have a file or folder written to the disk, where its file system can."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(descriptor)


def flush_tree(folder: Path) -> None:
    """Flush a folder and all that is in it."""
    for above, _, files in os.walk(folder):
        for name in files:
            flush(Path(above) / name)
        flush(Path(above))


@contextmanager
def name_full_disk(target: Path) -> Iterator[None]:
    """Turn any error that comes of a full disk into the OSError that says so.

    torch and safetensors hide a full disk behind errors of their own.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) or not _is_of_full_disk(error, target.parent):
            raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target)) from error


def _is_of_full_disk(error: Exception, folder: Path) -> bool:
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
        return True
    said = "".join(traceback.format_exception(error))
    return any(words in said for words in SAID_OF_FULL) or shutil.disk_usage(folder).free < FULL


# One writer -------------------------------------------------------------------------------------


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Make a folder if there is none, and be the only process that writes in it.

    Whatever ends the process ends that too. An empty folder is removed in the end. Raises UserError when
    another process has it.
    """
    held = None
    while held is None:
        folder.mkdir(parents=True, exist_ok=True)
        held = _lock(folder)
        if held is None and folder.exists():
            said = f"another process is writing {folder}"
            raise UserError(f"{said}: wait for its end, or choose another folder")
    remove_leftovers.__wrapped__(folder)
    try:
        yield
    finally:
        with suppress(OSError):
            folder.rmdir()
        _unlock(held)


@contextmanager
def wait_for_turn(path: Path) -> Iterator[None]:
    """Hold a lock on a file or folder that all processes ask for, one at a time."""
    held = os.open(path, os.O_RDONLY)
    try:
        with suppress(OSError):  # where a file system knows no locks
            fcntl.flock(held, fcntl.LOCK_EX)
        yield
    finally:
        os.close(held)


def _lock(folder: Path) -> int | None:
    """A lock on a folder, as an open file; None if another process has it, or it is gone.

    Where a file system knows no locks, all get one.
    """
    try:
        held = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(held)
        return None
    except OSError:
        pass
    with suppress(FileNotFoundError):
        if os.path.samestat(os.fstat(held), folder.stat()):
            HELD.add(held)
            return held
    os.close(held)  # it was removed meanwhile, and this is a lock on nothing
    return None


def _unlock(held: int) -> None:
    HELD.discard(held)
    os.close(held)


def _let_go() -> None:
    """In a fork: locks and scratch are its parent's, and must not outlive it."""
    global ENDING  # noqa: PLW0603
    for held in HELD:
        os.close(held)
    HELD.clear()
    LIVE.clear()
    ENDING = RLock()


os.register_at_fork(after_in_child=_let_go)


# What is ours -----------------------------------------------------------------------------------


def remove_own(folder: Path, is_own: Callable[[str], bool]) -> None:
    """Remove the files of a folder whose path in it `is_own`, and the folders that are empty then.

    Whatever else lies there stays, and so does the folder that holds it. No link is followed.
    """
    for above, folders, files in os.walk(folder, topdown=False):
        for name in files:
            path = Path(above) / name
            if is_own(path.relative_to(folder).as_posix()):
                path.unlink(missing_ok=True)
        for name in folders:
            if name.startswith(SCRATCH):
                shutil.rmtree(Path(above) / name, ignore_errors=True)
        with suppress(OSError):  # not empty
            Path(above).rmdir()


def sha256(path: Path) -> str:
    """The SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def unused(path: Path) -> Path:
    """The path, or with a number after it if there is something."""
    later = (path.with_name(f"{path.name}-{number}") for number in count(2))
    return path if not path.exists() else next(other for other in later if not other.exists())


def write_text(path: Path, text: str, scratch: Path | None = None) -> None:
    """Write `text` to `path`, whole or not at all."""
    with atomic_file(path, scratch) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, values: dict[str, Any], scratch: Path | None = None) -> None:
    """Write `values` to `path`, whole or not at all."""
    write_text(path, json.dumps(values, indent=2, ensure_ascii=False) + "\n", scratch)
