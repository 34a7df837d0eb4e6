import importlib.util
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import encoded_picture, fitv2, randomized
from fitv2.autoencoder import Pixels
from fitv2.checkpoint import Card, save_model
from fitv2.cli.commands import COMMANDS, WORK_IN
from fitv2.conditioning import Condition
from fitv2.config import RESTART, Guidance, Sampling
from fitv2.model import FiT
from fitv2.pipeline import FiTPipeline
from fitv2.presets import PRESETS
from fitv2.runtime.rng import generator
from fitv2.sampling.generate import generate
from fitv2.sampling.outputs import to_image
from fitv2.sampling.requests import Request


@pytest.mark.parametrize(
    ("chosen", "said"),
    [
        (
            [],
            f"left as they are; grown from 64 at time {RESTART:g}",
        ),
        (["--extrapolation", "none"], "left as they are\n"),
        (["--extrapolation", "pi"], "scaled by pi\n"),
    ],
)
def test_sample_says_what_it_does_beyond_the_trained_size(tmp_path, capsys, monkeypatch, chosen, said):
    monkeypatch.chdir(tmp_path)
    arguments = ["--prompt", "fox", "--size", "64x64", "--size", "64x288", "--steps", 2, "--out", "out"]
    status, _, error = fitv2(capsys, "sample", "emoji", *arguments, *chosen)
    assert status == 0
    assert f"fitv2: 64x288: more than the 64 tokens trained on; positions are {said}" in error


