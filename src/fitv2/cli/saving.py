"""Images into files named by what they show."""

import re
from pathlib import Path
from typing import Any

from fitv2.checkpoint import Card
from fitv2.runtime.files import atomic_file


def file_name(card: Card, label: int, pixels: tuple[int, int], seed: int) -> str:
    """LABEL_HEIGHTxWIDTH_SEED.png; characters that file names cannot hold become dashes."""
    plain = [re.sub(r"[^\w.-]+", "-", name) for name in card.labels]
    name = plain[label]
    if plain.count(name) > 1:  # two labels that differ in such characters alone
        name += f"-{label}"
    return f"{name}_{pixels[0]}x{pixels[1]}_{seed}.png"


def save_image(image: Any, path: Path) -> None:
    """Write an image, whole or not at all."""
    with atomic_file(path) as partial:
        image.save(partial)
