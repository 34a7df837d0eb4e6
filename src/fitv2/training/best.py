"""The best model of a run by the distance of its samples, kept beside its checkpoints."""

import contextlib
import math
import re
import shutil
from pathlib import Path
from typing import Any

from fitv2.checkpoint import Card, save_model
from fitv2.errors import UserError
from fitv2.runtime.distributed import World
from fitv2.runtime.files import atomic_folder, write_json
from fitv2.runtime.serialization import read_json
from fitv2.training.weights import Weights

DISTANCE = "judge/distance"  # the figure by which models are compared; lower is better
FOLDER, ABOUT = "best", "best.json"
FOUND = re.compile(rf"{FOLDER}-(\d+)")  # one that is to take its place


class Best:
    """RUN/best, a model folder with best.json, which says the step and the distance."""

    def __init__(self, run: Path, world: World, judge: str = "") -> None:
        self.folder, self.world, self.judge = run / FOLDER, world, judge

    def about(self) -> dict[str, Any]:
        """What is kept, if the same judge chose it; nothing else."""
        with contextlib.suppress(UserError):
            about = read_json(self.folder / ABOUT)
            if about.keys() == {"step", "judge", DISTANCE} and about["judge"] == self.judge:
                return about
        return {}

    def consider(self, step: int, distance: float, card: Card, weights: Weights) -> None:
        """Keep the EMA model of this step if the first process finds it better than the one that is kept."""
        if not self.world.any(self.world.first and distance < self.about().get(DISTANCE, math.inf)):
            return
        model, adapter = weights.gather_ema(self.world), weights.gather_adapter(self.world)
        if model is None:
            return
        found = self.folder.with_name(f"{FOLDER}-{step}")
        with atomic_folder(found) as scratch:
            save_model(model, card, scratch, adapter)
            write_json(scratch / ABOUT, {"step": step, DISTANCE: distance, "judge": self.judge})
        self._put(found)

    def _put(self, found: Path) -> None:
        """Put a whole model in the place of the best. A process killed meanwhile leaves both or `found`."""
        shutil.rmtree(self.folder, ignore_errors=True)
        found.rename(self.folder)

    def forget_after(self, step: int) -> None:
        """Remove a model of a step that the run has not reached, and finish what a killed process left."""
        found = {path: FOUND.fullmatch(path.name) for path in self.folder.parent.glob(f"{FOLDER}-*")}
        steps = sorted((int(name[1]), path) for path, name in found.items() if name and path.is_dir())
        for its_step, path in steps:
            if its_step > step:
                shutil.rmtree(path)
            else:
                self._put(path)  # whole, and better than what was there
        if self.about().get("step", 0) > step:
            shutil.rmtree(self.folder)
