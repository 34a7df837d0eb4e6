"""How many floating-point operations a step is, and how many a device can do."""

import re
from collections.abc import Sequence
from functools import cache
from time import perf_counter

import torch
from torch import nn

from fitv2.model import FiT

# Dense bfloat16 products, in 10¹² operations a second, from the makers' data sheets.
PEAKS = {
    "A100": 312, "A10G": 70, "L4": 121, "L40": 181, "L40S": 362,
    "RTX 3090": 71, "RTX 4090": 165, "RTX 5090": 210,
    "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H200": 989, "GH200": 989, "B200": 2250,
}  # fmt: skip


class TrainingFlops:
    """Operations of the matrix products in a forward and backward pass over images of some lengths.

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


@cache
def peak_flops(device: torch.device) -> float:
    """Operations a second that products of large matrices could reach at most.

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
