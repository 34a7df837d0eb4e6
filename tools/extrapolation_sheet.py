"""One picture of every way to go beyond the trained size, from the same seeds.

python tools/extrapolation_sheet.py clipart docs/extrapolation.png --size 160x320 --label smilies --seed 1
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from fitv2.checkpoint import load_model
from fitv2.config import Rope
from fitv2.encoding.images import parse_size
from fitv2.figures import contact_sheet
from fitv2.runtime.device import default_device
from fitv2.sampling.generate import Request, generate, load_codec

METHODS: dict[str, dict[str, Any]] = {
    "none": {},
    "pi": {"extrapolation": "pi"},
    "pi, joint": {"extrapolation": "pi", "per_axis": False},
    "ntk": {"extrapolation": "ntk"},
    "ntk-by-parts": {"extrapolation": "ntk-by-parts"},
    "yarn": {"extrapolation": "yarn"},
    "ntk + attention scale pro2": {"extrapolation": "ntk", "attention_scale": "pro2"},
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
    model, card = load_model(options.model)
    codec, unit = load_codec(model.to(default_device()), card)
    size = parse_size(options.size, unit)
    labels = [card.label_index(label) for label in options.label] or range(len(card.labels))[:6]
    requests = [Request(label, size, options.seed) for label in labels]
    rows = []
    for name, settings in METHODS.items():
        scaled = model.with_rope(Rope(**settings, train_side=card.square[0], pixels_a_token=unit))
        made = generate(scaled, codec, requests, guidance=card.guidance)
        rows.append([(name, image) for _, image in made])
    contact_sheet(rows, f"{options.model}, {options.size}, seed {options.seed}").quantize(256).save(
        options.out
    )


if __name__ == "__main__":
    main(tyro.cli(Options))
