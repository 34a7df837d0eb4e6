import dataclasses
import typing

import torch

from fitv2.config import Architecture, Diffusion, Rope, Solver, Training
from fitv2.config.names import Objective
from fitv2.diffusion.flow import PREDICTIONS, TIMES, WEIGHTS
from fitv2.diffusion.objective import OBJECTIVES
from fitv2.diffusion.paths import FORMS, PATHS, diffusion
from fitv2.diffusion.transport import SOLVERS
from fitv2.rope import METHODS
from fitv2.training.optim import OPTIMIZERS


def options(kind, name):
    """The values that the field of a dataclass may have."""
    return typing.get_args(next(f.type for f in dataclasses.fields(kind) if f.name == name))


def test_names_are_those_of_the_tables_they_choose_from():
    assert {*typing.get_args(Solver)} == {*SOLVERS, "ddpm", "ddim"}
    assert {*options(Architecture, "prediction")} == {*PREDICTIONS}
    assert {*options(Architecture, "path")} == {*PATHS, "ddpm"}
    assert {*options(Training, "loss_weight")} == {*WEIGHTS}
    assert {*options(Training, "times")} == {*TIMES}
    assert {*options(Training, "optimizer")} == {*OPTIMIZERS}
    assert {*typing.get_args(Objective)} == {*OBJECTIVES}
    assert {*typing.get_args(Diffusion)} == {*FORMS}
    assert {*options(Rope, "extrapolation")} == {*METHODS, "none"}
    for form in typing.get_args(Diffusion):
        assert diffusion(PATHS["linear"], form, torch.tensor(0.5)) >= 0
