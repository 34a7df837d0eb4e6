"""Rectified flow: x_t = t·x1 + (1−t)·x0 from noise x0 at t = 0 to data x1 at t = 1.

Liu et al., arXiv 2209.03003; FiTv2, section 3. Everything here is float32 whatever the model's
dtype: times, noise, path, target and loss.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from fitv2.errors import nearest
from fitv2.runtime import generator
from fitv2.tokens import PackedTokens

# The loss divides by (1−t)², which blows up near the data; below this, by its square instead.
# The value is that of "Back to Basics" (arXiv 2511.13720), for the same parametrisation.
MIN_TIME_TO_DATA = 0.05


@dataclass(frozen=True, eq=False)
class PathSample:
    """A point on the path of every image."""

    noisy: PackedTokens  # x_t
    t_B: Tensor
    data_TC: Tensor  # x1
    noise_TC: Tensor  # x0


def path_sample(data: PackedTokens, noise_TC: Tensor, t_B: Tensor) -> PathSample:
    """The linear path between `noise_TC` and `data` at times `t_B` in [0, 1]."""
    t_T1 = data.spread(t_B)[:, None]
    noisy = data.with_tokens(torch.lerp(noise_TC, data.x_TC, t_T1))
    return PathSample(noisy, t_B, data.x_TC, noise_TC)


def logit_normal_times(normal_B: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """Times sigmoid(mean + std·u) from standard normal u (Esser et al., arXiv 2403.03206, eq. 19)."""
    return torch.sigmoid(mean + std * normal_B)


def noise(lengths: Sequence[int], channels: int, keys: Sequence[tuple[int, ...]]) -> Tensor:
    """Standard normal tokens (T, channels), each image's from a key of its own."""
    pairs = zip(lengths, keys, strict=True)
    return torch.cat([torch.randn(n, channels, generator=generator(*key)) for n, key in pairs])


class Prediction(Protocol):
    """What a model's output means."""

    ends_early: bool  # whether the velocity is undefined at t = 1, so that solvers may not ask there

    def velocity(self, output_TC: Tensor, noisy: PackedTokens, t_B: Tensor) -> Tensor:
        """The velocity that an output stands for, float32."""

    def squared_error(self, output_TC: Tensor, sample: PathSample) -> Tensor:
        """Mean over a token's channels of the squared error of that velocity, (T,)."""


class VelocityPrediction:
    """The output is the velocity x1 − x0, as in FiTv2."""

    ends_early = False

    def velocity(self, output_TC: Tensor, noisy: PackedTokens, t_B: Tensor) -> Tensor:
        """The output itself."""
        return output_TC.float()

    def squared_error(self, output_TC: Tensor, sample: PathSample) -> Tensor:
        """|v̂ − (x1 − x0)|²."""
        return mse_loss(output_TC.float(), sample.data_TC - sample.noise_TC, reduction="none").mean(1)


class DataPrediction:
    """The output is the clean image, and the loss stays on velocity ("Back to Basics").

    Noise has no low-dimensional structure, images have: with few numbers a token inside the model
    and many outside (large pixel patches), only the image can be predicted.
    """

    ends_early = True

    def velocity(self, output_TC: Tensor, noisy: PackedTokens, t_B: Tensor) -> Tensor:
        """(x̂1 − x_t) / (1 − t), exact: an Euler step to t = 1 ends at x̂1. Undefined at t = 1."""
        return (output_TC.float() - noisy.x_TC) / noisy.spread(1 - t_B)[:, None]

    def squared_error(self, output_TC: Tensor, sample: PathSample) -> Tensor:
        """|(x̂1 − x_t) − (x1 − x_t)|² / max(1 − t, MIN_TIME_TO_DATA)²."""
        error_T = mse_loss(output_TC.float(), sample.data_TC, reduction="none").mean(1)
        return error_T / sample.noisy.spread((1 - sample.t_B).clamp_min(MIN_TIME_TO_DATA)).square()


PREDICTIONS: dict[str, Prediction] = {"velocity": VelocityPrediction(), "data": DataPrediction()}


def prediction_named(name: str) -> Prediction:
    """The prediction a model's config names; UserError when there is none of that name."""
    if name not in PREDICTIONS:
        raise nearest("prediction", name, PREDICTIONS)
    return PREDICTIONS[name]


def loss_per_image(output_TC: Tensor, sample: PathSample, prediction: Prediction) -> Tensor:
    """Mean squared error of the velocity over each image's tokens and channels, (B,)."""
    return sample.noisy.mean_per_image(prediction.squared_error(output_TC, sample))
