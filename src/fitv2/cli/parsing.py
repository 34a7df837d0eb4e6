"""Arguments of a command into its dataclass. Every mistake becomes one line."""

import contextlib
import dataclasses
import io
import re
import sys
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, TypeVar, cast

import tyro

from fitv2.config import Rope, Training
from fitv2.errors import UserError, nearest
from fitv2.limits import check_limits

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Options = TypeVar("Options")


def parse(kind: type[Options], arguments: list[str], default: Options | None) -> Options:
    """The options of a command. Every mistake becomes a UserError of one line."""
    known = list(dict.fromkeys(option_names(kind)))
    arguments = [rename(argument, known) for argument in arguments]
    if "--help" in arguments or "-h" in arguments:
        arguments = ["--help"]  # with arguments that were given tyro lists fewer
    for argument in arguments:
        name = argument.split("=")[0]
        if name.startswith("--") and name not in known:
            raise nearest("option", name, known)
    message = io.StringIO()
    program = "fitv2 " + re.sub(r"(?<=[a-z])(?=[A-Z])", " ", kind.__name__).lower()
    try:
        with contextlib.redirect_stderr(message):
            options = cast(Options, tyro.cli(kind, args=arguments, default=default, prog=program))
    except SystemExit as stop:
        if not stop.code:
            raise
        raise UserError(f"{first_part(message.getvalue())} (see {program} --help)") from None
    check_limits(cast("DataclassInstance", options))
    return options


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


# Names that options had before.
RENAMED = {
    **{old: new for kind in (Training, Rope) for old, new in kind.RENAMED.items()},
    "guidance": "guidance_scale",
}


def rename(argument: str, known: Collection[str]) -> str:
    """An argument with the name that its option has today, and a hint if that is another.

    Only `known` options are meant: those that the command has.
    """
    name, equals, value = argument.partition("=")
    prefix = "--no-" if name.startswith("--no-") else "--"
    new = RENAMED.get(name.removeprefix(prefix).replace("-", "_")) if name.startswith("--") else None
    flag = f"{prefix}{(new or '').replace('_', '-')}"
    if flag not in known:
        return argument
    print(f"fitv2: {name} is now {flag}", file=sys.stderr)
    return f"{flag}{equals}{value}"


def name_flags(message: str, options: Collection[str]) -> str:
    """A message of the library, which names fields as `max_grad_norm`, with the flags of these options."""

    def flag(field: re.Match[str]) -> str:
        name = f"--{field[1].replace('_', '-')}"
        return name if name in options else field[0]

    return re.sub(r"`([a-z][a-z0-9_]*)`", flag, message)
