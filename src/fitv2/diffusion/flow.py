"""Flows: what a model learns between noise at t = 0 and data at t = 1, and how its output is read.

FiTv2, section 3: the linear path, velocity and logit-normal times. The other paths, predictions and
weights are SiT's (arXiv 2401.08740). Everything here is float32 whatever the model's dtype: times,
noise, path, target and loss.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Protocol

import torch
from torch import Generator, Tensor
from torch.nn.functional import cosine_similarity

from fitv2.conditioning import Condition
from fitv2.config import Architecture, Sampling, Training
from fitv2.diffusion.noise import Known, Levels, Loss, NoisySample
from fitv2.diffusion.paths import PATHS, Path, score
from fitv2.diffusion.solvers import OnStep, no_change
from fitv2.diffusion.transport import transport
from fitv2.errors import UserError, nearest
from fitv2.tokens import Layout

Draw = Callable[[Generator], Tensor]  # a time in (0, 1), ()
Model = Callable[..., Tensor]  # (x, layout, t, condition) → output; any-step models take `target_B` too
Output = Callable[..., Tensor]  # (x (T, C) float32, t () or (B,), for any-step the target too) → per token

# The loss of predicted data divides by (1−t)², which blows up near the data; below this, by its square
# instead. The value is that of "Back to Basics" (arXiv 2511.13720), for the same parametrisation.
MIN_TIME_TO_DATA = 0.05


def uniform(rng: Generator) -> Tensor:
    """A time from (0, 1)."""
    return torch.rand((), generator=rng)


def logit_normal(rng: Generator, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """A time sigmoid(mean + std·u) with u ~ N(0, 1) (Esser et al., arXiv 2403.03206, eq. 19)."""
    return torch.sigmoid(mean + std * torch.randn((), generator=rng))


class Prediction(Protocol):
    """What a model's output means. `t_T1` are the tokens' times, `x_TC` their noisy content."""

    def velocity(self, path: Path, output_TC: Tensor, x_TC: Tensor, t_T1: Tensor) -> Tensor:
        """The velocity that an output stands for."""

    def error(self, path: Path, output_TC: Tensor, sample: NoisySample, t_T1: Tensor) -> Tensor:
        """What is squared in the loss."""


class VelocityPrediction:
    """The output is the velocity α'·x1 + σ'·x0, as in FiTv2."""

    def velocity(self, path: Path, output_TC: Tensor, x_TC: Tensor, t_T1: Tensor) -> Tensor:
        """The output itself."""
        return output_TC

    def error(self, path: Path, output_TC: Tensor, sample: NoisySample, t_T1: Tensor) -> Tensor:
        """v̂ − v."""
        data_rate, noise_rate = path.derivatives(t_T1)
        return output_TC - (data_rate * sample.data_TC + noise_rate * sample.noise_TC)


class ScorePrediction:
    """The output is ∇ log p_t(x)."""

    def velocity(self, path: Path, output_TC: Tensor, x_TC: Tensor, t_T1: Tensor) -> Tensor:
        """r·x + g·score."""
        return path.growth(t_T1) * x_TC + path.score_rate(t_T1) * output_TC

    def error(self, path: Path, output_TC: Tensor, sample: NoisySample, t_T1: Tensor) -> Tensor:
        """σ·ŝ + x0: the score of one image's path is −x0/σ."""
        return output_TC * path.coefficients(t_T1)[1] + sample.noise_TC


class NoisePrediction:
    """The output is the noise x0 = −σ·score."""

    def velocity(self, path: Path, output_TC: Tensor, x_TC: Tensor, t_T1: Tensor) -> Tensor:
        """r·x − g/σ·x̂0."""
        sigma = path.coefficients(t_T1)[1]
        return path.growth(t_T1) * x_TC - path.score_rate(t_T1) / sigma * output_TC

    def error(self, path: Path, output_TC: Tensor, sample: NoisySample, t_T1: Tensor) -> Tensor:
        """x̂0 − x0."""
        return output_TC - sample.noise_TC


class DataPrediction:
    """The output is the clean image, and the loss stays on velocity ("Back to Basics"); linear path.

    Noise has no low-dimensional structure, images have: with few channels per token inside the model
    and many outside (large pixel patches), only the image can be predicted.
    """

    def velocity(self, path: Path, output_TC: Tensor, x_TC: Tensor, t_T1: Tensor) -> Tensor:
        """(x̂1 − x_t) / (1 − t), exact: an Euler step to t = 1 ends at x̂1. Undefined at t = 1."""
        return (output_TC - x_TC) / (1 - t_T1)

    def error(self, path: Path, output_TC: Tensor, sample: NoisySample, t_T1: Tensor) -> Tensor:
        """(x̂1 − x_t) − (x1 − x_t), each over max(1 − t, MIN_TIME_TO_DATA)."""
        return (output_TC - sample.data_TC) / (1 - t_T1).clamp_min(MIN_TIME_TO_DATA)


