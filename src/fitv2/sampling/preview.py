"""The sheet of samples that shows how far a training is."""

import math

import numpy as np
from PIL import Image

from fitv2.autoencoder import Autoencoder
from fitv2.checkpoint import Card
from fitv2.config import Sampling
from fitv2.figures import contact_sheet
from fitv2.model import FiT
from fitv2.sampling.generate import Request, generate
from fitv2.tokens import Size

MOST_LABELS = 8


def preview(model: FiT, codec: Autoencoder, card: Card, title: str) -> Image.Image:
    """A row of samples for each of three sizes, some labels in each, always from the same noise."""
    labels = np.linspace(0, len(card.labels) - 1, min(MOST_LABELS, len(card.labels))).astype(int)
    requests = [Request(int(label), size, 0) for size in sizes(card.max_tokens) for label in labels]
    made = [
        (card.labels[request.label], image)
        for request, image in generate(model, codec, requests, sampling=Sampling(steps=20))
    ]
    rows = [made[i : i + len(labels)] for i in range(0, len(made), len(labels))]
    return contact_sheet(rows, title)


def sizes(max_tokens: int) -> list[Size]:
    """The largest square, and two wide sizes of about as many tokens or fewer."""
    side = max(2, math.isqrt(max_tokens))
    return [(side, side), (max(1, side * 5 // 8), side * 5 // 4), (max(1, side // 2), side * 3 // 2)]
