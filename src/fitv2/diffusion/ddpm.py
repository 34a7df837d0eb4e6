"""The diffusion process of FiT v1: 1000 steps of linear β, predicted noise and variance.

Ho et al., arXiv 2006.11239, with the learned-range variance and the hybrid loss of Nichol & Dhariwal,
arXiv 2102.09672. Sampling is diffusers' schedulers, which compute the same. Step 0 is next to data.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Generator, Tensor

from fitv2.conditioning import Condition
from fitv2.config import Architecture, Sampling, Training
from fitv2.diffusion.flow import Model, Output
from fitv2.diffusion.noise import Loss, NoisySample
from fitv2.diffusion.solvers import OnStep, no_change
from fitv2.errors import UserError
from fitv2.tokens import Layout

STEPS = 1000
BETAS = torch.linspace(1e-4, 0.02, STEPS, dtype=torch.float64)
KEPT = torch.cumprod(1 - BETAS, 0)  # ᾱ
KEPT_BEFORE = torch.cat([torch.ones(1, dtype=torch.float64), KEPT[:-1]])
POSTERIOR_VARIANCE = BETAS * (1 - KEPT_BEFORE) / (1 - KEPT)
# The first is 0 and its logarithm infinite: the second stands in for it, as in the released code.
LOG_POSTERIOR_VARIANCE = torch.cat([POSTERIOR_VARIANCE[1:2], POSTERIOR_VARIANCE[1:]]).log()


class DDPM:
    """The objective of FiT v1. Raises UserError for settings that a flow alone can have."""

    def __init__(self, architecture: Architecture | None = None, training: Training | None = None) -> None:
        if architecture and (architecture.prediction, architecture.time_shift) != ("noise", 1):
            raise UserError("with `path` ddpm a model predicts noise, and its times are not shifted")
        if architecture and architecture.early_head:
            raise UserError("`early_head` is for flows, not for `path` ddpm")
        if training and training.direction_weight:
            raise UserError("`direction_weight` is for velocities, which `path` ddpm has none of")
        if training and training.loss_weight != "none":
            raise UserError("`loss_weight` is for flows, not for `path` ddpm")
        if training and training.clean_share:
            raise UserError("`clean_share` is for flows, not for `path` ddpm")

    shuffles = False

    def draw_times(self, rng: Generator, step: int = 0) -> tuple[Tensor]:
        """A random step of the process, ()."""
        return (torch.randint(STEPS, (), generator=rng),)

    def quantiles(self, share: Tensor) -> Tensor:
        """Shares in (0, 1), from noise to data, as steps: all are equally likely."""
        return ((1 - share) * STEPS).long().clamp_max(STEPS - 1)

    def progress(self, t_B: Tensor) -> Tensor:
        """How far steps are from noise (0) to data (1)."""
        return 1 - t_B / STEPS

    def add_noise(
        self, data_TC: Tensor, layout: Layout, noise_TC: Tensor, t_B: Tensor, *more_B: Tensor
    ) -> NoisySample:
        """√ᾱ·data + √(1−ᾱ)·noise at the steps `t_B`."""
        signal, strength = _at(KEPT.sqrt(), t_B, layout), _at((1 - KEPT).sqrt(), t_B, layout)
        return NoisySample(signal * data_TC + strength * noise_TC, layout, t_B, data_TC, noise_TC)

    def loss(self, model: Model, sample: NoisySample, condition: Condition) -> Loss:
        """The error of the noise and of the variance of each image."""
        error_B = self.error(model(sample.x_TC, sample.layout, sample.t_B, condition), sample)
        return Loss(error_B, error_B)

    def held_out_errors(self, model: Model, sample: NoisySample, condition: Condition) -> dict[str, Tensor]:
        """As the loss."""
        return {"validation": self.loss(model, sample, condition).error_B}

    def error(self, output_TC: Tensor, sample: NoisySample) -> Tensor:
        """Squared error of the noise, plus the variational bound in bits for the variance alone, (B,).

        The released code's mean of the bound runs over padding too, where it has no gradient.
        """
        noise_TC, range_TC = output_TC.float().chunk(2, dim=1)
        squared = (noise_TC - sample.noise_TC).square()
        bound = _bound(noise_TC.detach(), range_TC, sample)
        return sample.mean((squared + bound).mean(1))

    def generate(
        self,
        output: Output,
        layout: Layout,
        x_TC: Tensor,
        generators: Sequence[Generator],
        sampling: Sampling,
        on_step: OnStep = no_change,
    ) -> Tensor:
        """From noise `x_TC` to data; `output` is the guided model, noise and variance (T, 2C).

        Raises UserError for a solver of flows, and as `scheduler` does.
        """
        solver, steps = sampling.resolve("ddpm")
        if solver not in SCHEDULERS:
            kinds = " or ".join(SCHEDULERS)
            raise UserError(f"{solver} follows a flow; this model is a DDPM: choose {kinds}")
        return denoise(
            output, layout, x_TC, generators, solver=solver, steps=steps, eta=sampling.eta, on_step=on_step,
        )  # fmt: skip


def _at(table: Tensor, t_B: Tensor, layout: Layout) -> Tensor:
    """A table's entries at each image's step, as a float32 column over its tokens."""
    return layout.spread(table.to(t_B.device)[t_B].float())[:, None]


def _bound(noise_TC: Tensor, range_TC: Tensor, sample: NoisySample) -> Tensor:
    """The term of the variational bound at each image's step, in bits, (T, C).

    KL(q(x_{t−1}|x_t, x_0) ‖ p(x_{t−1}|x_t)), and at step 0 −log p(x_0|x_1) of levels 1/127.5 apart.
    """

    def at(table: Tensor) -> Tensor:
        return _at(table, sample.t_B, sample.layout)

    x_TC = sample.x_TC
    predicted = at((1 / KEPT).sqrt()) * x_TC - at((1 / KEPT - 1).sqrt()) * noise_TC
    of_data = at(BETAS * KEPT_BEFORE.sqrt() / (1 - KEPT))
    of_noisy = at((1 - KEPT_BEFORE) * (1 - BETAS).sqrt() / (1 - KEPT))
    true_mean = of_data * sample.data_TC + of_noisy * x_TC
    mean = of_data * predicted + of_noisy * x_TC
    true_log_variance = at(LOG_POSTERIOR_VARIANCE)
    log_variance = torch.lerp(true_log_variance, at(BETAS.log()), (range_TC + 1) / 2)
    difference = true_log_variance - log_variance
    kl = 0.5 * (difference.exp() - 1 - difference + (true_mean - mean).square() * (-log_variance).exp())
    decoder = -_log_level(sample.data_TC, mean, 0.5 * log_variance)
    first = sample.layout.spread(sample.t_B == 0)[:, None]
    return torch.where(first, decoder, kl) / math.log(2.0)


def _log_level(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Log-probability of the level [x − 1/255, x + 1/255] under a Gaussian; the outermost are open.

    The normal distribution function is approximated by tanh, as in the released code.
    """

    def cumulative(z: Tensor) -> Tensor:
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))

    below = cumulative((x - mean - 1 / 255) * (-log_scale).exp())
    above = cumulative((x - mean + 1 / 255) * (-log_scale).exp())
    inside = torch.where(x < -0.999, above, torch.where(x > 0.999, 1 - below, above - below))
    return inside.clamp_min(1e-12).log()


