"""What a step learns from: pictures, each corrupted with a time and noise of its own key."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from fitv2.data import TokenDataset, open_card
from fitv2.ddpm import DDPM
from fitv2.errors import UserError
from fitv2.flow import Flow, PathSample, flow_of, noise
from fitv2.runtime import generator
from fitv2.settings import Architecture, Training
from fitv2.stores import Store
from fitv2.tokens import PackedTokens

VALIDATION = 3  # first number of the keys of held-out pictures; those of a run's other keys are in `train`


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


def held_out(data: Path | str, count: int, objective: Flow | DDPM) -> Iterator[tuple[PathSample, Tensor]]:
    """All held-out pictures as they are (not mirrored), `count` at a time; none if there are none.

    Each has its own noise, the same every time. Their times are spread as the paper's, not as the training's:
    runs that draw theirs otherwise are comparable.
    """
    if not open_card(Store(data)).pictures.get("validation"):
        return
    dataset = TokenDataset(data, "validation")
    rows = dataset.first_rows
    rows = rows[dataset.by_length(rows)]
    order = torch.randperm(len(rows), generator=generator(VALIDATION))
    times = objective.quantiles((order + 0.5) / len(rows))
    for start in range(0, len(rows), count):
        chosen = rows[start : start + count]
        packed, labels = dataset.batch(chosen)
        rngs = [generator(VALIDATION, int(r)) for r in chosen]
        start_TC = noise(packed.lengths, dataset.token_channels, rngs)
        yield objective.sample(packed, start_TC, times[start : start + count]), labels
