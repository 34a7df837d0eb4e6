import os
from dataclasses import asdict

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import randomized
from fitv2.checkpoint import WEIGHTS, find_model, load_model, note_files
from fitv2.cli.commands import run
from fitv2.config import Architecture, Rope
from fitv2.conversion.convert import convert_checkpoint, convert_to_released
from fitv2.conversion.reader import read_checkpoint
from fitv2.conversion.released import imagenet_labels, to_released
from fitv2.errors import UserError
from fitv2.model import FiT

FITV2 = Architecture(depth=2, width=64, heads=4)
FIT = Architecture(
    2, 64, 4, num_classes=10, prediction="noise", path="ddpm", adaln="full", qk_norm=False, mlp_width=256
)


def released(path, architecture=FITV2, dtype=torch.float32):
    """A tiny released checkpoint with random weights, as a file."""
    path.parent.mkdir(exist_ok=True)
    weights = to_released(randomized(FiT(**asdict(architecture))).to(dtype).state_dict())
    if path.suffix == ".bin":
        torch.save(weights, path)
    else:
        save_file(weights, path)
    return path


def same_bits(one, other):
    return one.keys() == other.keys() and all(
        a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))
        for a, b in ((one[name], other[name]) for name in one)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
@pytest.mark.parametrize("architecture", [FITV2, FIT], ids=["fitv2", "fit"])
def test_there_and_back_every_bit(tmp_path, architecture, suffix, dtype):
    source = released(tmp_path / f"model_ema{suffix}", architecture, dtype)
    convert_checkpoint(source, tmp_path / "model", heads=4)
    convert_to_released(tmp_path / "model", tmp_path / "again.safetensors")
    assert same_bits(load_file(tmp_path / "again.safetensors"), read_checkpoint(source).weights)
    model, card = load_model(tmp_path / "model")
    assert model.architecture == architecture
    assert (card.max_tokens, card.guidance) == (256, 1.5)
    assert len(card.labels) == architecture.num_classes


def test_a_safetensors_file_that_is_none_is_read_by_its_content(tmp_path):
    """Some released .safetensors were written by torch.save."""
    source = released(tmp_path / "model_ema.bin").rename(tmp_path / "model_ema.safetensors")
    convert_checkpoint(source, tmp_path / "model", heads=4)
    assert load_model(tmp_path / "model")[0].architecture == FITV2


@pytest.mark.parametrize(
    ("name", "asked", "post_trained"),
    [
        ("fitv2_xl.safetensors", None, False),
        ("fitv2_hr_xl.safetensors", None, True),
        ("FiTv2_XL_HRFT/model_ema.safetensors", None, True),
        ("three/chrome.safetensors", None, False),
        ("fitv2_hr_xl.safetensors", False, False),
        ("fitv2_xl.safetensors", True, True),
    ],
)
def test_post_trained_ones_carry_their_positions(tmp_path, name, asked, post_trained):
    convert_checkpoint(released(tmp_path / name), tmp_path / "out", heads=4, post_trained=asked)
    model, card = load_model(tmp_path / "out")
    assert model.architecture.rope == (Rope("ntk", train_side=16) if post_trained else Rope())
    assert card.max_tokens == (1024 if post_trained else 256)


