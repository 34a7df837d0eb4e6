import hashlib
import io
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderTiny
from PIL import Image
from safetensors.torch import load_file, save_file

from fitv2.autoencoder import DiffusersAutoencoder, load_autoencoder, shrinking
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


def with_stem():
    """An AutoencoderKL on patches of 4×4 pixels."""
    return AutoencoderKL(
        in_channels=48, out_channels=48, block_out_channels=(8, 8), latent_channels=4, norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip


def deep_compression():
    shape = {
        "block_out_channels": (8, 8, 8), "block_types": "ResBlock", "layers_per_block": (1, 1, 1),
        "qkv_multiscales": ((), (), ()),
    }  # fmt: skip
    sides = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in shape.items()}
    return AutoencoderDC(latent_channels=4, attention_head_dim=4, scaling_factor=0.5, **sides)


@pytest.mark.parametrize(
    ("make", "downsample"), [(with_stem, 8), (AutoencoderTiny, 8), (deep_compression, 4)]
)
def test_other_autoencoders_of_diffusers_shrink_as_their_config_says(make, downsample, tmp_path):
    torch.manual_seed(0)
    make().save_pretrained(tmp_path)
    codec = load_autoencoder(str(tmp_path))
    image = torch.rand(2, 3, 4 * downsample, 6 * downsample) * 2 - 1
    latents = codec.encode(image)
    assert codec.downsample == downsample
    assert latents.shape == (2, 4, 4, 6)
    assert codec.decode(latents).shape == image.shape
    assert codec.decode(latents).std() > 0


def test_a_stem_cuts_patches_and_puts_them_back(tmp_path):
    model = with_stem()
    model.encode = lambda x: [x]  # what the stem gives comes back
    model.decode = lambda x: SimpleNamespace(sample=x)
    codec, image = DiffusersAutoencoder(model, "stem"), torch.rand(1, 3, 8, 16)
    assert torch.equal(codec.encode(image)[0, :, 0, 0], image[0, :, :4, :4].flatten() * codec.scale)
    torch.testing.assert_close(codec.decode(codec.encode(image)), image)


def test_an_autoencoder_of_another_kind_is_named(tiny_vae, tmp_path):
    shutil.copytree(tiny_vae, tmp_path / "vae")
    config = json.loads((tmp_path / "vae" / "config.json").read_text())
    (tmp_path / "vae" / "config.json").write_text(json.dumps(config | {"_class_name": "AutoencoderKLWan"}))
    with pytest.raises(UserError, match="unknown autoencoder class 'AutoencoderKLWan'"):
        load_autoencoder(str(tmp_path / "vae"))
    for channels in (4, 0, 6):
        with pytest.raises(UserError, match=f"{channels} input channels"):
            shrinking({"in_channels": channels, "block_out_channels": (8,)})


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
