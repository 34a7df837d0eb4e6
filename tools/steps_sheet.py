"""One noise by more and more steps: the shipped any-step model above the flow that it was made of.

python tools/steps_sheet.py docs/results/any-step/steps.png
"""

import sys
from pathlib import Path

from PIL import Image

from fitv2 import FiTPipeline
from fitv2.config import Sampling
from fitv2.figures import contact_sheet
from fitv2.runtime.rng import generator

WANTED = (
    ("red apple", (128, 128)), ("house", (96, 96)), ("two owls side by side", (80, 160)),
    ("rocket", (160, 80)), ("three cookies in a row", (64, 192)), ("three penguins in a column", (192, 64)),
)  # fmt: skip
STEPS = {"emoji-any-step": (1, 2, 4, 25), "emoji": (2, 4, 25)}


def row(pipe: FiTPipeline, name: str, steps: int) -> list[tuple[str, Image.Image]]:
    """The pictures of so many steps."""
    prompts, sizes = zip(*WANTED, strict=True)
    images = pipe.stream(
        prompt=prompts, height=[height for height, _ in sizes], width=[width for _, width in sizes],
        generator=[generator(3) for _ in WANTED], sampling=Sampling(steps=steps), progress=lambda _: None,
    )  # fmt: skip
    passes = steps * (1 if pipe.card.guidance == 1 else 2)
    said = f"{name}: {passes} pass{'es' * (passes > 1)}"
    return [("" if number else said, image) for number, image in enumerate(images)]


def main(out: Path) -> None:
    """Draw the sheet."""
    rows = []
    for name, numbers in STEPS.items():
        pipe = FiTPipeline.from_pretrained(name)
        rows += [row(pipe, name, steps) for steps in numbers]
    out.parent.mkdir(parents=True, exist_ok=True)
    contact_sheet(rows, "The same noise by more and more passes of the transformer").save(out)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
