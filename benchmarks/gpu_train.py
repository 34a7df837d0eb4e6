"""Training on a GPU: images a second, share of the peak, memory; compiled or not, packed and padded.

    python benchmarks/gpu_train.py [--preset fitv2-xl] [--images 256] [--grad-accum-steps 8] [--steps 10]

Steps of the trainer on synthetic latents of ImageNet-like sizes under 256 tokens. The padded side computes
as many images, each of 256 tokens, which is what padding costs without the cost of a mask: it counts the
operations of the images alone, not those of padding. Prints one JSON object a case, with date and device.
"""

import argparse
import datetime
import gc
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from time import perf_counter

import numpy as np
import torch

from fitv2.data.dataset import TokenDataset
from fitv2.presets import Preset, preset
from fitv2.runtime.device import default_device
from fitv2.tokens import Size
from fitv2.training.throughput import peak_flops
from fitv2.training.trainer import Trainer
from loading import synthetic
from packed_vs_padded import imagenet_sizes

WARM_UP, NEVER = 3, 10**9


def measure(chosen: Preset, sizes: list[Size], real: list[Size], steps: int) -> dict[str, float]:
    """Steps on images of `sizes`, of which `real` are no padding."""
    device = default_device()
    gc.collect()  # compiled blocks refer to themselves
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "tokens"
        synthetic(data, len(sizes), sizes)
        trainer = Trainer(chosen, TokenDataset(data), data, Path(folder) / "run", None)
        for _ in range(WARM_UP):
            trainer.advance(lambda _: None)
        started = perf_counter()
        for _ in range(steps):  # each waits for the device, to read its loss
            trainer.advance(lambda _: None)
        elapsed = perf_counter() - started
        trainer.saver.finish()
    flops = trainer.flops([rows * columns for rows, columns in real]) * chosen.training.batch_size / len(real)
    memory = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else float("nan")
    return {
        "images_per_second": round(steps * chosen.training.batch_size / elapsed, 2),
        "share_of_peak": round(flops * steps / elapsed / peak_flops(device), 4),
        "memory_gib": round(memory, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--preset", default="fitv2-xl")
    parser.add_argument("--depth", type=int, help="another than the preset's")
    parser.add_argument("--width", type=int, help="another than the preset's")
    parser.add_argument("--images", type=int, default=256, help="a step")
    parser.add_argument("--grad-accum-steps", type=int, default=8)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--eager-only", action="store_true", help="without torch.compile")
    parser.add_argument("--compiled-only", action="store_true", help="with torch.compile alone")
    parser.add_argument("--packed-only", action="store_true", help="without padding")
    options = parser.parse_args()
    base = preset(options.preset)
    model = replace(
        base.model, depth=options.depth or base.model.depth, width=options.width or base.model.width
    )
    training = replace(
        base.training, batch_size=options.images, grad_accum_steps=options.grad_accum_steps,
        steps=NEVER, log_every=NEVER, validate_every=NEVER, sample_every=NEVER, save_every=NEVER, track=(),
    )  # fmt: skip
    real = imagenet_sizes(4 * options.images, np.random.default_rng(0))
    device = default_device()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    layouts = {"packed": real} if options.packed_only else {"packed": real, "padded": [(16, 16)] * len(real)}
    for compiled in [False] * (not options.compiled_only) + [True] * (not options.eager_only):
        for kind, sizes in layouts.items():
            chosen = replace(base, model=model, training=replace(training, compile=compiled))
            case: dict[str, object] = {
                "date": datetime.date.today().isoformat(),
                "device": name,
                "torch": torch.__version__,
            }
            case |= {"preset": options.preset, "layout": kind, "compiled": compiled}
            print(json.dumps(case | measure(chosen, sizes, real, options.steps)), flush=True)


if __name__ == "__main__":
    main()
