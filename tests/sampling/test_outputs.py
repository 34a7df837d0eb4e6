"""Pixels as images, and images as a caller wants them."""

import numpy as np
import torch
from PIL import Image

from fitv2.sampling.outputs import convert, to_image


def test_pixels_are_rounded_to_the_nearest_level_and_clamped():
    pixels = torch.tensor([-2.0, -1.0, 0.0, 0.003, 0.005, 1.0]).expand(3, 1, 6)
    assert np.asarray(to_image(pixels))[0, :, 0].tolist() == [0, 0, 128, 128, 128, 255]


def test_images_of_one_size_are_stacked_and_others_listed():
    red, wide = Image.new("RGB", (2, 3), "red"), Image.new("RGB", (4, 3), "red")
    arrays = convert([red, red], "np")
    assert (arrays.shape, arrays[0, 0, 0].tolist()) == ((2, 3, 2, 3), [1, 0, 0])
    assert torch.equal(convert([red, red], "pt"), torch.from_numpy(arrays).permute(0, 3, 1, 2))
    assert [array.shape for array in convert([red, wide], "np")] == [(3, 2, 3), (3, 4, 3)]
    assert [tensor.shape for tensor in convert([red, wide], "pt")] == [(3, 3, 2), (3, 3, 4)]
    assert convert([red, wide], "pil") == [red, wide]
