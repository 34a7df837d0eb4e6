"""Which images a step takes: a fixed number, or as many as fill a budget of tokens.

Both are functions of (seed, step) alone, so a run may stop anywhere and go on with any number of
processes. Every image comes once an epoch. A dataset row is one variant of an image (its mirror
image, a crop); each epoch takes one variant of each image.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from fitv2.errors import UserError

FILL = 0.995  # share of the budget that an average pack is planned to fill


class Images:
    """The images of a dataset, as far as planning needs them.

    `first_rows` is the first row of each image, `lengths` the tokens of each row, `cropped` whether a
    row is a crop; an image's crops are its last rows. One that has crops and others is taken
    cropped with `crop_probability`; within its kind every row is equally likely.
    """

    def __init__(
        self,
        first_rows: np.ndarray,
        lengths: np.ndarray,
        cropped: np.ndarray | None = None,
        crop_probability: float = 0.5,
    ) -> None:
        self.first_rows, self.lengths, self.crop_probability = first_rows, lengths, crop_probability
        variants = np.diff(first_rows, append=len(lengths)).astype(np.int32)
        crops = np.zeros_like(variants)
        if cropped is not None and cropped.any():
            crops = np.add.reduceat(cropped, first_rows, dtype=variants.dtype)
        self.whole, self.crops = variants - crops, crops  # rows of each kind

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        """One row of each image."""
        if not self.crops.any():
            return self.first_rows + rng.integers(self.whole)
        crop = rng.random(len(self.first_rows)) < self._crop_shares()
        start = self.first_rows + np.where(crop, self.whole, 0)
        return start + rng.integers(np.where(crop, self.crops, self.whole))

    def _crop_shares(self) -> np.ndarray:
        """How often each image is taken cropped."""
        return np.where(self.whole == 0, 1.0, np.where(self.crops == 0, 0.0, self.crop_probability))

    def moments(self) -> tuple[np.ndarray, np.ndarray]:
        """Expected length of each image, and variance."""
        share = self._crop_shares()
        kinds = np.stack([self.whole, self.crops], axis=1)
        chances = np.stack([1 - share, share], axis=1) / np.maximum(kinds, 1)
        weights = np.repeat(chances.ravel(), kinds.ravel())
        mean = np.add.reduceat(weights * self.lengths, self.first_rows)
        weights *= self.lengths
        square = np.add.reduceat(weights * self.lengths, self.first_rows)
        return mean, np.maximum(square - mean**2, 0)


@dataclass(frozen=True, eq=False)
class Step:
    """The images of one step."""

    rows: np.ndarray  # of the dataset
    keys: np.ndarray  # a number for each, which no other image of the run has: its randomness follows

    def shared(self, lengths: np.ndarray, ranks: int) -> list["Step"]:
        """The step cut into one part a rank, with nearly equal tokens; `lengths` are those of its rows.

        A part may be empty when there are fewer images than ranks.
        """
        longest_first = np.argsort(-lengths, kind="stable")
        part = np.empty(len(lengths), dtype=np.int64)
        part[longest_first], _ = dealt(lengths[longest_first].astype(np.int64), ranks)
        return [Step(self.rows[part == rank], self.keys[part == rank]) for rank in range(ranks)]


class Sampler(ABC):
    """What a step takes, worked out an epoch at a time. Can be sent to other processes."""

    @abstractmethod
    def plan(self, epoch: int) -> Any:
        """All of an epoch."""

    @abstractmethod
    def step(self, step: int) -> Step:
        """The images of a step."""

    @cached_property
    def _epoch(self) -> Any:
        return lru_cache(maxsize=2)(self.plan)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_epoch"}


class FixedCount(Sampler):
    """So many images a step, whatever their sizes: as the paper trains."""

    def __init__(self, images: Images, count: int, seed: int) -> None:
        self.images, self.count, self.seed = images, count, seed

    def plan(self, epoch: int) -> np.ndarray:
        """A row of each image, in the epoch's order."""
        rng = np.random.default_rng((self.seed, epoch))
        return rng.permutation(self.images.draw(rng))

    def step(self, step: int) -> Step:
        """Images step·count to (step+1)·count of an endless sequence of epochs."""
        keys = np.arange(step * self.count, (step + 1) * self.count)
        epochs, places = np.divmod(keys, len(self.images.first_rows))
        rows = [self._epoch(int(epoch))[places[epochs == epoch]] for epoch in np.unique(epochs)]
        return Step(np.concatenate(rows), keys)


