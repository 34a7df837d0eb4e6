"""No command opens a connection that nobody asked for: with a guard in place of the ways to the network."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

from conftest import FORK, randomized
from fitv2.__main__ import main
from fitv2.checkpoint import Card, save_model
from fitv2.cli.commands import run as run_command
from fitv2.model import FiT
from fitv2.pipeline import FiTPipeline
from fitv2.training.trackers import build_trackers

HUB = "stabilityai/sd-vae-ft-ema"

# Python imports a module of this name by itself when it starts.
GUARD = """
import os, socket

def guarded(name):
    def refuse(*arguments, **named):
        with open(os.environ["ATTEMPTS"], "a") as file:
            file.write(f"{name} {arguments[-2:]}\\n")
        raise OSError("the network was asked for")
    return refuse

socket.socket.connect = guarded("connect")
socket.socket.connect_ex = guarded("connect_ex")
socket.create_connection = guarded("create_connection")
socket.getaddrinfo = guarded("getaddrinfo")
"""


@pytest.fixture
def guarded(tmp_path, monkeypatch):
    """Run a command under the guard: its status, what it says, and what it attempted."""
    monkeypatch.setenv("ATTEMPTS", str(tmp_path / "attempts"))
    for name in ("HF_HUB_OFFLINE", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "empty"))  # nothing was fetched before

    def forked(*arguments):
        def run():
            file = os.open(tmp_path / "said", os.O_CREAT | os.O_TRUNC | os.O_WRONLY | os.O_APPEND)
            os.dup2(file, 1)
            os.dup2(file, 2)
            sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))  # noqa: SIM115
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            sys.argv = ["fitv2", *map(str, arguments)]
            exec(GUARD)
            time.sleep = lambda _: None  # the hub's library waits between its attempts
            main()

        process = FORK.Process(target=run)
        process.start()
        process.join(60)
        if process.exitcode is None:
            process.kill()
            pytest.fail((tmp_path / "said").read_text())
        return process.exitcode, (tmp_path / "said").read_text(), attempts(tmp_path)

    return forked


@pytest.fixture
def guarded_fresh(tmp_path):
    """The same with `python -m fitv2`: nothing is imported before the guard."""
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "sitecustomize.py").write_text(GUARD)
    changes = {
        "PYTHONPATH": str(tmp_path / "path"), "ATTEMPTS": str(tmp_path / "attempts"),
        "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}

    def fresh(*arguments):
        command = [sys.executable, "-m", "fitv2", *map(str, arguments)]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=120, env=kept | changes, check=False
        )
        return done.returncode, done.stdout + done.stderr, attempts(tmp_path)

    return fresh


def attempts(tmp_path):
    file = tmp_path / "attempts"
    return file.read_text().splitlines() if file.exists() else []


# What lies around -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def around(tiny_vae, tmp_path_factory):
    """Folders as they may come from anywhere, by what is special about each."""
    root = tmp_path_factory.mktemp("around")
    shape = {"depth": 1, "width": 16, "heads": 1, "patch_size": 2, "in_channels": 4, "num_classes": 2}
    model = randomized(FiT(**shape)).eval()
    save_model(model, Card(("blue", "red"), HUB, 16), root / "model of the hub")
    shutil.copytree(root / "model of the hub", root / "string model")
    write(root / "string model" / "config.json", HUB)
    (root / "string model" / "files.json").unlink()
    shutil.copytree(tiny_vae, root / "string vae")
    write(root / "string vae" / "config.json", HUB)
    save_model(model, Card(("blue", "red"), str(root / "string vae"), 16), root / "model of a string")
    for number in range(8):
        latent(root / "latents" / "from_16_to_16" / f"{number}.safetensors", 2, 3, number)
    assert run_command(["convert", str(root / "latents"), str(root / "set of the hub")]) == 0
    save_model(model, Card(("blue", "red"), str(tiny_vae), 16), root / "own model")
    pipeline = FiTPipeline.from_pretrained(root / "own model")
    pipeline.save_pretrained(root / "pipeline")
    shutil.copytree(root / "pipeline", root / "pipeline with a string")
    write(root / "pipeline with a string" / "vae" / "config.json", HUB)
    build_trackers(("tensorboard",), root / "tracked", 0, {})  # imported before processes are forked
    return root


def latent(path, rows, columns, number):
    """A file of the released latents."""
    path.parent.mkdir(parents=True, exist_ok=True)
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    feature = torch.randn(2, rows, columns, 16, generator=torch.Generator().manual_seed(number))
    grid, size = torch.stack([column.flatten(), row.flatten()]), torch.tensor([rows, columns])
    save_file({"feature": feature, "grid": grid, "size": size.int(), "label": torch.tensor(number)}, path)


def write(path, values):
    path.write_text(json.dumps(values))


FEW = ["--label", "0", "--steps", "2"]


def asks(name, around, folder, out):
    """The arguments of a command that has no reason to use the network."""
    return {
        "clipart": ["sample", "clipart", "--size", "32x32", "--out", out, *FEW],
        "export": ["export", "clipart", out],
        "convert": ["convert", around / "own model", out.with_suffix(".safetensors"), "--to-released"],
        "encode": ["encode", folder, out, "--max-tokens", "16", "--workers", "0"],
        "pipeline": ["sample", around / "pipeline", "--size", "32x32", "--out", out, *FEW],
        "own model": ["sample", around / "own model", "--size", "32x32", "--out", out, *FEW],
        "inspect without pictures": ["inspect", around / "set of the hub", "--samples", "0", "--out", out],
    }[name]


FULFILLED = ["clipart", "export", "convert", "encode", "pipeline", "own model", "inspect without pictures"]


def missing(name, around, folder, out):
    """The arguments of a command that lacks what lies on the hub, or pretends to."""
    return {
        "sample": ["sample", around / "model of the hub", "--out", out, *FEW],
        "train": ["train", "debug", "--data", around / "set of the hub", "--out", out, "--steps", "2"],
        "inspect": ["inspect", around / "set of the hub", "--out", out],
    }[name]


def broken(name, around, folder, out):
    """The arguments of a command that meets a config.json that is only a string."""
    return {
        "model": ["sample", around / "string model", "--out", out, *FEW],
        "export": ["export", around / "string model", out],
        "its autoencoder": ["sample", around / "model of a string", "--out", out, *FEW],
        "autoencoder": ["encode", folder, out, "--autoencoder", around / "string vae", "--workers", "0"],
        "pipeline": ["sample", around / "pipeline with a string", "--out", out, *FEW],
    }[name]


BROKEN = ["model", "export", "its autoencoder", "autoencoder", "pipeline"]


def one_line(said):
    (line,) = [line for line in said.splitlines() if line.startswith("fitv2: ")]
    assert "Traceback" not in said
    return line


# Tests ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FULFILLED)
def test_what_lies_here_needs_no_network(guarded, around, folder, tmp_path, name):
    status, said, tried = guarded(*asks(name, around, folder, tmp_path / "out"))
    assert (status, tried) == (0, []), said


def test_training_on_what_lies_here_needs_no_network(guarded, tokens, tmp_path):
    out = ["--out", tmp_path / "out", "--steps", "2", "--sample-every", "2"]
    status, said, tried = guarded("train", "debug", "--data", tokens, *out)
    assert (status, tried) == (0, []), said


@pytest.mark.parametrize("name", ["sample", "train", "inspect"])
def test_a_name_of_the_hub_in_a_file_is_no_wish(guarded, around, folder, tmp_path, name):
    status, said, tried = guarded(*missing(name, around, folder, tmp_path / "out"))
    assert (status, tried) == (2, []), said
    assert "--allow-download" in one_line(said)
    assert HUB in one_line(said)


@pytest.mark.parametrize("name", ["sample", "train", "inspect"])
def test_it_is_fetched_where_that_is_wished(guarded, around, folder, tmp_path, name):
    arguments = missing(name, around, folder, tmp_path / "out")
    status, said, tried = guarded(*arguments, "--allow-download")
    assert status == 2, said
    assert tried != []
    assert HUB in one_line(said)


def test_who_names_an_autoencoder_of_the_hub_wants_it(guarded, folder, tmp_path):
    status, said, tried = guarded("encode", folder, tmp_path / "out", "--autoencoder", HUB)
    assert status == 2, said
    assert tried != []
    assert HUB in one_line(said)


@pytest.mark.parametrize(
    ("name", "wished"), [*((name, False) for name in BROKEN), ("model", True), ("its autoencoder", True),
                         ("pipeline", True)]
)  # fmt: skip
def test_a_config_that_is_a_string_reaches_nowhere(guarded, around, folder, tmp_path, name, wished):
    arguments = broken(name, around, folder, tmp_path / "out")
    status, said, tried = guarded(*arguments, *["--allow-download"] * wished)
    assert (status, tried) == (2, []), said
    assert "config.json" in one_line(said)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["asks", "missing", "broken"])
def test_the_same_from_the_first_import_on(guarded_fresh, around, folder, tmp_path, kind):
    table, names, expected = {
        "asks": (asks, FULFILLED, 0), "missing": (missing, ["sample", "train", "inspect"], 2),
        "broken": (broken, BROKEN, 2),
    }[kind]  # fmt: skip
    for name in names:
        arguments = table(name, around, folder, tmp_path / name)
        status, said, tried = guarded_fresh(*arguments)
        assert (name, status, tried) == (name, expected, []), said


@pytest.mark.slow
def test_the_guard_sees_what_is_wished_from_the_first_import_on(guarded_fresh, around, folder, tmp_path):
    arguments = missing("sample", around, folder, tmp_path / "out")
    status, said, tried = guarded_fresh(*arguments, "--allow-download")
    assert status == 2, said
    assert tried != []


def test_the_guard_sees_connections(tmp_path, monkeypatch):
    monkeypatch.setenv("ATTEMPTS", str(tmp_path / "attempts"))

    def run():
        exec(GUARD)
        for attempt in (
            lambda: socket.create_connection(("127.0.0.1", 9)),
            lambda: socket.socket().connect(("127.0.0.1", 9)),
            lambda: socket.getaddrinfo("localhost", 9),
        ):
            with pytest.raises(OSError, match="was asked for"):
                attempt()

    process = FORK.Process(target=run)
    process.start()
    process.join()
    assert process.exitcode == 0
    assert [line.split()[0] for line in attempts(tmp_path)] == ["create_connection", "connect", "getaddrinfo"]
