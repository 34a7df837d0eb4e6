"""What is measured between two lines of the log."""

import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from time import perf_counter

import torch
from torch import Tensor, nn

from fitv2.model import FiT

BINS = 5  # of time, from noise to data


class ByTime:
    """Sums of losses and counts of images by their time, on the device until they are asked for."""

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(2, BINS, device=device)

    def add(self, progress_B: Tensor, loss_B: Tensor, counts: bool = True) -> None:
        """Images so far from noise (0) to data (1), and their losses; none if they do not count."""
        bin_B = (progress_B * BINS).long().clamp(0, BINS - 1)
        values = counts * torch.stack([loss_B, torch.ones_like(loss_B)]).to(self.sums.dtype)
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


# Dense bfloat16 matmuls, in 10¹² operations a second, from the makers' data sheets.
PEAKS = {
    "A100": 312, "A10G": 70, "L4": 121, "L40": 181, "L40S": 362,
    "RTX 3090": 71, "RTX 4090": 165, "RTX 5090": 210,
    "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H200": 989, "GH200": 989, "B200": 2250,
}  # fmt: skip


class TrainingFlops:
    """Operations of the matmuls in a forward and backward pass over images of some lengths.

    Elementwise operations are not counted, nor what is computed again to save memory: as in MFU (PaLM,
    arXiv 2204.02311, appendix B). A frozen matrix needs no gradient of its own.
    """

    def __init__(self, model: FiT) -> None:
        self.a_token = self.an_image = 0
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear):
                # Forward, the gradient of the input (of the first layers none is needed), of the weight.
                first = name in ("patch_embed", "time_embed.up")
                flops = 2 * module.weight.numel() * (2 - first + module.weight.requires_grad)
                if "modulation" in name or "time_embed" in name:
                    self.an_image += flops
                else:
                    self.a_token += flops
        self.a_pair = 3 * 4 * model.architecture.depth * model.architecture.width

    def __call__(self, lengths: Sequence[int]) -> int:
        """For one step of images of so many tokens each."""
        pairs = sum(length**2 for length in lengths)
        return self.a_token * sum(lengths) + self.an_image * len(lengths) + self.a_pair * pairs


@dataclass(frozen=True)
class MultiplyAdds:
    """Of the matmuls in a forward pass over an image without text; each is two floating-point operations."""

    linear: int  # of matrices of weights: what the paper gives
    attention: int  # of queries with keys, and of weights with values

    @classmethod
    def of(cls, model: FiT, tokens: int) -> "MultiplyAdds":
        """For an image of so many tokens."""
        linear = 0
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and not name.startswith("text_embed"):
                once = "modulation" in name or "time_embed" in name
                linear += module.weight.numel() * (1 if once else tokens)
        return cls(linear, 2 * model.architecture.depth * model.architecture.width * tokens**2)


@cache
def peak_flops(device: torch.device) -> float:
    """Operations a second that matmuls of large matrices could reach at most.

    From the data sheet where the accelerator is known; else measured, in float32 on a CPU.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        known = [part for part in PEAKS if re.search(rf"\b{part}\b", name) and "Laptop" not in name]
        if known:
            return PEAKS[max(known, key=len)] * 1e12
    on_cpu = device.type == "cpu"
    side = 1024 if on_cpu else 8192
    matrix = torch.ones(side, side, device=device, dtype=torch.float32 if on_cpu else torch.bfloat16)
    best = min(_seconds(matrix) for _ in range(5))
    return 2 * side**3 / best


def _seconds(matrix: torch.Tensor) -> float:
    started = perf_counter()
    (matrix @ matrix)[0, 0].item()
    return perf_counter() - started