def test_a_picture_in_bfloat16_is_nearly_that_in_float32(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    chosen = ["--prompt", "red apple", "--size", "64x64", "--steps", 4]
    for precision in ("float32", "bfloat16"):
        said = fitv2(capsys, "sample", "emoji", *chosen, "--precision", precision, "--out", precision)
        assert said[0] == 0
    one, other = (
        np.asarray(Image.open(next((tmp_path / name).iterdir())), float) for name in ("float32", "bfloat16")
    )
    assert 0 < abs(one - other).mean() < 4


def test_encode_train_sample(folder, tmp_path, capsys, monkeypatch):
    """The three commands of the README, on a folder of one's own."""
    monkeypatch.chdir(tmp_path)
    assert fitv2(capsys, "encode", folder, "tokens", "--max-tokens", 16)[0] == 0
    assert fitv2(capsys, "train", "debug", "--data", "tokens", "--out", "run", "--steps", 2)[0] == 0
    status, _, _ = fitv2(
        capsys, "sample", "run", "--label", "blue", "--label", "1", "--size", "32x32", "--size", "16x48",
        "--num", 2, "--seed", 5, "--steps", 2, "--out", "out",
    )  # fmt: skip
    assert status == 0
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == [
        f"{label}_{size}_{seed}.png"
        for label in ("blue", "red") for size in ("16x48", "32x32") for seed in (5, 6)
    ]  # fmt: skip
    assert Image.open(tmp_path / "out" / "red_16x48_5.png").size == (48, 16)


def test_an_exported_model_is_the_run_s_and_makes_the_same_pictures(tokens, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert fitv2(capsys, "train", "debug", "--data", tokens, "--out", "run", "--steps", 2)[0] == 0
    assert fitv2(capsys, "export", "run", "model")[:2] == (0, "model: the model of run\n")
    for model in ("run", "model"):
        assert (
            fitv2(capsys, "sample", model, "--label", "red", "--steps", 2, "--out", f"{model} made")[0] == 0
        )
    (one,), (other,) = ([*(tmp_path / f"{model} made").iterdir()] for model in ("run", "model"))
    assert Image.open(one).tobytes() == Image.open(other).tobytes()
    assert FiT.from_pretrained("model").architecture.num_classes == 2
    assert fitv2(capsys, "export", "run", "model")[2].startswith("fitv2: model already exists")


def test_skipped_pictures_show_in_the_exit_status(folder, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "good.png").write_bytes((folder / "blue" / "0.png").read_bytes())
    (tmp_path / "in" / "bad.png").write_text("x")
    status, _, said = fitv2(capsys, "encode", tmp_path / "in", tmp_path / "out")
    assert status == 3
    assert "1 images left out" in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["smaple"], "unknown command 'smaple': did you mean sample"),
        (["train", "clpart", "--data", "x", "--out", "y"], "unknown preset 'clpart': did you mean clipart"),
        (["train", "debug", "--dta", "x"], "unknown option '--dta': did you mean --data"),
        (["train", "debug", "--data", "x", "--out", "y", "--steps", "many"], "--steps"),
        (["train", "debug"], "--data"),
        (["train", "--data", "x", "debug", "--out", "y"], "name a preset first"),
        (["train", "debug", "--data", "x", "--out", "y", "--patch-size=2"], "follows from the data"),
        (["train", "debug", "--data", "x", "--out", "y", "--heads", "7"], "width 32 over 7 heads"),
        (["train", "debug", "--data", "x", "--out", "y", "--log-every", "0"], "--log-every is 0"),
        (["sample", "clipart", "--seed", "-1"], "--seed is -1"),
        (["train", "debug", "--data", "none", "--out", "y"], "dataset.json is missing"),
        (["sample"], "MODEL"),
        (["sample", "clip", "--label", "x"], "unknown model 'clip': did you mean clipart"),
        (["sample", "clipart", "--label", "flog"], "unknown label 'flog': did you mean flags"),
        (["sample", "clipart", "--size", "50x"], "is not HEIGHTxWIDTH in pixels"),
        (["sample", "clipart", "--size", "0x50"], "is not HEIGHTxWIDTH in pixels"),
        (["sample", "clipart", "--num", "0"], "--num is 0"),
        (["sample", "clipart", "--solver", "hean"], "heun"),
        (["sample", "clipart", "--solver", "ddpm"], "unknown solver 'ddpm'"),
        (["sample", "clipart", "--extrapolation", "ntk", "--train-side", "0"], "--train-side is 0"),
        (["sample", "clipart", "--guidance-channels", "9"], "the latent has 3"),
        (["sample", "clipart", "--guidance-scale", "nan"], "--guidance-scale is nan"),
        (["sample", "clipart", "--guidance-interval", "0.9", "0.1"], "two rising times"),
        (["convert", "nowhere.bin", "out"], "nowhere.bin does not exist"),
        (["encode", "nowhere", "out"], "nowhere does not exist"),
        (["demo", "--data", "nowhere"], "emoji set is not at nowhere"),
    ],
)
def test_a_mistake_is_one_line_that_says_what_to_do(arguments, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, err = fitv2(capsys, *arguments)
    lines = err.splitlines()
    assert (status, out, len(lines)) == (2, "", 1)
    assert lines[0].startswith("fitv2: ")
    assert said in lines[0]
    assert not list(tmp_path.iterdir())


def test_sizes_are_exact(tmp_path, capsys):
    options = ["--label", "flags", "--size", "33x50", "--steps", 1, "--out", tmp_path / "out"]
    assert fitv2(capsys, "sample", "clipart", *options)[0] == 0
    assert Image.open(tmp_path / "out" / "flags_33x50_0.png").size == (50, 33)


def test_labels_that_are_numbers_are_not_mixed_up_with_their_places(tmp_path, capsys):
    """Of the labels 1, 2, 3 the one called 2 is the second, whatever lies at place 2."""
    shape = {"depth": 1, "width": 16, "heads": 2, "patch_size": 4, "in_channels": 3, "num_classes": 3}
    save_model(randomized(FiT(**shape)), Card(("1", "2", "3"), "pixels", 16), tmp_path / "model")
    options = ["--size", "8x8", "--steps", 2, "--out", tmp_path / "out"]
    assert fitv2(capsys, "sample", tmp_path / "model", *options)[0] == 0
    pipe = FiTPipeline.from_pretrained(tmp_path / "model")
    made = {}
    for index, name in enumerate(pipe.card.labels):
        request = Request(Condition.of(label=torch.tensor([index])), (8, 8), generator(0))
        (pixels,) = generate(pipe.transformer, Pixels(), [request], Guidance(1.5), Sampling(steps=2))
        made[name] = to_image(pixels).tobytes()
        assert Image.open(tmp_path / "out" / f"{name}_8x8_0.png").tobytes() == made[name]
        for label in (index, name):
            (image,) = pipe(label, 8, 8, generator=[generator(0)], num_inference_steps=2).images
            assert image.tobytes() == made[name]
    assert len(set(made.values())) == 3


def test_a_former_name_of_an_option_is_taken_with_a_hint(capsys, tmp_path):
    options = ["--data", tmp_path / "none", "--out", tmp_path / "run", "--shard", 2, "--micro-batches=3"]
    status, _, err = fitv2(capsys, "train", "debug", *options)
    hints = ["fitv2: --shard is now --fsdp-size", "fitv2: --micro-batches is now --grad-accum-steps"]
    assert (status, err.splitlines()[:2]) == (2, hints)
    assert "dataset.json is missing" in err.splitlines()[2]


def test_help_of_train_names_the_preset_and_offers_only_what_it_takes(capsys):
    status, out, _ = fitv2(capsys, "train", "fast", "--help")
    assert status == 0
    assert "PRESET" in out.splitlines()[0]
    assert "0.006" in out  # the preset's learning rate
    assert not any(flag in out for flag in ("--patch-size", "--in-channels", "--num-classes"))


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, capsys):
    status, out, _ = fitv2(capsys, *command.split(), "--help")
    assert status == 0
    assert "--" in out


