"""Checkpoints that are damaged, wrapped or something else: one line, or the right result; and both ways."""

import gzip
import io
import json
import os
import random
import tarfile
import warnings
import zipfile
from collections import OrderedDict
from dataclasses import asdict, replace

import pytest
import torch
from safetensors.torch import load_file, save, save_file

from conftest import randomized
from fitv2.checkpoint import CONFIG, FILES, WEIGHTS, Card, load_model, save_model, verify_model
from fitv2.cli.commands import run
from fitv2.config import Architecture
from fitv2.conversion.convert import convert_checkpoint, convert_to_released
from fitv2.conversion.reader import read_checkpoint
from fitv2.conversion.released import to_released
from fitv2.errors import UserError
from fitv2.model import FiT

TINY = Architecture(depth=1, width=16, heads=2, in_channels=1, num_classes=4)
FORMATS = ("safetensors", "zip", "old pickle", "wrapped")


@pytest.fixture(scope="module")
def weights():
    return to_released(randomized(FiT(**asdict(TINY))).state_dict())


def pickled(held, old=False):
    file = io.BytesIO()
    torch.save(held, file, _use_new_zipfile_serialization=not old)
    return file.getvalue()


@pytest.fixture(scope="module")
def files(weights):
    """The tiny checkpoint as the bytes of each kind of file."""
    wrapped = {"ema": {f"module.{name}": tensor for name, tensor in weights.items()}, "epoch": 3}
    held = (save(weights), pickled(weights), pickled(weights, old=True), pickled(wrapped))
    return dict(zip(FORMATS, held, strict=True))


def refusal(source, out):
    """What is said of a checkpoint, in one line that names it; nothing is left. None if it is converted."""
    before = set(out.parent.iterdir())
    try:
        convert_checkpoint(source, out, heads=2)
    except UserError as error:
        assert set(out.parent.iterdir()) == before
        said = str(error)
        assert said.isprintable()
        assert str(source) in said
        return said
    assert set(out.parent.iterdir()) == before | {out}
    return None


def changed_bytes(out, weights):
    """In how many bytes a converted model differs from these released weights."""
    now = to_released(load_file(out / WEIGHTS))
    assert {name: (t.shape, t.dtype) for name, t in now.items()} == {
        name: (t.shape, t.dtype) for name, t in weights.items()
    }
    return sum(int((now[n].view(torch.uint8) != weights[n].view(torch.uint8)).sum()) for n in now)


# Damaged checkpoints


@pytest.mark.parametrize("part", range(20))
@pytest.mark.parametrize("form", FORMATS)
def test_a_checkpoint_cut_off_is_refused(form, part, files, tmp_path):
    content = files[form]
    length = random.Random(f"{form} {part}").randrange(len(content)) if part else len(content) - 1
    (tmp_path / "model.bin").write_bytes(content[:length])
    assert refusal(tmp_path / "model.bin", tmp_path / "out") is not None


@pytest.mark.parametrize("seed", range(25))
@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
@pytest.mark.parametrize("form", FORMATS)
def test_a_flipped_byte_is_refused_or_changes_that_byte_alone(form, suffix, seed, files, weights, tmp_path):
    content, rng = bytearray(files[form]), random.Random(f"{form} {suffix} {seed}")
    place = rng.randrange(2000 if seed % 2 else len(content))  # a header or the pickle lies first
    content[place] ^= rng.randrange(1, 256)
    source = tmp_path / f"model{suffix}"
    source.write_bytes(content)
    if refusal(source, tmp_path / "out") is None:
        has_checksums = form in ("zip", "wrapped")
        assert changed_bytes(tmp_path / "out", weights) <= (0 if has_checksums else 1)
        assert load_model(tmp_path / "out")[0].architecture == TINY


@pytest.mark.parametrize("seed", range(20))
def test_a_renamed_tensor_is_named(seed, weights, tmp_path):
    rng = random.Random(seed)
    name = rng.choice(sorted(weights))
    letters = list(name)
    letters[rng.randrange(len(letters))] = rng.choice("\n\x1b\u200b.ü")
    renamed = {("".join(letters) if key == name else key): tensor for key, tensor in weights.items()}
    torch.save(renamed, tmp_path / "model.bin")
    said = refusal(tmp_path / "model.bin", tmp_path / "out")
    assert name in said or "not weights of a released FiT" in said


@pytest.mark.parametrize("seed", range(10))
def test_another_shape_is_named(seed, weights, tmp_path):
    name = random.Random(seed).choice(sorted(weights))
    shape = random.Random(seed).choice([(), (1,), (0,), (3, 5), (0, 7), (2, 2, 2), (16, 16)])
    save_file(weights | {name: torch.zeros(shape)}, tmp_path / "model.safetensors")
    said = refusal(tmp_path / "model.safetensors", tmp_path / "out")
    assert "expected" in said or "not weights of a released FiT" in said or "missing" in said


