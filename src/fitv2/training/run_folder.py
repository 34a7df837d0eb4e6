"""What a run folder says of itself: run.json, which rebuilds the run, and its log."""

import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from fitv2.checkpoint import newest_checkpoint, step_of
from fitv2.config import FREE, Architecture, Training
from fitv2.data.format import DatasetCard
from fitv2.errors import UserError
from fitv2.presets import Preset
from fitv2.runtime.files import atomic_file, write_json
from fitv2.runtime.serialization import from_dict, read_json

SCHEDULE = ("steps", "decay_steps")  # free, but they decide how the learning rate goes on


def settle(run: Path, preset: Preset, data: DatasetCard, init: str | None) -> dict[str, list[int]]:
    """Write run.json, or check that the run already there is this one; how its schedule changes.

    That is [before, now] by setting. Only settings that are free may change once there is a checkpoint.
    Raises UserError naming the others, and for a decay that would have begun before the newest checkpoint.
    """
    changes: dict[str, list[int]] = {}
    path = run / "run.json"
    tokens = asdict(data.about) | {"pictures": data.pictures, "rows": data.rows}
    del tokens["encoding"]  # the same images encoded elsewhere, in other shards, are the same data
    described = {
        "data": json.loads(json.dumps(tokens)),
        "init": init,
        **json.loads(json.dumps(asdict(preset))),
    }
    if path.exists():
        before = read_json(path)
        if not all(isinstance(before.get(part), dict) for part in ("data", "model", "training")):
            raise UserError(f"{path} is not that of a run")
        old, new = flat(before), flat(described)
        changed = [key for key in new if key not in FREE and old.get(key) != new[key]]
        newest = newest_checkpoint(run)
        if changed and newest:
            raise UserError(f"{run} is a run with another {', '.join(changed)}: choose another folder")
        changes = {key: [old[key], new[key]] for key in SCHEDULE if old[key] != new[key]}
        if changes and newest:
            check_schedule(preset.training, step_of(newest))
    elif run.exists() and any(run.iterdir()):
        raise UserError(f"{run} exists and is not a run: choose another folder")
    write_json(path, described | {"torch": torch.__version__})
    return changes


def check_schedule(training: Training, step: int) -> None:
    """UserError if the learning rate would jump at `step` into a decay that had begun before."""
    begins = training.steps - training.decay_steps
    if begins < step < training.steps and training.decay_steps:
        raise UserError(
            f"`decay_steps` {training.decay_steps} of `steps` {training.steps} would have begun at step"
            f" {begins}, and the run is at {step}: give `steps` {step + training.decay_steps}"
        )


def note_start(run: Path, step: int, processes: int, schedule: Mapping[str, list[int]]) -> None:
    """Append to starts.jsonl what is being started: the command, versions, the state of the code.

    `schedule` is what `settle` returned.
    """
    line = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "step": step,
        "command": shlex.join(sys.argv),
        "processes": processes,
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("fitv2", "torch", "diffusers")},
        },
        "machine": describe_machine(),
        "code": describe_code(),
        "schedule": schedule,
    }
    with (run / "starts.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(line, ensure_ascii=False) + "\n")


def describe_machine() -> str:
    """What a run computes on, in words."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} × {torch.cuda.get_device_name()}"
    return f"{os.cpu_count()} cores, {platform.machine()} {platform.system()}"


def describe_code() -> str | None:
    """The commit of the package's own repository, and whether files differ from it; None if it has none.

    A repository that merely encloses the package is not asked: it is somebody else's, and its settings
    may have git run programs. Of our own none is run either.
    """
    root = PACKAGE.parents[1]
    if (
        not (root / ".git").exists()
        or root / "src" / "fitv2" != PACKAGE
        or not (root / "pyproject.toml").exists()
    ):
        return None
    asked = []
    for question in (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no")):
        try:
            command = ["git", *QUIET_GIT, "-C", str(root), *question]
            done = subprocess.run(
                command, capture_output=True, text=True, check=True, timeout=10, env=without_git(os.environ)
            )
            asked.append(done.stdout.strip())
        except (OSError, subprocess.SubprocessError):
            return None
    commit, changes = asked
    return f"{commit} with changes" if changes else commit


PACKAGE = Path(__file__).resolve().parents[1]
QUIET_GIT = ("-c", "core.fsmonitor=false", "-c", "core.hooksPath=/dev/null", "--no-optional-locks")


def without_git(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment that names no other repository."""
    return {name: value for name, value in environment.items() if not name.startswith("GIT_")}


def flat(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that decide a run's outcome, without their nesting, as they are named today.

    What was no setting when the run began is at its default.
    """
    training = asdict(from_dict(Training, settings["training"]))
    model = asdict(from_dict(Architecture, settings["model"]))
    return {"init": settings.get("init"), **settings["data"], **model, **training}


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log, up to the first that is none; none if there is no log."""
    lines: list[dict[str, Any]] = []
    if path.exists():
        for line in path.read_bytes().splitlines():
            try:
                values = json.loads(line)
            except (ValueError, RecursionError):
                break
            if not (isinstance(values, dict) and isinstance(values.get("step"), int)):
                break
            lines.append(values)
    return lines


def cut_log(path: Path, step: int) -> None:
    """Drop what was logged after the checkpoint that a run resumes from."""
    lines = [json.dumps(line) + "\n" for line in read_log(path) if line["step"] <= step]
    with atomic_file(path) as partial:
        partial.write_text("".join(lines), encoding="utf-8")
