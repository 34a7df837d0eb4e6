"""Planning an epoch of ImageNet's size: seconds, memory, and how full the packs are.

    python benchmarks/planning.py [IMAGES]

The floor: two sorts and a permutation of as many integers. Prints one JSON object a budget.
"""

import json
import resource
import sys
import time

import numpy as np

from fitv2.data.packing import Images, TokenBudget
from packed_vs_padded import imagenet_sizes


def imagenet_like(count: int) -> Images:
    """Two variants of each image: resized, and cropped to 256 tokens."""
    lengths = np.array([rows * columns for rows, columns in imagenet_sizes(20_000, np.random.default_rng(0))])
    resized = np.random.default_rng(0).choice(lengths, count).astype(np.int32)
    both = np.stack([resized, np.full_like(resized, 256)], axis=1).ravel()
    return Images(np.arange(0, 2 * count, 2), both)


def megabytes() -> float:
    """The most memory this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main(count: int) -> None:
    images = imagenet_like(count)
    before, floor_from = megabytes(), time.perf_counter()
    np.random.default_rng(0).permutation(count)
    for _ in range(2):
        np.argsort(images.lengths[::2], kind="stable")
    floor = time.perf_counter() - floor_from
    for budget in (4_096, 8_192, 16_384, 65_536):
        started = time.perf_counter()
        sampler = TokenBudget(images, budget, seed=0)
        counted = time.perf_counter()
        _, rows, bounds = sampler.plan(1)
        planned = time.perf_counter()
        filled = np.add.reduceat(images.lengths[rows], bounds[:-1])
        print(json.dumps({
            "images": count, "budget": budget, "packs": sampler.packs,
            "seconds_once": round(counted - started, 3), "seconds_an_epoch": round(planned - counted, 3),
            "floor_seconds": round(floor, 3), "megabytes": round(megabytes() - before),
            "fill": round(float(filled.sum() / (budget * sampler.packs)), 4),
            "emptiest": round(float(filled.min() / budget), 4),
            "fullest": round(float(filled.max() / budget), 4),
        }))  # fmt: skip


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1_281_167)
