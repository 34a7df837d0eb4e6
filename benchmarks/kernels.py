"""What each kernel gains over its plain formula, forward and backward.

    python benchmarks/kernels.py [--tokens 2048] [--width 768] [--repeats 15] [--precision float32]

Images of ImageNet-like sizes, one process, alternating runs; the ratio is the formula's time over the
kernel's, medians. A kernel that gains under 5 % has no place in `fitv2.kernels`. Prints a JSON object a line.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from time import perf_counter

import numpy as np
import torch
from torch import Tensor, nn

from fitv2 import kernels
from fitv2.runtime.device import default_device
from fitv2.tokens import Layout
from packed_vs_padded import imagenet_sizes

Work = Callable[[], Tensor]


def seconds(work: Work, leaves: list[Tensor]) -> tuple[float, float]:
    """Of the forward and of the backward pass."""
    started = perf_counter()
    out = work()
    between = perf_counter()
    out.backward(torch.ones_like(out))
    ended = perf_counter()
    for leaf in leaves:
        leaf.grad = None
    return between - started, ended - between


def compare(name: str, formula: Work, kernel: Work, leaves: list[Tensor], repeats: int) -> None:
    """Print how many times longer the formula takes."""
    times: dict[str, list[tuple[float, float]]] = {"formula": [], "kernel": []}
    for _ in range(repeats + 2):
        for kind, work in (("formula", formula), ("kernel", kernel)):
            times[kind].append(seconds(work, leaves))
    forward, backward, both = (
        [statistics.median(part(t) for t in times[kind][2:]) for kind in ("formula", "kernel")]
        for part in (lambda t: t[0], lambda t: t[1], sum)
    )
    ratios = {"forward": forward, "backward": backward, "both": both}
    figures = {part: round(slow / fast, 3) for part, (slow, fast) in ratios.items()}
    print(json.dumps({"kernel": name, **figures, "milliseconds": round(1e3 * both[1], 2)}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--precision", default="float32", choices=("float32", "bfloat16"))
    options = parser.parse_args()
    device, dtype = default_device(), getattr(torch, options.precision)
    sizes = imagenet_sizes(64, np.random.default_rng(0))
    count = int(np.searchsorted(np.cumsum([r * c for r, c in sizes]), options.tokens)) + 1
    layout = Layout.of(sorted(sizes[:count], key=lambda size: size[0] * size[1])).to(device)
    tokens, width = layout.tokens, options.width

    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).to(dtype).requires_grad_()

    x, base, scale = leaf(tokens, width), leaf(tokens, width), leaf(len(layout), width)
    gate, up = leaf(tokens, 2 * width), leaf(tokens, 2 * width)
    heads = leaf(tokens, width // 64, 64)
    rotation = torch.polar(torch.ones(tokens, 1, 32), torch.randn(tokens, 1, 32)).to(device)
    linear = nn.Linear(width, 3 * width, device=device, dtype=dtype)
    repeats = options.repeats
    compare(
        "scaled_sum",
        lambda: kernels.scaled_sum_formula(base, x, scale, layout),
        lambda: kernels.scaled_sum(base, x, scale, layout),
        [x, base, scale], repeats,
    )  # fmt: skip
    compare(
        "gated_silu", lambda: kernels.gated_silu_formula(gate, up), lambda: kernels.gated_silu(gate, up),
        [gate, up], repeats,
    )  # fmt: skip
    compare(
        "rotate", lambda: kernels.rotate_formula(heads, rotation), lambda: kernels.rotate(heads, rotation),
        [heads], repeats,
    )  # fmt: skip
    parts = (width, width, width)
    compare(
        "linear_parts, then gated_silu of two",
        lambda: kernels.gated_silu(*linear(x).split(parts, -1)[:2]),
        lambda: kernels.gated_silu(*kernels.linear_parts(linear, x, parts)[:2]),
        [x, *linear.parameters()], repeats,
    )  # fmt: skip


if __name__ == "__main__":
    main()
