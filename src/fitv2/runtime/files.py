"""Writes that happen whole or not at all."""

import errno
import hashlib
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

from fitv2.errors import UserError

FULL = 1 << 20  # bytes free, below which an error is put down to the disk


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """A new folder beside `target`, renamed to it on success and removed on any failure.

    Raises UserError when `target` already holds something.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} already exists and is not empty: remove it or choose another")
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        with name_full_disk(target):
            yield partial
            partial.chmod(0o755)  # mkdtemp makes folders that only their owner can read
            partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def atomic_file(target: Path, scratch: Path | None = None) -> Iterator[Path]:
    """A path to write to, renamed to `target` on success and removed on any failure.

    It lies in `scratch`, a folder on the same disk [default: beside `target`], where it is left
    only if this process is killed.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    # The suffix stays last: image and array writers choose their format by it.
    # A random name: processes of several machines may have one number, and write one file.
    partial = (scratch or target.parent) / f".{secrets.token_hex(4)}.{target.name}"
    try:
        with name_full_disk(target):
            yield partial
            with partial.open("rb") as written:  # on the disk before it has its name: power may fail
                os.fsync(written.fileno())
            partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def name_full_disk(target: Path) -> Iterator[None]:
    """Turn any error while the disk is full into the OSError that says so.

    torch and safetensors hide a full disk behind errors of their own.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) or shutil.disk_usage(target.parent).free >= FULL:
            raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target)) from error


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
