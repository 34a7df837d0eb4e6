"""The held-out images, each with its fixed time and noise."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import torch

from fitv2.conditioning import Condition
from fitv2.data.dataset import TokenDataset, open_card
from fitv2.data.storage import Store
from fitv2.diffusion.noise import NoisySample, draw_noise
from fitv2.diffusion.objective import Objective
from fitv2.runtime.rng import VALIDATION, generator
from fitv2.text_encoder import TextEncoder
from fitv2.training.initialize import give_texts

Held = tuple[NoisySample, Condition, bool]


class HeldOut:
    """A process's share of all held-out images as they are, not mirrored; opened once.

    Each image has its own noise, the same every time. Times are spread as the paper's, not as the
    training's: runs that draw theirs otherwise are comparable.
    """

    def __init__(
        self,
        data: Path | str,
        tokens: int,
        objective: Objective,
        rank: int = 0,
        ranks: int = 1,
        encoder: TextEncoder | None = None,
    ) -> None:
        self.objective, self.rank, self.ranks = objective, rank, ranks
        there = open_card(Store(data)).pictures.get("validation")
        self.dataset = TokenDataset(data, "validation") if there else None
        if self.dataset:
            if encoder:
                give_texts(self.dataset, encoder)
            rows = self.dataset.first_rows
            self.rows = rows[self.dataset.by_length(rows)]
            order = torch.randperm(len(rows), generator=generator(VALIDATION))
            self.times = objective.quantiles((order + 0.5) / len(rows))
            self.slices = fill(self.dataset.lengths[self.rows].tolist(), tokens)

    def __iter__(self) -> Iterator[Held]:
        """Samples, conditions, and whether they count; nothing if no images are held out.

        All processes get as many batches: where one has no other left, it gets one that does not count.
        """
        if self.dataset is None:
            return
        count = len(self.slices)
        for number in range(self.rank, -(-count // self.ranks) * self.ranks, self.ranks):
            piece = self.slices[number % count]
            rows = self.rows[piece]
            packed, condition = self.dataset.batch(rows)
            rngs = [generator(VALIDATION, int(row)) for row in rows]
            noise_TC = draw_noise(packed.layout.lengths, self.dataset.token_channels, rngs)
            sample = self.objective.add_noise(packed.x_TC, packed.layout, noise_TC, self.times[piece])
            yield replace(sample, learned_T=self.dataset.learned(rows)), condition, number < count


def fill(lengths: Sequence[int], tokens: int) -> list[slice]:
    """Neighbours that together have at most so many tokens, or one that alone has more."""
    starts, total = [0], 0
    for place, length in enumerate(lengths):
        if place > starts[-1] and total + length > tokens:
            starts.append(place)
            total = 0
        total += length
    return [slice(start, stop) for start, stop in pairwise([*starts, len(lengths)])]
