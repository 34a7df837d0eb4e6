import pytest
import torch
from diffusers import AutoencoderKL

from fitv2.autoencoder import load_autoencoder
from fitv2.errors import UserError


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A tiny AutoencoderKL with downsampling 8, a scale and a shift, saved as diffusers saves it."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("vae")
    AutoencoderKL(
        block_out_channels=(8, 8, 8, 8), down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=4, norm_num_groups=4,
        scaling_factor=0.5, shift_factor=0.25,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def test_pixels_are_their_own_latents():
    codec, image = load_autoencoder("pixels"), torch.rand(1, 3, 4, 6)
    assert torch.equal(codec.decode(codec.encode(image)), image)
    assert (codec.channels, codec.downsample) == (3, 1)


def test_kl_autoencoder_owns_its_statistics(tiny):
    codec = load_autoencoder(str(tiny))
    assert (codec.channels, codec.downsample) == (4, 8)
    image = torch.rand(2, 3, 16, 32) * 2 - 1
    latents = codec.encode(image)
    assert latents.shape == (2, 4, 2, 4)
    model = AutoencoderKL.from_pretrained(tiny)
    with torch.inference_mode():
        mean = model.encode(image).latent_dist.mean
        torch.testing.assert_close(latents, (mean - 0.25) * 0.5)
        torch.testing.assert_close(codec.decode(latents), model.decode(mean).sample)


def test_unknown_autoencoder_is_one_clear_line(tmp_path):
    with pytest.raises(UserError, match="cannot be loaded") as raised:
        load_autoencoder(str(tmp_path))
    assert "\n" not in str(raised.value)
