"""Along a flow: from noise to data, and from data to noise.

ODEs and SDEs as in SiT (Ma et al., arXiv 2401.08740).
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import torch
from torch import Generator, Tensor

from fitv2.config import Sampling
from fitv2.diffusion import solvers
from fitv2.diffusion.noise import draw_noise
from fitv2.diffusion.paths import Path, diffusion
from fitv2.diffusion.scheduled import SCHEDULERS, follow_scheduler, scheduler_named
from fitv2.diffusion.solvers import OnStep, Velocity, no_change, part_of
from fitv2.errors import UserError, nearest
from fitv2.tokens import Layout

SOLVERS = (
    *solvers.FIXED, *solvers.MULTISTEP, *solvers.ADAPTIVE, *solvers.STOCHASTIC, *solvers.JUMPS, *SCHEDULERS,
)  # fmt: skip
Solve = Callable[..., Tensor]  # (velocity, x, times, on_step) → x


class Field(Protocol):
    """What a solver has to know of a flow."""

    @property
    def path_name(self) -> str:
        """The name of the path."""

    @property
    def path(self) -> Path:
        """From noise to data in time."""

    @property
    def ends_early(self) -> bool:
        """Whether the velocity is undefined at data."""

    @property
    def takes_jumps(self) -> bool:
        """Whether the velocity may be asked with a target, for the mean on the way there."""

    def interval(self) -> tuple[float, float]:
        """The times between which the velocity is finite."""

    def score(self, velocity_TC: Tensor, x_TC: Tensor, t_T1: Tensor) -> Tensor:
        """The score of the field with this velocity."""


@torch.no_grad()
def transport(
    flow: Field,
    velocity: Velocity,
    layout: Layout,
    x_TC: Tensor,
    generators: Sequence[Generator],
    sampling: Sampling,
    *,
    to_noise: bool = False,
    begin: float = 0.0,
    on_step: OnStep = no_change,
) -> Tensor:
    """Take images laid out like `layout` from noise `x_TC` to data, or back with `to_noise`.

    `x_TC` may also be what it is at time `begin`; then the steps that lie behind that are left out.

    With a deterministic solver the way back ends at the noise that gives the data; with a stochastic
    one at a sample of it. Each image's noise along the way is drawn from its own generator. `on_step`
    is called after each step. Raises UserError for an unknown solver.
    """
    name, steps = sampling.resolve()
    if name in SCHEDULERS or not isinstance(name, str):
        if to_noise:
            raise UserError("towards noise only solvers of our own lead: `solver` heun, for one")
        scheduler = scheduler_named(name, sampling.shift) if isinstance(name, str) else name
        return follow_scheduler(scheduler, flow, velocity, x_TC, steps, begin, on_step)
    if name in solvers.STOCHASTIC:
        return _stochastic(flow, velocity, layout, x_TC, generators, sampling, to_noise, begin, on_step)
    if name in solvers.JUMPS and (to_noise or not flow.takes_jumps):
        raise UserError(f"`solver` {name} leads any-step models towards data alone: take ab2 here")
    solve = solver_named(name, layout, sampling.rtol, sampling.atol)
    start, stop = flow.interval()
    if to_noise:
        # Where the velocity is undefined at data, so near to it that the difference is not seen. A model
        # whose predicted data are off by e has a velocity off by e/(1−t) there.
        times = torch.linspace(stop - 1e-3 if flow.ends_early else stop, start, steps + 1)
        return solve(velocity, x_TC, times.to(x_TC.device), on_step)
    start, steps = _begun(start, stop, steps, begin)
    times = times_between(start, stop, steps, sampling.shift).to(x_TC.device)
    if not flow.ends_early:
        return solve(velocity, x_TC, times, on_step)
    before = part_of(on_step, (steps - 1) / steps)
    x_TC = solve(velocity, x_TC, times[:-1], before) if steps > 1 else x_TC
    return solvers.fixed(solvers.EULER, velocity, x_TC, times[-2:], on_step)


def times_between(start: float, stop: float, steps: int, shift: float = 1.0) -> Tensor:
    """Times of that many steps (steps+1,); with a shift above 1 they are shorter near the noise.

    What is left of the way, σ, becomes shift·σ / (1 + (shift−1)·σ) (Esser et al., arXiv 2403.03206, eq. 23).
    """
    if shift == 1:
        return torch.linspace(start, stop, steps + 1)
    left = torch.linspace(1, 0, steps + 1)
    return stop - (stop - start) * shift * left / (1 + (shift - 1) * left)


def _begun(start: float, stop: float, steps: int, begin: float, fewest: int = 1) -> tuple[float, int]:
    """Where to start, and as many steps as lie between there and the end, but `fewest`.

    Raises UserError for a beginning that does not lie before the end.
    """
    if begin <= start:
        return start, steps
    if begin >= stop:
        said = "`restart`, and 1 - `strength`,"
        raise UserError(
            f"the start is at time {begin:g}; with this solver it must be below {stop:g}: see {said}"
        )
    return begin, max(fewest, round(steps * (stop - begin) / (stop - start)))


def solver_named(name: str, layout: Layout, rtol: float = 1e-3, atol: float = 1e-4) -> Solve:
    """The ODE solver of that name; a step size is chosen for each image of `layout` by itself."""
    if name in solvers.FIXED:
        return partial(solvers.fixed, solvers.FIXED[name])
    if name in solvers.MULTISTEP | solvers.JUMPS:
        return (solvers.MULTISTEP | solvers.JUMPS)[name]
    if name not in solvers.ADAPTIVE:
        raise nearest("solver", name, SOLVERS)
    return partial(
        solvers.adaptive,
        solvers.ADAPTIVE[name],
        spread=lambda value_B: layout.spread(value_B)[:, None],
        mean=lambda value_TC: layout.mean_per_image(value_TC.mean(1)),
        rtol=rtol,
        atol=atol,
    )


def _stochastic(
    flow: Field,
    velocity: Velocity,
    layout: Layout,
    x_TC: Tensor,
    generators: Sequence[Generator],
    sampling: Sampling,
    to_noise: bool,
    begin: float,
    on_step: OnStep,
) -> Tensor:
    """dx = (v ± w·score)·dt + √(2w)·dW: plus towards data, minus towards noise (SiT, eq. 5)."""
    name, steps = sampling.resolve()
    if steps < 2:
        raise UserError("`steps` must be at least 2 with a stochastic solver")
    start, stop = stochastic_interval(flow, sampling)
    start, steps = _begun(start, stop, steps, begin, fewest=2)
    times = torch.linspace(start, stop, steps, device=x_TC.device)  # the last step is one of them
    strength = partial(diffusion, flow.path, sampling.diffusion, norm=sampling.diffusion_norm)
    sign = -1.0 if to_noise else 1.0

    def drift(x: Tensor, t: Tensor) -> Tensor:
        v = velocity(x, t)
        return v + sign * strength(t) * flow.score(v, x, layout.spread(t.expand(len(layout)))[:, None])

    def draw() -> Tensor:
        return draw_noise(layout.lengths, x_TC.shape[1], generators).to(x_TC.device)

    solve = solvers.STOCHASTIC[name]
    if to_noise:
        # The first step is exact: what the path holds at the last time, given the data. The last is the
        # ODE's, because the noise of some forms (sbdm: (1−t)/t) is without bound at t = 0.
        alpha, sigma = flow.path.coefficients(times[-1])
        size = sampling.last_step_size
        if start + size >= stop:
            raise UserError(f"`last_step_size` is {size}; towards noise it must leave room between both ends")
        times = torch.linspace(stop, start + size, steps, device=x_TC.device)
        x_TC = solve(drift, strength, alpha * x_TC + sigma * draw(), times, draw)
        return x_TC - size * velocity(x_TC, times[-1])
    x_TC = solve(drift, strength, x_TC, times, draw, part_of(on_step, (steps - 1) / steps))
    return on_step(1.0, _last_step(flow, velocity, drift, layout, x_TC, times[-1], sampling))


def stochastic_interval(flow: Field, sampling: Sampling) -> tuple[float, float]:
    """From where to where an SDE is followed: the score is infinite at data, some forms at noise.

    As in the released code where that keeps a margin; where it keeps none (VP, sbdm, no last step) and
    mostly fails, 1e-3.
    """
    start, _ = flow.interval()
    if sampling.diffusion == "sbdm" and flow.path_name != "vp":
        start = 1e-3
    left = sampling.last_step_size if sampling.last_step != "none" else 0.0
    return start, 1.0 - (left or 1e-3)


def _last_step(
    flow: Field,
    velocity: Velocity,
    drift: Velocity,
    layout: Layout,
    x_TC: Tensor,
    t: Tensor,
    sampling: Sampling,
) -> Tensor:
    """The step that adds no noise: the drift's mean, Tweedie's estimate of the data, or the ODE's."""
    if sampling.last_step == "mean":
        return x_TC + sampling.last_step_size * drift(x_TC, t)
    if sampling.last_step == "euler":
        return x_TC + sampling.last_step_size * velocity(x_TC, t)
    if sampling.last_step == "none":
        return x_TC
    alpha, sigma = flow.path.coefficients(t)
    score = flow.score(velocity(x_TC, t), x_TC, layout.spread(t.expand(len(layout)))[:, None])
    return (x_TC + sigma**2 * score) / alpha
