import json
from dataclasses import replace

import pytest
import torch

from fitv2.checkpoint import load_model
from fitv2.config import Rope
from fitv2.data.dataset import TokenDataset
from fitv2.errors import UserError
from fitv2.presets import preset
from fitv2.training.trainer import Trainer, train

DEBUG = preset("debug")


def settings(**changes):
    return replace(DEBUG, training=replace(DEBUG.training, **changes))


def test_continuing_another_model(tokens, tmp_path):
    train(settings(steps=2), tokens, tmp_path / "first")
    dataset = TokenDataset(tokens)
    trainer = Trainer(settings(steps=1), dataset, tokens, tmp_path / "second", str(tmp_path / "first"))
    expected = load_model(tmp_path / "first")[0]
    for held in (trainer.weights.master, trainer.weights.ema):
        for one, other in zip(held.parameters(), expected.parameters(), strict=True):
            assert torch.equal(one, other)
    wider = replace(settings(steps=1), model=replace(DEBUG.model, width=64))
    with pytest.raises(UserError, match="another width"):
        train(wider, tokens, tmp_path / "third", init=str(tmp_path / "first"))
    assert not (tmp_path / "third").exists()


def test_post_training_needs_a_trained_model(tokens, tmp_path):
    with pytest.raises(UserError, match=r"`trainable` post-training trains a part of .*: give `init`"):
        train(settings(steps=1, trainable="post-training"), tokens, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_started_from_a_post_trained_model_keeps_its_positions(tokens, tmp_path):
    rope = Rope("ntk", train_side=4)
    scaled = replace(settings(steps=1), model=replace(DEBUG.model, rope=rope))
    train(scaled, tokens, tmp_path / "first")
    train(settings(steps=1), tokens, tmp_path / "second", init=str(tmp_path / "first"))
    assert load_model(tmp_path / "second")[0].architecture.rope == rope
    assert (
        json.loads((tmp_path / "second" / "run.json").read_text())["model"]["rope"]["extrapolation"] == "ntk"
    )
