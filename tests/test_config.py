import dataclasses
import typing

import pytest
import torch

from fitv2.config import Architecture, Diffusion, Encoding, Guidance, Rope, Sampling, Solver, Training
from fitv2.diffusion.flow import PREDICTIONS, WEIGHTS
from fitv2.diffusion.paths import PATHS, diffusion
from fitv2.diffusion.transport import SOLVERS
from fitv2.errors import UserError
from fitv2.rope import METHODS

TINY = {"depth": 1, "width": 32, "heads": 2}


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Rope("ntk"), "give --train-side, the rows of the largest square"),
        (lambda: Rope(attention_scale="paper"), "give --train-side"),
        (lambda: Architecture(**TINY, path="ddpm"), "predicts noise"),
        (lambda: Architecture(**TINY, path="gvp", prediction="data"), "for --path linear"),
        (lambda: Architecture(**TINY, time_shift=0), "--time-shift is 0"),
        (lambda: Architecture(1, 8, 2, rope=Rope("ntk", train_side=4)), "heads of at least 8"),
        (lambda: Guidance(interval=(0.5, 0.5)), "two rising times"),
        (lambda: Guidance(float("nan")), "--guidance is nan"),
        (lambda: Guidance(channels=0), "--guidance-channels is 0"),
        (lambda: Sampling(steps=0), "--steps is 0"),
        (lambda: Sampling(rtol=float("nan")), "--rtol is nan"),
        (lambda: Sampling(last_step_size=1.0), "--last-step-size is 1.0"),
        (lambda: Training(batch_size=0), "--batch-size is 0"),
    ],
)
def test_what_cannot_work_is_refused(make, said):
    with pytest.raises(UserError, match=said):
        make()


def options(kind, name):
    """The values that the field of a dataclass may have."""
    return typing.get_args(next(f.type for f in dataclasses.fields(kind) if f.name == name))


def test_names_are_those_of_the_tables_they_choose_from():
    assert {*typing.get_args(Solver)} == {*SOLVERS, "ddpm", "ddim"}
    assert {*options(Architecture, "prediction")} == {*PREDICTIONS}
    assert {*options(Architecture, "path")} == {*PATHS, "ddpm"}
    assert {*options(Training, "loss_weight")} == {*WEIGHTS}
    assert {*options(Rope, "extrapolation")} == {*METHODS, "none"}
    for form in typing.get_args(Diffusion):
        assert diffusion(PATHS["linear"], form, torch.tensor(0.5)) >= 0


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"max_tokens": (64, 64)}, "names a limit twice"),
        ({"max_tokens": ()}, "--max-tokens is 0"),
        ({"max_tokens": (40_000,)}, "at most 32767"),
        ({"patch_size": 0}, "--patch-size is 0"),
        ({"patch_size": 500}, "at most 128"),
        ({"shard_size": 0}, "--shard-size is 0"),
        ({"batch_size": 0}, "--batch-size is 0"),
    ],
)
def test_encodings_that_cannot_be_are_refused(values, said):
    with pytest.raises(UserError, match=said):
        Encoding(**values)
