"""The best model of a run by the distance of its samples, kept beside its checkpoints."""

import math
import shutil
from dataclasses import replace
from pathlib import Path

import torch

from fitv2.checkpoint import Card, save_model
from fitv2.errors import UserError
from fitv2.runtime.distributed import World
from fitv2.runtime.files import atomic_folder, write_json
from fitv2.runtime.serialization import read_json
from fitv2.training.weights import Weights

DISTANCE = "judge/distance"  # the figure by which models are compared; lower is better
FOLDER, ABOUT = "best", "best.json"


class Best:
    """RUN/best, a model folder with best.json, which says the step and the distance."""

    def __init__(self, run: Path, world: World) -> None:
        self.folder, self.world = run / FOLDER, world

    @property
    def distance(self) -> float:
        """That of the model that is kept; infinite if there is none."""
        try:
            return float(read_json(self.folder / ABOUT)[DISTANCE])
        except (UserError, KeyError):
            return math.inf

    def consider(self, step: int, distance: float, card: Card, weights: Weights) -> None:
        """Keep the EMA model of this step if the first process finds it better than the one that is kept."""
        better = torch.tensor(self.world.first and distance < self.distance, dtype=torch.int32)
        if not self.world.any(bool(better)):
            return
        model = weights.gather_ema(self.world)
        if model is None:
            return
        with atomic_folder(self.folder.with_name(f"{FOLDER}-{step}")) as partial:
            save_model(model, replace(card), partial)
            write_json(partial / ABOUT, {"step": step, DISTANCE: distance})
        self._remove()
        self.folder.with_name(f"{FOLDER}-{step}").rename(self.folder)

    def forget_after(self, step: int) -> None:
        """Remove a model of a step that the run has not reached: it was resumed before it."""
        try:
            known = int(read_json(self.folder / ABOUT)["step"])
        except (UserError, KeyError):
            return
        if known > step:
            self._remove()

    def _remove(self) -> None:
        if self.folder.exists():
            shutil.rmtree(self.folder)
