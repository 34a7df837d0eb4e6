"""Checkpoints of a run, written while training goes on: whole or not at all.

A checkpoint is a folder `step-NNNNNNN` with the averaged model in `ema/`, which samples, and in `state/`
what training carries on from. It is written as `.step-NNNNNNN`; only what is whole gets its name.
"""

import shutil
import warnings
from collections.abc import Callable
from concurrent.futures import Future, wait
from pathlib import Path
from threading import Thread

import torch
import torch.distributed as dist

from fitv2.checkpoint import Card, checkpoints, save_model, step_of
from fitv2.errors import UserError
from fitv2.files import full_disk_named
from fitv2.model import FiT
from fitv2.runtime import World
from fitv2.training_state import State, write_state


class Saver:
    """Writes the checkpoints of a run, one at a time, all processes together."""

    def __init__(self, run: Path, card: Card, world: World, keep: int, milestone_every: int | None) -> None:
        self.run, self.card, self.world = run, card, world
        self.keep, self.milestone_every = keep, milestone_every
        self.writing: tuple[int, Future[None]] | None = None
        self.last: int | None = None  # step whose checkpoint was begun last

    def clean(self) -> None:
        """Remove what a process that was killed left half-written."""
        for partial in self.run.glob("checkpoints/.step-*"):
            shutil.rmtree(partial)

    def save(self, step: int, state: State, average: FiT | None) -> None:
        """Begin to write a checkpoint, after the one before is written.

        `state` and `average` (of the first process; in the others None) may not change any more.
        """
        self.finish()
        partial = self._folder(step, ".")
        self.last = step
        self.writing = step, in_background(lambda: self._write(partial, state, average))

    def look(self) -> None:
        """Give a checkpoint its name if it is written by now. Raises as `finish`."""
        if self.writing is not None and self.writing[1].done():
            self.finish()

    def finish(self) -> None:
        """Wait until a checkpoint is written. Raises UserError when it cannot be."""
        if self.writing is None:
            return
        (step, written), self.writing = self.writing, None
        partial, folder = self._folder(step, "."), self._folder(step)
        try:
            written.result()
            if self.world.first:
                partial.rename(folder)
                self._prune()
        except Exception as error:
            if self.world.first and written.done():
                shutil.rmtree(partial, ignore_errors=True)
            reason = " ".join(str(error).split())[-300:]
            raise UserError(f"checkpoint {folder} cannot be written: {reason}") from error

    def abandon(self, seconds: float) -> None:
        """Give a checkpoint that is being written some time more; that it fails is only a warning.

        For when there is a graver error, which may be that another process is gone.
        """
        if self.writing is None:
            return
        step, written = self.writing
        wait([written], seconds)
        if not written.done():
            self.writing = None  # the next start removes what there is
            warnings.warn(f"checkpoint of step {step} is left half-written", stacklevel=2)
            return
        try:
            self.finish()
        except UserError as error:
            warnings.warn(str(error), stacklevel=2)

    def _folder(self, step: int, prefix: str = "") -> Path:
        return self.run / "checkpoints" / f"{prefix}step-{step:07d}"

    def _write(self, partial: Path, state: State, average: FiT | None) -> None:
        if self.world.device.index is not None:
            torch.accelerator.set_device_index(self.world.device.index)  # each thread has its own
        with full_disk_named(self.run):
            if self.world.first:
                (partial / "state").mkdir(parents=True)
            if self.world.group is not None:
                dist.barrier(self.world.group)
            if average is not None:
                save_model(average, self.card, partial / "ema")
            weights = sorted((partial / "ema").glob("*.safetensors")) if self.world.first else []
            write_state(state, partial / "state", self.world.group, weights)

    def _prune(self) -> None:
        """Remove all but the newest and the milestones."""
        for old in checkpoints(self.run)[: -self.keep]:
            if self.milestone_every is None or step_of(old) % self.milestone_every:
                shutil.rmtree(old)


def in_background(work: Callable[[], None]) -> Future[None]:
    """The result of `work` in a thread that does not keep the process alive."""
    future: Future[None] = Future()

    def run() -> None:
        try:
            work()
            future.set_result(None)
        except BaseException as error:
            future.set_exception(error)

    Thread(target=run, daemon=True).start()
    return future
