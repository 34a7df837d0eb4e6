"""What a run folder says of itself: run.json, which rebuilds the run, and its log."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from fitv2.config import from_dict, read_json
from fitv2.errors import UserError
from fitv2.files import whole_file, write_json
from fitv2.presets import Architecture, Preset, Training

# Settings that may change when a run is carried on: they decide when, not what.
FREE = ("steps", "minutes", "log_every", "validate_every", "sample_every", "save_every", "keep")


def settle(run: Path, preset: Preset, data: Path, init: str | None) -> None:
    """Write run.json, or check that the run already there is this one.

    Only FREE settings may change. Raises UserError naming the others.
    """
    path = run / "run.json"
    described = {"data": str(data), "init": init, **asdict(preset)}
    if path.exists():
        before = read_json(path)
        old, new = (
            {key: value for key, value in settings.items() if key not in FREE}
            for settings in (flat(before), flat(described))
        )
        changed = [key for key in new if old.get(key) != new[key]]
        if changed:
            raise UserError(f"{run} is a run with another {', '.join(changed)}: choose another --out")
    elif run.exists() and any(run.iterdir()):
        raise UserError(f"{run} exists and is not a run: choose another --out")
    write_json(path, described | {"torch": torch.__version__})


def flat(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that decide a run's outcome, without their nesting."""
    return {"init": settings["init"], **settings["model"], **settings["training"]}


def read_run(run: Path) -> Preset:
    """The preset that a run was started with, from its json."""
    values = read_json(run / "run.json")
    return Preset(
        values["about"],
        from_dict(Architecture, values["model"]),
        from_dict(Training, values["training"]),
    )


def cut_log(path: Path, step: int) -> None:
    """Drop what was logged after the checkpoint that a run resumes from."""
    if not path.exists():
        return
    lines = [line for line in path.read_text().splitlines() if json.loads(line)["step"] <= step]
    with whole_file(path) as partial:
        partial.write_text("".join(line + "\n" for line in lines))
