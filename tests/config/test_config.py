import dataclasses
import typing

import pytest
import torch

from fitv2.config import (
    FREE,
    Architecture,
    Diffusion,
    Encoding,
    Guidance,
    Positions,
    Rope,
    Sampling,
    Solver,
    Training,
)
from fitv2.config.names import Objective
from fitv2.diffusion.flow import PREDICTIONS, TIMES, WEIGHTS
from fitv2.diffusion.objective import OBJECTIVES, objective_of
from fitv2.diffusion.paths import FORMS, PATHS, diffusion
from fitv2.diffusion.transport import SOLVERS
from fitv2.errors import UserError
from fitv2.rope import METHODS
from fitv2.training.optim import OPTIMIZERS

TINY = {"depth": 1, "width": 32, "heads": 2}


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Rope("ntk"), "give `train_side`, the rows of the largest square"),
        (lambda: Rope(attention_scale="paper"), "give `train_side`"),
        (lambda: objective_of(Architecture(**TINY, path="ddpm")), "predicts noise"),
        (lambda: objective_of(Architecture(**TINY, path="gvp", prediction="data")), "for `path` linear"),
        (lambda: Architecture(**TINY, time_shift=0), "`time_shift` is 0"),
        (lambda: Architecture(1, 8, 2, rope=Rope("ntk", train_side=4)), "heads of at least 8"),
        (lambda: Guidance(guidance_interval=(0.5, 0.5)), "two rising times"),
        (lambda: Guidance(float("nan")), "`guidance_scale` is nan"),
        (lambda: Guidance(guidance_channels=0), "`guidance_channels` is 0"),
        (lambda: Sampling(steps=0), "`steps` is 0"),
        (lambda: Sampling(rtol=float("nan")), "`rtol` is nan"),
        (lambda: Sampling(last_step_size=1.0), "`last_step_size` is 1.0"),
        (lambda: Training(batch_size=0), "`batch_size` is 0"),
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
    assert {*options(Training, "times")} == {*TIMES}
    assert {*options(Training, "optimizer")} == {*OPTIMIZERS}
    assert {*typing.get_args(Objective)} == {*OBJECTIVES}
    assert {*typing.get_args(Diffusion)} == {*FORMS}
    assert {*options(Rope, "extrapolation")} == {*METHODS, "none"}
    for form in typing.get_args(Diffusion):
        assert diffusion(PATHS["linear"], form, torch.tensor(0.5)) >= 0


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"max_tokens": (64, 64)}, "names a limit twice"),
        ({"max_tokens": ()}, "names no limit"),
        ({"max_tokens": (40_000,)}, "at most 32767"),
        ({"patch_size": 0}, "`patch_size` is 0"),
        ({"patch_size": 500}, "at most 128"),
        ({"shard_size": 0}, "`shard_size` is 0"),
        ({"batch_size": 0}, "`batch_size` is 0"),
    ],
)
def test_encodings_that_cannot_be_are_refused(values, said):
    with pytest.raises(UserError, match=said):
        Encoding(**values)


def test_when_may_change_on_resuming_but_not_what_is_learnt():
    assert sorted(FREE) == [
        "check_data", "compile", "decay_steps", "evaluate_every", "evaluate_num", "fsdp_size",
        "grad_accum_steps", "gradient_checkpointing", "keep", "log_every", "milestone_every", "minutes",
        "sample_every", "save_every", "stall_minutes", "steps", "track", "validate_every", "workers",
    ]  # fmt: skip


OWN = Rope("yarn", per_axis=False, attention_scale="paper", train_side=16, grid=(20, 20), base=500.0)


@pytest.mark.parametrize(
    ("positions", "expected"),
    [
        (Positions(), OWN),
        (Positions("ntk"), Rope("ntk", train_side=16, pixels_per_token=8, base=500.0)),
        (Positions("none"), Rope("none", train_side=16, pixels_per_token=8, base=500.0)),
        (
            Positions("pi", "pro2", per_axis=False, train_side=12),
            Rope("pi", False, "pro2", train_side=12, pixels_per_token=8, base=500.0),
        ),
        (Positions(attention_scale="pro1"), dataclasses.replace(
            OWN, attention_scale="pro1", pixels_per_token=8, grid=None)),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_said_of_positions_replaces_the_model_s_own(positions, expected):
    assert positions.apply(OWN, 32, 8) == expected


def test_a_model_that_scales_nothing_is_scaled_from_the_square_it_was_trained_on():
    assert Positions("pi").apply(Rope(), 32, 8) == Rope("pi", train_side=32, pixels_per_token=8)


@pytest.mark.parametrize("positions", [Positions(train_side=8), Positions(per_axis=False)], ids=str)
def test_positions_that_scale_nothing_are_refused(positions):
    with pytest.raises(UserError, match="`train_side` and `per_axis` do nothing without `extrapolation`"):
        positions.apply(Rope(), 16, 16)


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(), ("ab2", 25)),
        (Sampling("euler", 7), ("euler", 7)),
        (Sampling("dopri5"), ("dopri5", 25)),
        (Sampling("stochastic-heun"), ("stochastic-heun", 250)),
        (Sampling("ddim"), ("ddim", 250)),
    ],
    ids=str,
)
def test_a_noisy_solver_takes_ten_times_as_many_steps(sampling, expected):
    assert sampling.resolve() == expected
    assert Sampling().resolve("ddpm") == ("ddpm", 250)
