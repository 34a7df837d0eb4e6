"""What a step learns from: pictures, each corrupted with a time and noise of its own key."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fitv2.config import Architecture, Training
from fitv2.diffusion.ddpm import DDPM
from fitv2.diffusion.flow import Flow, PathSample, flow_of
from fitv2.errors import UserError
from fitv2.runtime.rng import generator
from fitv2.tokens import PackedTokens


def objective_of(architecture: Architecture, training: Training) -> Flow | DDPM:
    """What a model of this architecture is trained on. Raises UserError for settings it cannot have."""
    if architecture.path != "ddpm":
        return flow_of(architecture, training)
    if training.direction_weight:
        raise UserError("--direction-weight is for velocities, which --path ddpm has none of")
    return DDPM()


def corrupted(
    data: PackedTokens, keys: Sequence[tuple[int, ...]], objective: Flow | DDPM, label_dropout: float
) -> tuple[PathSample, Tensor]:
    """A path sample, and which labels to drop (B,): each image's draws come from its own key."""
    times, chances, noises = [], [], []
    for key, length in zip(keys, data.lengths, strict=True):
        rng = generator(*key)
        times.append(objective.draw_time(rng))
        chances.append(torch.rand((), generator=rng))
        noises.append(torch.randn(length, data.x_TC.shape[1], generator=rng))
    sample = objective.sample(data, torch.cat(noises), torch.stack(times))
    return sample, torch.stack(chances) < label_dropout
