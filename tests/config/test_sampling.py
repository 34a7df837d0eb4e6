import dataclasses

import pytest

from fitv2.config import Guidance, Positions, Rope, Sampling
from fitv2.errors import UserError


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Guidance(guidance_interval=(0.5, 0.5)), "two rising times"),
        (lambda: Guidance(float("nan")), "`guidance_scale` is nan"),
        (lambda: Guidance(guidance_channels=0), "`guidance_channels` is 0"),
        (lambda: Sampling(steps=0), "`steps` is 0"),
        (lambda: Sampling(rtol=float("nan")), "`rtol` is nan"),
        (lambda: Sampling(last_step_size=1.0), "`last_step_size` is 1.0"),
    ],
)
def test_what_cannot_work_is_refused(make, said):
    with pytest.raises(UserError, match=said):
        make()


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
    assert Sampling().resolve("any-step") == ("any-step", 4)
    assert Sampling(steps=2).resolve("any-step") == ("any-step", 2)
    assert Sampling("ab2").resolve("any-step") == ("ab2", 25)


@pytest.mark.parametrize(
    ("sampling", "said"),
    [
        (Sampling("euler-maruyama", shift=2.0), "`shift` does nothing with `solver` euler-maruyama"),
        (Sampling("dopri5", shift=2.0), "`shift` does nothing with `solver` dopri5"),
        (Sampling("heun", rtol=0.1), "`rtol` does nothing with `solver` heun"),
        (Sampling(eta=1.0), "`eta` does nothing with `solver` ab2"),
        (Sampling("unipc", last_step="euler"), "`last_step` does nothing with `solver` unipc"),
    ],
    ids=str,
)
def test_settings_that_a_solver_does_not_read_are_refused(sampling, said):
    with pytest.raises(UserError, match=said):
        sampling.resolve()


def test_settings_that_a_solver_reads_are_taken():
    for sampling in (
        Sampling("euler-maruyama", diffusion="linear", last_step="none"), Sampling("dopri5", atol=1e-3),
        Sampling("ddim", eta=0.5), Sampling("dpm++", shift=2.0), Sampling(shift=2.0),
    ):  # fmt: skip
        sampling.resolve()
    with pytest.raises(UserError, match="`eta` does nothing with `solver` any-step"):
        Sampling(eta=1.0).resolve("any-step")
