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

LABEL = 1  # behind the key of an image, of the draw for its label alone


@dataclass(frozen=True, eq=False)
class Draws:
    """What chance decides of B images with T tokens. Arrays: a process hands them on at little cost."""

    times_BN: np.ndarray  # those of each image, as the objective draws them
    chance_B: np.ndarray  # below the dropout: without its condition
    label_chance_B: np.ndarray  # below the dropout: without its label
    noise_TC: np.ndarray
    lengths: tuple[int, ...]

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
        return cls(times_BN, chance_B, label_B, torch.cat(noises).numpy(), tuple(lengths))

    def select(self, images: Sequence[int]) -> "Draws":
        """Those of some of the images, in the given order."""
        chosen = np.asarray(images)
        pieces = np.split(self.noise_TC, np.cumsum(self.lengths)[:-1])
        noise_TC = np.concatenate([pieces[i] for i in images])
        times_BN, chance_B, label_B = (x[chosen] for x in (self.times_BN, self.chance_B, self.label_chance_B))
        return Draws(times_BN, chance_B, label_B, noise_TC, tuple(self.lengths[i] for i in images))

    def add_noise(self, data: PackedTokens, objective: Objective) -> NoisySample:
        """These images with their noise, where `data` is."""
        device = data.x_TC.device
        noise_TC, times_BN = (torch.from_numpy(x).to(device) for x in (self.noise_TC, self.times_BN))
        t_B, *target_B = times_BN.unbind(1)
        sample = objective.add_noise(data.x_TC, data.layout, noise_TC, t_B)
        return replace(sample, target_B=target_B[0]) if target_B else sample

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
