"""The best model of a run is kept."""

import json

import pytest
import torch
from safetensors.torch import load_file
from test_trainer import settings

from conftest import together
from fitv2.checkpoint import WEIGHTS, load_model
from fitv2.training.run_folder import read_log
from fitv2.training.trainer import train


def judged(distances):
    """A judge that finds one distance after another."""
    left = list(distances)
    return lambda pipeline: {"judge/distance": left.pop(0)}


@pytest.mark.parametrize(("distances", "step"), [([3, 1, 2], 2), ([3, 2, 1], 3), ([1, 2, 3], 1)])
def test_the_best_of_three(tokens, tmp_path, distances, step):
    run = tmp_path / "run"
    train(settings(steps=3, evaluate_every=1, save_every=1, keep=5), tokens, run, judge=judged(distances))
    about = json.loads((run / "best" / "best.json").read_text())
    assert about == {"step": step, "judge/distance": 1}
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
    assert json.loads((run / "best" / "best.json").read_text()) == {"step": 4, "judge/distance": 3}


@pytest.mark.parametrize("fsdp_size", [1, 2])
def test_several_processes_keep_one(tokens, tmp_path, fsdp_size):
    def work(rank):
        wanted = settings(steps=2, evaluate_every=1, batch_size=8, fsdp_size=fsdp_size)
        train(wanted, tokens, tmp_path / "run", judge=judged([2, 1]))

    assert together(2, work) == [None, None]
    assert json.loads((tmp_path / "run" / "best" / "best.json").read_text())["step"] == 2
    load_model(tmp_path / "run" / "best")
