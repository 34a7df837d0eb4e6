"""Draw the sheet of docs/guides/editing.md by the shipped any-step model: what a flow does to a picture.

python tools/editing_sheet.py docs/guides/editing.png
"""

import sys
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from fitv2 import FiTPipeline
from fitv2.figures import Captioned, contact_sheet
from fitv2.runtime.rng import generator
from fitv2.sampling.editing import noise_at_sizes, on_the_way, place


def main(out: Path) -> None:
    """A row for each kind of editing."""
    pipe = FiTPipeline.from_pretrained("emoji-any-step")
    channels = pipe.transformer.token_channels

    def make(count: int, **wanted: Any) -> list[Image.Image]:
        rngs = [generator(seed) for seed in range(count)]
        return list(pipe.stream(generator=rngs, progress=lambda _: None, **wanted))

    (cat,) = make(1, prompt="cat face")
    strengths = [0.6, 0.8, 0.9]
    dogs = make(3, prompt="dog face", image=[cat] * 3, strength=strengths)
    rows: list[list[Captioned]] = [[("a picture", cat)]]
    rows[0] += [(f"dog face, strength {s}", dog) for s, dog in zip(strengths, dogs, strict=True)]

    (owls,) = make(1, prompt="two owls side by side", height=80, width=160)
    mask = Image.new("L", owls.size)
    ImageDraw.Draw(mask).rectangle((80, 0, 160, 80), fill="white")
    prompts = ["owl and fox side by side", "owl and red apple side by side", "owl and penguin side by side"]
    made = make(3, prompt=prompts, image=[owls] * 3, mask_image=[mask] * 3)
    rows.append([("another picture", owls), ("a mask", mask), *zip(prompts, made, strict=True)])

    canvas, around = place(cat, (128, 256), (0, 0))
    prompts = ["two cat faces side by side", "cat face and dog face side by side"]
    made = make(2, prompt=prompts, image=[canvas] * 2, mask_image=[around] * 2)
    rows.append([*zip(prompts, made, strict=True)])

    ends = make(2, prompt=["dog face", "fox"])
    first, last = pipe.invert(ends, prompt=["dog face", "fox"])
    noises = on_the_way(first, last, count=4)
    between = make(4, prompt=["dog face", "dog face", "fox", "fox"], latents=noises)
    rows.append([("one picture", ends[0]), *((f"{step}/3 of the way", between[step]) for step in range(4)),
                 ("the other", ends[1])])  # fmt: skip

    grids = [(8, 8), (6, 10), (10, 6), (5, 12), (12, 5)]
    sizes = [(rows_ * pipe.unit, columns * pipe.unit) for rows_, columns in grids]
    made = make(
        5, prompt=["red apple"] * 5, height=[size[0] for size in sizes], width=[size[1] for size in sizes],
        latents=noise_at_sizes(grids, channels, generator(3)),
    )  # fmt: skip
    rows.append(
        [
            (f"one noise at {height}x{width}", image)
            for (height, width), image in zip(sizes, made, strict=True)
        ]
    )
    contact_sheet(rows).save(out)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
