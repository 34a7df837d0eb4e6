"""User-facing errors: one line, with a fix."""

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(ValueError):
    """A mistake in the input. The command line prints it as one line and exits with status 2.

    Settings and arguments are named in backticks, `max_grad_norm`; the command line turns them into flags.
    """


def nearest(kind: str, name: str, choices: Iterable[str]) -> UserError:
    """The error for an unknown `name`, naming the choices most like it (all, if none is like it)."""
    known = list(choices)
    close = get_close_matches(name, known, n=3, cutoff=0.5)
    if close:
        return UserError(f"unknown {kind} {name!r}: did you mean {' or '.join(close)}?")
    listed = ", ".join(known[:20]) + (", …" if len(known) > 20 else "")
    return UserError(f"unknown {kind} {name!r}: choose from {listed}")
