"""What a model is trained on, and how images are made with it. `OBJECTIVES` names every kind.

A new objective is a class with these methods and an entry in the table. One that is a `Flow` can also be
followed from on the way, which growth needs; nobody else asks which one it is.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Generator, Tensor

from fitv2.conditioning import Condition
from fitv2.config import OBJECTIVE_OF_PATH, Architecture, Sampling, Training
from fitv2.diffusion.any_step import AnyStep
from fitv2.diffusion.ddpm import DDPM
from fitv2.diffusion.flow import Flow, Model, Output
from fitv2.diffusion.noise import Loss, NoisySample
from fitv2.diffusion.solvers import OnStep
from fitv2.errors import UserError, nearest
from fitv2.tokens import Layout


class Objective(Protocol):
    """Times run from `progress` 0, noise, to 1, data; what a time is, is the objective's own business."""

    def draw_times(self, rng: Generator, step: int) -> tuple[Tensor, ...]:
        """The random time () of an image at a step of training, and what else is drawn with it."""

    def quantiles(self, share: Tensor) -> Tensor:
        """Shares in (0, 1) as times whose distribution no setting changes: those of validation."""

    def progress(self, t_B: Tensor) -> Tensor:
        """How far times are from noise (0) to data (1)."""

    @property
    def shuffles(self) -> bool:
        """Whether training is to bring the tokens of each image in any order."""

    def add_noise(
        self, data_TC: Tensor, layout: Layout, noise_TC: Tensor, t_B: Tensor, *more_B: Tensor
    ) -> NoisySample:
        """Data with noise in it at times `t_B`; in training `more_B` is what else `draw_times` draws."""

    def loss(self, model: Model, sample: NoisySample, condition: Condition) -> Loss:
        """The loss of each image. It may call the model as often as it needs."""

    def held_out_errors(self, model: Model, sample: NoisySample, condition: Condition) -> dict[str, Tensor]:
        """The error of each held-out image, by what it is the error of; "validation" is that of the model."""

    def generate(
        self,
        output: Output,
        layout: Layout,
        x_TC: Tensor,
        generators: Sequence[Generator],
        sampling: Sampling,
        on_step: OnStep = ...,
    ) -> Tensor:
        """From noise to data; each image draws from its own generator.

        Raises UserError for a solver that does not fit.
        """


OBJECTIVES: dict[str, Callable[[Architecture, Training | None], Objective]] = {
    "flow": Flow.of,
    "any-step": AnyStep.of,
    "ddpm": DDPM,
}


def objective_of(architecture: Architecture, training: Training | None = None) -> Objective:
    """The objective of a model; `training` says how it is trained. Raises UserError for what does not fit."""
    name, path = architecture.objective_name, architecture.path
    if name not in OBJECTIVES:
        raise nearest("objective", name, OBJECTIVES)
    own = OBJECTIVE_OF_PATH.get(path)
    if own is not None and own != name:
        raise UserError(f"`path` {path} is for `objective` {own}")
    if own is None and name in OBJECTIVE_OF_PATH.values():
        raise UserError(
            f"`objective` {name} has a path of its own: leave out `path` {path}, or the objective"
        )
    return OBJECTIVES[name](architecture, training)
