"""Flows: what a model learns between noise at t = 0 and data at t = 1, and how its output is read.

FiTv2, section 3: the linear path, velocity and logit-normal times. The other paths, predictions and
weights are SiT's (arXiv 2401.08740). Everything here is float32 whatever the model's dtype: times,
noise, path, target and loss.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import torch
from torch import Generator, Tensor
from torch.nn.functional import cosine_similarity

from fitv2.config import Architecture, Training
from fitv2.diffusion.paths import PATHS, Path, score
from fitv2.errors import UserError, nearest
from fitv2.tokens import PackedTokens

# The loss of predicted data divides by (1−t)², which blows up near the data; below this, by its square
# instead. The value is that of "Back to Basics" (arXiv 2511.13720), for the same parametrisation.
MIN_TIME_TO_DATA = 0.05


@dataclass(frozen=True, eq=False)
class PathSample:
    """A point on the path of every image."""

    noisy: PackedTokens  # x_t
    t_B: Tensor
    data_TC: Tensor  # x1
    noise_TC: Tensor  # x0

    def to(self, device: torch.device) -> "PathSample":
        """The sample on another device."""
        moved = (x.to(device) for x in (self.t_B, self.data_TC, self.noise_TC))
        return PathSample(self.noisy.to(device), *moved)


def noise(lengths: Sequence[int], channels: int, generators: Sequence[Generator]) -> Tensor:
    """Standard normal tokens (T, channels), each image's from a CPU generator of its own."""
    pairs = zip(lengths, generators, strict=True)
    return torch.cat([torch.randn(n, channels, generator=rng) for n, rng in pairs])


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

    def error(self, path: Path, output_TC: Tensor, sample: PathSample, t_T1: Tensor) -> Tensor:
        """What is squared in the loss."""


class VelocityPrediction:
    """The output is the velocity α'·x1 + σ'·x0, as in FiTv2."""

    def velocity(self, path: Path, output_TC: Tensor, x_TC: Tensor, t_T1: Tensor) -> Tensor:
        """The output itself."""
        return output_TC

    def error(self, path: Path, output_TC: Tensor, sample: PathSample, t_T1: Tensor) -> Tensor:
        """v̂ − v."""
        data_rate, noise_rate = path.derivatives(t_T1)
        return output_TC - (data_rate * sample.data_TC + noise_rate * sample.noise_TC)


class ScorePrediction:
    """The output is ∇ log p_t(x)."""

    def velocity(self, path: Path, output_TC: Tensor, x_TC: Tensor, t_T1: Tensor) -> Tensor:
        """r·x + g·score."""
        return path.growth(t_T1) * x_TC + path.score_rate(t_T1) * output_TC

    def error(self, path: Path, output_TC: Tensor, sample: PathSample, t_T1: Tensor) -> Tensor:
        """σ·ŝ + x0: the score of one image's path is −x0/σ."""
        return output_TC * path.coefficients(t_T1)[1] + sample.noise_TC


class NoisePrediction:
    """The output is the noise x0 = −σ·score."""

    def velocity(self, path: Path, output_TC: Tensor, x_TC: Tensor, t_T1: Tensor) -> Tensor:
        """r·x − g/σ·x̂0."""
        sigma = path.coefficients(t_T1)[1]
        return path.growth(t_T1) * x_TC - path.score_rate(t_T1) / sigma * output_TC

    def error(self, path: Path, output_TC: Tensor, sample: PathSample, t_T1: Tensor) -> Tensor:
        """x̂0 − x0."""
        return output_TC - sample.noise_TC


class DataPrediction:
    """The output is the clean image, and the loss stays on velocity ("Back to Basics"); linear path.

    Noise has no low-dimensional structure, images have: with few numbers a token inside the model
    and many outside (large pixel patches), only the image can be predicted.
    """

    def velocity(self, path: Path, output_TC: Tensor, x_TC: Tensor, t_T1: Tensor) -> Tensor:
        """(x̂1 − x_t) / (1 − t), exact: an Euler step to t = 1 ends at x̂1. Undefined at t = 1."""
        return (output_TC - x_TC) / (1 - t_T1)

    def error(self, path: Path, output_TC: Tensor, sample: PathSample, t_T1: Tensor) -> Tensor:
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