# diffusers' schedulers for this process, and what is particular to each.
SCHEDULERS: dict[str, dict[str, Any]] = {
    "ddpm": {"variance_type": "learned_range", "timestep_spacing": "linspace"},
    "ddim": {"timestep_spacing": "leading"},
}


def scheduler(solver: str, steps: int) -> Any:
    """The scheduler of that name on `steps` of its steps.

    Raises UserError for more than 1000 steps, and for DDIM steps that do not divide 1000.
    """
    import diffusers

    if steps > STEPS or (solver == "ddim" and STEPS % steps):
        few = f"at most {STEPS}" if solver == "ddpm" else f"a divisor of {STEPS}"
        raise UserError(f"`steps` is {steps}; with {solver} it must be {few}")
    known = {"beta_start": 1e-4, "beta_end": 0.02, "clip_sample": False, "num_train_timesteps": STEPS}
    made = getattr(diffusers, f"{solver.upper()}Scheduler")(**known, **SCHEDULERS[solver])
    made.alphas_cumprod = KEPT  # theirs is float32: at step 0 its 1 − ᾱ is off by 2e-4
    if solver == "ddim":
        made.set_timesteps(steps)
    else:
        made.set_timesteps(timesteps=respace(steps)[::-1])
    return made


def respace(steps: int) -> list[int]:
    """The kept steps as the released code spreads them: the stride is added up, then rounded.

    diffusers' own spacing rounds products, which falls otherwise for a quarter of all counts.
    """
    stride, place, kept = (STEPS - 1) / (steps - 1) if steps > 1 else 1, 0.0, []
    for _ in range(steps):
        kept.append(round(place))
        place += stride
    return kept


def denoise(
    output: Callable[[Tensor, Tensor], Tensor],
    layout: Layout,
    x_TC: Tensor,
    generators: Sequence[Generator],
    *,
    solver: str = "ddpm",
    steps: int = 250,
    eta: float = 0.0,
    on_step: OnStep = no_change,
) -> Tensor:
    """From noise `x_TC` to data, images of `layout`.

    `output` is (x, step ()) → noise and variance (T, 2C). Each image draws its noise from its own
    generator. Raises UserError as `scheduler` does.
    """
    chosen = scheduler(solver, steps)
    options: dict[str, Any] = {} if solver == "ddpm" else {"eta": eta}
    for i, step in enumerate(chosen.timesteps, 1):
        out = output(x_TC, step.to(x_TC.device))
        if solver == "ddim":  # it has a variance of its own
            out = out.chunk(2, dim=1)[0]
        pieces = zip(out.split(layout.lengths), x_TC.split(layout.lengths), generators, strict=True)
        x_TC = torch.cat(
            [chosen.step(o, int(step), x, generator=rng, **options).prev_sample for o, x, rng in pieces]
        )
        x_TC = on_step(i / steps, x_TC)
    return x_TC
