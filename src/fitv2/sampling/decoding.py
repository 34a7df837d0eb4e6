"""Between images of pixels and the tokens of their latents."""

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor

from fitv2.autoencoder import Autoencoder
from fitv2.tokens import patchify, unpatchify

DECODED_TOGETHER = 8  # an autoencoder's activations take far more memory than the transformer's


def encode(images: Sequence[Tensor], autoencoder: Autoencoder, patch: int) -> Tensor:
    """Pixels (3, H, W) of images of any sizes, in multiples of a token → tokens (T, C), float32."""
    return torch.cat([
        patchify(autoencoder.encode(image[None]), patch).flatten(0, 2).float() for image in images
    ])  # fmt: skip


def decode(tokens: Sequence[Tensor], autoencoder: Autoencoder, patch: int) -> list[Tensor]:
    """Tokens (rows, columns, C) of images → pixels (3, H, W), float32, on the host.

    Neighbours of equal size are decoded together.
    """
    images: list[Tensor] = []
    for _, group in groupby(tokens, key=lambda image: image.shape):
        same = unpatchify(torch.stack(list(group)), patch)
        for few in same.split(DECODED_TOGETHER):
            images.extend(autoencoder.decode(few).float().cpu())
    return images


def crop_evenly(image: Tensor, pixels: tuple[int, int]) -> Tensor:
    """The middle (3, height, width) of an image: as much is cut on either side."""
    top, left = ((have - want) // 2 for have, want in zip(image.shape[1:], pixels, strict=True))
    return image[:, top : top + pixels[0], left : left + pixels[1]]
