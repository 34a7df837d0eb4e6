"""Frozen dataclasses to and from json, strictly. Imports nothing heavy: `--help` is built from it."""

import contextlib
import dataclasses
import json
import types
import typing
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from fitv2.errors import UserError, in_one_line, nearest
from fitv2.runtime.registry import is_registered

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Config = TypeVar("Config", bound="DataclassInstance")


def from_dict(kind: type[Config], values: dict[str, Any], complete: bool = False) -> Config:
    """A `kind` with these values, as json holds them.

    A key that had another name before is told by the mapping RENAMED of `kind`. Raises UserError for an
    unknown key, naming the nearest known one, for a missing key, and for a value of another type. With
    `complete` a key is missing also where there is a default, but for those in ADDED of `kind`: they came
    later, and their defaults are what was before.
    """
    fields = {field.name: field for field in dataclasses.fields(kind)}
    renamed: dict[str, str] = getattr(kind, "RENAMED", {})
    fitting = {}
    for key, value in values.items():
        key = renamed.get(key, key)
        if key not in fields:
            raise nearest(f"key of {kind.__name__}", key, fields)
        fitting[key] = _checked(f"{key} of {kind.__name__}", value, fields[key].type, complete)
    if complete and (missing := fields.keys() - fitting.keys() - getattr(kind, "ADDED", frozenset())):
        raise UserError(f"{kind.__name__} lacks {', '.join(sorted(missing))}")
    try:
        return kind(**fitting)
    except TypeError as error:
        raise UserError(f"incomplete {kind.__name__}: {error}") from error


def _checked(name: str, value: Any, wanted: Any, complete: bool = False) -> Any:
    """`value` if it is of the type; json's lists as tuples, its whole numbers as floats too."""
    if wanted is Any:
        return value
    origin, arguments = typing.get_origin(wanted), typing.get_args(wanted)
    if dataclasses.is_dataclass(wanted) and isinstance(value, dict):
        return from_dict(typing.cast(type, wanted), value, complete)
    if origin is tuple and isinstance(value, list | tuple):
        kinds = arguments[:1] * len(value) if arguments[-1] is Ellipsis else arguments
        if len(kinds) == len(value):
            return tuple(
                _checked(name, item, kind, complete) for item, kind in zip(value, kinds, strict=True)
            )
        wanted = typing.Never
    if origin is dict and isinstance(value, dict):
        return {key: _checked(f"{name}, {key}", item, arguments[1], complete) for key, item in value.items()}
    if origin is typing.Literal:
        fits = value in arguments or is_registered(wanted, value)
    elif origin in (types.UnionType, typing.Union):
        for option in arguments:
            with contextlib.suppress(UserError):
                return _checked(name, value, option, complete)
        fits = False
    elif wanted is float:
        fits = isinstance(value, int | float) and not isinstance(value, bool)
    else:
        fits = isinstance(value, origin or wanted) and (wanted is bool or not isinstance(value, bool))
    if not fits:
        raise UserError(f"{name} is {repr(value)[:80]}, which is not of the right type")
    return value


def read_json(path: Path) -> dict[str, Any]:
    """The json object in `path`; UserError when it is missing or damaged."""
    try:
        return parse_json(path, path.read_bytes())
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing") from error


def parse_json(path: Path | str, content: bytes) -> dict[str, Any]:
    """The json object in the content of `path`; UserError when it is damaged."""
    try:
        values = json.loads(content)
    except (ValueError, RecursionError) as error:  # also numbers of more digits than Python takes
        raise UserError(f"{path} is damaged: {in_one_line(error)}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} is damaged: expected a json object")
    return values
