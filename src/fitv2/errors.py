"""User-facing errors: one line, with a fix."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
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


@contextmanager
def reading(name: object) -> Iterator[None]:
    """Turn any error while reading somebody's file into one line that names it.

    What a file from elsewhere can do to a library is not known: each may raise anything at all. UserErrors
    pass, and so does what says nothing of the file: a full memory, an interruption.
    """
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:
        raise UserError(f"{name} cannot be read: {in_one_line(error)}") from error


def in_one_line(error: BaseException, most: int = 300) -> str:
    """What an error says, in one line; its kind, if it says nothing."""
    said = getattr(error, "strerror", None) or " ".join(str(error).split())
    return printable(said[:most]) or type(error).__name__


def printable(text: str) -> str:
    """Text that moves no cursor and changes no colour."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)
