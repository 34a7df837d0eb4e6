import numpy as np
import torch

from fitv2.autoencoder import Pixels, load_autoencoder
from fitv2.sampling.decoding import crop_evenly, decode, encode
from fitv2.sampling.outputs import to_image
from fitv2.tokens import Layout, PackedTokens, unpack


def test_images_of_any_sizes_become_one_sequence_and_come_back():
    images = [torch.rand(3, 8, 12), torch.rand(3, 4, 4)]
    x_TC = encode(images, Pixels(), 4)
    again = decode(unpack(PackedTokens(x_TC, Layout.of([(2, 3), (1, 1)]))), Pixels(), 4)
    assert all(torch.equal(one, other) for one, other in zip(images, again, strict=True))


def test_latents_are_those_of_the_autoencoder(tiny_vae):
    autoencoder = load_autoencoder(str(tiny_vae))
    x_TC = encode([torch.rand(3, 32, 48)], autoencoder, 2)
    assert (x_TC.shape, x_TC.dtype) == ((6, 16), torch.float32)


def test_what_is_cut_is_as_much_on_either_side():
    image = torch.arange(6 * 7).reshape(1, 6, 7).expand(3, 6, 7)
    assert torch.equal(crop_evenly(image, (6, 7)), image)
    assert torch.equal(crop_evenly(image, (4, 3)), image[:, 1:5, 2:5])
    assert torch.equal(crop_evenly(image, (3, 6)), image[:, 1:4, :6])  # of an odd number the more at the end


def test_decoding_rounds_to_the_nearest_level():
    levels = torch.arange(256).reshape(1, 1, 256).expand(3, 1, 256) / 127.5 - 1
    (made,) = decode([levels.permute(1, 2, 0)], Pixels(), 1)
    assert made.dtype == torch.float32
    assert (np.array(to_image(made))[0, :, 0] == np.arange(256)).all()