def nested():
    with warnings.catch_warnings(action="ignore"):
        return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])


def quantized():
    with warnings.catch_warnings(action="ignore"):
        return torch.quantize_per_tensor(torch.ones(64), 0.1, 0, torch.qint8)


ODD = {
    **{str(kind).removeprefix("torch."): (lambda kind=kind: torch.zeros(64, dtype=kind)) for kind in (
        torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool, torch.complex64,
        torch.uint16, torch.uint32)},
    "quantized": quantized,
    "sparse": lambda: torch.ones(64).to_sparse(),
    "sparse or nested": nested,
    "no array": lambda: torch.zeros(64, device="meta"),
    "larger than its numbers": lambda: torch.zeros(1).expand(64),
    "float4": lambda: torch.zeros(64, dtype=torch.uint8).view(torch.float4_e2m1fn_x2),
    "not finite": lambda: torch.full((64,), torch.nan),
    "is not finite": lambda: torch.tensor([0.0, -torch.inf] * 32),
}  # fmt: skip


@pytest.mark.parametrize("said", ODD)
def test_tensors_that_are_no_floating_numbers_are_named(said, weights, tmp_path):
    name = "blocks.0.attn.qkv.bias"
    assert weights[name].shape == (48,)
    odd = ODD[said]()
    with warnings.catch_warnings(action="ignore"):
        torch.save(weights | {name: odd if odd.is_nested or odd.is_quantized or odd.is_sparse else odd[:48]},
                   tmp_path / "model.bin")  # fmt: skip
    told = refusal(tmp_path / "model.bin", tmp_path / "out")
    assert f"{name} is " in told
    assert said in told


