"""A sheet of sixty prompts by chance from the names of the emoji set: what a model can draw, and what not.

    python tools/prompts_by_chance.py emoji docs/results/models/emoji/random.png

Forty squares, ten at 1:2 and 2:1, ten rows of three; seeds 0 to 59.
"""

import random
import sys
from pathlib import Path

import pyarrow.parquet as pq

from fitv2.figures import contact_sheet
from fitv2.pipeline import FiTPipeline
from fitv2.runtime.rng import generator

DATA = Path(__file__).parents[1] / "data" / "emoji" / "train.parquet"
WIDE = ((80, 160), (160, 80))


def plural(name: str) -> str:
    """As in the captions of rows, nearly."""
    return name if name.endswith(("s", "y", "ch", "sh", "x")) else f"{name}s"


def main(model: str, out: str) -> None:
    """Draw the sheet."""
    names = sorted({*pq.read_table(DATA, columns=["caption"])["caption"].to_pylist()})
    chosen = random.Random(0).sample(names, 60)
    sizes = [(128, 128)] * 40 + [WIDE[i % 2] for i in range(10)] + [(64, 208)] * 10
    prompts = chosen[:50] + [f"three {plural(name)} in a row" for name in chosen[50:]]
    pipeline = FiTPipeline.from_pretrained(model)
    images = pipeline.stream(
        height=[height for height, _ in sizes], width=[width for _, width in sizes], prompt=prompts,
        generator=[generator(seed) for seed in range(60)],
    )  # fmt: skip
    cells = [(prompt, image) for prompt, image in zip(prompts, images, strict=True)]
    rows = [cells[i : i + 10] for i in range(0, 50, 10)] + [cells[50:55], cells[55:]]
    contact_sheet(rows, f"Prompts by chance, by {model}").save(out)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