class Touch:
    """A pickle of this makes a file when it is run."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mknod, (str(self.path),)


@pytest.mark.parametrize("name", ["model.bin", "model.safetensors"])
@pytest.mark.parametrize("old", [False, True])
def test_a_pickle_that_would_run_code_is_refused_and_not_run(tmp_path, name, old):
    torch.save({"weight": Touch(tmp_path / "run")}, tmp_path / name, _use_new_zipfile_serialization=not old)
    with pytest.raises(UserError, match="asks to run code, which was not done"):
        convert_checkpoint(tmp_path / name, tmp_path / "out")
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "out").exists()


def damaged(path, damage):
    weights = load_file(path)
    damage(weights)
    save_file(weights, path)
    return path


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda w: w.pop("t_embedder.mlp.0.bias"), "t_embedder.mlp.0.bias is missing"),
        (lambda w: w.update(extra=torch.zeros(2)), "extra is not one of its tensors"),
        (lambda w: w.update({"t_embedder.mlp.0.bias": torch.zeros(2)}), r"mlp.0.bias is \(2,\), expected"),
        (lambda w: w.pop("x_embedder.proj.weight"), "not weights of a released FiT"),
    ],
)
def test_wrong_tensors_are_named_and_nothing_is_written(tmp_path, damage, said):
    source = damaged(released(tmp_path / "model.safetensors"), damage)
    with pytest.raises(UserError, match=said):
        convert_checkpoint(source, tmp_path / "out", heads=4)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (b"no checkpoint at all", "damaged, or was not written by torch.save"),
        (b"\x10\0\0\0\0\0\0\0{", "damaged"),
    ],
)
def test_files_that_are_no_checkpoints(tmp_path, content, said):
    (tmp_path / "model.bin").write_bytes(content)
    with pytest.raises(UserError, match=said):
        read_checkpoint(tmp_path / "model.bin")
    torch.save({"epoch": 3}, tmp_path / "model.bin")
    with pytest.raises(UserError, match="other things than tensors"):
        read_checkpoint(tmp_path / "model.bin")


def test_nothing_is_overwritten(tmp_path):
    source = released(tmp_path / "model.safetensors")
    convert_checkpoint(source, tmp_path / "out", heads=4)
    with pytest.raises(UserError, match="already exists"):
        convert_checkpoint(source, tmp_path / "out", heads=4)
    with pytest.raises(UserError, match="already exists"):
        convert_to_released(tmp_path / "out", source)
    with pytest.raises(UserError, match=r"end in \.safetensors"):
        convert_to_released(tmp_path / "out", tmp_path / "model.bin")


def test_a_large_model_in_parts_goes_back_too(tmp_path):
    source = released(tmp_path / "model.safetensors")
    convert_checkpoint(source, tmp_path / "out", heads=4)
    model, _ = load_model(tmp_path / "out")
    (tmp_path / "out" / WEIGHTS).unlink()
    model.save_pretrained(tmp_path / "out", max_shard_size="300KB")
    note_files(tmp_path / "out")
    assert not (tmp_path / "out" / WEIGHTS).exists()
    convert_to_released(tmp_path / "out", tmp_path / "again.safetensors")
    assert same_bits(load_file(tmp_path / "again.safetensors"), load_file(source))


def test_the_shipped_model_has_released_names_too(tmp_path):
    convert_to_released("clipart", tmp_path / "clipart.safetensors")
    weights = load_file(tmp_path / "clipart.safetensors")
    count = sum(tensor.numel() for tensor in weights.values())
    assert count == sum(tensor.numel() for tensor in load_file(find_model("clipart") / WEIGHTS).values())
    assert "blocks.0.mlp.fc1_x.weight" in weights


def test_imagenet_labels_are_a_thousand_different_names():
    labels = imagenet_labels()
    assert len(labels) == len({label.lower() for label in labels}) == 1000
    assert (labels[0], labels[207], labels[999]) == ("tench", "golden retriever", "toilet tissue")


def test_from_released_files_to_pictures_on_the_command_line(tmp_path, latents, tiny_vae, capsys):
    """Convert a checkpoint and latents, train on from one with the other, sample, and go back."""
    source = released(tmp_path / "fitv2_hr" / "model_ema.bin")
    place = lambda name: str(tmp_path / name)  # noqa: E731
    assert run(["convert", str(source), place("model"), "--heads", "4", "--autoencoder", str(tiny_vae)]) == 0
    assert "as FiTv2 post-trained of width 64" in capsys.readouterr().out
    assert run(["convert", str(latents), place("set"), "--autoencoder", str(tiny_vae)]) == 0
    shape = ["--depth", "2", "--width", "64", "--heads", "4", "--prediction", "velocity"]
    rope = ["--extrapolation", "ntk", "--train-side", "16"]
    assert run(["train", "debug", "--data", place("set"), "--out", place("run"), "--init", place("model"),
                "--steps", "2", *shape, *rope]) == 0  # fmt: skip
    assert load_model(tmp_path / "run")[0].architecture.rope == Rope("ntk", train_side=16)
    for name in ("model", "run"):
        assert run(["sample", place(name), "--label", "golden retriever", "--size", "32x64", "--steps", "2",
                    "--extrapolation", "yarn", "--guidance-interval", "0.2", "0.8",
                    "--out", place(f"{name} images")]) == 0  # fmt: skip
        assert (tmp_path / f"{name} images" / "golden-retriever_32x64_0.png").exists()
    assert run(["convert", place("run"), place("back.safetensors"), "--to-released"]) == 0
    assert load_file(tmp_path / "back.safetensors").keys() == read_checkpoint(source).weights.keys()
    with pytest.raises(UserError, match="add --to-released"):
        run(["convert", place("model"), place("x")])
    with pytest.raises(UserError, match="do nothing without `extrapolation`"):
        run(["sample", place("model"), "--train-side", "8"])
