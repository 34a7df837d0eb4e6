"""Where the numbers and images of a run go: log.jsonl always, and what people watch it with."""

import hashlib
import json
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import numpy as np
from PIL import Image

from fitv2.errors import UserError

Scalars = Mapping[str, float]


class Tracker(Protocol):
    """Takes the numbers of a step, and its images. Names have a / between group and quantity."""

    def scalars(self, step: int, values: Scalars) -> None:
        """Some numbers of a step."""

    def image(self, step: int, name: str, image: Image.Image) -> None:
        """An image of a step."""

    def close(self) -> None:
        """The run has ended."""


class JsonLines:
    """A line of JSON for each call, in a file that is cut to a checkpoint when a run resumes from it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def scalars(self, step: int, values: Scalars) -> None:
        """Append a line."""
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")

    def image(self, step: int, name: str, image: Image.Image) -> None:
        """Nothing: images lie beside the file."""

    def close(self) -> None:
        """Nothing."""


class TensorBoard:
    """Event files. What a killed run logged after its checkpoint is hidden when it resumes."""

    def __init__(self, run: Path, step: int) -> None:
        board: Any = imported("tensorboard", "torch.utils.tensorboard")
        self.writer = board.SummaryWriter(str(run / "tensorboard"), purge_step=step + 1, flush_secs=30)

    def scalars(self, step: int, values: Scalars) -> None:
        """One curve each."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def image(self, step: int, name: str, image: Image.Image) -> None:
        """A slider of images."""
        self.writer.add_image(name, np.asarray(image.convert("RGB")), step, dataformats="HWC")

    def close(self) -> None:
        """Write the rest."""
        self.writer.close()


class Hosted:
    """Weights & Biases, or trackio, which has the same functions."""

    def __init__(self, name: str, run: Path, config: Mapping[str, Any]) -> None:
        self.module: Any = imported(name, name)
        options: dict[str, Any] = {"project": "fitv2", "config": dict(config), "resume": "allow"}
        # One run for one folder, however often it was started.
        if name == "wandb":
            options |= {"id": run_id(run), "name": run.name, "dir": str(run)}
        else:
            options |= {"name": f"{run.name}-{run_id(run)[:6]}"}
        try:
            self.module.init(**options)
        except Exception as error:
            raise UserError(f"`track` {name} cannot begin: {' '.join(str(error).split())[:300]}") from error
        self.name, self.works = name, True

    def scalars(self, step: int, values: Scalars) -> None:
        """One curve each."""
        self._try(lambda: self.module.log(dict(values), step=step))

    def image(self, step: int, name: str, image: Image.Image) -> None:
        """An image."""
        self._try(lambda: self.module.log({name: self.module.Image(image)}, step=step))

    def close(self) -> None:
        """Hand over the rest."""
        self._try(self.module.finish)

    def _try(self, call: Callable[[], Any]) -> None:
        """A service that fails does not end the training; it is left alone from then on."""
        if not self.works:
            return
        try:
            call()
        except Exception as error:
            self.works = False
            warnings.warn(f"{self.name} gets nothing more: {error}", stacklevel=2)


def build_trackers(names: Iterable[str], run: Path, step: int, config: Mapping[str, Any]) -> list[Tracker]:
    """The log, and one tracker for each name. Raises UserError when its package is not installed."""
    chosen: list[Tracker] = [JsonLines(run / "log.jsonl")]
    for name in names:
        chosen.append(TensorBoard(run, step) if name == "tensorboard" else Hosted(name, run, config))
    return chosen


def run_id(run: Path) -> str:
    """A name for the run that no other folder has, of the letters that services allow."""
    return hashlib.sha256(str(run.resolve()).encode()).hexdigest()[:16]


def imported(package: str, module: str) -> ModuleType:
    """A module of a package that is optional; UserError saying how to install it."""
    from importlib import import_module

    try:
        return import_module(module)
    except ImportError as error:
        raise UserError(
            f"`track` {package} needs it: pip install {package}, or leave it out of `track`"
        ) from error
