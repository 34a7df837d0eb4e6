"""Arguments of a command into its dataclass. Every mistake becomes one line."""

import contextlib
import dataclasses
import io
from collections.abc import Iterator
from typing import TypeVar, cast

import tyro

from fitv2.errors import UserError, nearest

Options = TypeVar("Options")


def parse(kind: type[Options], arguments: list[str], default: Options | None) -> Options:
    """The options of a command. Every mistake becomes a UserError of one line."""
    known = list(dict.fromkeys(option_names(kind)))
    for argument in arguments:
        name = argument.split("=")[0]
        if name.startswith("--") and name not in known:
            raise nearest("option", name, known)
    message = io.StringIO()
    program = f"fitv2 {kind.__name__.lower()}"
    try:
        with contextlib.redirect_stderr(message):
            return cast(Options, tyro.cli(kind, args=arguments, default=default, prog=program))
    except SystemExit as stop:
        if not stop.code:
            raise
        raise UserError(f"{first_part(message.getvalue())} (see {program} --help)") from None


def option_names(kind: type) -> Iterator[str]:
    """All options of a command, as they are typed."""
    yield "--help"
    for option in dataclasses.fields(kind):
        inner = getattr(option.type, "__origin__", option.type)
        if isinstance(inner, type) and dataclasses.is_dataclass(inner):
            yield from option_names(inner)
        else:
            name = option.name.replace("_", "-")
            yield f"--{name}"
            if option.type is bool:
                yield f"--no-{name}"


def first_part(box: str) -> str:
    """What a boxed error message says before its first rule, in one line."""
    lines = [line.strip("│╭╮╰╯|+ \n") for line in box.splitlines()]
    said: list[str] = []
    for line in lines[1:]:
        if not line.strip("─-"):
            break
        said.append(line)
    return " ".join(said) or box.strip()
