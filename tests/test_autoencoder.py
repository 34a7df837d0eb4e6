import hashlib
import io
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file, save_file

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


@pytest.mark.parametrize("how", ["missing", "extra", "misshapen"])
def test_an_autoencoder_of_other_tensors_is_refused(tiny_vae, tmp_path, how):
    shutil.copytree(tiny_vae, tmp_path / "vae")
    path = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    name = "decoder.conv_out.bias"
    if how == "missing":
        del weights[name]
    else:
        weights[f"{name}.more" if how == "extra" else name] = torch.zeros(7)
    save_file(weights, path)
    with pytest.raises(UserError, match=r"conv_out|another model's weights") as raised:
        load_autoencoder(str(tmp_path / "vae"))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("content", ['"stabilityai/sd-vae-ft-ema"', "[]", "{", ""])
def test_a_config_that_is_none_does_not_name_one_of_the_hub(tiny_vae, tmp_path, content):
    shutil.copytree(tiny_vae, tmp_path / "vae")
    (tmp_path / "vae" / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"config\.json is damaged"):
        load_autoencoder(str(tmp_path / "vae"))


def test_a_name_of_the_hub_is_not_fetched_unasked():
    with pytest.raises(UserError, match="to fetch it from the hub, `allow_download`"):
        load_autoencoder("organization/no-such-autoencoder")


def test_the_shipped_autoencoder_keeps_drawings_it_never_saw():
    """The first held-out concepts of data/emoji: see docs/results/models/emoji-autoencoder."""
    codec = load_autoencoder("emoji")
    assert (codec.name, codec.channels, codec.downsample) == ("emoji", 8, 8)
    table = pq.read_table(Path(__file__).parents[1] / "data" / "emoji" / "validation.parquet")
    errors, latents = [], []
    for cell, caption in zip(table["image"], table["caption"].to_pylist(), strict=True):
        if hashlib.sha256(caption.encode()).digest()[0] < 5:  # as tools/train_autoencoder.py holds them out
            image = Image.open(io.BytesIO(cell["bytes"].as_py())).convert("RGB").resize((128, 128))
            pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 127.5 - 1
            latents.append(codec.encode(pixels))
            errors.append((codec.decode(latents[-1]).clamp(-1, 1) - pixels).square().mean() / 4)
    assert len(errors) >= 5
    assert -10 * torch.stack(errors).log10().mean() > 29
    deviation = torch.cat(latents).std((0, 2, 3))
    assert 0.7 < deviation.min() < deviation.max() < 1.4
