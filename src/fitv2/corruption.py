"""What a step learns from: pictures, each corrupted with a time and noise of its own key."""

from collections.abc import Iterator, Sequence
from itertools import pairwise
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


Held = tuple[PathSample, Tensor, bool]


def held_out(
    data: Path | str, tokens: int, objective: Flow | DDPM, rank: int = 0, ranks: int = 1
) -> Iterator[Held]:
    """A process's share of all held-out pictures as they are: samples, labels, and whether they count.

    Not mirrored. As many at a time as fill `tokens`, at least one; nothing if there are none. All
    processes get as many batches: where one has no other left, it gets one that does not count. Each
    picture has its own noise, the same every time. Their times are spread as the paper's, not as the
    training's: runs that draw theirs otherwise are comparable.
    """
    if not open_card(Store(data)).pictures.get("validation"):
        return
    dataset = TokenDataset(data, "validation")
    rows = dataset.first_rows
    rows = rows[dataset.by_length(rows)]
    order = torch.randperm(len(rows), generator=generator(VALIDATION))
    times = objective.quantiles((order + 0.5) / len(rows))
    pieces = filled(dataset.lengths[rows].tolist(), tokens)
    for number in range(rank, -(-len(pieces) // ranks) * ranks, ranks):
        piece = pieces[number % len(pieces)]
        chosen = rows[piece]
        packed, labels = dataset.batch(chosen)
        rngs = [generator(VALIDATION, int(r)) for r in chosen]
        start_TC = noise(packed.lengths, dataset.token_channels, rngs)
        yield objective.sample(packed, start_TC, times[piece]), labels, number < len(pieces)


def filled(lengths: Sequence[int], tokens: int) -> list[slice]:
    """Neighbours that together have at most so many tokens, or one that alone has more."""
    starts, total = [0], 0
    for place, length in enumerate(lengths):
        if place > starts[-1] and total + length > tokens:
            starts.append(place)
            total = 0
        total += length
    return [slice(start, stop) for start, stop in pairwise([*starts, len(lengths)])]