def test_who_stops_reading_is_told_nothing():
    command = f"for _ in 1 2 3 4 5; do {sys.executable} -m fitv2 encode --help | head -1; done"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert result.stderr == ""
    assert result.stdout.count("usage: fitv2 encode") == 5


def test_the_work_of_every_command_is_somewhere():
    assert WORK_IN.keys() == COMMANDS.keys()
    assert all(importlib.util.find_spec(name) for name in WORK_IN.values())


def test_help_names_commands_and_presets(capsys):
    status, out, _ = fitv2(capsys, "--help")
    assert status == 0
    assert all(name in out for name in (*COMMANDS, *PRESETS))


def test_an_unwritable_folder_is_one_line(folder, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    status, _, err = fitv2(capsys, "encode", folder, tmp_path / "file" / "out")
    assert status == 2
    assert "fitv2: cannot read or write" in err


def test_python_dash_m_works():
    result = subprocess.run(
        [sys.executable, "-m", "fitv2", "--version"], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "0.1.0"


@pytest.mark.parametrize(
    ("error", "said", "status"),
    [
        (
            ZeroDivisionError("division by zero"),
            "unexpected ZeroDivisionError: division by zero (add --debug",
            1,
        ),
        (MemoryError(), "not enough memory: MemoryError", 2),
        (torch.OutOfMemoryError("CUDA out of memory"), "not enough memory: CUDA out of memory", 2),
        (FloatingPointError("not finite"), "not finite", 2),
        (OSError(28, "No space left on device", "/x"), "cannot read or write /x: No space left on device", 2),
        (ModuleNotFoundError("x", name="wandb"), "wandb is not installed: pip install wandb", 2),
        (ModuleNotFoundError("x", name="pyarrow.parquet"), "pip install 'fitv2[train]'", 2),
        (ModuleNotFoundError("x", name="gradio"), "gradio is not installed: pip install 'fitv2[app]'", 2),
    ],
)
def test_every_error_is_one_line(error, said, status, monkeypatch, capsys):
    def failing(_):
        raise error

    monkeypatch.setitem(COMMANDS, "demo", (COMMANDS["demo"][0], failing))
    returned, _, printed = fitv2(capsys, "demo")
    assert (returned, len(printed.splitlines())) == (status, 1)
    assert said in printed
    with pytest.raises(type(error)):
        fitv2(capsys, "demo", "--debug")


def test_a_terminal_that_knows_ascii_alone_is_enough(tmp_path):
    for name in ("caf\u00e9", "\u72ac"):
        (tmp_path / "in" / name).mkdir(parents=True)
        (tmp_path / "in" / name / "1.png").write_bytes(encoded_picture())
    ascii_alone = {**os.environ, "PYTHONIOENCODING": "ascii", "LC_ALL": "C", "PYTHONUTF8": "0"}
    for command in (
        ["--help"],
        ["encode", "in", "out", "--workers", "0"],
        ["inspect", "out", "--samples", "0"],
    ):
        done = subprocess.run(
            [sys.executable, "-m", "fitv2", *command],
            cwd=tmp_path,
            env=ascii_alone,
            capture_output=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.isascii()
