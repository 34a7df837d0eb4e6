"""What a step learns from: images, each with a time and noise of its own key."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fitv2.conditioning import Condition
from fitv2.diffusion.noise import NoisySample
from fitv2.diffusion.objective import Objective
from fitv2.runtime.rng import generator
from fitv2.tokens import PackedTokens

LABEL = 1  # behind the key of an image, of the draw for its label alone


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


def drop_labels(condition: Condition, keys: Sequence[tuple[int, ...]], dropout: float) -> Condition:
    """A condition of labels and texts without some of the labels: so that a text alone is enough."""
    chances = torch.stack([torch.rand((), generator=generator(*key, LABEL)) for key in keys])
    label_B = condition.values["label"]
    assert isinstance(label_B, Tensor)
    label_B = torch.where(chances < dropout, torch.full_like(label_B, -1), label_B)
    return replace(condition, values={**condition.values, "label": label_B})
