"""Solvers of dx/dt = velocity(x, t) and of its stochastic relatives. They know nothing of images or models.

`x` is any float tensor. Times run from `times[0]` to `times[-1]`, in either direction.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

Velocity = Callable[..., Tensor]  # (x, t) → dx/dt, of the shape of x
# Called after a step with the share of the way that is done, 0 to 1, and x. What it returns goes on: x
# itself, or another tensor where it is to be changed.
OnStep = Callable[[float, Tensor], Tensor]


def no_change(_: float, x: Tensor) -> Tensor:
    """What is called after a step where nobody asks."""
    return x


def part_of(on_step: OnStep, share: float) -> OnStep:
    """What is called after the steps of the first `share` of a way."""
    return lambda done, x: on_step(share * done, x)


@dataclass(frozen=True)
class Tableau:
    """A Runge–Kutta method, as Butcher writes it. Stage i is at t + nodes[i]·dt."""

    order: int
    nodes: tuple[float, ...]
    stages: tuple[tuple[float, ...], ...]  # of earlier slopes, for each stage but the first
    weights: tuple[float, ...]
    error: tuple[float, ...] = ()  # weights minus those of the embedded method, where there is one

    @property
    def last_is_next(self) -> bool:
        """Whether the last stage's slope is the next step's first."""
        return self.weights == (*self.stages[-1], 0.0) if self.stages else False


EULER = Tableau(1, (0,), (), (1,))
HEUN = Tableau(2, (0, 1), ((1,),), (1 / 2, 1 / 2))
MIDPOINT = Tableau(2, (0, 1 / 2), ((1 / 2,),), (0, 1))
HEUN3 = Tableau(3, (0, 1 / 3, 2 / 3), ((1 / 3,), (0, 2 / 3)), (1 / 4, 0, 3 / 4))
# Kutta's 3/8 rule: what torchdiffeq, and so the released code, calls rk4.
RK4 = Tableau(
    4, (0, 1 / 3, 2 / 3, 1), ((1 / 3,), (-1 / 3, 1), (1, -1, 1)), (1 / 8, 3 / 8, 3 / 8, 1 / 8)
)  # fmt: skip

# Dormand & Prince, "A family of embedded Runge–Kutta formulae" (1980), table 2.
DOPRI5 = Tableau(
    order=5,
    nodes=(0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1, 1),
    stages=(
        (1 / 5,),
        (3 / 40, 9 / 40),
        (44 / 45, -56 / 15, 32 / 9),
        (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
        (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
        (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
    ),
    weights=(35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84, 0),
    error=(71 / 57600, 0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40),
)
# Bogacki & Shampine, "A 3(2) pair of Runge–Kutta formulas" (1989).
BOSH3 = Tableau(
    order=3,
    nodes=(0, 1 / 2, 3 / 4, 1),
    stages=((1 / 2,), (0, 3 / 4), (2 / 9, 1 / 3, 4 / 9)),
    weights=(2 / 9, 1 / 3, 4 / 9, 0),
    error=(-5 / 72, 1 / 12, 1 / 9, -1 / 8),
)
# Fehlberg, NASA TR R-315 (1969): the pair of orders 1 and 2.
FEHLBERG2 = Tableau(
    order=2,
    nodes=(0, 1 / 2, 1),
    stages=((1 / 2,), (1 / 256, 255 / 256)),
    weights=(1 / 512, 255 / 256, 1 / 512),
    error=(-1 / 512, 0, 1 / 512),
)
ADAPTIVE_HEUN = Tableau(2, (0, 1), ((1,),), (1 / 2, 1 / 2), error=(-1 / 2, 1 / 2))

FIXED = {"heun": HEUN, "euler": EULER, "midpoint": MIDPOINT, "heun3": HEUN3, "rk4": RK4}
ADAPTIVE = {"dopri5": DOPRI5, "bosh3": BOSH3, "fehlberg2": FEHLBERG2, "adaptive-heun": ADAPTIVE_HEUN}


def fixed(
    method: Tableau, velocity: Velocity, x: Tensor, times: Tensor, on_step: OnStep = no_change
) -> Tensor:
    """The method's steps between neighbouring `times` (steps+1,)."""
    for i, (t, dt) in enumerate(zip(times[:-1], times.diff(), strict=True), 1):
        x, _ = _step(method, velocity, x, t, dt, dt, velocity(x, t))
        x = on_step(i / (len(times) - 1), x)
    return x


