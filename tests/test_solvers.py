import math

import pytest
import torch
from torchdiffeq import odeint

from fitv2.solvers import dopri5, euler, heun


def field(x, t):
    """dx/dt = x·cos t: x(t) = x(0)·exp(sin t)."""
    return x * torch.cos(t)


def error(solver, steps, stop=2.0):
    x = solver(
        field, torch.ones(1, dtype=torch.double), torch.linspace(0, stop, steps + 1, dtype=torch.double)
    )
    return abs(x.item() - math.exp(math.sin(stop)))


@pytest.mark.parametrize(("solver", "order"), [(euler, 1), (heun, 2)])
def test_order_of_convergence(solver, order):
    measured = math.log2(error(solver, 128) / error(solver, 256))
    assert measured == pytest.approx(order, abs=0.1)


@pytest.mark.parametrize("solver", [euler, heun])
def test_progress_ends_at_one(solver):
    seen = []
    solver(field, torch.ones(1), torch.linspace(0, 1, 6), seen.append)
    assert seen == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])


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
    return dopri5(velocity, options.pop("start", start), times, spread=spread, mean=mean, **options)


def test_dopri5_agrees_with_torchdiffeq():
    ours = solve(RATES_B, LENGTHS, rtol=1e-8, atol=1e-10)
    start = torch.full((6, 2), 0.3, dtype=torch.double)
    velocity = stiff(RATES_B, LENGTHS)
    theirs = odeint(
        lambda t, x: velocity(x, t), start, torch.tensor([0.0, 1.0], dtype=torch.double),
        method="dopri5", rtol=1e-10, atol=1e-12,
    )[-1]  # fmt: skip
    torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-8)


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
