"""One evaluation of a model on a CPU: its share of the peak, for one picture and many.

    python benchmarks/evaluation.py [--model emoji-any-step] [--pictures 1 8 32] [--size 128x128] [--compile]

The floor is the matrix products (of weights, and of attention) at the rate that a large product of the same
dtype reaches here. For each dtype of which this processor has products, packs of so many pictures are
evaluated in turns; prints a JSON object a line: milliseconds of the floor and of an evaluation (the median),
and their ratio.
"""

import argparse
import json
import statistics
from time import perf_counter

import torch
from tqdm import tqdm

from fitv2.checkpoint import find_model, load_model
from fitv2.conditioning import Condition, Text
from fitv2.encoding.images import parse_size
from fitv2.model import FiT
from fitv2.runtime.device import has_bfloat16_matmuls
from fitv2.tokens import Layout
from fitv2.training.throughput import MultiplyAdds
from fitv2.training.weights import compile_blocks

CPU = torch.device("cpu")
UNIT = 16  # pixels of a token
WORDS = 2  # of each prompt


def peak(dtype: torch.dtype, side: int = 2048, rounds: int = 5) -> float:
    """Operations a second of a large product."""
    matrix, seconds = torch.ones(side, side, dtype=dtype), []
    for _ in range(rounds):
        started = perf_counter()
        (matrix @ matrix)[0, 0].item()
        seconds.append(perf_counter() - started)
    return 2 * side**3 / min(seconds)


def condition_of(model: FiT, pictures: int) -> Condition:
    """Labels, and texts of a few tokens where the model takes them."""
    shape = model.architecture
    values: dict[str, torch.Tensor | Text] = {"label": torch.zeros(pictures, dtype=torch.long)}
    if "text" in shape.conditions:
        one = torch.randn(WORDS, shape.text_channels), torch.randn(shape.pooled_channels)
        values["text"] = Text.of([one] * pictures)
    return Condition.of(**values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="emoji-any-step")
    parser.add_argument("--pictures", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--size", default="128x128")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args()
    height, width = parse_size(options.size)
    grid = -(-height // UNIT), -(-width // UNIT)
    dtypes = [torch.float32, *([torch.bfloat16] if has_bfloat16_matmuls(CPU) else [])]
    for dtype in dtypes:
        model, _ = load_model(find_model(options.model))
        counted = MultiplyAdds.of(model, grid[0] * grid[1] + WORDS)
        model.cast(dtype)
        if options.compile:
            compile_blocks(model)
        packs = {}
        for pictures in options.pictures:
            layout = Layout.of([grid] * pictures)
            x_TC = torch.randn(layout.tokens, model.token_channels)
            packs[pictures] = x_TC, layout, torch.full((pictures,), 0.5), condition_of(model, pictures)
        seconds: dict[int, list[float]] = {pictures: [] for pictures in packs}
        with torch.no_grad():
            for number in tqdm(range(options.rounds + 2), str(dtype), leave=False):
                for pictures, inputs in packs.items():
                    started = perf_counter()
                    model(*inputs)
                    if number >= 2:
                        seconds[pictures].append(perf_counter() - started)
        rate = peak(dtype)
        for pictures, found in seconds.items():
            floor = 2 * (counted.linear + counted.attention) * pictures / rate
            median = statistics.median(found)
            told = {"floor_ms": round(1e3 * floor, 2), "ms": round(1e3 * median, 2)}
            told |= {"share_of_peak": round(floor / median, 3), "gigaflops_of_peak": round(rate / 1e9)}
            same = {"model": options.model, "dtype": str(dtype).removeprefix("torch."), "pictures": pictures}
            same |= {"compiled": options.compile, "threads": torch.get_num_threads()}
            print(json.dumps(same | told))


if __name__ == "__main__":
    main()
