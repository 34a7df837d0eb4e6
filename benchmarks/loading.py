"""Loading tokens: images a second, and memory, from ten thousand images to a million.

    python benchmarks/loading.py [--folder FOLDER] [--images N N …]

Makes synthetic datasets of latents of about 130 tokens in FOLDER (5 GB; by default a temporary one), reads
them once so that they are warm, then loads steps of 64 images in an epoch's order: in one process, and
through two loader workers. The floor is one copy of the same bytes out of the page cache: preadv of the
images of a step in their order, without packing. Prints one JSON object a size; each is measured in a process
of its own.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import numpy as np

from fitv2.data.dataset import Steps, TokenDataset, batches
from fitv2.data.format import CARD, About, Shard, ShardRows, finish, shard_name
from fitv2.data.packing import FixedCount

CHANNELS, IMAGES_A_SHARD, IMAGES_A_STEP = 16, 4096, 64


def synthetic(folder: Path, images: int, sizes: Sequence[tuple[int, int]] = ()) -> None:
    """A dataset of so many images, one row each, of `sizes` or of 4 to 256 tokens, 130 on average."""
    rng = np.random.default_rng(0)
    numbers = rng.standard_normal((1 << 20, CHANNELS)).astype(np.float16)
    about = About(tuple(f"label {i}" for i in range(1000)), "pixels", 1.0, 0.0, 2, 4, 256)
    shards: dict[str, Shard] = {}
    folder.mkdir(parents=True, exist_ok=True)
    for number, start in enumerate(range(0, images, IMAGES_A_SHARD)):
        rows = ShardRows()
        for image in range(start, min(start + IMAGES_A_SHARD, images)):
            size = rng.integers(2, 17, 2) if image % 3 else (13, 18)
            size = sizes[image] if sizes else size
            length = int(size[0] * size[1])
            at = int(rng.integers(len(numbers) - length))
            tokens = numbers[at : at + length].reshape(int(size[0]), int(size[1]), CHANNELS)
            rows.add(tokens, int(rng.integers(1000)), f"{image}.jpg", 0)
        name = shard_name("train", number)
        shards[name] = rows.write(folder / name, about)
    finish(folder, about, shards, [])


def memory(field: str) -> float:
    """Megabytes of this process: VmRSS all, RssAnon its own, RssFile of files mapped into it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field + ":"))


def rate(steps: Steps, workers: int, seconds: float) -> float:
    """Images a second over so many seconds, after a start of 100 steps."""
    stream = batches(steps, 0, workers)
    for _ in islice(stream, 100):
        pass
    images, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        images += len(next(stream).condition)
    return images / (time.perf_counter() - started)


def floor(dataset: TokenDataset, steps: Steps, seconds: float) -> float:
    """Images a second when their bytes are only copied."""
    images, started, number = 0, time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        rows = steps.sampler.step(number).rows
        bytes_each = dataset.lengths[rows] * 2 * CHANNELS
        into = memoryview(bytearray(int(bytes_each.sum())))
        at = 0
        for (name, start), size in zip(dataset.places(rows), bytes_each.tolist(), strict=True):
            os.preadv(dataset.store._files(name).fileno(), [into[at : at + size]], start)
            at += size
        images, number = images + len(rows), number + 1
    return images / (time.perf_counter() - started)


def measure(folder: Path, seconds: float) -> dict[str, float]:
    """One size, in this process."""
    for path in folder.iterdir():
        path.read_bytes()
    before = memory("VmRSS")
    started = time.perf_counter()
    dataset = TokenDataset(folder)
    opened = time.perf_counter() - started
    images = dataset.images()
    steps = Steps(dataset, FixedCount(images, IMAGES_A_STEP, seed=0))
    alternating = [(rate(steps, 0, seconds), floor(dataset, steps, seconds)) for _ in range(3)]
    here, copied = (sorted(values)[1] for values in zip(*alternating, strict=True))
    held = memory("VmRSS") - before
    return {
        "images": len(images.first_rows),
        "tokens_an_image": round(float(images.lengths.mean()), 1),
        "open_seconds": round(opened, 3),
        "images_per_second": round(here),
        "floor_images_per_second": round(copied),
        "of_floor": round(here / copied, 2),
        "two_workers": round(rate(steps, 2, seconds)),
        "megabytes_grown": round(held, 1),
        "megabytes_of_plan_and_index": round(
            sum(array.nbytes for array in (dataset.lengths, dataset.first_rows, dataset._starts)) / 1e6, 1
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--images", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--seconds", type=float, default=4.0, help="of each measurement")
    parser.add_argument("--measure", type=Path, help="a dataset that was made before, in this process")
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure, options.seconds)), flush=True)
        return
    with tempfile.TemporaryDirectory() as temporary:
        for images in options.images:
            folder = (options.folder or Path(temporary)) / str(images)
            if not (folder / CARD).exists():
                synthetic(folder, images)
            again = ["--measure", str(folder), "--seconds", str(options.seconds)]
            subprocess.run([sys.executable, __file__, *again], check=True)


if __name__ == "__main__":
    main()