class TokenBudget(Sampler):
    """At most `budget` tokens a step, in packs of nearly equal size.

    An epoch has always as many packs, however its variants fall, so a step's number tells its epoch.
    Images are dealt out in strata of equal length, the longest first, each time to the emptiest packs
    (longest processing time first, Graham 1969, a stratum at a time): packs differ by few tokens, so
    every step and every rank has equal work. Raises UserError when an image is longer than the budget.
    """

    def __init__(self, images: Images, budget: int, seed: int) -> None:
        longest = int(images.lengths.max())
        if longest > budget:
            raise UserError(f"--tokens-a-step is {budget}; the longest image has {longest} tokens")
        self.images, self.budget, self.seed = images, budget, seed
        self.packs = self._packs_an_epoch()

    def _packs_an_epoch(self) -> int:
        """Enough for the tokens of an epoch to fill `FILL` of them, and of any epoch (six deviations) all.

        More where packs hold so few images that some dealt packs are above the budget.
        """
        mean, variance = self.images.moments()
        most = mean.sum() + 6 * np.sqrt(variance.sum())
        images = len(self.images.first_rows)  # each fits alone, so more packs than images would be empty
        packs = min(images, int(np.ceil(max(mean.sum() / FILL, most) / self.budget)))
        drawn = np.sort(self.images.lengths[self.images.draw(np.random.default_rng((self.seed, 0)))])[::-1]
        while dealt(drawn, packs)[1].max() > self.budget:
            packs = min(images, int(np.ceil(packs * 1.002)))
        return packs

    def plan(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The epoch's images ordered by pack, their rows, and where each pack begins (packs+1,)."""
        rng = np.random.default_rng((self.seed, epoch))
        rows = self.images.draw(rng)
        shuffled = rng.permutation(len(rows))
        longest_first = shuffled[np.argsort(-self.images.lengths[rows[shuffled]], kind="stable")]
        lengths = self.images.lengths[rows[longest_first]].astype(np.int64)
        pack, filled = dealt(lengths, self.packs)
        relieve(pack, filled, lengths, self.budget)
        pack = rng.permutation(self.packs)[pack]  # else the first packs would always hold the longest
        order = np.argsort(pack, kind="stable")
        bounds = np.searchsorted(pack[order], np.arange(self.packs + 1))
        images = longest_first[order]
        return images, rows[images], bounds

    def step(self, step: int) -> Step:
        """Pack number `step` of an endless sequence of epochs."""
        epoch, pack = divmod(step, self.packs)
        images, rows, bounds = self._epoch(epoch)
        inside = slice(bounds[pack], bounds[pack + 1])
        return Step(rows[inside], epoch * len(self.images.first_rows) + images[inside])


def dealt(lengths: np.ndarray, packs: int) -> tuple[np.ndarray, np.ndarray]:
    """The pack of each image, and each pack's tokens. `lengths` fall."""
    pack = np.empty(len(lengths), dtype=np.int64)
    filled = np.zeros(packs, dtype=lengths.dtype)
    for start in range(0, len(lengths), packs):
        stratum = slice(start, start + packs)
        emptiest = np.argsort(filled, kind="stable")[: len(lengths[stratum])]
        pack[stratum] = emptiest
        filled[emptiest] += lengths[stratum]
    return pack, filled


def relieve(pack: np.ndarray, filled: np.ndarray, lengths: np.ndarray, budget: int) -> None:
    """Swap images of packs above the budget with shorter ones of the emptiest, or move them there.

    In place. Hardly ever needed: only if an epoch deals worse than the one the packs were counted by.
    """
    while filled.max() > budget:
        full, emptiest = int(filled.argmax()), int(filled.argmin())
        here, there = np.flatnonzero(pack == full), np.flatnonzero(pack == emptiest)
        gains = lengths[here][:, None] - np.append(lengths[there], 0)[None]  # the last column is a move
        fits = (gains > 0) & (gains <= budget - filled[emptiest])
        if not fits.any():
            raise UserError(f"--tokens-a-step {budget} is too small for images of these lengths")
        i, j = np.unravel_index(np.where(fits, gains, 0).argmax(), gains.shape)
        pack[here[i]] = emptiest
        if j < len(there):
            pack[there[j]] = full
        filled[full] -= gains[i, j]
        filled[emptiest] += gains[i, j]
