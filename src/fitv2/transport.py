"""Along a flow: from noise to data, from data to noise, and the likelihood of data.

ODEs and SDEs as in SiT (Ma et al., arXiv 2401.08740); likelihood as in FFJORD (arXiv 1810.01367).
"""

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Generator, Tensor

from fitv2 import solvers
from fitv2.errors import UserError, nearest
from fitv2.flow import Flow, noise
from fitv2.paths import diffusion
from fitv2.settings import Sampling
from fitv2.solvers import Progress, Velocity
from fitv2.tokens import PackedTokens

SOLVERS = (*solvers.FIXED, *solvers.ADAPTIVE, *solvers.STOCHASTIC)
Solve = Callable[..., Tensor]  # (velocity, x, times, progress) → x


@torch.no_grad()
def transport(
    flow: Flow,
    velocity: Velocity,
    packed: PackedTokens,
    x_TC: Tensor,
    generators: Sequence[Generator],
    sampling: Sampling,
    *,
    to_noise: bool = False,
    progress: Progress = lambda _: None,
) -> Tensor:
    """Take images laid out like `packed` from noise `x_TC` to data, or back with `to_noise`.

    With a deterministic solver the way back ends at the noise that gives the data; with a stochastic
    one at a sample of it. Each image's noise along the way is drawn from its own generator. Raises
    UserError for an unknown solver.
    """
    name = sampling.solver or "heun"
    if name in solvers.STOCHASTIC:
        return _stochastic(flow, velocity, packed, x_TC, generators, sampling, to_noise, progress)
    solve = solver_named(name, packed, sampling.rtol, sampling.atol)
    start, stop = flow.interval()
    steps = sampling.steps or 25
    if to_noise:
        # Where the velocity is undefined at data, so near to it that the difference is not seen. A model
        # whose predicted data are off by e has a velocity off by e/(1−t) there.
        times = torch.linspace(stop - 1e-3 if flow.ends_early else stop, start, steps + 1)
        return solve(velocity, x_TC, times.to(x_TC.device), progress)
    times = torch.linspace(start, stop, steps + 1, device=x_TC.device)
    if not flow.ends_early:
        return solve(velocity, x_TC, times, progress)
    x_TC = solve(velocity, x_TC, times[:-1], progress) if steps > 1 else x_TC
    return solvers.fixed(solvers.EULER, velocity, x_TC, times[-2:], progress)


def solver_named(name: str, packed: PackedTokens, rtol: float = 1e-3, atol: float = 1e-4) -> Solve:
    """The ODE solver of that name; a step size is chosen for each image of `packed` by itself."""
    if name in solvers.FIXED:
        return partial(solvers.fixed, solvers.FIXED[name])
    if name not in solvers.ADAPTIVE:
        raise nearest("solver", name, SOLVERS)
    return partial(
        solvers.adaptive,
        solvers.ADAPTIVE[name],
        spread=lambda value_B: packed.spread(value_B)[:, None],
        mean=lambda value_TC: packed.mean_per_image(value_TC.mean(1)),
        rtol=rtol,
        atol=atol,
    )


