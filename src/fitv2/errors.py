"""What a person did that cannot work, said in one line with the way out."""

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(Exception):
    """A mistake in the input. The command line prints it as one line and exits with status 2."""


def nearest(kind: str, name: str, choices: Iterable[str]) -> UserError:
    """The error for an unknown `name`, naming the choices most like it (all, if none is like it)."""
    known = list(choices)
    close = get_close_matches(name, known, n=3, cutoff=0.5)
    if close:
        return UserError(f"unknown {kind} {name!r}: did you mean {' or '.join(close)}?")
    listed = ", ".join(known[:20]) + (", …" if len(known) > 20 else "")
    return UserError(f"unknown {kind} {name!r}: choose from {listed}")
