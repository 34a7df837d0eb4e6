"""The best model of a run is kept."""

import json
import shutil
import time

import pytest
import torch
from safetensors.torch import load_file
from test_trainer import settings

from conftest import together
from fitv2.checkpoint import WEIGHTS, load_model
from fitv2.training.run_folder import read_log
from fitv2.training.trainer import train


class judged:  # noqa: N801
    """A judge that finds one distance after another."""

    def __init__(self, distances, identity="judge"):
        self.left, self.identity = list(distances), identity

    def __call__(self, pipeline):
        found = self.left.pop(0)
        if found is None:
            raise FloatingPointError("an image came out with numbers that are not finite")
        return {"judge/distance": found}


@pytest.mark.parametrize(("distances", "step"), [([3, 1, 2], 2), ([3, 2, 1], 3), ([1, 2, 3], 1)])
def test_the_best_of_three(tokens, tmp_path, distances, step):
    run = tmp_path / "run"
    train(settings(steps=3, evaluate_every=1, save_every=1, keep=5), tokens, run, judge=judged(distances))
    about = json.loads((run / "best" / "best.json").read_text())
    assert about == {"step": step, "judge/distance": 1, "judge": "judge"}
    best = load_file(run / "best" / WEIGHTS)
    kept = load_file(run / "checkpoints" / f"step-{step:07d}" / "ema" / WEIGHTS)
    assert best.keys() == kept.keys()
    assert all(torch.equal(best[name], kept[name]) for name in best)
    load_model(run / "best")
    assert [
        line["judge/distance"] for line in read_log(run / "log.jsonl") if "judge/distance" in line
    ] == distances


def test_a_worse_one_after_resuming_does_not_replace_it(tokens, tmp_path):
    run = tmp_path / "run"
    train(settings(steps=2, evaluate_every=1), tokens, run, judge=judged([1, 2]))
    train(settings(steps=4, evaluate_every=1), tokens, run, judge=judged([3, 4]))
    assert json.loads((run / "best" / "best.json").read_text())["step"] == 1


def test_one_of_a_step_that_was_lost_is_forgotten(tokens, tmp_path):
    """The run is resumed before it: what is trained again is judged again."""
    run = tmp_path / "run"
    train(settings(steps=2, evaluate_every=2), tokens, run, judge=judged([5]))
    about = json.loads((run / "best" / "best.json").read_text())
    (run / "best" / "best.json").write_text(json.dumps(about | {"step": 9, "judge/distance": 0.1}))
    train(settings(steps=4, evaluate_every=2), tokens, run, judge=judged([3]))
    assert json.loads((run / "best" / "best.json").read_text()) == {
        "step": 4,
        "judge/distance": 3,
        "judge": "judge",
    }


def test_another_judge_begins_anew(tokens, tmp_path):
    run = tmp_path / "run"
    train(settings(steps=1, evaluate_every=1), tokens, run, judge=judged([1]))
    train(settings(steps=2, evaluate_every=1), tokens, run, judge=judged([5], "another"))
    assert json.loads((run / "best" / "best.json").read_text())["step"] == 2


def test_what_a_killed_process_left_takes_its_place(tokens, tmp_path):
    run = tmp_path / "run"
    train(settings(steps=1, evaluate_every=1), tokens, run, judge=judged([1]))
    (run / "best").rename(run / "best-1")  # killed between the two: it is the only one
    (run / "best-backup").mkdir()
    (run / "best-2.png").touch()
    train(settings(steps=2, evaluate_every=1), tokens, run, judge=judged([2]))
    assert json.loads((run / "best" / "best.json").read_text())["step"] == 1
    assert not (run / "best-1").exists()
    assert (run / "best-backup").exists()  # somebody's own


def test_what_a_killed_process_left_of_a_lost_step_is_removed(tokens, tmp_path):
    run = tmp_path / "run"
    train(settings(steps=1, evaluate_every=1), tokens, run, judge=judged([3]))
    shutil.copytree(run / "best", run / "best-7")
    train(settings(steps=2, evaluate_every=1), tokens, run, judge=judged([4]))
    assert json.loads((run / "best" / "best.json").read_text())["step"] == 1
    assert not (run / "best-7").exists()


def test_the_others_wait_for_a_judge_however_long_it_takes(tokens, tmp_path):
    def slow(pipeline):
        time.sleep(6)
        return {"judge/distance": 1.0}

    def work(rank):
        slow.identity = "judge"
        wanted = settings(steps=2, evaluate_every=2, batch_size=8, stall_minutes=0.05)
        train(wanted, tokens, tmp_path / "run", judge=slow)

    assert together(2, work) == [None, None]
    assert json.loads((tmp_path / "run" / "best" / "best.json").read_text())["step"] == 2


def test_samples_that_are_not_finite_do_not_end_the_training(tokens, tmp_path):
    with pytest.warns(UserWarning, match="samples of step 1 are not judged"):
        train(settings(steps=2, evaluate_every=1), tokens, tmp_path / "run", judge=judged([None, 7]))
    assert json.loads((tmp_path / "run" / "best" / "best.json").read_text())["step"] == 2


@pytest.mark.parametrize("fsdp_size", [1, 2])
def test_several_processes_keep_one(tokens, tmp_path, fsdp_size):
    def work(rank):
        wanted = settings(steps=2, evaluate_every=1, batch_size=8, fsdp_size=fsdp_size)
        train(wanted, tokens, tmp_path / "run", judge=judged([2, 1]))

    assert together(2, work) == [None, None]
    assert json.loads((tmp_path / "run" / "best" / "best.json").read_text())["step"] == 2
    load_model(tmp_path / "run" / "best")
