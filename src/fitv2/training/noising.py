"""What a step learns from: images, each with a time and noise of its own key."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fitv2.diffusion.noise import NoisySample
from fitv2.diffusion.objective import Objective
from fitv2.runtime.rng import generator
from fitv2.tokens import PackedTokens


def add_noise(
    data: PackedTokens, keys: Sequence[tuple[int, ...]], objective: Objective, dropout: float
) -> tuple[NoisySample, Tensor]:
    """Noisy images, and of which to drop the condition (B,): each image draws from its own key."""
    times, chances, noises = [], [], []
    for key, length in zip(keys, data.layout.lengths, strict=True):
        rng = generator(*key)
        times.append(objective.draw_time(rng))
        chances.append(torch.rand((), generator=rng))
        noises.append(torch.randn(length, data.x_TC.shape[1], generator=rng))
    sample = objective.add_noise(data.x_TC, data.layout, torch.cat(noises), torch.stack(times))
    return sample, torch.stack(chances) < dropout
