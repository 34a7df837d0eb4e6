"""One picture of every way to go beyond the trained size, from the same seeds.

python tools/extrapolation_sheet.py clipart docs/guides/extrapolation.png
    --size 160x320 --label smilies --seed 1
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import tyro

from fitv2.config import Positions
from fitv2.encoding.images import parse_size
from fitv2.figures import contact_sheet
from fitv2.pipeline import FiTPipeline
from fitv2.runtime.device import default_device
from fitv2.runtime.rng import generator

METHODS = {
    "none": Positions("none"),
    "pi": Positions("pi"),
    "pi, joint": Positions("pi", per_axis=False),
    "ntk": Positions("ntk"),
    "ntk-by-parts": Positions("ntk-by-parts"),
    "yarn": Positions("yarn"),
    "ntk + attention scale pro2": Positions("ntk", attention_scale="pro2"),
}


@dataclass(frozen=True)
class Options:
    """A column for each label, a row for each method."""

    model: Annotated[str, tyro.conf.Positional]
    out: Annotated[Path, tyro.conf.Positional]
    size: str = "256x256"
    label: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    seed: int = 0


def main(options: Options) -> None:
    pipeline = FiTPipeline.from_pretrained(options.model).to(default_device())
    labels = pipeline.get_label_ids(options.label) or list(range(len(pipeline.card.labels)))[:6]
    height, width = parse_size(options.size)
    rows = []
    for name, positions in METHODS.items():
        scaled = replace(positions, train_side=pipeline.card.square[0])
        generators = [generator(options.seed) for _ in labels]
        made = pipeline.stream(labels, height, width, generators, positions=scaled)
        rows.append([(name, image) for image in made])
    contact_sheet(rows, f"{options.model}, {options.size}, seed {options.seed}").quantize(256).save(
        options.out
    )


if __name__ == "__main__":
    main(tyro.cli(Options))
