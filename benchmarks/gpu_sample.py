"""Sampling on a GPU: images a second, share of the peak, memory; compiled or not.

    python benchmarks/gpu_sample.py [--preset fitv2-xl] [--images 64] [--steps 25]

Latents of images of ImageNet-like sizes under 256 tokens, with guidance, in bfloat16, of random weights;
decoding is left out. An image takes 2·STEPS passes of the model. Prints one JSON object a case, with date
and device.
"""

import argparse
import datetime
import json
from collections.abc import Callable
from time import perf_counter

import numpy as np
import torch
from torch import Tensor

from fitv2.conditioning import Condition
from fitv2.config import Guidance, Sampling
from fitv2.model import FiT
from fitv2.runtime.device import default_device
from fitv2.runtime.rng import generator
from fitv2.sampling.generate import default_tokens_per_pack
from fitv2.sampling.pack import generate_tokens
from fitv2.tokens import Layout, Size
from fitv2.training.throughput import MultiplyAdds, peak_flops
from packed_vs_padded import imagenet_sizes

GUIDANCE = Guidance(1.5)


def packs(sizes: list[Size], tokens: int) -> list[Layout]:
    """The images in packs of at most so many tokens."""
    found: list[list[Size]] = [[]]
    for size in sorted(sizes, key=lambda size: size[0] * size[1]):
        if sum(rows * columns for rows, columns in [*found[-1], size]) > tokens:
            found.append([])
        found[-1].append(size)
    return [Layout.of(pack) for pack in found]


def sample(model: FiT, layouts: list[Layout], sampling: Sampling) -> Callable[[], list[Tensor]]:
    """A function that makes the latents of all images."""
    chosen = [layout.to(model.device) for layout in layouts]
    labels = [Condition.of(label=torch.arange(len(one)) % 1000).to(model.device) for one in chosen]

    def run() -> list[Tensor]:
        made = [
            generate_tokens(model, one, label, [generator(i) for i in range(len(one))], GUIDANCE, sampling)
            for one, label in zip(chosen, labels, strict=True)
        ]
        made[-1].sum().item()  # waits for the device
        return made

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--preset", default="fitv2-xl")
    parser.add_argument("--depth", type=int, help="another than the preset's")
    parser.add_argument("--width", type=int, help="another than the preset's")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--eager-only", action="store_true", help="without torch.compile")
    options = parser.parse_args()
    changes = {key: value for key in ("depth", "width") if (value := getattr(options, key))}
    device = default_device()
    model = FiT.from_preset(options.preset, **changes).to(device).eval()
    model.cast(torch.bfloat16)
    sizes = imagenet_sizes(options.images, np.random.default_rng(0))
    flops = sum(
        4 * options.steps * (cost.linear + cost.attention)
        for rows, columns in sizes
        for cost in [MultiplyAdds.of(model, rows * columns)]
    )
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    layouts = packs(sizes, default_tokens_per_pack(device))
    for compiled in (False,) if options.eager_only else (False, True):
        if compiled:
            model.compile_repeated_blocks(dynamic=True)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        run = sample(model, layouts, Sampling(steps=options.steps))
        with torch.no_grad():
            run()
            started = perf_counter()
            run()
            elapsed = perf_counter() - started
        memory = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else float("nan")
        case = {
            "date": datetime.date.today().isoformat(), "device": name, "torch": torch.__version__,
            "preset": options.preset, "evaluations": options.steps, "compiled": compiled,
            "images_per_second": round(options.images / elapsed, 2),
            "share_of_peak": round(flops / elapsed / peak_flops(device), 4), "memory_gib": round(memory, 1),
        }  # fmt: skip
        print(json.dumps(case), flush=True)


if __name__ == "__main__":
    main()
