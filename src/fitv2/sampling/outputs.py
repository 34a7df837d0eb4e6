"""Pixels as images, and images as a caller wants them."""

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

OUTPUT_TYPES = ("pil", "np", "pt")


def to_image(pixels: Tensor) -> Image.Image:
    """Pixels (3, H, W) in [−1, 1] as an image.

    Rounded to the nearest of 256 levels: truncation would darken by half a level.
    """
    levels = ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte()
    return Image.fromarray(levels.permute(1, 2, 0).numpy())


def convert(images: list[Image.Image], output_type: str) -> Any:
    """Images as one of `OUTPUT_TYPES`: "np" is (N, H, W, 3) in [0, 1], "pt" (N, 3, H, W).

    A list where sizes differ.
    """
    if output_type == "pil":
        return images
    arrays = [np.asarray(image, dtype=np.float32) / 255 for image in images]
    same = len({array.shape for array in arrays}) == 1
    if output_type == "np":
        return np.stack(arrays) if same else arrays
    tensors = [torch.from_numpy(array).permute(2, 0, 1) for array in arrays]
    return torch.stack(tensors) if same else tensors
