"""Whether the judge tells real pictures from spoilt ones: distances of held-out pictures, whole and spoilt.

    python tools/judge_order.py data/emoji REFERENCE OUT [--size 128x128]

REFERENCE is the folder `reference` of an evaluation. The pictures of the validation split are brought to the
size as those of the reference are; then blurred (Gaussian, radius 1 and 2 pixels), made noisy (deviation 10
and 30 of 255), or cut into 16 pieces that change places. Prints a table.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter
from tqdm import tqdm

from fitv2.encoding.images import parse_size
from fitv2.evaluation.evaluate import evaluate
from fitv2.evaluation.reference import Collection, size_name
from fitv2.evaluation.settings import Evaluation

Spoil = Callable[[Image.Image, np.random.Generator], Image.Image]


def blur(radius: float) -> Spoil:
    """A Gaussian blur."""
    return lambda image, _: image.filter(ImageFilter.GaussianBlur(radius))


def add_noise(deviation: float) -> Spoil:
    """Normal noise on every number, of 255."""

    def spoil(image: Image.Image, rng: np.random.Generator) -> Image.Image:
        pixels = np.asarray(image, np.float32)
        return Image.fromarray(
            (pixels + rng.normal(0, deviation, pixels.shape)).clip(0, 255).astype(np.uint8)
        )

    return spoil


def shuffle(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Four by four pieces in another order."""
    pixels = np.asarray(image)
    rows, columns = pixels.shape[0] // 4, pixels.shape[1] // 4
    pieces = [pixels[r * rows :, c * columns :][:rows, :columns] for r in range(4) for c in range(4)]
    order = rng.permutation(16).reshape(4, 4)
    return Image.fromarray(np.vstack([np.hstack([pieces[i] for i in row]) for row in order]))


SPOILT: dict[str, Spoil] = {
    "as they are": lambda image, _: image,
    "blurred by 1": blur(1),
    "blurred by 2": blur(2),
    "noise of 10": add_noise(10),
    "noise of 30": add_noise(30),
    "pieces shuffled": shuffle,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("pictures")
    parser.add_argument("reference")
    parser.add_argument("out", type=Path)
    parser.add_argument("--size", default="128x128")
    chosen = parser.parse_args()
    pixels = parse_size(chosen.size)
    fitted = Collection.open(chosen.pictures, "validation", None, None, None).pictures(pixels, 0.4)
    held_out = [image for number in range(len(fitted)) for image in fitted.read(range(number, number + 1))]
    print("| held-out pictures | FD | KD | precision | coverage |\n|---|---|---|---|---|")
    for name, spoil in tqdm(SPOILT.items(), disable=None):
        folder = chosen.out / name.replace(" ", "_")
        pictures = folder / "pictures"
        pictures.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng(0)
        for number, image in enumerate(held_out):
            if image is not None:
                spoil(image, rng).save(pictures / f"{number:04}.png")
        result = evaluate(
            str(pictures), chosen.reference, folder / "evaluation", Evaluation(), None, [pixels]
        )
        assert result is not None
        its = next(iter(result.sizes[size_name(pixels)].values()))
        values = " | ".join(str(its[key]) for key in ("FD", "KD", "precision", "coverage"))
        print(f"| {name} | {values} |", flush=True)


if __name__ == "__main__":
    main()
