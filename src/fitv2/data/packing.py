"""Which images a step takes: a fixed number, or as many as fill a budget of tokens.

Both are functions of (seed, step) alone, so a run may stop anywhere and resume with any number of
processes. Every image comes once an epoch. A dataset row is one variant of an image (its mirror
image, a crop); each epoch takes one variant of each image.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from fitv2.errors import UserError

FILL = 0.996  # share of the budget that an average pack is planned to fill
MORE = 0.001  # share of packs more, where so few do not fit
ATTEMPTS = 100  # of an epoch to draw variants that fit
SWAPS_AT_ONCE = 1 << 21


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
        self.uncropped, self.crops = variants - crops, crops  # rows of each kind

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        """One row of each image."""
        if not self.crops.any():
            return self.first_rows + rng.integers(self.uncropped)
        crop = rng.random(len(self.first_rows)) < self._crop_shares()
        start = self.first_rows + np.where(crop, self.uncropped, 0)
        return start + rng.integers(np.where(crop, self.crops, self.uncropped))

    def _crop_shares(self) -> np.ndarray:
        """How often each image is taken cropped."""
        return np.where(self.uncropped == 0, 1.0, np.where(self.crops == 0, 0.0, self.crop_probability))

    def moments(self) -> tuple[np.ndarray, np.ndarray]:
        """Expected length of each image, and variance."""
        share = self._crop_shares()
        kinds = np.stack([self.uncropped, self.crops], axis=1)
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

    def split(self, lengths: np.ndarray, parts: int) -> list["Step"]:
        """The step cut into parts of nearly equal tokens; `lengths` are those of its rows.

        A part may be empty when there are fewer images than parts.
        """
        longest_first = np.argsort(-lengths, kind="stable")
        part = np.empty(len(lengths), dtype=np.int64)
        part[longest_first], _ = assign_to_packs(lengths[longest_first].astype(np.int64), parts)
        return [Step(self.rows[part == n], self.keys[part == n]) for n in range(parts)]


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


SMALLEST = 8  # the first step of a ramp-up has this part of the images of the others


class FixedCount(Sampler):
    """So many images a step, whatever their sizes: as the paper trains.

    Over the first `rampup` steps their number grows from an eighth of that.
    """

    def __init__(self, images: Images, count: int, seed: int, rampup: int = 0) -> None:
        self.images, self.count, self.seed, self.rampup = images, count, seed, rampup

    def plan(self, epoch: int) -> np.ndarray:
        """A row of each image, in the epoch's order."""
        rng = np.random.default_rng((self.seed, epoch))
        return rng.permutation(self.images.draw(rng))

    def step(self, step: int) -> Step:
        """The next images of an endless sequence of epochs."""
        first, end = (images_before(number, self.count, self.rampup) for number in (step, step + 1))
        keys = np.arange(first, end)
        epochs, places = np.divmod(keys, len(self.images.first_rows))
        rows = [self._epoch(int(epoch))[places[epochs == epoch]] for epoch in np.unique(epochs)]
        return Step(np.concatenate(rows), keys)


def images_before(step: int, count: int, rampup: int = 0) -> int:
    """The images of all steps before one, of so many each after the first `rampup`."""
    return int(_rampup_starts(count, rampup)[min(step, rampup)]) + max(0, step - rampup) * count


