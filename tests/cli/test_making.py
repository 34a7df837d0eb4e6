"""`fitv2 sample` and `fitv2 edit`: resumable, told in the picture, shared by processes."""

import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from conftest import fitv2, randomized
from fitv2.checkpoint import Card, save_model
from fitv2.cli.making import Written
from fitv2.evaluation.pictures import Batch
from fitv2.model import FiT
from fitv2.sampling.recipe import read_recipe


def files(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.png"))}


SHAPE = {"depth": 1, "width": 32, "heads": 2, "patch_size": 4, "in_channels": 3, "num_classes": 2}
QUICK = ("--steps", 2)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_picture_is_made_again_from_what_it_says(pixel_model, here, capsys):
    options = ("--label", "red", "--size", "12x20", "--seed", 7, "--guidance-scale", 2, *QUICK)
    assert fitv2(capsys, "sample", pixel_model, *options, "--out", "first")[0] == 0
    source = here / "first" / "red_12x20_7.png"
    assert read_recipe(source).label == "red"
    assert fitv2(capsys, "sample", pixel_model, "--from-metadata", source, "--out", "again")[0] == 0
    assert files(here / "first") == files(here / "again")
    status, _, said = fitv2(capsys, "sample", pixel_model, "--from-metadata", source, "--label", "red")
    assert (status, "--from-metadata says how the picture is made" in said) == (2, True)


def test_other_weights_are_said_and_do_not_replace_the_picture(pixel_model, here, capsys):
    other = randomized(FiT(**SHAPE), seed=1)
    save_model(other, Card(("blue", "red"), "pixels", 16, 1.0), here / "other")
    assert fitv2(capsys, "sample", pixel_model, "--label", "red", *QUICK, "--out", "first")[0] == 0
    source = here / "first" / "red_16x16_0.png"
    status, _, said = fitv2(capsys, "sample", "other", "--from-metadata", source, "--out", "again")
    assert (status, "was made by other weights" in said) == (0, True)
    before = source.read_bytes()
    status, _, said = fitv2(capsys, "sample", "other", "--from-metadata", source, "--out", "first")
    assert (status, "would be replaced by another picture" in said) == (2, True)
    assert source.read_bytes() == before


def test_what_is_there_is_not_made_again_and_what_differs_is(pixel_model, here, capsys):
    options = ("sample", pixel_model, "--num", 3, "--size", "8x8", "--out", "out")
    assert fitv2(capsys, *options, *QUICK)[0] == 0
    before = {path: path.stat().st_mtime_ns for path in (here / "out").iterdir()}
    assert len(before) == 6
    assert fitv2(capsys, *options, *QUICK)[0] == 0
    assert {path: path.stat().st_mtime_ns for path in (here / "out").iterdir()} == before
    whole = files(here / "out")
    (here / "out" / "red_8x8_1.png").unlink()
    assert fitv2(capsys, *options, *QUICK)[0] == 0
    assert files(here / "out") == whole
    assert fitv2(capsys, *options, "--steps", 3)[0] == 0
    assert files(here / "out").keys() == whole.keys()
    assert not set(files(here / "out").values()) & set(whole.values())


def test_a_picture_of_another_prompt_is_not_written_over(here, capsys):
    command = ("sample", "emoji-any-step", "--size", "32x32", "--steps", 1, "--out", "made")
    assert fitv2(capsys, *command, "--prompt", "fox!")[0] == 0
    before = files(here / "made")
    status, _, said = fitv2(capsys, *command, "--prompt", "fox?")
    assert (status, "shows something else, 'fox!': give another --out" in said) == (2, True)
    assert files(here / "made") == before


def test_a_folder_of_pictures_may_be_named_as_the_model(here, capsys):
    command = ("sample", "emoji-any-step", "--prompt", "fox", "--size", "32x32", "--steps", 1)
    for _ in range(2):
        assert fitv2(capsys, *command, "--out", "emoji-any-step")[0] == 0


def test_a_sheet_and_a_batch_for_adm_s_evaluator(pixel_model, here, capsys):
    assert fitv2(capsys, "sample", pixel_model, "--size", "8x8", "--size", "4x12", *QUICK, "--grid", "--npz",
                 "--out", "out")[0] == 0  # fmt: skip
    assert Image.open(here / "out" / "grid.png").width > 24
    batch = Batch(here / "out" / "4x12.npz")
    assert (len(batch), batch.pixels) == (2, (4, 12))
    blue = np.asarray(Image.open(here / "out" / "blue_4x12_0.png"))
    assert np.array_equal(np.asarray(batch.read(range(1))[0]), blue)


@pytest.mark.parametrize(("killed", "again"), [(1, 1), (1, 2), (2, 1)])
def test_killed_and_run_again_the_same_files(pixel_model, here, capsys, killed, again):
    """Two hundred, in blocks of a few images, so that the work can be cut off in the middle."""
    options = ["sample", str(pixel_model), "--num", "100", "--size", "64x64", "--steps", "2"]
    assert fitv2(capsys, *options, "--out", "whole")[0] == 0

    def started(processes):
        many = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m", "--"]
        command = [sys.executable, *(many if processes > 1 else ["-m"]), "fitv2", *options, "--out", "out"]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        return subprocess.Popen(command, cwd=here, start_new_session=True, **quiet)

    running = started(killed)
    while running.poll() is None and len(files(here / "out")) < 20:
        pass
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    assert 20 <= len(files(here / "out")) < 200
    assert started(again).wait(300) == 0
    assert files(here / "out") == files(here / "whole")


def test_the_bar_of_several_processes_is_that_of_all(tmp_path):
    written = Written(tmp_path / "out", {"a.png", "b.png", "c.png"})
    assert written.count() == 0
    (tmp_path / "out").mkdir()
    for name in ("a.png", "c.png", "another.png"):
        (tmp_path / "out" / name).touch()
    assert written.count() == 0  # it was looked up just now
    written.looked -= 10
    assert written.count() == 2
