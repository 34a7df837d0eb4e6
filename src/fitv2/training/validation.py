"""Held-out pictures with fixed times and noise."""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from fitv2.data.dataset import TokenDataset, open_card
from fitv2.data.storage import Store
from fitv2.diffusion.ddpm import DDPM
from fitv2.diffusion.flow import Flow, PathSample, noise
from fitv2.runtime.rng import generator

VALIDATION = 3  # first number of the keys of held-out pictures; those of a run's other keys are in `train`


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