@lru_cache
def _rampup_starts(count: int, rampup: int) -> np.ndarray:
    eighths = rampup + (SMALLEST - 1) * np.arange(rampup, dtype=np.int64)  # of rampup·SMALLEST
    counts = -(-count * eighths // max(1, SMALLEST * rampup))
    return np.concatenate([[0], np.cumsum(counts)])


class TokenBudget(Sampler):
    """At most `budget` tokens a step, in packs of nearly equal size.

    An epoch has always as many packs, however its variants fall, so a step's number tells its epoch.
    Images are assigned in strata of equal length, the longest first, each time to the emptiest packs
    (longest processing time first, Graham 1969, a stratum at a time): packs differ by few tokens, so
    every step and every rank has equal work. Raises UserError when an image is longer than the budget.
    """

    def __init__(self, images: Images, budget: int, seed: int) -> None:
        longest = int(images.lengths.max())
        if longest > budget:
            raise UserError(f"`tokens_per_step` is {budget}; the longest image has {longest} tokens")
        self.images, self.budget, self.seed = images, budget, seed
        self.packs = self._packs_an_epoch()

    def _packs_an_epoch(self) -> int:
        """As few as fill `FILL` of them on average, and hold what nearly each epoch draws (three deviations).

        More where packs hold so few images that they do not fit.
        """
        mean, variance = self.images.moments()
        most = mean.sum() + 3 * np.sqrt(variance.sum())
        images = len(self.images.first_rows)  # each fits alone, so more packs than images would be empty
        packs, more, failed = int(np.ceil(max(mean.sum() / FILL, most) / self.budget)), MORE, 0
        while packs < images and self._assign(0, 0, packs) is None:
            packs, more, failed = int(np.ceil(packs * (1 + more))), min(2 * more, 16 * MORE), packs
        packs = min(images, packs)
        while failed and packs - failed > max(1, MORE * packs):  # the steps grow: look between the last two
            middle = (packs + failed) // 2
            packs, failed = (middle, failed) if self._assign(0, 0, middle) else (packs, middle)
        return min(images, round(packs * (1 + MORE)))  # other epochs may fit a little worse

    def plan(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The epoch's images ordered by pack, their rows, and where each pack begins (packs+1,).

        An epoch that draws too much for its packs draws again.
        """
        for attempt in range(ATTEMPTS):
            found = self._assign(epoch, attempt, self.packs)
            if found:
                return found
        raise UserError(f"`tokens_per_step` {self.budget} is too small for images of these lengths")

    def _assign(
        self, epoch: int, attempt: int, packs: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
        rng = np.random.default_rng((self.seed, epoch, attempt))
        rows = self.images.draw(rng)
        shuffled = rng.permutation(len(rows))
        longest_first = shuffled[np.argsort(-self.images.lengths[rows[shuffled]], kind="stable")]
        lengths = self.images.lengths[rows[longest_first]].astype(np.int64)
        pack, filled = assign_to_packs(lengths, packs)
        rebalance(pack, filled, lengths, self.budget)
        if filled.max() > self.budget:
            return None
        pack = rng.permutation(packs)[pack]  # else the first packs would always hold the longest
        order = np.argsort(pack, kind="stable")
        bounds = np.searchsorted(pack[order], np.arange(packs + 1))
        images = longest_first[order]
        return images, rows[images], bounds

    def step(self, step: int) -> Step:
        """Pack number `step` of an endless sequence of epochs."""
        epoch, pack = divmod(step, self.packs)
        images, rows, bounds = self._epoch(epoch)
        inside = slice(bounds[pack], bounds[pack + 1])
        return Step(rows[inside], epoch * len(self.images.first_rows) + images[inside])


def assign_to_packs(lengths: np.ndarray, packs: int) -> tuple[np.ndarray, np.ndarray]:
    """The pack of each image, and each pack's tokens. `lengths` are sorted in descending order."""
    pack = np.empty(len(lengths), dtype=np.int64)
    filled = np.zeros(packs, dtype=lengths.dtype)
    for start in range(0, len(lengths), packs):
        stratum = slice(start, start + packs)
        emptiest = np.argsort(filled, kind="stable")[: len(lengths[stratum])]
        pack[stratum] = emptiest
        filled[emptiest] += lengths[stratum]
    return pack, filled


def rebalance(pack: np.ndarray, filled: np.ndarray, lengths: np.ndarray, budget: int) -> None:
    """Swap images of packs above the budget with shorter ones of the emptiest, in place.

    The fullest pack is paired with the emptiest, the next with the next, and so on, round by round until no
    pack is above the budget or nothing helps. An empty place counts as an image of no length.
    """
    if filled.max() <= budget:
        return
    counts = np.bincount(pack, minlength=len(filled))
    order = np.argsort(pack, kind="stable")
    places = np.arange(len(pack)) - np.repeat(np.cumsum(counts) - counts, counts)
    slots = np.full((len(filled), counts.max() + 1), len(lengths))  # the images of each pack
    slots[pack[order], places] = order
    lengths = np.append(lengths, 0).astype(np.int32)
    # Of packs of very many images a thousand are enough to choose from, with a last place, which is empty.
    some = np.unique(np.linspace(0, slots.shape[1] - 1, min(slots.shape[1], 1_000)).astype(np.int64))
    while (filled > budget).any():
        full = np.flatnonzero(filled > budget)
        full = full[np.argsort(-filled[full], kind="stable")]
        empty = np.argsort(filled, kind="stable")[: len(full)]
        here, there = lengths[slots[full]][:, some], lengths[slots[empty]][:, some]
        i, j, helps = choose_swaps(here, there, filled[full], filled[empty], budget)
        if not helps.any():
            break
        full, empty, i, j = full[helps], empty[helps], some[i[helps]], some[j[helps]]
        given, taken = slots[full, i], slots[empty, j]
        slots[full, i], slots[empty, j] = taken, given
        filled[full] -= lengths[given] - lengths[taken]
        filled[empty] += lengths[given] - lengths[taken]
    held = slots < len(pack)
    pack[slots[held]] = np.nonzero(held)[0]


def choose_swaps(
    here: np.ndarray, there: np.ndarray, full: np.ndarray, empty: np.ndarray, budget: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which image of each full pack to swap with which of an empty one, and whether that helps.

    `here` and `there` are the lengths of their images, (pairs, images). The swap is the one after which
    both have equally much room, or the largest that the empty pack has room for.
    """
    need, room = full - budget, budget - empty
    aim = np.where(room >= need, (need + room) // 2, room)
    best = np.empty(len(here), dtype=np.int64)
    helps = np.empty(len(here), dtype=bool)
    pairs = max(1, SWAPS_AT_ONCE // here.shape[1] ** 2)
    for start in range(0, len(here), pairs):
        some = slice(start, start + pairs)
        gains = here[some, :, None] - there[some, None, :]
        fits = (gains > 0) & (gains <= room[some, None, None])
        distance = np.where(fits, np.abs(gains - aim[some, None, None]), budget).reshape(len(gains), -1)
        best[some] = distance.argmin(axis=1)
        helps[some] = fits.reshape(len(gains), -1)[np.arange(len(gains)), best[some]]
    i, j = np.divmod(best, here.shape[1])
    return i, j, helps
