import math
from functools import partial

import pytest
import torch
from torchdiffeq import odeint

from fitv2.diffusion.solvers import (
    ADAPTIVE,
    DOPRI5,
    EULER,
    FIXED,
    adams_bashforth,
    adaptive,
    euler_maruyama,
    fixed,
    jump,
    stochastic_heun,
)

METHODS = FIXED | ADAPTIVE


def field(x, t):
    """dx/dt = x·cos t: x(t) = x(0)·exp(sin t)."""
    return x * torch.cos(t)


def error(method, steps, stop=2.0):
    times = torch.linspace(0, stop, steps + 1, dtype=torch.double)
    x = fixed(method, field, torch.ones(1, dtype=torch.double), times)
    return abs(x.item() - math.exp(math.sin(stop)))


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_order_of_convergence(method):
    measured = math.log2(error(method, 64) / error(method, 128))
    assert measured == pytest.approx(method.order, abs=0.2)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_tableaus_are_consistent(method):
    assert sum(method.weights) == pytest.approx(1)
    assert sum(method.error) == pytest.approx(0, abs=1e-12)
    sums = [0, *map(sum, method.stages)]
    assert sums == pytest.approx(method.nodes)


@pytest.mark.parametrize("name", ["euler", "heun", "midpoint", "heun3", "rk4"])
def test_fixed_steps_equal_torchdiffeq(name):
    times = torch.linspace(0, 2, 9, dtype=torch.double)
    start = torch.tensor([1.0, -0.3], dtype=torch.double)
    theirs = odeint(lambda t, x: field(x, t), start, times, method={"heun": "heun2"}.get(name, name))[-1]
    torch.testing.assert_close(fixed(FIXED[name], field, start, times), theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["euler", "heun", "rk4"])
def test_progress_ends_at_one(name):
    seen = []
    fixed(FIXED[name], field, torch.ones(1), torch.linspace(0, 1, 6), lambda done, x: seen.append(done) or x)
    assert seen == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])


SOLVERS = {
    **{name: partial(fixed, method) for name, method in FIXED.items()},
    "ab2": adams_bashforth,
    "dopri5": partial(adaptive, DOPRI5, spread=lambda b: b, mean=lambda x: x),
    "euler-maruyama": lambda *given: euler_maruyama(still, still, *given[1:3], lambda: 0.0, given[3]),
    "stochastic-heun": lambda *given: stochastic_heun(still, still, *given[1:3], lambda: 0.0, given[3]),
    "any-step": lambda *given: jump(lambda x, t, r: still(x), *given[1:]),
}


def still(x, *_):
    return torch.zeros_like(x)


@pytest.mark.parametrize("name", SOLVERS)
def test_what_a_step_is_changed_to_goes_on(name):
    """Where nothing moves, the end is the sum of what was added after each step."""
    added = []

    def add(done, x):
        added.append(done)
        return x + done

    end = SOLVERS[name](still, torch.ones(1), torch.linspace(0, 1, 6), add)
    assert end.item() == pytest.approx(1 + sum(added))
    assert added[-1] == 1


def test_ab2_forgets_the_slope_of_where_it_was():
    """dx/dt = −x, put to 5 halfway: still of order 2."""
    errors = []
    for steps in (16, 32, 64):
        end = adams_bashforth(
            lambda x, _: -x, torch.ones(1, dtype=torch.double), torch.linspace(0, 1, steps + 1).double(),
            lambda done, x: torch.full_like(x, 5.0) if done == 0.5 else x,
        )  # fmt: skip
        errors.append(abs(end.item() - 5 * math.exp(-0.5)))
    assert errors[0] / errors[1] > 3.5
    assert errors[1] / errors[2] > 3.5


def test_an_adaptive_solver_goes_on_from_where_it_was_put():
    """dx/dt = −x, put back to 1 after its first step: that step's time is lost."""
    lost = []

    def put_back(done, x):
        if lost:
            return x
        lost.append(done)
        return torch.ones_like(x)

    end = SOLVERS["dopri5"](lambda x, _: -x, torch.ones(1), torch.linspace(0, 1, 2), put_back)
    assert end.item() == pytest.approx(math.exp(-(1 - lost[0])), abs=1e-3)


def test_euler_asks_once_a_step():
    calls = []
    fixed(EULER, lambda x, t: calls.append(float(t)) or x, torch.ones(1), torch.linspace(0, 1, 5))
    assert calls == pytest.approx([0, 0.25, 0.5, 0.75])


@pytest.mark.parametrize("solve", [euler_maruyama, stochastic_heun])
def test_stochastic_solvers_on_a_process_with_known_moments(solve):
    """Ornstein–Uhlenbeck, dx = −x·dt + √2·dW from 2: mean 2·e^−t, variance 1 − e^−2t."""
    rng = torch.Generator().manual_seed(0)
    start = torch.full((200_000,), 2.0)
    draw = lambda: torch.randn(start.shape, generator=rng)  # noqa: E731
    x = solve(lambda x, _: -x, torch.ones_like, start, torch.linspace(0, 1, 101), draw)
    assert x.mean().item() == pytest.approx(2 * math.exp(-1), abs=0.01)
    assert x.var().item() == pytest.approx(1 - math.exp(-2), abs=0.02)


