"""Frozen dataclasses to and from json, strictly. Imports nothing heavy: `--help` is built from it."""

import dataclasses
import json
from pathlib import Path
from typing import Any, TypeVar

from fitv2.errors import UserError, nearest

Config = TypeVar("Config")


def from_dict(kind: type[Config], values: dict[str, Any]) -> Config:
    """A `kind` with these values; an unknown key raises UserError naming the nearest known one."""
    known = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    for key in values:
        if key not in known:
            raise nearest(f"key of {kind.__name__}", key, known)
    try:
        return kind(**values)
    except TypeError as error:
        raise UserError(f"incomplete {kind.__name__}: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """The json object in `path`; UserError when it is missing or damaged."""
    try:
        values = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is damaged: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} is damaged: expected a json object")
    return values
