"""Any-step models: the mean velocity of a flow between two times, so that few steps are enough.

Decoupled MeanFlow (Lee et al., arXiv 2510.24474). u(x, t, r) is the mean of the velocity along the flow from
x at time t to time r, so that x + (r − t)·u is where the flow is at r. A trained flow becomes such a model
without new parameters: u(x, t, t) is the velocity, bit for bit. Its derivative along the flow gives the rest,

    u(x, t, r) = v(x, t) + (r − t)·du/dt,

which is taken by central differences ("Transition Models", arXiv 2509.04394): kernels for sequences of
varying length have no exact products with their Jacobian. Time runs from noise, 0, to data, 1, as it does
everywhere here.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Generator, Tensor

from fitv2.conditioning import Condition
from fitv2.config import ANY_STEP, Architecture, Training
from fitv2.diffusion.flow import Flow, Model, logit_normal
from fitv2.diffusion.noise import Loss, NoisySample
from fitv2.errors import UserError
from fitv2.tokens import Layout

# Means of the two logit-normal draws that are t and r (the paper's, of noise: 0.4 and −1.2).
EARLY, LATE = -0.4, 1.2
# Added to an image's error before its logarithm is the loss, so that easy and hard times weigh alike.
SOFTENING = 0.01

ANY = [0]  # image, where no other is to be computed: processes that share a model call it equally often


@dataclass(frozen=True)
class AnyStep(Flow):
    """The objective. Raises UserError where the model does not predict the velocity of a linear path."""

    training: Training = Training()  # noqa: RUF009  frozen
    name = ANY_STEP
    takes_jumps = True

    def __post_init__(self) -> None:
        """UserError for what there is not."""
        super().__post_init__()
        if (self.path_name, self.prediction) != ("linear", "velocity"):
            raise UserError("`objective` any-step is for `path` linear and `prediction` velocity")
        start, stop = self.training.learned_guidance_interval
        if not 0 <= start < stop <= 1:
            said = f"`learned_guidance_interval` is {start} {stop}"
            raise UserError(f"{said}; it must be two rising times, 0 (noise) to 1 (data)")

    @classmethod
    def of(cls, architecture: Architecture, training: Training | None = None) -> "AnyStep":
        """As of `Flow`; `training` also says which steps and which guidance are learned."""
        flow = Flow.of(architecture, training)
        if flow.direction_weight:
            raise UserError("`direction_weight` is not for `objective` any-step: 0 leaves it out")
        if architecture.depth < 2:
            raise UserError("`objective` any-step needs a `depth` of 2: the last blocks see the target")
        if architecture.early_head:
            raise UserError("`early_head` is not for `objective` any-step")
        if flow.clean_share:
            raise UserError("`clean_share` is not for `objective` any-step: 0 leaves it out")
        return cls(flow.path_name, flow.prediction, flow.weight, flow.draw, training=training or Training())

    # Training

    def draw_times(self, rng: Generator, step: int = 0) -> tuple[Tensor, Tensor]:
        """Where an image is, and where it is to be led, () each; the same twice: it learns the flow."""
        if torch.rand((), generator=rng) >= self.training.jump_share:
            (t,) = super().draw_times(rng)
            return t, t
        drawn = logit_normal(rng, EARLY), logit_normal(rng, LATE)
        t, target = (self._scale_time(time) for time in (torch.minimum(*drawn), torch.maximum(*drawn)))
        reach = min(1.0, (step + 1) / max(1, self.training.curriculum_steps))
        return t, torch.lerp(t, target, reach)

    def add_noise(
        self, data_TC: Tensor, layout: Layout, noise_TC: Tensor, t_B: Tensor, *more_B: Tensor
    ) -> NoisySample:
        """The points of the path at times `t_B`; behind these may stand where each image is to be led."""
        sample = super().add_noise(data_TC, layout, noise_TC, t_B)
        return replace(sample, target_B=more_B[0]) if more_B else sample

    def loss(self, model: Model, sample: NoisySample, condition: Condition) -> Loss:
        """log(1 + error/SOFTENING) of each image's squared error, which is reported."""
        if sample.target_B is None:  # nobody drew a step: the flow's
            sample = replace(sample, target_B=sample.t_B)
        target_TC = self.mean_velocity(model, sample, condition)
        output_TC = model(sample.x_TC, sample.layout, sample.t_B, condition, target_B=sample.target_B)
        error_B = sample.mean((output_TC.to(target_TC.dtype) - target_TC).square().mean(1))
        return Loss((error_B / SOFTENING).log1p(), error_B)

    def held_out_errors(self, model: Model, sample: NoisySample, condition: Condition) -> dict[str, Tensor]:
        """The error of the flow in it, and of the longest steps: from each image's time to the data."""
        ends = {"validation": sample.t_B, "validation_jump": torch.ones_like(sample.t_B)}
        return {
            name: self.loss(model, replace(sample, target_B=end_B), condition).error_B
            for name, end_B in ends.items()
        }

    @torch.no_grad()
    def mean_velocity(self, model: Model, sample: NoisySample, condition: Condition) -> Tensor:
        """What the model should say, (T, C): v + (r − t)·du/dt, by itself as it is."""
        alpha_rate, sigma_rate = self.path.derivatives(sample.layout.spread(sample.t_B)[:, None])
        velocity_TC = alpha_rate * sample.data_TC + sigma_rate * sample.noise_TC
        velocity_TC = self._guided(model, sample, condition, velocity_TC)
        assert sample.target_B is not None
        if not self.training.jump_share:
            return velocity_TC
        jumping = (sample.target_B > sample.t_B).nonzero().flatten().tolist()
        step_T1 = sample.layout.spread(sample.target_B - sample.t_B)[:, None]
        rate_TC = self._rate(model, sample, condition, velocity_TC, jumping or ANY)
        return velocity_TC + step_T1 * rate_TC

    def _guided(self, model: Model, sample: NoisySample, condition: Condition, velocity_TC: Tensor) -> Tensor:
        """v + (1 − 1/w)·(u_c − u_∅) where guidance is learned: its mean is the velocity with guidance w."""
        if self.training.learned_guidance == 1:
            return velocity_TC
        start, stop = self.training.learned_guidance_interval
        inside_B = condition.present_B & (start <= sample.t_B) & (sample.t_B <= stop)
        found = inside_B.nonzero().flatten().tolist()
        some, own = _Some.of(sample, found or ANY), condition.select(found or ANY)
        output_TC = model(
            torch.cat([some.x_TC, some.x_TC]), Layout.concatenate([some.layout, some.layout]),
            torch.cat([some.t_B, some.t_B]), Condition.concatenate([own, own.null()]),
        )  # fmt: skip
        conditional, unconditional = output_TC.to(sample.x_TC.dtype).chunk(2)
        more_TC = (1 - 1 / self.training.learned_guidance) * (conditional - unconditional)
        return some.add(velocity_TC, more_TC) if found else velocity_TC

    def _rate(
        self,
        model: Model,
        sample: NoisySample,
        condition: Condition,
        velocity_TC: Tensor,
        images: Sequence[int],
    ) -> Tensor:
        """du/dt along the flow for some images, by a central difference; 0 for the others."""
        some, its = _Some.of(sample, images), condition.select(images)
        later_B = (some.t_B + self.training.difference).clamp_max(1.0)
        sooner_B = (some.t_B - self.training.difference).clamp_min(0.0)
        moved = [
            some.x_TC + some.layout.spread(t_B - some.t_B)[:, None] * velocity_TC[some.where_T]
            for t_B in (later_B, sooner_B)
        ]
        output_TC = model(
            torch.cat(moved), Layout.concatenate([some.layout, some.layout]), torch.cat([later_B, sooner_B]),
            Condition.concatenate([its, its]), target_B=torch.cat([some.target_B, some.target_B]),
        )  # fmt: skip
        later, sooner = output_TC.to(sample.x_TC.dtype).chunk(2)
        span_T1 = some.layout.spread(later_B - sooner_B)[:, None]
        return some.add(torch.zeros_like(velocity_TC), (later - sooner) / span_T1)


@dataclass(frozen=True, eq=False)
class _Some:
    """Some of the images of a sample."""

    where_T: Tensor  # bool, among the tokens of all
    x_TC: Tensor
    layout: Layout
    t_B: Tensor
    target_B: Tensor

    @classmethod
    def of(cls, sample: NoisySample, images: Sequence[int]) -> "_Some":
        """Those of the numbers `images`, which rise."""
        assert sample.target_B is not None
        chosen_B = torch.tensor(images, device=sample.t_B.device)
        among_B = torch.zeros_like(sample.t_B, dtype=torch.bool).index_fill_(0, chosen_B, True)
        where_T = sample.layout.spread(among_B)
        picked = sample.t_B[chosen_B], sample.target_B[chosen_B]
        return cls(where_T, sample.x_TC[where_T], sample.layout.select(images), *picked)

    def add(self, all_TC: Tensor, more_TC: Tensor) -> Tensor:
        """`all_TC` of all tokens, with more of these."""
        return all_TC.index_add(0, self.where_T.nonzero().flatten(), more_TC)