def _stochastic(
    flow: Flow,
    velocity: Velocity,
    packed: PackedTokens,
    x_TC: Tensor,
    generators: Sequence[Generator],
    sampling: Sampling,
    to_noise: bool,
    progress: Progress,
) -> Tensor:
    """dx = (v ± w·score)·dt + √(2w)·dW: plus towards data, minus towards noise (SiT, eq. 5)."""
    steps = sampling.steps or 250
    if steps < 2:
        raise UserError("--steps must be at least 2 with a stochastic solver")
    start, stop = stochastic_interval(flow, sampling)
    times = torch.linspace(start, stop, steps, device=x_TC.device)  # the last step is one of them
    strength = partial(diffusion, flow.path, sampling.diffusion, norm=sampling.diffusion_norm)
    sign = -1.0 if to_noise else 1.0

    def drift(x: Tensor, t: Tensor) -> Tensor:
        v = velocity(x, t)
        return v + sign * strength(t) * flow.score(v, packed.with_tokens(x), t.expand(len(packed.sizes)))

    def draw() -> Tensor:
        return noise(packed.lengths, x_TC.shape[1], generators).to(x_TC.device)

    solve = solvers.STOCHASTIC[sampling.solver or ""]
    if to_noise:
        # The first step is exact: what the path holds at the last time, given the data. The last is the
        # ODE's, because the noise of some forms (sbdm: (1−t)/t) is without bound at t = 0.
        alpha, sigma = flow.path.coefficients(times[-1])
        size = sampling.last_step_size
        if start + size >= stop:
            raise UserError(f"--last-step-size is {size}; towards noise it must leave room between both ends")
        times = torch.linspace(stop, start + size, steps, device=x_TC.device)
        x_TC = solve(drift, strength, alpha * x_TC + sigma * draw(), times, draw, progress)
        return x_TC - size * velocity(x_TC, times[-1])
    x_TC = solve(drift, strength, x_TC, times, draw, progress)
    return _last_step(flow, velocity, drift, packed, x_TC, times[-1], sampling)


def stochastic_interval(flow: Flow, sampling: Sampling) -> tuple[float, float]:
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
    flow: Flow,
    velocity: Velocity,
    drift: Velocity,
    packed: PackedTokens,
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
    score = flow.score(velocity(x_TC, t), packed.with_tokens(x_TC), t.expand(len(packed.sizes)))
    return (x_TC + sigma**2 * score) / alpha


def log_likelihood(
    flow: Flow,
    velocity: Velocity,
    data: PackedTokens,
    generators: Sequence[Generator],
    sampling: Sampling = Sampling(solver="dopri5", rtol=1e-5, atol=1e-5),  # noqa: B008  frozen
    *,
    probes: int = 1,
    progress: Progress = lambda _: None,
) -> Tensor:
    """log p(data) of each image, (B,) in nats, by the instantaneous change of variables.

    log p(x1) = log N(x0; 0, I) − ∫ div v dt along the ODE (Chen et al., arXiv 1806.07366). The divergence
    is Hutchinson's estimate with `probes` random signs a number, fixed along the way and drawn from
    each image's own generator: unbiased, and exact where the Jacobian is diagonal. `velocity` must not
    be guided. The estimate is of the density of latents, not of pixels.
    """
    if sampling.solver in solvers.STOCHASTIC or probes < 1:
        raise UserError("a likelihood needs an ODE solver and at least one probe")
    channels = data.x_TC.shape[1]
    shape = (probes, channels)
    drawn = [
        torch.randint(0, 2, (n, *shape), generator=rng)
        for n, rng in zip(data.lengths, generators, strict=True)
    ]
    signs_TPC = (2.0 * torch.cat(drawn) - 1.0).to(data.x_TC.device)

    def augmented(state: Tensor, t: Tensor) -> Tensor:
        """The velocity, and beside it each token's part of the divergence as one more channel."""
        with torch.enable_grad():
            x = state[:, :channels].detach().requires_grad_()
            v = velocity(x, t)
            divergence = torch.zeros_like(x[:, :1])
            for i in range(probes):
                signs = signs_TPC[:, i]
                (gradient,) = torch.autograd.grad((v * signs).sum(), x, retain_graph=i + 1 < probes)
                divergence += (gradient * signs).sum(1, keepdim=True) / probes
        return torch.cat([v.detach(), divergence], dim=1)

    start = torch.cat([data.x_TC, torch.zeros_like(data.x_TC[:, :1])], dim=1)
    end = transport(
        flow, augmented, data, start, generators, sampling, to_noise=True, progress=progress
    )  # fmt: skip
    per_token = -0.5 * (end[:, :channels].square() + math.log(2 * math.pi)).sum(1) + end[:, channels]
    return data.sum_per_image(per_token)
