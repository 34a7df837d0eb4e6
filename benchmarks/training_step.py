"""Where a training step's time goes: data, forward, backward, optimizer, rest.

    python benchmarks/training_step.py [--preset fitv2-b] [--depth 3] [--tokens 2048] [--steps 5]

Trains a preset, by default at a smaller depth for a CPU's sake, on synthetic latents of ImageNet-like sizes.
`data` is reading, packing and adding noise; `forward` the model and its loss; `optimizer` clipping, AdamW
and the EMA. The floor is the
products of forward and backward at the rate of a large product of matrices: measured, or the data sheet's.
Prints one JSON object, medians over the steps.
"""

import argparse
import json
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Callable, Generator
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any
from unittest import mock

import numpy as np
import torch

from fitv2.data.dataset import Batch, TokenDataset
from fitv2.presets import preset
from fitv2.training.noising import Draws
from fitv2.training.throughput import peak_flops
from fitv2.training.trainer import Trainer
from loading import synthetic
from packed_vs_padded import imagenet_sizes


class Stopwatch:
    """Seconds by part of a step."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds = device, defaultdict[str, float](float)

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            started = self.now()
            result = function(*arguments, **options)
            self.seconds[part] += self.now() - started
            return result

        return run

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return perf_counter()


Drawn = tuple[Batch, Draws]


def timed_batches(batches: Generator[Drawn, None, None], watch: Stopwatch) -> Generator[Drawn, None, None]:
    """Batches, with the time that each takes."""
    following = watch.timed("data", batches.__next__)
    while True:
        yield following()


def watched(trainer: Trainer, watch: Stopwatch) -> Callable[[], bool]:
    """A step of the trainer whose parts are timed."""
    trainer.batches = timed_batches(trainer.batches, watch)
    for part, owner, name in (
        ("data", trainer, "noise"),
        ("forward", type(trainer.objective), "loss"),  # it calls the model
        ("backward", torch.Tensor, "backward"),
        ("optimizer", trainer.weights, "clip"),
        ("optimizer", trainer, "update"),
    ):
        mock.patch.object(owner, name, watch.timed(part, getattr(owner, name))).start()
    return watch.timed("all", lambda: trainer.advance(lambda _: None))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--preset", default="fitv2-b")
    parser.add_argument("--depth", type=int, default=3)
    parser.add_argument("--width", type=int, help="another than the preset's")
    parser.add_argument("--tokens", type=int, default=2048, help="a step")
    parser.add_argument("--steps", type=int, default=5)
    options = parser.parse_args()
    chosen = preset(options.preset)
    model = replace(chosen.model, depth=options.depth, width=options.width or chosen.model.width)
    training = replace(chosen.training, tokens_per_step=options.tokens, log_every=10**9, track=())
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "tokens"
        synthetic(data, 500, imagenet_sizes(500, np.random.default_rng(0)))
        trainer = Trainer(
            replace(chosen, model=model, training=training),
            TokenDataset(data),
            data,
            Path(folder) / "run",
            None,
        )
        trainer.advance(lambda _: None)
        watch = Stopwatch(trainer.device)
        step = watched(trainer, watch)
        splits, floors = [], []
        for _ in range(options.steps):
            watch.seconds.clear()
            flops = trainer.rates.flops
            step()
            splits.append(dict(watch.seconds))
            floors.append((trainer.rates.flops - flops) / peak_flops(trainer.device))
        trainer.saver.finish()
    parts = {
        part: statistics.median(split[part] for split in splits)
        for part in ("all", "data", "forward", "backward", "optimizer")
    }
    beside = [1 - (split["forward"] + split["backward"]) / split["all"] for split in splits]
    rest = statistics.median(
        s["all"] - s["data"] - s["forward"] - s["backward"] - s["optimizer"] for s in splits
    )
    print(
        json.dumps(
            {
                "device": str(trainer.device),
                "parameters": trainer.weights.master.num_parameters(),
                "seconds": {name: round(value, 4) for name, value in (parts | {"rest": rest}).items()},
                "beside_forward_and_backward": round(statistics.median(beside), 4),
                "of_floor": round(statistics.median(floors) / parts["all"], 3),
            }
        )
    )


if __name__ == "__main__":
    main()
