"""What tells two evaluations apart: a note in their folder."""

import time
from pathlib import Path
from typing import Any

from fitv2.errors import UserError
from fitv2.runtime.files import write_json
from fitv2.runtime.serialization import read_json

SETTINGS = "settings.json"
WAIT, PATIENCE = 0.5, 600.0  # seconds between looks for another process's note; until it has to be there


def settle(folder: Path, about: dict[str, Any], begins: bool = True) -> None:
    """Note in a new folder what is evaluated there, or compare it with what was noted.

    The process that `begins` notes it, the others wait for the note. Raises UserError naming what differs,
    and for a folder of other things.
    """
    path = folder / SETTINGS
    if begins and not path.exists():
        if folder.exists() and any(folder.iterdir()):
            raise UserError(f"{folder} already exists and is not empty: remove it or choose another")
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, about)
        return
    waited = 0.0
    while not path.exists():
        if waited > PATIENCE:
            raise UserError(f"process 1 has not begun in {folder}: all processes need the same folder")
        time.sleep(WAIT)
        waited += WAIT
    before, now = _flat(read_json(path)), _flat(about)
    if differing := [key for key in now if before.get(key) != now[key]]:
        changes = "; ".join(f"{key} was {before.get(key)!r}, now {now[key]!r}" for key in differing)
        raise UserError(f"{folder} holds another evaluation: {changes}. Choose another folder")


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values in nested dictionaries by their paths, lists for tuples."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = list(value) if isinstance(value, tuple) else value
    return found
