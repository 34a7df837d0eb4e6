"""Images on the way between noise and data, and the noise itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from fitv2.tokens import Layout


class Levels(NamedTuple):
    """Runs of tokens with a time of their own: some of an image are cleaner than the others."""

    layout: Layout  # as if every run were an image
    t_L: Tensor

    def to(self, device: torch.device) -> Levels:
        """The runs on another device."""
        return Levels(self.layout.to(device), self.t_L.to(device))


@dataclass(frozen=True, eq=False)
class NoisySample:
    """Images with noise in them. Everything is float32 whatever the model's dtype."""

    x_TC: Tensor  # noisy tokens
    layout: Layout
    t_B: Tensor  # the time of each image
    data_TC: Tensor
    noise_TC: Tensor
    target_B: Tensor | None = None  # the time to which each is to be led, for any-step models
    learned_T: Tensor | None = None  # how much of each token is learned, 0 to 1 [default: all]
    levels: Levels | None = None  # the times of its tokens, where an image has several; t_B is the noisiest

    @property
    def t_T1(self) -> Tensor:  # noqa: N802  a shape
        """The time of each token."""
        layout, times = (self.layout, self.t_B) if self.levels is None else self.levels
        return layout.spread(times)[:, None]

    @property
    def mean_time_B(self) -> Tensor:  # noqa: N802  a shape
        """The mean time of each image's tokens."""
        return self.t_B if self.levels is None else self.layout.mean_per_image(self.t_T1[:, 0])

    def to(self, device: torch.device) -> NoisySample:
        """The sample on another device."""
        x_TC, t_B, data_TC, noise_TC = (
            value.to(device) for value in (self.x_TC, self.t_B, self.data_TC, self.noise_TC)
        )
        target_B, learned_T = (
            None if value is None else value.to(device) for value in (self.target_B, self.learned_T)
        )
        levels = None if self.levels is None else self.levels.to(device)
        layout = self.layout.to(device)
        return NoisySample(x_TC, layout, t_B, data_TC, noise_TC, target_B, learned_T, levels)

    def mean(self, error_T: Tensor) -> Tensor:
        """The mean error of each image's tokens, (B,); of those that are learned, weighted by how much.

        An image of which nothing is learned has the error 0.
        """
        mean_B = self.layout.mean_per_image
        if self.learned_T is None:
            return mean_B(error_T)
        learned_T = self.learned_T.to(error_T.dtype)
        return mean_B(learned_T * error_T) / mean_B(learned_T).clamp_min(1e-6)


class Known(NamedTuple):
    """Parts of images that are not to be made but stay as they are."""

    where_TC: Tensor  # bool
    data_TC: Tensor
    noise_TC: Tensor  # what these parts start from

    def hold(self, value_TC: Tensor, known_TC: Tensor) -> Tensor:
        """`value_TC` with these parts replaced."""
        return torch.where(self.where_TC, known_TC, value_TC)


class Loss(NamedTuple):
    """The loss of each image."""

    total_B: Tensor  # what is minimized
    error_B: Tensor  # what is reported, comparable between settings of one objective


def draw_noise(lengths: Sequence[int], channels: int, generators: Sequence[Generator]) -> Tensor:
    """Standard normal tokens (T, channels), each image's from a CPU generator of its own."""
    pairs = zip(lengths, generators, strict=True)
    return torch.cat([torch.randn(n, channels, generator=rng) for n, rng in pairs])
