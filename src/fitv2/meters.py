"""What is measured between two lines of the log."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from time import perf_counter

import torch
from torch import Tensor

BINS = 5  # of time, from noise to data


class ByTime:
    """Sums of losses and counts of images by their time, on the device until they are asked for."""

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(2, BINS, device=device)

    def add(self, progress_B: Tensor, loss_B: Tensor) -> None:
        """Images so far from noise (0) to data (1), and their losses."""
        bin_B = (progress_B * BINS).long().clamp(0, BINS - 1)
        values = torch.stack([loss_B, torch.ones_like(loss_B)]).to(self.sums.dtype)
        self.sums.index_add_(1, bin_B, values)

    def means(self, name: str) -> dict[str, float]:
        """The mean of all, and of each bin that has images; nothing if there are none."""
        total, count = self.sums.sum(1).tolist()
        if not count:
            return {}
        values = {name: total / count}
        for i, (loss, images) in enumerate(self.sums.T.tolist()):
            if images:
                values[f"{name}_by_time/{i / BINS:.1f}-{(i + 1) / BINS:.1f}"] = loss / images
        return values


class Rates:
    """Images, tokens and operations a second, and the share of time spent waiting for data."""

    def __init__(self, peak: float) -> None:
        self.peak = peak
        self.seconds = self.waited = self.latest = 0.0
        self.images = self.tokens = self.flops = 0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Time spent inside is waiting for data."""
        started = perf_counter()
        yield
        self.waited += perf_counter() - started

    @contextmanager
    def step(self) -> Iterator[None]:
        """Time spent inside is that of a step."""
        started = perf_counter()
        yield
        self.latest = perf_counter() - started
        self.seconds += self.latest

    def count(self, lengths: Sequence[int], images: int, flops: int) -> None:
        """What a step computed: tokens of this process's images, and how many images all had."""
        self.images += images
        self.tokens += sum(lengths)
        self.flops += flops

    def values(self, ranks: int) -> dict[str, float]:
        """By name; tokens are taken to be as many in each process."""
        seconds = max(self.seconds, 1e-9)
        return {
            "speed/images_per_second": self.images / seconds,
            "speed/tokens_per_second": self.tokens * ranks / seconds,
            "speed/share_of_peak_flops": self.flops / seconds / self.peak,
            "speed/data_wait_share": self.waited / seconds,
        }


def memory_gib(device: torch.device) -> float:
    """The most memory that was in use so far: the accelerator's, or on a CPU the process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    try:
        import resource
    except ImportError:  # Windows
        return float("nan")
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / 2**30 if sys.platform == "darwin" else most / 2**20
