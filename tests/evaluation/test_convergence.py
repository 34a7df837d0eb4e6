"""The study of convergence: its variants, its curves, and a small one from the first command to the table."""

import json
import math

import pytest

from conftest import held_out_set
from fitv2.config import Guidance, Sampling
from fitv2.evaluation.convergence import (
    Curve,
    factor,
    plan_convergence,
    plan_scaling,
    run_study,
)
from fitv2.evaluation.evaluate import evaluate
from fitv2.evaluation.judged import How
from fitv2.evaluation.settings import Evaluation, Scale


def curve(name, distances, seed=0):
    return Curve(name, seed, (10, 20, 30), tuple(distances), 1, 1.0)


@pytest.mark.parametrize(
    ("distance", "steps"), [(100, 10), (80, 10), (70, 15), (60, 20), (50, 25), (40, 30), (39, math.inf)]
)
def test_steps_to_a_distance(distance, steps):
    assert curve("x", [80, 60, 40]).steps_to(distance) == steps


def test_the_factor_is_over_seeds():
    slower = [curve("FiT", [90, 80, 60], seed) for seed in (0, 1)]
    found = factor([curve("x", [60, 50, 40], 0), curve("x", [70, 60, 40], 1)], slower)
    assert found.value == pytest.approx((3 + 1.5) / 2)
    assert found.error == pytest.approx(0.75)
    assert factor(slower, slower).value == 1
    assert factor([curve("x", [90, 80, 70], 0), curve("x", [70, 60, 40], 1)], slower) is None


@pytest.fixture
def ground(folder, tmp_path, pixel_model, colours):
    """Tokens, square ones, and a reference."""
    data = held_out_set(folder, tmp_path)
    evaluate(
        str(pixel_model), str(folder), tmp_path / "evaluated", Evaluation(num=10),
        How(Guidance(1.0), Sampling(steps=2)), [(32, 32)],
    )  # fmt: skip
    return str(data), tmp_path / "evaluated" / "reference"


TINY = Scale(width=32, heads=2, depth=4, steps=4, batch_size=4, every=2)


def test_a_small_study_and_again(ground, tmp_path):
    data, reference = ground
    runs = plan_convergence(data, data, TINY, ("DiT", "FiT", "FiTv2+levels+aligned"))
    said = []
    curves = run_study(runs, reference, tmp_path / "study", seeds=(0, 1), num=12, report=said.append)
    assert [(one.variant, one.seed) for one in curves] == [
        (name, seed) for seed in (0, 1) for name in ("DiT", "FiT", "FiTv2+levels+aligned")
    ]
    assert all(one.steps == (2, 4) for one in curves)
    assert {one.variant: len(one.losses) for one in curves} == {"DiT": 0, "FiT": 0, "FiTv2+levels+aligned": 2}
    assert len(said) == 6
    table = (tmp_path / "study" / "table.md").read_text()
    assert "| FiTv2+levels+aligned |" in table and "fewer steps than FiT |" in table
    assert (tmp_path / "study" / "curves.png").exists()
    again = run_study(runs, reference, tmp_path / "study", seeds=(0, 1), num=12)
    assert again == curves
    assert len(json.loads((tmp_path / "study" / "curves.json").read_text())["curves"]) == 6


def test_models_of_a_scaling_study_cost_the_same(ground):
    data, _ = ground
    scale = Scale(width=96, heads=3, depth=4, steps=1000, batch_size=4, every=10)
    runs = plan_scaling(data, scale, (64, 96, 160), (2, 4, 4))
    assert [run.preset.model.width for run in runs] == [64, 96, 160]
    assert runs[1].preset.training.steps == 1000
    from fitv2.evaluation.convergence import gmac

    costs = [run.preset.training.steps * gmac(run.preset.model, 16) for run in runs]
    assert max(costs) / min(costs) < 1.05
    judged = [run.preset.training.steps / run.preset.training.evaluate_every for run in runs]
    assert judged == [100, 100, 100]  # at equal costs
