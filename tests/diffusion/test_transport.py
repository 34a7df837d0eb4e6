"""Flows whose answer is known: data N(m, s²) in every number, with its exact velocity."""

import pytest
import torch

from conftest import GAUSSIAN_MEAN as MEAN
from conftest import GAUSSIAN_STD as STD
from conftest import gaussian, noise_of
from fitv2.config import Sampling
from fitv2.diffusion.flow import Flow
from fitv2.diffusion.paths import PATHS
from fitv2.diffusion.scheduled import SCHEDULERS
from fitv2.diffusion.solvers import ADAPTIVE, JUMPS, STOCHASTIC
from fitv2.diffusion.transport import SOLVERS, stochastic_interval, transport
from fitv2.errors import UserError
from fitv2.runtime.rng import generator
from fitv2.tokens import Layout

FORMS = ("constant", "sbdm", "sigma", "linear", "decreasing", "increasing-decreasing")


def moved(flow, layout, x, sampling, to_noise=False, first=0):
    rngs = [generator(first + i) for i in range(len(layout))]
    return transport(flow, gaussian(flow, layout), layout, x, rngs, sampling, to_noise=to_noise)


@pytest.mark.parametrize("path", ["linear", "gvp"])
@pytest.mark.parametrize(
    "solver", [name for name in SOLVERS if name not in (*STOCHASTIC, *JUMPS, *SCHEDULERS)]
)
def test_odes_map_noise_to_the_data_and_back(path, solver):
    """The exact flow of a Gaussian is x0 → MEAN + STD·x0."""
    flow, layout = Flow(path), Layout.of([(3, 4), (1, 2)])
    noise = noise_of(layout, 3)
    precise = {"rtol": 1e-5, "atol": 1e-6} if solver in ADAPTIVE else {}
    sampling = Sampling(solver, steps=2000 if solver == "euler" else 200, **precise)
    data = moved(flow, layout, noise, sampling)
    torch.testing.assert_close(data, MEAN + STD * noise, rtol=1e-3, atol=1e-3)
    back = moved(flow, layout, data, sampling, to_noise=True)
    torch.testing.assert_close(back, noise, rtol=3e-3, atol=3e-3)


def test_the_way_back_of_a_model_that_predicts_data_starts_beside_it():
    flow, layout = Flow(prediction="data"), Layout.of([(3, 4)])
    noise = noise_of(layout, 3)
    back = moved(flow, layout, MEAN + STD * noise, Sampling(steps=100), to_noise=True)
    torch.testing.assert_close(back, noise, rtol=0.01, atol=0.01)


PICTURES, TOKENS, CHANNELS = (
    8,
    500,
    20,
)  # 80,000 numbers: standard error of their mean STD/283, of std STD/400
EIGHTH = TOKENS * CHANNELS


SDES = [(path, form, solver, "mean") for path in PATHS for form in FORMS for solver in STOCHASTIC]
SDES += [("linear", form, "euler-maruyama", last) for form in FORMS for last in ("tweedie", "euler", "none")]


@pytest.mark.parametrize(("path", "form", "solver", "last_step"), SDES)
def test_every_sde_has_the_mean_and_variance_of_the_data(path, form, solver, last_step):
    flow, layout = Flow(path), Layout.of([(1, TOKENS)] * PICTURES)
    # The last step adds no noise: the longer it is, the less of the variance is there.
    sampling = Sampling(solver, 400, diffusion=form, last_step=last_step, last_step_size=0.002)
    data = moved(flow, layout, noise_of(layout, CHANNELS, first=100), sampling)
    assert data.mean().item() == pytest.approx(MEAN, abs=0.012)
    assert data.std().item() == pytest.approx(STD, abs=0.015)
    eighths = data.flatten().sort().values[[EIGHTH, -EIGHTH]].tolist()  # the shape is Gaussian too
    assert eighths == pytest.approx([MEAN - 1.1503 * STD, MEAN + 1.1503 * STD], abs=0.03)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("solver", STOCHASTIC)
def test_an_sde_run_backwards_turns_data_into_noise(form, solver):
    flow, layout = Flow(), Layout.of([(1, TOKENS)] * PICTURES)
    data = MEAN + STD * noise_of(layout, CHANNELS, first=50)
    steps = 1600 if form == "sbdm" else 400  # its noise is strong where it ends
    noise = moved(flow, layout, data, Sampling(solver, steps, diffusion=form), to_noise=True)
    assert noise.mean().item() == pytest.approx(0, abs=0.015)
    assert noise.std().item() == pytest.approx(1, abs=0.015)


def test_an_sde_forgets_where_it_started_and_an_ode_does_not():
    flow, layout = Flow(), Layout.of([(1, TOKENS)])
    start = noise_of(layout, CHANNELS)

    def correlation(sampling):
        data = moved(flow, layout, start, sampling, first=9)
        return torch.corrcoef(torch.stack([start.flatten(), data.flatten()]))[0, 1].item()

    assert correlation(Sampling("heun", 50)) == pytest.approx(1, abs=1e-4)
    strong = Sampling("euler-maruyama", 200, diffusion="constant", diffusion_norm=4.0)
    assert abs(correlation(strong)) < 0.1


def test_intervals_are_those_of_the_released_code():
    """(path, prediction, form, last step) → where the SDE starts and stops."""
    for path, prediction, form, last, expected in (
        ("linear", "velocity", "sigma", "mean", (0.0, 0.96)),
        ("linear", "velocity", "sbdm", "mean", (1e-3, 0.96)),
        ("gvp", "noise", "sigma", "mean", (1e-3, 0.96)),
        ("vp", "velocity", "sbdm", "mean", (0.0, 0.96)),
        ("linear", "velocity", "sigma", "none", (0.0, 0.999)),
    ):
        settings = Sampling("euler-maruyama", diffusion=form, last_step=last)
        assert stochastic_interval(Flow(path, prediction), settings) == pytest.approx(expected)


def test_the_number_of_velocities_is_the_number_of_steps():
    flow, layout, calls = Flow(), Layout.of([(1, 2)]), []
    exact = gaussian(flow, layout)

    def counting(x, t):
        calls.append(float(t))
        return exact(x, t)

    noise = noise_of(layout, 3)
    transport(flow, counting, layout, noise, [generator(0)], Sampling("euler-maruyama", 250))
    assert len(calls) == 250
    assert calls[-1] == pytest.approx(0.96)


def test_wrong_requests_are_refused():
    layout = Layout.of([(1, 2)])
    with pytest.raises(UserError, match="did you mean heun"):
        moved(Flow(), layout, noise_of(layout, 3), Sampling("huen"))
    with pytest.raises(UserError, match="at least 2"):
        moved(Flow(), layout, noise_of(layout, 3), Sampling("euler-maruyama", 1))