@pytest.mark.parametrize("kind", [torch.float64, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_every_floating_dtype_goes_there_and_back(kind, weights, tmp_path):
    weights = {name: tensor.to(kind) for name, tensor in weights.items()}
    torch.save(weights, tmp_path / "model.bin")
    assert refusal(tmp_path / "model.bin", tmp_path / "out") is None
    convert_to_released(tmp_path / "out", tmp_path / "again.safetensors")
    again = load_file(tmp_path / "again.safetensors")
    assert again.keys() == weights.keys()
    assert all(torch.equal(again[n].view(torch.uint8), weights[n].view(torch.uint8)) for n in again)
    assert all(tensor.dtype == kind for tensor in again.values())


# Files that are something else


def archive(kind, content=b"no weights"):
    file = io.BytesIO()
    if kind == "tar":
        with tarfile.open(fileobj=file, mode="w") as tar:
            member = tarfile.TarInfo("model.bin")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    else:
        with zipfile.ZipFile(file, "w") as zipped:
            zipped.writestr("model.bin", content)
    return file.getvalue()


def recompressed(content):
    """The same zip archive, its members compressed."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as new:
        for member in old.infolist():
            new.writestr(member.filename, old.read(member))
    return file.getvalue()


def headed(header):
    return len(header).to_bytes(8, "little") + header


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 2684262720\n"
ELSE = {
    "empty": (lambda files: b"", "is empty"),
    "pointer": (lambda files: POINTER, "is a Git LFS pointer.*run git lfs pull"),
    "html": (lambda files: b"<!DOCTYPE html>\n<html><body>Sign in</body></html>", "is a page of HTML"),
    "html in capitals": (lambda files: b"\n <HTML><HEAD>", "is a page of HTML"),
    "gzip": (lambda files: gzip.compress(files["zip"]), "compressed by gzip"),
    "zip": (lambda files: archive("zip"), "is a zip archive without a checkpoint"),
    "zip of a checkpoint": (lambda files: archive("zip", files["zip"]), "is a zip archive without"),
    "compressed": (lambda files: recompressed(files["zip"]), "is a compressed zip archive"),
    "tar": (lambda files: archive("tar", files["zip"]), "is a tar archive: unpack it"),
    "text": (lambda files: b"epoch,loss\n1,0.2\n", "damaged, or was not written by torch.save"),
    "json": (lambda files: b'{"epoch": 3}', "damaged"),
    "zeros": (lambda files: bytes(4096), "damaged"),
    "deep header": (lambda files: headed(b'{"a":' + b"[" * 5000 + b"]" * 5000 + b"}"), "damaged"),
    "long number": (lambda files: headed(b'{"a":' + b"9" * 5000 + b"}"), "damaged"),
    "header of a length beyond": (lambda files: b"\xff" * 8 + b"{", "damaged"),
    "nothing in it": (lambda files: save({}), "holds other things than tensors, or nothing"),
    "a list": (lambda files: pickled([torch.zeros(2)]), "holds a list"),
    "a tensor": (lambda files: pickled(torch.zeros(2)), "holds a Tensor"),
    "numbered": (lambda files: pickled({1: torch.zeros(2)}), "other things than tensors"),
    "deep": (lambda files: pickled({"model": {"model": {"a": torch.zeros(2)}}}), "other things than tensors"),
}  # fmt: skip


@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
@pytest.mark.parametrize("kind", ELSE)
def test_what_is_no_checkpoint_is_told_for_what_it_is(kind, suffix, files, tmp_path):
    content, said = ELSE[kind]
    source = tmp_path / f"model{suffix}"
    source.write_bytes(content(files))
    assert refusal(source, tmp_path / "out") is not None
    with pytest.raises(UserError, match=said):
        read_checkpoint(source)


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "model.bin")
    with pytest.raises(UserError, match="is no file"):
        read_checkpoint(tmp_path / "model.bin")


# What training wraps a checkpoint in


def prefixed(prefix, weights):
    return OrderedDict((prefix + name, tensor) for name, tensor in weights.items())


WRAPPED = {
    "plain": (lambda w: w, ""),
    **{prefix: (lambda w, prefix=prefix: prefixed(prefix, w), f"prefix {prefix!r} removed") for prefix in (
        "module.", "_orig_mod.", "model.", "ema.", "module._orig_mod.", "_orig_mod.module.")},
    **{key: (lambda w, key=key: {key: w, "epoch": 3}, f"taken from {key!r}") for key in (
        "ema", "model", "state_dict")},
    "both": (lambda w: {"model": {n: t + 1 for n, t in w.items()}, "ema": w, "optimizer": {"state": {}}},
             "taken from 'ema'"),
    "ema is none": (lambda w: {"model": w, "ema": None}, "taken from 'model'"),
    "beside a number": (lambda w: {"model": w, "step": torch.tensor(3)}, "taken from 'model'"),
    "lightning": (lambda w: {"state_dict": prefixed("model.", w), "global_step": 3},
                  "taken from 'state_dict', prefix 'model.' removed"),
    "as in the guide": (lambda w: {"ema": prefixed("module.", w)},
                        "taken from 'ema', prefix 'module.' removed"),
}  # fmt: skip


@pytest.mark.parametrize("how", WRAPPED)
def test_what_training_wraps_around_it_is_taken_off_and_said(how, weights, tmp_path):
    wrap, said = WRAPPED[how]
    torch.save(wrap(weights), tmp_path / "model.bin")
    taken_for = convert_checkpoint(tmp_path / "model.bin", tmp_path / "out", heads=2)
    assert taken_for == "FiTv2 of width 16" + (f" ({said})" if said else "")
    assert changed_bytes(tmp_path / "out", weights) == 0


PREFIX, WHICH, OTHER = (
    "do not agree on a prefix",
    "which is the model is not said",
    "other things than tensors",
)
AMBIGUOUS = {
    "one name without": (lambda w: prefixed("module.", w) | {"n_averaged": torch.ones(1)}, PREFIX),
    "two prefixes": (lambda w: prefixed("ema.", w) | prefixed("model.", w), PREFIX),
    "four of them": (lambda w: prefixed("module." * 4, w), PREFIX),
    "two dictionaries": (lambda w: {"state_dict": w, "model": w}, WHICH),
    "three dictionaries": (lambda w: {"state_dict": w, "model": w, "ema": w}, WHICH),
    "tensors beside": (lambda w: {"ema": w} | w, WHICH),
    "an average of another form": (lambda w: {"ema": {"decay": 0.9, "shadow": w}, "model": w}, OTHER),
    "another key": (lambda w: {"generator": w, "epoch": 3}, OTHER),
}  # fmt: skip


@pytest.mark.parametrize("how", AMBIGUOUS)
def test_where_it_is_not_clear_it_is_refused(how, weights, tmp_path):
    wrap, said = AMBIGUOUS[how]
    torch.save(wrap(weights), tmp_path / "model.bin")
    assert said in refusal(tmp_path / "model.bin", tmp_path / "out")


def test_tensors_that_share_memory_or_lie_transposed_are_written_whole(weights, tmp_path):
    name = "blocks.0.attn.proj.weight"
    one = weights[name]
    moved = weights | {name: one.t().contiguous().t()}
    biases = [key for key in weights if key.endswith("bias") and weights[key].shape == (16,)]
    held = torch.randn(20, generator=torch.Generator().manual_seed(0))
    moved |= {key: held[i : i + 16] for i, key in enumerate(biases[:3])}
    torch.save(moved, tmp_path / "model.bin")
    assert refusal(tmp_path / "model.bin", tmp_path / "out") is None
    assert len(biases) >= 3
    assert changed_bytes(tmp_path / "out", {key: tensor.contiguous() for key, tensor in moved.items()}) == 0


def test_what_was_taken_off_is_printed_and_the_folder_is_hashed(weights, tmp_path, capsys):
    torch.save({"ema": weights}, tmp_path / "model.bin")
    assert run(["convert", str(tmp_path / "model.bin"), str(tmp_path / "out"), "--heads", "2"]) == 0
    assert "as FiTv2 of width 16 (taken from 'ema')" in capsys.readouterr().out
    assert set(json.loads((tmp_path / "out" / FILES).read_text())) == {CONFIG, "card.json", WEIGHTS}
    verify_model(tmp_path / "out")


# Back to the released names


@pytest.fixture
def folder(tmp_path):
    model = randomized(FiT(**asdict(TINY)))
    (tmp_path / "model").mkdir()
    save_model(model, Card(("a", "b", "c", "d"), "pixels", 16), tmp_path / "model")
    return tmp_path / "model"


def with_weights(change):
    def apply(folder):
        weights = load_file(folder / WEIGHTS)
        change(weights)
        save_file(weights, folder / WEIGHTS)

    return apply


def with_config(**values):
    def apply(folder):
        config = json.loads((folder / CONFIG).read_text()) | values
        (folder / CONFIG).write_text(json.dumps(config))

    return apply


BIAS = "blocks.0.attention.qkv.bias"
BACK = {
    "missing": (with_weights(lambda w: w.pop(BIAS)), f"{BIAS} is missing"),
    "extra": (with_weights(lambda w: w.update(extra=torch.zeros(2))), "extra is not one of its tensors"),
    "misshapen": (with_weights(lambda w: w.update({BIAS: torch.zeros(3)})), rf"{BIAS} is \(3,\) float32"),
    "of whole numbers": (with_weights(lambda w: w.update({BIAS: w[BIAS].long()})),
                         rf"{BIAS} is \(48,\) int64"),
    "nan": (with_weights(lambda w: w[BIAS].fill_(torch.nan)), f"{BIAS} is not finite"),
    "one nan": (with_weights(lambda w: w[BIAS].view(-1)[7:8].fill_(torch.nan)), f"{BIAS} is not finite"),
    "inf": (with_weights(lambda w: w[BIAS].view(-1)[7:8].fill_(-torch.inf)), f"{BIAS} is not finite"),
    "half of it": (with_weights(lambda w: w.update({BIAS: torch.full((48,), torch.inf).half()})),
                   "not finite"),
    "float8": (with_weights(lambda w: w.update({BIAS: torch.full((48,), torch.nan).to(torch.float8_e4m3fn)})),
               "not finite"),
    "float4": (with_weights(lambda w: w.update(
        {BIAS: torch.zeros(48, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)})), BIAS),
    "another depth": (with_config(depth=2), "holds another model's weights: blocks.1"),
    "a depth beyond all": (with_config(depth=10**9), "describes no model"),
    "another condition": (with_config(conditions=["text"]), "text"),
    "no condition": (with_config(conditions=[]), "conditioned on nothing"),
    "two conditions": (with_config(conditions=["label", "label"]), "conditioned on label and label"),
    "another objective": (with_config(objective="mine"), "mine"),
    "no config": (lambda folder: (folder / CONFIG).unlink(), "missing"),
    "a config of another thing": (with_config(_class_name="UNet2DModel"), "not of a FiT"),
    "cut off": (lambda folder: os.truncate(folder / WEIGHTS, 900), "damaged"),
    "a pointer": (lambda folder: (folder / WEIGHTS).write_bytes(POINTER), "damaged"),
    "a deep config": (lambda folder: (folder / CONFIG).write_text("[" * 5000), "damaged"),
}  # fmt: skip


@pytest.mark.parametrize("how", BACK)
def test_a_model_that_is_not_whole_does_not_go_back(how, folder, tmp_path):
    change, said = BACK[how]
    change(folder)
    with pytest.raises(UserError, match="damaged or was changed"):
        convert_to_released(folder, tmp_path / "out.safetensors")
    (folder / FILES).unlink()
    with pytest.raises(UserError, match=said) as told:
        convert_to_released(folder, tmp_path / "out.safetensors")
    assert str(told.value).isprintable()
    assert str(folder) in str(told.value)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_objective_of_somebody_else_does_not_go_back(tmp_path, monkeypatch):
    """A registered one makes a model that trains here; the released code has no such loss."""
    monkeypatch.setitem(__import__("fitv2.diffusion.objective", fromlist="_").OBJECTIVES, "mine", object)
    model = randomized(FiT(**asdict(replace(TINY, objective="mine"))))
    (tmp_path / "model").mkdir()
    save_model(model, Card(("a", "b", "c", "d"), "pixels", 16), tmp_path / "model")
    with pytest.raises(UserError, match="objective mine: the released code knows flow and ddpm"):
        convert_to_released(tmp_path / "model", tmp_path / "out.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
