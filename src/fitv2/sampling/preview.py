"""The sheet of samples that shows how far a training is."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from fitv2.config import Sampling
from fitv2.figures import contact_sheet
from fitv2.pipeline import FiTPipeline
from fitv2.runtime.rng import generator
from fitv2.tokens import Size

MAX_LABELS = 8


def preview(pipeline: FiTPipeline, title: str, prompts: Sequence[str] = ()) -> Image.Image:
    """A row of samples for each of three sizes, some labels or prompts each, always from the same noise."""
    labels = prompts or pipeline.card.labels
    chosen = np.linspace(0, len(labels) - 1, min(MAX_LABELS, len(labels))).astype(int).tolist()
    sizes = [
        (rows * pipeline.unit, columns * pipeline.unit) for rows, columns in grids(pipeline.card.max_tokens)
    ]
    wanted = [(label, *size) for size in sizes for label in chosen]
    numbers, heights, widths = (list(column) for column in zip(*wanted, strict=True))
    what: dict[str, Any] = {"prompt": [labels[i] for i in numbers]} if prompts else {"class_labels": numbers}
    usual = Sampling().resolve(pipeline.transformer.architecture.objective_name)[1]
    made = pipeline.stream(
        height=heights, width=widths, generator=[generator(0) for _ in wanted], **what,
        sampling=Sampling(steps=min(20, usual)), progress=lambda _: None,
    )  # fmt: skip
    captioned = [(labels[number], image) for number, image in zip(numbers, made, strict=True)]
    rows = [captioned[i : i + len(chosen)] for i in range(0, len(captioned), len(chosen))]
    return contact_sheet(rows, title)


def grids(max_tokens: int) -> list[Size]:
    """The largest square, and two wide grids of about as many tokens or fewer."""
    side = max(2, math.isqrt(max_tokens))
    return [(side, side), (max(1, side * 5 // 8), side * 5 // 4), (max(1, side // 2), side * 3 // 2)]
