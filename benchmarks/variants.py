"""Time of a training step of variants of the study of convergence, on the same images.

    python benchmarks/variants.py [--variants FiTv2 fast fast+levels] [--width 128] [--steps 12]

Latents of squares of 64 tokens, 32 a step, float32; steps of the variants alternate in one process. Prints
one JSON object a variant: median milliseconds, and how many times as long as the first variant a step takes
(the median of the ratios, from neighbouring steps).
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from time import perf_counter

from fitv2.data.dataset import TokenDataset
from fitv2.evaluation.convergence import tokens_of
from fitv2.evaluation.settings import Scale
from fitv2.evaluation.variants import variant
from fitv2.training.trainer import Trainer
from loading import synthetic

NEVER = 10**6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--variants", nargs="+", default=["FiTv2", "fast", "fast+levels", "fast+aligned"])
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=12)
    options = parser.parse_args()
    scale = Scale(
        options.width, options.heads, options.depth, NEVER, options.batch, every=NEVER, precision="float32"
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        data = str(Path(folder) / "tokens")
        synthetic(Path(data), 400, [(8, 8)] * 400)
        trainers = {
            name: Trainer(
                variant(name, scale, tokens_of(data)[0]), TokenDataset(data), data, Path(folder) / name, None
            )
            for name in options.variants
        }
        seconds: dict[str, list[float]] = {name: [] for name in trainers}
        for number in range(options.steps + 2):
            for name, trainer in trainers.items():
                started = perf_counter()
                trainer.advance(lambda _: None)
                if number >= 2:  # the first ones warm up
                    seconds[name].append(perf_counter() - started)
        for trainer in trainers.values():
            trainer.saver.finish()
    first = seconds[options.variants[0]]
    for name, taken in seconds.items():
        ratio = statistics.median(one / other for one, other in zip(taken, first, strict=True))
        found = {"milliseconds": round(1e3 * statistics.median(taken), 1), "times_as_long": round(ratio, 3)}
        print(json.dumps({"variant": name, **found}))


if __name__ == "__main__":
    main()
