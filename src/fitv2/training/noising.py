"""What a step learns from: images, each with a time and noise of its own key."""

from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace

import numpy as np
import torch

from fitv2.conditioning import Condition
from fitv2.data.dataset import Batch, Read, Steps
from fitv2.diffusion.noise import NoisySample
from fitv2.diffusion.objective import Objective
from fitv2.runtime.rng import NOISING, generator
from fitv2.runtime.workers import read_ahead
from fitv2.tokens import PackedTokens

LABEL, SHUFFLE = 1, 2  # behind the key of an image, of the draws for its label alone and its tokens' order


@dataclass(frozen=True, eq=False)
class Draws:
    """What chance decides of B images with T tokens. Arrays: a process hands them on at little cost."""

    times_BN: np.ndarray  # those of each image, as the objective draws them
    chance_B: np.ndarray  # below the dropout: without its condition
    label_chance_B: np.ndarray  # below the dropout: without its label
    noise_TC: np.ndarray
    lengths: tuple[int, ...]
    order_T: np.ndarray | None = None  # where, within its image, each token comes from, if they are shuffled

    @classmethod
    def of(
        cls,
        keys: Sequence[tuple[int, ...]],
        lengths: Sequence[int],
        channels: int,
        objective: Objective,
        step: int = 0,
    ) -> "Draws":
        """Those of images of so many tokens in a step: each image draws from its own key."""
        times, chances, label_chances, noises = [], [], [], []
        for key, length in zip(keys, lengths, strict=True):
            rng = generator(*key)
            times.append(torch.stack(objective.draw_times(rng, step)))
            chances.append(torch.rand((), generator=rng))
            noises.append(torch.randn(length, channels, generator=rng))
            label_chances.append(torch.rand((), generator=generator(*key, LABEL)))
        times_BN, chance_B, label_B = (torch.stack(one).numpy() for one in (times, chances, label_chances))
        order_T = None
        if objective.shuffles:
            both = zip(keys, lengths, strict=True)
            orders = [torch.randperm(length, generator=generator(*key, SHUFFLE)) for key, length in both]
            order_T = torch.cat(orders).numpy()
        return cls(times_BN, chance_B, label_B, torch.cat(noises).numpy(), tuple(lengths), order_T)

    def select(self, images: Sequence[int]) -> "Draws":
        """Those of some of the images, in the given order."""
        chosen = np.asarray(images)

        def of_tokens(value: np.ndarray) -> np.ndarray:
            pieces = np.split(value, np.cumsum(self.lengths)[:-1])
            return np.concatenate([pieces[i] for i in images])

        noise_TC, order_T = of_tokens(self.noise_TC), self.order_T
        if order_T is not None:
            order_T = of_tokens(order_T)
        times_BN, chance_B, label_B = (x[chosen] for x in (self.times_BN, self.chance_B, self.label_chance_B))
        lengths = tuple(self.lengths[i] for i in images)
        return Draws(times_BN, chance_B, label_B, noise_TC, lengths, order_T)

    def add_noise(
        self, data: PackedTokens, objective: Objective, learned_T: torch.Tensor | None = None
    ) -> NoisySample:
        """These images with their noise, where `data` is; of each token as much is learned as is said."""
        x_TC, layout, device = data.x_TC, data.layout, data.x_TC.device
        noise_TC, times_BN = (torch.from_numpy(x).to(device) for x in (self.noise_TC, self.times_BN))
        if learned_T is not None:
            learned_T = learned_T.to(device)
        if self.order_T is not None:
            order_T = torch.from_numpy(self.order_T).to(device) + layout.spread(layout.cu_seqlens[:-1])
            x_TC, layout = x_TC[order_T], layout.reorder(order_T)
            learned_T = None if learned_T is None else learned_T[order_T]
        sample = objective.add_noise(x_TC, layout, noise_TC, *times_BN.unbind(1))
        return sample if learned_T is None else replace(sample, learned_T=learned_T)

    def drop(self, condition: Condition, dropout: float, labels: bool) -> Condition:
        """The condition without that of some images; with `labels` without some of the other labels too."""
        condition = condition.drop(torch.from_numpy(self.chance_B < dropout))
        if not labels:
            return condition
        label_B = condition.values["label"]
        assert isinstance(label_B, torch.Tensor)
        label_B = torch.where(torch.from_numpy(self.label_chance_B < dropout), -1, label_B)
        return replace(condition, values={**condition.values, "label": label_B})


def places(keys: np.ndarray, wanted: np.ndarray) -> list[int]:
    """Where among the different `keys` each of the wanted ones is."""
    order = np.argsort(keys)
    found: list[int] = order[np.searchsorted(keys, wanted, sorter=order)].tolist()
    return found


@dataclass(frozen=True)
class Reading:
    """Reads the tokens of a step, and draws for its images: what other processes can do ahead."""

    steps: Steps
    objective: Objective
    seed: int

    def __call__(self, number: int) -> tuple[Read, Draws]:
        """A step by its number."""
        read = self.steps.read(number)
        dataset, step = self.steps.dataset, read[0]
        keys = [(self.seed, NOISING, int(key)) for key in step.keys]
        lengths = dataset.lengths[step.rows].tolist()
        return read, Draws.of(keys, lengths, dataset.token_channels, self.objective, number)


def drawn_batches(reading: Reading, first: int, workers: int) -> Generator[tuple[Batch, Draws], None, None]:
    """Batches and their draws from step `first` on, without end, made ahead by so many processes."""
    with closing(read_ahead(reading, range(first, 1 << 40), workers)) as ready:
        for read, draws in ready:
            yield reading.steps.pack(read), draws
