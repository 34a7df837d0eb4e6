import pytest
import torch

from fitv2.config import Training
from fitv2.model import FiT
from fitv2.presets import preset
from fitv2.training.optim import build_optimizers, freeze, learning_rate


def test_post_training_is_14_15_percent_of_fitv2_xl():
    with torch.device("meta"):
        model = FiT.from_preset("fitv2-xl-hr")
    freeze(model, preset("fitv2-xl-hr").training.trainable)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == 94_961_680
    assert round(100 * trained / sum(p.numel() for p in model.parameters()), 2) == 14.15


def test_learning_rate_warms_up_holds_and_decays():
    config = Training(steps=100, learning_rate=1.0, warmup_steps=10, decay_steps=20)
    rates = [learning_rate(config, step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9:80] == [1.0] * 71
    assert rates[90] == pytest.approx(0.5)
    assert 0 < rates[99] <= 0.05


def test_muon_is_for_the_matrices_of_the_blocks_that_are_trained(model):
    muon, adamw = build_optimizers(model, Training(optimizer="muon"))
    matrices = {id(p) for p in model.blocks.parameters() if p.ndim == 2}
    assert {id(p) for group in muon.param_groups for p in group["params"]} == matrices
    both = [p for optimizer in (muon, adamw) for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in both} == {id(p) for p in model.parameters()}
    freeze(model, "post-training")
    (left,) = (o for o in build_optimizers(model, Training(optimizer="adamw")))
    held = {id(p) for group in left.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters() if p.requires_grad}
