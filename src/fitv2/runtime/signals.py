"""SIGINT and SIGTERM: who has nothing to save leaves at once, leaving nothing half-written.

Light: a command sets its handlers before it imports anything that takes time.
"""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from fitv2.runtime.files import remove_live_scratch

NUMBERS = (signal.SIGINT, signal.SIGTERM)
RECEIVED: list[int] = []  # what came while `catch_interrupts` did


def leave_on_signals(hint: str = "") -> None:
    """From now on end this process as soon as such a signal comes: one line, status 128 + its number.

    No KeyboardInterrupt is raised. Libraries swallow one that comes while they are imported, or inside
    what they call back. A signal that is ignored, as behind nohup, stays ignored.
    """
    process = os.getpid()

    def leave(number: int, _: Any) -> None:
        if os.getpid() == process:  # else a child that has set no handlers of its own yet
            remove_live_scratch()
            with suppress(Exception):
                sys.stdout.flush()
            os.write(2, f"\nfitv2: stopped by {signal.Signals(number).name}{hint}\n".encode())
        os._exit(128 + number)

    for number in NUMBERS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, leave)


@contextmanager
def catch_interrupts() -> Iterator[Callable[[], bool]]:
    """Whether SIGINT or SIGTERM came since; a second one acts as usual."""
    RECEIVED.clear()
    before: dict[int, Any] = {}

    def note(number: int, _: Any) -> None:
        RECEIVED.append(number)
        signal.signal(number, before[number])

    for number in NUMBERS:
        before[number] = signal.signal(number, note)
    try:
        yield lambda: bool(RECEIVED)
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)
