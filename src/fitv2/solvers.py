"""Solvers of dx/dt = velocity(x, t). They know nothing of images, guidance or models.

`x` is any float tensor. Times run from `times[0]` to `times[-1]`, in either direction.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Velocity = Callable[[Tensor, Tensor], Tensor]  # (x, t) → dx/dt, of the shape of x
Progress = Callable[[float], None]  # called with the share of the way that is done, 0 to 1


def _quiet(_: float) -> None:
    pass


def euler(velocity: Velocity, x: Tensor, times: Tensor, progress: Progress = _quiet) -> Tensor:
    """Euler's method, first order: one evaluation a step. `times` is (steps+1,)."""
    for i, (t, dt) in enumerate(zip(times[:-1], times.diff(), strict=True), 1):
        x = x + dt * velocity(x, t)
        progress(i / (len(times) - 1))
    return x


def heun(velocity: Velocity, x: Tensor, times: Tensor, progress: Progress = _quiet) -> Tensor:
    """Heun's method, second order: two evaluations a step. `times` is (steps+1,)."""
    for i, (t, dt) in enumerate(zip(times[:-1], times.diff(), strict=True), 1):
        slope = velocity(x, t)
        x = x + dt / 2 * (slope + velocity(x + dt * slope, t + dt))
        progress(i / (len(times) - 1))
    return x


# Dormand & Prince, "A family of embedded Runge–Kutta formulae" (1980), table 2. The last row is
# also the fifth-order solution, so its slope is the next step's first.
_DOPRI_C = (1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
_DOPRI_A = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
_DOPRI_ERROR = (  # fifth minus fourth order
    71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40
)  # fmt: skip


def dopri5(
    velocity: Velocity,
    x: Tensor,
    times: Tensor,
    progress: Progress = _quiet,
    *,
    spread: Callable[[Tensor], Tensor],
    mean: Callable[[Tensor], Tensor],
    rtol: float = 1e-3,
    atol: float = 1e-4,
    max_steps: int = 1000,
) -> Tensor:
    """Dormand–Prince 5(4) with a step size of its own for each of B independent systems in `x`.

    So a system's solution does not depend on its neighbours. `velocity` gets times (B,); `spread`
    repeats (B,) over a system's entries so that it broadcasts against `x`, `mean` averages `x` over
    them to (B,). Only the ends of `times` count. Raises FloatingPointError after `max_steps` steps.
    Step control: Hairer, Nørsett & Wanner, Solving Ordinary Differential Equations I, II.4.
    """
    start, stop = float(times[0]), float(times[-1])
    norm = lambda value, scale: mean((value / scale).square()).sqrt()  # noqa: E731
    t = torch.full_like(mean(x), start)
    slope = velocity(x, t)
    step = _first_step(velocity, x, t, slope, stop - start, norm, spread, rtol, atol)
    for _ in range(max_steps):
        remaining = stop - t
        last = step.abs() >= remaining.abs()
        step = torch.where(last, remaining, step)
        slopes, dt = [slope], spread(step)
        for c, row in zip(_DOPRI_C, _DOPRI_A, strict=True):
            x_next = x + dt * _combine(row, slopes)
            slopes.append(velocity(x_next, t + c * step))
        scale = atol + rtol * torch.maximum(x.abs(), x_next.abs())
        error = norm(dt * _combine(_DOPRI_ERROR, slopes), scale)
        accepted = error <= 1
        t = torch.where(accepted, torch.where(last, torch.full_like(t, stop), t + step), t)
        keep = spread(accepted)
        x, slope = torch.where(keep, x_next, x), torch.where(keep, slopes[-1], slope)
        step = step * (0.9 * error.clamp_min(1e-10) ** -0.2).clamp(0.2, 10.0)
        done = (t - start) / (stop - start)
        progress(float(done.min()))
        if bool((done == 1).all()):
            return x
    raise FloatingPointError(f"dopri5 did not reach t={stop} in {max_steps} steps")


def _combine(weights: tuple[float, ...], slopes: list[Tensor]) -> Tensor:
    terms = [w * slope for w, slope in zip(weights, slopes, strict=True) if w]
    return torch.stack(terms).sum(0)


def _first_step(
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
    h1 = torch.where(steepest <= 1e-15, h0.abs().mul(1e-3).clamp_min(1e-6), (0.01 / steepest) ** 0.2)
    return torch.minimum(100 * h0.abs(), h1).clamp_max(abs(span)).copysign(torch.tensor(span))
