import pytest
import torch
from diffusers import AutoencoderKL

from fitv2.autoencoder import load_autoencoder
from fitv2.errors import UserError


def test_pixels_are_their_own_latents():
    codec, image = load_autoencoder("pixels"), torch.rand(1, 3, 4, 6)
    assert torch.equal(codec.decode(codec.encode(image)), image)
    assert (codec.channels, codec.downsample) == (3, 1)


def test_kl_autoencoder_owns_its_statistics(tiny_vae):
    codec = load_autoencoder(str(tiny_vae))
    assert (codec.channels, codec.downsample) == (4, 8)
    image = torch.rand(2, 3, 16, 32) * 2 - 1
    latents = codec.encode(image)
    assert latents.shape == (2, 4, 2, 4)
    model = AutoencoderKL.from_pretrained(tiny_vae)
    with torch.inference_mode():
        mean = model.encode(image).latent_dist.mean
        torch.testing.assert_close(latents, (mean - 0.25) * 0.5)
        torch.testing.assert_close(codec.decode(latents), model.decode(mean).sample)


def test_unknown_autoencoder_is_one_clear_line(tmp_path):
    with pytest.raises(UserError, match="there is no such folder"):
        load_autoencoder("/nowhere/vae")  # and not: cannot connect to the hub
    with pytest.raises(UserError, match="cannot be loaded") as raised:
        load_autoencoder(str(tmp_path))
    assert "\n" not in str(raised.value)