PREDICTIONS: dict[str, Prediction] = {
    "velocity": VelocityPrediction(),
    "data": DataPrediction(),
    "noise": NoisePrediction(),
    "score": ScorePrediction(),
}

# Of the squared error of a noise or a score (SiT, table 2; g is the path's score rate).
WEIGHTS: dict[str, Callable[[Path, Tensor], Tensor]] = {
    "none": lambda path, t: torch.ones_like(t),
    "velocity": lambda path, t: (path.score_rate(t) / path.coefficients(t)[1]) ** 2,
    "likelihood": lambda path, t: path.score_rate(t) / path.coefficients(t)[1] ** 2,
}


# How training draws its times.
TIMES: dict[str, Callable[[Training], Draw]] = {
    "logit-normal": lambda training: partial(logit_normal, mean=training.time_mean, std=training.time_std),
    "uniform": lambda _: uniform,
}


@dataclass(frozen=True)
class Flow:
    """The objective of FiTv2: a path, what the model predicts on it, and how it is trained.

    Raises UserError for names that do not exist, and for a weight where it has no meaning.
    """

    path_name: str = "linear"
    prediction: str = "velocity"
    weight: str = "none"
    draw: Draw = field(default=logit_normal)
    direction_weight: float = 0.0
    early_weight: float = 0.0  # of the loss of an early head; 0 where there is none
    early_prediction: str = ""  # what the early head predicts [default: what the model does]
    clean_share: float = 0.0  # of the tokens of an image, trained at the later of two times

    def __post_init__(self) -> None:
        """UserError for what there is not."""
        kinds = ("path", self.path_name, PATHS), ("prediction", self.prediction, PREDICTIONS)
        for kind, name, known in (*kinds, ("loss weight", self.weight, WEIGHTS)):
            if name not in known:
                raise nearest(kind, name, known)
        if self.weight != "none" and self.prediction not in ("noise", "score"):
            raise UserError(f"`loss_weight` {self.weight} is for `prediction` noise or score")
        if self.prediction == "data" and self.path_name != "linear":
            raise UserError("`prediction` data is for `path` linear")
        if self.early_prediction not in ("", self.prediction):
            if (self.prediction, self.early_prediction) != ("velocity", "data"):
                raise UserError("`early_prediction` is data beside `prediction` velocity, or the same")
            if self.path_name != "linear":
                raise UserError("`early_prediction` data is for `path` linear")

    @classmethod
    def of(cls, architecture: Architecture, training: Training | None = None) -> "Flow":
        """The flow a model was made for; `training` says how its times are drawn and its loss weighted."""
        if training is None:
            early = architecture.early_prediction or ""
            return cls(architecture.path, architecture.prediction, early_prediction=early)
        if training.times not in TIMES:
            raise nearest("distribution of times", training.times, TIMES)
        if architecture.early_head and not training.early_weight:
            raise UserError("an early head learns nothing with `early_weight` 0")
        return cls(
            architecture.path, architecture.prediction, training.loss_weight,
            TIMES[training.times](training), training.direction_weight,
            training.early_weight if architecture.early_head else 0.0,
            architecture.early_prediction or "", training.clean_share,
        )  # fmt: skip

    @property
    def path(self) -> Path:
        """The path itself."""
        return PATHS[self.path_name]

    def interval(self, margin: float = 1e-3) -> tuple[float, float]:
        """The times between which the velocity is finite; where an end is not, it is `margin` away.

        The margins of SiT: 1e-3, but 1e-5 for training on VP.
        """
        if self.path_name == "vp":
            return 0.0, 1.0 - margin
        return (margin, 1.0 - margin) if self.prediction in ("noise", "score") else (0.0, 1.0)

    @property
    def ends_early(self) -> bool:
        """Whether the velocity is undefined at the end of the interval, so that solvers may not ask there."""
        return self.prediction == "data"

    name = "flow"  # of the objective: how images are made if nothing is said
    takes_jumps = False  # whether the model says where a finite step leads

    @property
    def shuffles(self) -> bool:
        """Whether the tokens of an image are to come in any order: the last ones are the cleaner ones."""
        return self.clean_share > 0

    # Training

    def _scale_time(self, share: Tensor) -> Tensor:
        """Shares in (0, 1) as times of training."""
        start, stop = self.interval(1e-5 if self.path_name == "vp" else 1e-3)
        return start + (stop - start) * share

    def draw_times(self, rng: Generator, step: int = 0) -> tuple[Tensor, ...]:
        """A random time of training, (), the same at every step; or two of them, the noisier first."""
        t = self._scale_time(self.draw(rng))
        if not self.clean_share:
            return (t,)
        other = self._scale_time(self.draw(rng))
        return torch.minimum(t, other), torch.maximum(t, other)

    def quantiles(self, share: Tensor) -> Tensor:
        """Shares in (0, 1) as times of the paper's distribution, logit-normal (0, 1), whatever `draw` is."""
        return self._scale_time(torch.sigmoid(torch.special.ndtri(share)))

    def progress(self, t_B: Tensor) -> Tensor:
        """How far times are from noise (0) to data (1)."""
        return t_B

    def add_noise(
        self, data_TC: Tensor, layout: Layout, noise_TC: Tensor, t_B: Tensor, *more_B: Tensor
    ) -> NoisySample:
        """The points x_t of the path between noise and data at times `t_B`.

        With cleaner times behind these the last tokens of each image are there: two noise levels in one
        image (Self-Flow, arXiv 2603.06507).
        """
        sample = NoisySample(noise_TC, layout, t_B, data_TC, noise_TC)
        if more_B:
            times_L = torch.stack([t_B, *more_B], dim=1).flatten()
            sample = replace(sample, levels=Levels(layout.divide(self.clean_share), times_L))
        alpha, sigma = self.path.coefficients(sample.t_T1)
        return replace(sample, x_TC=alpha * data_TC + sigma * noise_TC)

    def loss(self, model: Model, sample: NoisySample, condition: Condition) -> Loss:
        """The squared error of each image; beside it 1 − cosine and an early head's, where they have weights.

        The early head's is that of internal guidance (arXiv 2512.24176).
        """
        output_TC, early_TC = self._outputs(model, sample, condition)
        total_B = error_B = self.squared_error(output_TC, sample)
        if self.direction_weight:
            total_B = total_B + self.direction_weight * self.direction_error(output_TC, sample)
        if early_TC is not None:
            total_B = total_B + self.early_weight * self.early_error(early_TC, sample)
        return Loss(total_B, error_B)

    def held_out_errors(self, model: Model, sample: NoisySample, condition: Condition) -> dict[str, Tensor]:
        """The squared error; and that of an early head."""
        output_TC, early_TC = self._outputs(model, sample, condition)
        errors = {"validation": self.squared_error(output_TC, sample)}
        if early_TC is not None:
            errors["validation_early"] = self.early_error(early_TC, sample)
        return errors

    def _outputs(
        self, model: Model, sample: NoisySample, condition: Condition
    ) -> tuple[Tensor, Tensor | None]:
        """What the model says, and its early head where that is trained."""
        t, more = sample.t_B, {}
        if sample.levels is not None:  # other models know no levels, and no early head
            more["levels"], t = sample.levels
        if not self.early_weight:
            return model(sample.x_TC, sample.layout, t, condition, **more), None
        output_TC, early_TC = model(sample.x_TC, sample.layout, t, condition, early=True, **more)
        return output_TC, early_TC

    def squared_error(self, output_TC: Tensor, sample: NoisySample) -> Tensor:
        """Mean over each image's tokens and channels of the weighted squared error, (B,)."""
        t_T1 = sample.t_T1
        error = PREDICTIONS[self.prediction].error(self.path, output_TC.float(), sample, t_T1)
        squared_T = error.square().mean(1)
        if self.weight != "none":
            squared_T = WEIGHTS[self.weight](self.path, t_T1[:, 0]) * squared_T
        return sample.mean(squared_T)

    def early_error(self, early_TC: Tensor, sample: NoisySample) -> Tensor:
        """The same of an early head, (B,); where it alone predicts data, that of the data at all times alike.

        Then the early blocks are aligned with the latents themselves, as in SRA 2 (arXiv 2601.17830).
        """
        if self.early_prediction in ("", self.prediction):
            return self.squared_error(early_TC, sample)
        return sample.mean((early_TC.float() - sample.data_TC).square().mean(1))

    def beyond_early(self, output_TC: Tensor, early_TC: Tensor, x_TC: Tensor, t_T1: Tensor) -> Tensor:
        """How far the model goes beyond its early head, in what the model predicts, (T, C)."""
        if self.early_prediction in ("", self.prediction):
            return output_TC - early_TC.float()
        data_TC = x_TC + (1 - t_T1) * output_TC  # where its velocity leads
        return (data_TC - early_TC.float()) / (1 - t_T1).clamp_min(MIN_TIME_TO_DATA)

    def direction_error(self, output_TC: Tensor, sample: NoisySample) -> Tensor:
        """1 − cosine of the predicted and the true velocity, mean over each image's tokens, (B,).

        "FasterDiT" (arXiv 2410.10356) adds it to the squared error.
        """
        t_T1 = sample.t_T1
        alpha_rate, sigma_rate = self.path.derivatives(t_T1)
        true_TC = alpha_rate * sample.data_TC + sigma_rate * sample.noise_TC
        made_TC = self.velocity(output_TC, sample.x_TC, t_T1)
        return sample.mean(1 - cosine_similarity(made_TC, true_TC, dim=1))

    # Sampling

    def velocity(self, output_TC: Tensor, x_TC: Tensor, t_T1: Tensor) -> Tensor:
        """The velocity that an output stands for at each token's time, (T, C) float32."""
        return PREDICTIONS[self.prediction].velocity(self.path, output_TC.float(), x_TC, t_T1)

    def expected_data(self, velocity_TC: Tensor, x_TC: Tensor, t_T1: Tensor) -> Tensor:
        """The data to which a straight line of the path through `x_TC` with this velocity leads, (T, C)."""
        alpha, sigma = self.path.coefficients(t_T1)
        alpha_rate, sigma_rate = self.path.derivatives(t_T1)
        return (sigma_rate * x_TC - sigma * velocity_TC) / (alpha * sigma_rate - sigma * alpha_rate)

    def score(self, velocity_TC: Tensor, x_TC: Tensor, t_T1: Tensor) -> Tensor:
        """∇ log p_t(x) of the field with this velocity, (T, C); infinite at t = 1."""
        return score(self.path, velocity_TC, x_TC, t_T1)

    def follow(self, output: Output, layout: Layout) -> Output:
        """The velocity v(x, t) of a model's output, for solvers; t is () or (B,).

        Any-step models are asked for the mean velocity from there to a target time too, of the same shape.
        """

        def velocity(x_TC: Tensor, *times: Tensor) -> Tensor:
            t_B, *target_B = (time.float().expand(len(layout)) for time in times)
            return self.velocity(output(x_TC, t_B, *target_B), x_TC, layout.spread(t_B)[:, None])

        return velocity

    def follow_around(self, output: Output, layout: Layout, known: Known) -> Output:
        """The velocity where some parts are known: these go straight from their noise to their data.

        The model sees them where the path has them at that time, so that the rest is made to fit (the
        replacement of Song et al., arXiv 2011.13456, I.2, without noise that is drawn anew at every step).
        """
        free = self.follow(output, layout)

        def velocity(x_TC: Tensor, t: Tensor, *target: Tensor) -> Tensor:
            t_T1 = layout.spread(t.float().expand(len(layout)))[:, None]
            (alpha, sigma), (alpha_rate, sigma_rate) = (
                self.path.coefficients(t_T1),
                self.path.derivatives(t_T1),
            )
            x_TC = known.hold(x_TC, alpha * known.data_TC + sigma * known.noise_TC)
            return known.hold(
                free(x_TC, t, *target), alpha_rate * known.data_TC + sigma_rate * known.noise_TC
            )

        return velocity

    def generate(
        self,
        output: Output,
        layout: Layout,
        x_TC: Tensor,
        generators: Sequence[Generator],
        sampling: Sampling,
        on_step: OnStep = no_change,
        start: float = 0.0,
        known: Known | None = None,
    ) -> Tensor:
        """From `x_TC`, noise or what is at time `start`, to data; `output` is the guided model."""
        solver, steps = sampling.resolve(self.name)
        sampling = replace(sampling, solver=solver, steps=steps)
        follow = self.follow if known is None else partial(self.follow_around, known=known)
        made = transport(
            self, follow(output, layout), layout, x_TC, generators, sampling, begin=start, on_step=on_step
        )
        return made if known is None else known.hold(made, known.data_TC)

    def invert(
        self,
        output: Output,
        layout: Layout,
        data_TC: Tensor,
        generators: Sequence[Generator],
        sampling: Sampling,
    ) -> Tensor:
        """The noise from which `generate` makes data; with a stochastic solver a sample of it."""
        velocity = self.follow(output, layout)
        return transport(self, velocity, layout, data_TC, generators, sampling, to_noise=True)
