"""Ways to compute images of mixed shapes on a GPU: packed, by length, padded, in buckets.

    python benchmarks/gpu_layouts.py [--preset fitv2-xl] [--depth 8] [--images 128] [--repeats 5]

Forward and backward pass of the model in bfloat16, some of its blocks, on latents of ImageNet-like sizes
under 256 tokens, in alternating rounds:

- packed: one sequence, PyTorch's variable-length kernel;
- by length: the same sequence, images of equal length in one call of attention after another;
- padded: every image as 256 tokens, which is what padding costs without its mask;
- bucketed: every image at the nearest of nine shapes, a batch of one shape at a time, as many images of each
  as are nearest to it.

Prints one JSON object a case: images a second, tokens an image, and the share of the card's peak of what the
images need, padding not counted.
"""

import argparse
import datetime
import json
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from time import perf_counter
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from fitv2 import attention
from fitv2.conditioning import Condition
from fitv2.model import FiT
from fitv2.runtime.device import default_device
from fitv2.tokens import Layout, Size
from fitv2.training.throughput import MultiplyAdds, peak_flops
from packed_vs_padded import imagenet_sizes

BUCKETS = ((16, 16), (14, 18), (18, 14), (12, 21), (21, 12), (11, 23), (23, 11), (9, 28), (28, 9))
SQUARE = (16, 16)  # of the limit of 256 tokens


def nearest_bucket(size: Size) -> Size:
    """The bucket of the nearest aspect ratio."""
    return min(BUCKETS, key=lambda bucket: abs(np.log(bucket[0] / bucket[1] * size[1] / size[0])))


def batches(way: str, sizes: Sequence[Size]) -> list[list[Size]]:
    """The images of each call of the model, as large as a way computes them."""
    if way == "padded":
        return [[SQUARE] * len(sizes)]
    if way == "bucketed":
        return [[bucket] * count for bucket, count in Counter(map(nearest_bucket, sizes)).items()]
    return [sorted(sizes, key=lambda size: size[0] * size[1])]


def passes(model: FiT, groups: list[list[Size]]) -> Callable[[], None]:
    """A function that runs the model forward and backward over all images."""
    device, inputs = model.device, []
    for sizes in groups:
        layout = Layout.of(sizes).to(device)
        x_TC = torch.randn(layout.tokens, model.token_channels, device=device)
        labels = Condition.of(label=torch.arange(len(sizes), device=device) % 1000)
        inputs.append((x_TC, layout, torch.rand(len(sizes), device=device), labels))

    def run() -> None:
        for one in inputs:
            model(*one).float().square().mean().backward()
        model.zero_grad()

    return run


def by_length() -> AbstractContextManager[object]:
    """Attention without the variable-length kernel, as where there is none."""

    def attend(q: Tensor, k: Tensor, v: Tensor, _: Tensor, runs: attention.Runs) -> Tensor:
        return attention._attend_by_length(q, k, v, runs)

    return mock.patch.object(attention, "_attend", attend)


def wait(device: torch.device) -> None:
    """Until the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--preset", default="fitv2-xl")
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--width", type=int, help="another than the preset's")
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--eager-only", action="store_true", help="without torch.compile")
    options = parser.parse_args()
    changes = {"depth": options.depth} | ({"width": options.width} if options.width else {})
    device = default_device()
    model = FiT.from_preset(options.preset, **changes).to(device)
    model.cast(torch.bfloat16)
    sizes = imagenet_sizes(options.images, np.random.default_rng(0))
    flops = sum(
        6 * (cost.linear + cost.attention)
        for rows, columns in sizes
        for cost in [MultiplyAdds.of(model, rows * columns)]
    )
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    about = {"date": datetime.date.today().isoformat(), "device": name, "torch": torch.__version__}
    about |= {"preset": options.preset, "depth": options.depth, "images": options.images}
    for compiled in (False,) if options.eager_only else (False, True):
        if compiled:
            model.compile_repeated_blocks(dynamic=True)
        groups = {way: batches(way, sizes) for way in ("packed", "by length", "padded", "bucketed")}
        runs = {way: passes(model, its) for way, its in groups.items()}
        times: dict[str, list[float]] = {way: [] for way in groups}
        for number in range(options.repeats + 2):
            for way, run in runs.items():
                with by_length() if way == "by length" else nullcontext():
                    wait(device)
                    started = perf_counter()
                    run()
                    wait(device)
                if number >= 2:  # the first ones warm up
                    times[way].append(perf_counter() - started)
        for way, taken in times.items():
            median = statistics.median(taken)
            tokens = sum(rows * columns for group in groups[way] for rows, columns in group)
            found = {
                "images_per_second": round(len(sizes) / median, 1),
                "tokens_per_image": round(tokens / len(sizes), 1),
                "share_of_peak": round(flops / median / peak_flops(device), 4),
                "spread": [round(min(taken) / median, 3), round(max(taken) / median, 3)],
            }
            print(json.dumps(about | {"layout": way, "compiled": compiled} | found), flush=True)


if __name__ == "__main__":
    main()