@pytest.mark.parametrize("solve", [euler_maruyama, stochastic_heun])
def test_without_noise_they_are_the_ode_solvers(solve):
    times, start = torch.linspace(0, 2, 41, dtype=torch.double), torch.ones(1, dtype=torch.double)
    x = solve(field, torch.zeros_like, start, times, lambda: torch.ones(1))
    expected = fixed(EULER if solve is euler_maruyama else FIXED["heun"], field, start, times)
    torch.testing.assert_close(x, expected)


RATES_B = torch.tensor([0.5, -3.0, 20.0], dtype=torch.double)
LENGTHS = torch.tensor([2, 1, 3])


def stiff(rates_B, lengths, log=None):
    """Systems of different speed: dx/dt = rate·(cos(rate·t) − x)."""
    rates_T1 = rates_B.repeat_interleave(lengths)[:, None]

    def velocity(x, t_B):
        t = t_B.expand(len(rates_B)).repeat_interleave(lengths)[:, None]
        if log is not None:
            log.append(t_B)
        return rates_T1 * (torch.cos(rates_T1 * t) - x)

    return velocity


def solve(rates_B, lengths, **options):
    spread = lambda value: value.repeat_interleave(lengths)[:, None]  # noqa: E731
    mean = lambda value: torch.stack([v.mean() for v in value.split(lengths.tolist())])  # noqa: E731
    start = torch.full((int(lengths.sum()), 2), 0.3, dtype=torch.double)
    times = torch.tensor(options.pop("times", [0.0, 1.0]), dtype=torch.double)
    velocity = options.pop("velocity", stiff(rates_B, lengths))
    method = options.pop("method", DOPRI5)
    return adaptive(method, velocity, options.pop("start", start), times, spread=spread, mean=mean, **options)


# Fehlberg's pair estimates the error of its first-order half: it needs a tighter tolerance.
@pytest.mark.parametrize(
    ("name", "tolerance", "reached"),
    [("dopri5", 1e-8, 1e-7), ("bosh3", 1e-6, 1e-5), ("adaptive-heun", 1e-6, 1e-4), ("fehlberg2", 1e-8, 1e-4)],
)
def test_adaptive_solvers_reach_what_they_promise(name, tolerance, reached):
    options = {"rtol": tolerance, "atol": tolerance / 100, "max_steps": 20_000}
    ours = solve(RATES_B, LENGTHS, method=ADAPTIVE[name], **options)
    start = torch.full((6, 2), 0.3, dtype=torch.double)
    velocity = stiff(RATES_B, LENGTHS)
    theirs = odeint(
        lambda t, x: velocity(x, t), start, torch.tensor([0.0, 1.0], dtype=torch.double),
        method="dopri5", rtol=1e-10, atol=1e-12,
    )[-1]  # fmt: skip
    torch.testing.assert_close(ours, theirs, rtol=reached, atol=reached)


def test_a_system_does_not_depend_on_its_neighbours():
    together = solve(RATES_B, LENGTHS)
    pieces = zip(RATES_B.split(1), LENGTHS.split(1), together.split(LENGTHS.tolist()), strict=True)
    for rate, length, part in pieces:
        assert torch.equal(solve(rate, length), part)


def test_dopri5_runs_backwards():
    forth = solve(RATES_B, LENGTHS, rtol=1e-9, atol=1e-11, times=[0.0, 0.3])
    back = solve(RATES_B, LENGTHS, rtol=1e-9, atol=1e-11, times=[0.3, 0.0], start=forth)
    torch.testing.assert_close(back, torch.full_like(back, 0.3), rtol=1e-5, atol=1e-6)


def test_dopri5_gives_up_by_saying_so():
    with pytest.raises(FloatingPointError, match=r"did not reach t=1\.0 in 3 steps"):
        solve(RATES_B, LENGTHS, rtol=1e-12, atol=1e-14, max_steps=3)


def test_adaptive_solvers_stop_at_once_on_numbers_that_are_not_finite():
    asked = []

    def velocity(x, t_B):
        asked.append(t_B)
        return torch.where((t_B > 0.4)[0], torch.full_like(x, torch.nan), torch.ones_like(x))

    with pytest.raises(FloatingPointError, match="not finite"):
        solve(RATES_B[:1], LENGTHS[:1], velocity=velocity, max_steps=100_000)
    assert len(asked) < 2_000


def test_a_step_that_overflows_is_shortened_and_the_solution_is_reached():
    def velocity(x, t_B):
        return torch.where(x.abs() > 10, torch.full_like(x, torch.nan), 3 * torch.ones_like(x))

    reached = solve(RATES_B[:1], LENGTHS[:1], velocity=velocity)
    torch.testing.assert_close(reached, torch.full_like(reached, 3.3))