@dataclass(frozen=True)
class Flow:
    """A path, what the model predicts on it, and how it is trained.

    Raises UserError for names that do not exist, and for a weight where it has no meaning.
    """

    path_name: str = "linear"
    prediction: str = "velocity"
    weight: str = "none"
    draw: Callable[[Generator], Tensor] = field(default=logit_normal)

    def __post_init__(self) -> None:
        """UserError for what there is not."""
        kinds = ("path", self.path_name, PATHS), ("prediction", self.prediction, PREDICTIONS)
        for kind, name, known in (*kinds, ("loss weight", self.weight, WEIGHTS)):
            if name not in known:
                raise nearest(kind, name, known)
        if self.weight != "none" and self.prediction not in ("noise", "score"):
            raise UserError(f"--loss-weight {self.weight} is for --prediction noise or score")

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

    def spaced(self, share: Tensor) -> Tensor:
        """Shares in (0, 1) as times of training."""
        start, stop = self.interval(1e-5 if self.path_name == "vp" else 1e-3)
        return start + (stop - start) * share

    def draw_time(self, rng: Generator) -> Tensor:
        """A random time of training, ()."""
        return self.spaced(self.draw(rng))

    def progress(self, t_B: Tensor) -> Tensor:
        """How far times are from noise (0) to data (1)."""
        return t_B

    def quantiles(self, share: Tensor) -> Tensor:
        """Shares in (0, 1) as times of the paper's distribution, logit-normal (0, 1), whatever `draw` is."""
        return self.spaced(torch.sigmoid(torch.special.ndtri(share)))

    def sample(self, data: PackedTokens, noise_TC: Tensor, t_B: Tensor) -> PathSample:
        """The points x_t of the path between `noise_TC` and `data` at times `t_B`."""
        alpha, sigma = self.path.coefficients(data.spread(t_B)[:, None])
        return PathSample(data.with_tokens(alpha * data.x_TC + sigma * noise_TC), t_B, data.x_TC, noise_TC)

    def loss(self, output_TC: Tensor, sample: PathSample) -> Tensor:
        """Mean over each image's tokens and channels of the weighted squared error, (B,)."""
        t_T1 = sample.noisy.spread(sample.t_B)[:, None]
        error = PREDICTIONS[self.prediction].error(self.path, output_TC.float(), sample, t_T1)
        weight_B = WEIGHTS[self.weight](self.path, sample.t_B)
        return weight_B * sample.noisy.mean_per_image(error.square().mean(1))

    def direction_loss(self, output_TC: Tensor, sample: PathSample) -> Tensor:
        """1 − cosine of the predicted and the true velocity, mean over each image's tokens, (B,).

        "FasterDiT" (arXiv 2410.10356) adds it to the squared error.
        """
        alpha_rate, sigma_rate = self.path.derivatives(sample.noisy.spread(sample.t_B)[:, None])
        true_TC = alpha_rate * sample.data_TC + sigma_rate * sample.noise_TC
        made_TC = self.velocity(output_TC, sample.noisy, sample.t_B)
        return sample.noisy.mean_per_image(1 - cosine_similarity(made_TC, true_TC, dim=1))

    def velocity(self, output_TC: Tensor, noisy: PackedTokens, t_B: Tensor) -> Tensor:
        """The velocity that an output stands for, (T, C) float32."""
        t_T1 = noisy.spread(t_B)[:, None]
        return PREDICTIONS[self.prediction].velocity(self.path, output_TC.float(), noisy.x_TC, t_T1)

    def score(self, velocity_TC: Tensor, noisy: PackedTokens, t_B: Tensor) -> Tensor:
        """∇ log p_t(x) of the field with this velocity, (T, C); infinite at t = 1."""
        return score(self.path, velocity_TC, noisy.x_TC, noisy.spread(t_B)[:, None])


def flow_of(architecture: Architecture, training: Training | None = None) -> Flow:
    """The flow a model was made for; `training` says how its times are drawn and its loss weighted."""
    if training is None:
        return Flow(architecture.path, architecture.prediction)
    draw = partial(logit_normal, mean=training.time_mean, std=training.time_std)
    chosen = uniform if training.times == "uniform" else draw
    return Flow(architecture.path, architecture.prediction, training.loss_weight, chosen)