def adams_bashforth(velocity: Velocity, x: Tensor, times: Tensor, on_step: OnStep = no_change) -> Tensor:
    """Steps between neighbouring `times` (steps+1,), each led by the slope before it too: order 2.

    One evaluation a step, where Heun takes two. The first step is Euler's. Hairer, Nørsett & Wanner,
    Solving Ordinary Differential Equations I, III.1 and, for steps of unequal length, III.5.
    """
    before, length = None, 1.0
    for i, (t, dt) in enumerate(zip(times[:-1], times.diff(), strict=True), 1):
        slope = velocity(x, t)
        x = x + dt * (slope if before is None else slope + dt / (2 * length) * (slope - before))
        seen = on_step(i / (len(times) - 1), x)
        before, length, x = (slope if seen is x else None), dt, seen  # the slope before is of another place
    return x


def _step(
    method: Tableau, velocity: Velocity, x: Tensor, t: Tensor, step: Tensor, dt: Tensor, slope: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """One step and its slopes; `dt` is `step` in a shape that broadcasts against `x`."""
    slopes = [slope]
    for node, stage in zip(method.nodes[1:], method.stages, strict=True):
        slopes.append(velocity(x + dt * _combine(stage, slopes), t + node * step))
    return x + dt * _combine(method.weights, slopes), slopes


def _combine(weights: tuple[float, ...], slopes: list[Tensor]) -> Tensor:
    terms = [w * slope for w, slope in zip(weights, slopes, strict=True) if w]
    return terms[0] if len(terms) == 1 else torch.stack(terms).sum(0)


def adaptive(
    method: Tableau,
    velocity: Velocity,
    x: Tensor,
    times: Tensor,
    on_step: OnStep = no_change,
    *,
    spread: Callable[[Tensor], Tensor],
    mean: Callable[[Tensor], Tensor],
    rtol: float = 1e-3,
    atol: float = 1e-4,
    max_steps: int = 1000,
) -> Tensor:
    """An embedded method with a step size of its own for each of B independent systems in `x`.

    So a system's solution does not depend on its neighbours. `velocity` gets times (B,); `spread`
    repeats (B,) over a system's entries so that it broadcasts against `x`, `mean` averages `x` over
    them to (B,). Only the ends of `times` count. Raises FloatingPointError after `max_steps` steps, at a
    slope that is not finite, and where steps would have to be too small for `t` to change.
    Step control: Hairer, Nørsett & Wanner, Solving Ordinary Differential Equations I, II.4.
    """
    start, stop = float(times[0]), float(times[-1])
    norm = lambda value, scale: mean((value / scale).square()).sqrt()  # noqa: E731
    t = torch.full_like(mean(x), start)
    slope = velocity(x, t)
    step = _first_step(method, velocity, x, t, slope, stop - start, norm, spread, rtol, atol)
    for _ in range(max_steps):
        remaining = stop - t
        last = step.abs() >= remaining.abs()
        step = torch.where(last, remaining, step)
        if bool(((t + step == t) & (t != stop)).any()) or not bool(slope.isfinite().all()):
            raise FloatingPointError(
                "the model gives numbers that are not finite, or jump: the solver cannot follow"
            )
        dt = spread(step)
        x_next, slopes = _step(method, velocity, x, t, step, dt, slope)
        next_slope = slopes[-1] if method.last_is_next else velocity(x_next, t + step)
        scale = atol + rtol * torch.maximum(x.abs(), x_next.abs())
        # A step far too long may overflow: it is refused like any other.
        error = norm(dt * _combine(method.error, slopes), scale).nan_to_num(math.inf, math.inf)
        accepted = error <= 1
        t = torch.where(accepted, torch.where(last, torch.full_like(t, stop), t + step), t)
        keep = spread(accepted)
        x, slope = torch.where(keep, x_next, x), torch.where(keep, next_slope, slope)
        step = step * (0.9 * error.clamp_min(1e-10) ** (-1 / method.order)).clamp(0.2, 10.0)
        done = (t - start) / (stop - start)
        seen = on_step(float(done.min()), x) if bool(accepted.any()) else x
        if bool((done == 1).all()):
            return seen
        if seen is not x:
            x, slope = seen, velocity(seen, t)
    raise FloatingPointError(f"the solver did not reach t={stop} in {max_steps} steps")


def _first_step(
    method: Tableau,
    velocity: Velocity,
    x: Tensor,
    t: Tensor,
    slope: Tensor,
    span: float,
    norm: Callable[[Tensor, Tensor], Tensor],
    spread: Callable[[Tensor], Tensor],
    rtol: float,
    atol: float,
) -> Tensor:
    """Hairer, Nørsett & Wanner's starting step (B,), signed like `span`."""
    scale = atol + rtol * x.abs()
    d0, d1 = norm(x, scale), norm(slope, scale)
    h0 = torch.where((d0 < 1e-5) | (d1 < 1e-5), torch.full_like(d0, 1e-6), 0.01 * d0 / d1)
    h0 = h0.clamp_max(abs(span)).copysign(torch.tensor(span))
    d2 = norm(velocity(x + spread(h0) * slope, t + h0) - slope, scale) / h0.abs()
    steepest = torch.maximum(d1, d2)
    h1 = (0.01 / steepest) ** (1 / method.order)
    h1 = torch.where(steepest <= 1e-15, h0.abs().mul(1e-3).clamp_min(1e-6), h1)
    return torch.minimum(100 * h0.abs(), h1).clamp_max(abs(span)).copysign(torch.tensor(span))


MULTISTEP = {"ab2": adams_bashforth}


def jump(velocity: Velocity, x: Tensor, times: Tensor, on_step: OnStep = no_change) -> Tensor:
    """x + (r − t)·u(x, t, r) between neighbouring `times` (steps+1,): exact, if u is the mean velocity.

    `velocity` gets both times of a step.
    """
    for i, (t, target) in enumerate(pairwise(times), 1):
        x = x + (target - t) * velocity(x, t, target)
        x = on_step(i / (len(times) - 1), x)
    return x


JUMPS = {"any-step": jump}


# Stochastic -------------------------------------------------------------------------------------


def euler_maruyama(
    drift: Velocity,
    strength: Callable[[Tensor], Tensor],
    x: Tensor,
    times: Tensor,
    draw: Callable[[], Tensor],
    on_step: OnStep = no_change,
) -> Tensor:
    """dx = drift·dt + √(2·strength(t))·dW, half an order; `draw` gives standard normal tensors like `x`.

    Running backwards, `drift` must be that of the reversed process.
    """
    for i, (t, dt) in enumerate(zip(times[:-1], times.diff(), strict=True), 1):
        kick = (2 * strength(t) * dt.abs()).sqrt() * draw()
        x = x + dt * drift(x, t) + kick
        x = on_step(i / (len(times) - 1), x)
    return x


def stochastic_heun(
    drift: Velocity,
    strength: Callable[[Tensor], Tensor],
    x: Tensor,
    times: Tensor,
    draw: Callable[[], Tensor],
    on_step: OnStep = no_change,
) -> Tensor:
    """Euler-Maruyama with Heun's step for the drift, after the noise of the step is in (SiT's)."""
    for i, (t, dt) in enumerate(zip(times[:-1], times.diff(), strict=True), 1):
        x = x + (2 * strength(t) * dt.abs()).sqrt() * draw()
        slope = drift(x, t)
        x = x + dt / 2 * (slope + drift(x + dt * slope, t + dt))
        x = on_step(i / (len(times) - 1), x)
    return x


STOCHASTIC = {"euler-maruyama": euler_maruyama, "stochastic-heun": stochastic_heun}
