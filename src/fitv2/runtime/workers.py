"""Processes that read ahead: torch's loader, made to end with its parent and to pass on what went wrong."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any, TypeVar

import torch

from fitv2.errors import UserError
from fitv2.runtime.signals import NUMBERS

Key = TypeVar("Key")
Item = TypeVar("Item")

AHEAD = 4  # items that each process reads before they are asked for


def read_ahead(read: Callable[[Key], Item], keys: Iterable[Key], workers: int) -> Generator[Item, None, None]:
    """`read` of each key, in order, by so many processes; with 0 by this one, when it is asked for.

    Items should hold few tensors, best none: each costs an open file on its way between processes.
    A UserError in a process is raised here as it is. The processes end with the iterator, and
    when this one is killed.
    """
    if not workers:
        yield from map(read, keys)
        return
    loader = torch.utils.data.DataLoader(
        _Reading(read), batch_size=None, sampler=keys, num_workers=workers,
        prefetch_factor=AHEAD, collate_fn=_same, worker_init_fn=end_with_parent,
    )  # fmt: skip
    try:
        for item in started(loader):
            if isinstance(item, UserError):
                raise item
            yield item
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise UserError(
            "a reading process was ended from outside; perhaps it ran out of memory:"
            " run the same command again to resume, with fewer `workers`"
        ) from error


def started(loader: Iterable[Item]) -> Iterator[Item]:
    """The iterator of a loader. Its processes never see a signal to stop, not even while they start."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, NUMBERS)
    try:
        return iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Reading(torch.utils.data.Dataset[Any]):
    def __init__(self, read: Callable[[Any], Any]) -> None:
        self.read = read

    def __getitem__(self, key: Any) -> Any:
        try:
            return self.read(key)
        except UserError as error:  # torch would raise it with a traceback in its message
            return error


def _same(item: Any) -> Any:
    return item


def end_with_parent(_: int) -> None:
    """End this process, a worker of another, as soon as that one was killed, and not before.

    torch's loader workers notice too, but then wait for ever to hand over what they read. Signals to stop go
    to all processes of a group, and the parent decides when: it may have something to save.
    """
    for number in NUMBERS:
        signal.signal(number, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def wait() -> None:
        if parent:
            parent.join()
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
