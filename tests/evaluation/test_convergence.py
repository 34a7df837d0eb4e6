"""The study of convergence: its variants, its curves, and a small one from the first command to the table."""

import json
import math

import pytest

from conftest import held_out_set
from fitv2.config import Architecture, Guidance, Sampling
from fitv2.data.packing import images_before
from fitv2.errors import UserError
from fitv2.evaluation.convergence import (
    VARIANTS,
    Curve,
    factor,
    plan_convergence,
    plan_scaling,
    run_study,
    variant,
)
from fitv2.evaluation.evaluate import evaluate
from fitv2.evaluation.judged import How
from fitv2.evaluation.settings import Evaluation, Scale

LATENTS = Architecture(1, 4, 1, patch_size=2, in_channels=8, num_classes=3)


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_have_the_data_s_tokens_and_one_width(name):
    model = variant(name, Scale(), LATENTS).model
    assert (model.width, model.heads) == (192, 6)
    assert (model.patch_size, model.in_channels, model.num_classes) == (2, 8, 3)


def test_each_variant_differs_by_what_it_is_named_for():
    models = {name: variant(name, Scale(), LATENTS) for name in VARIANTS}
    assert models["DiT"].model.path == models["FiT"].model.path == "ddpm"
    assert models["SiT"].model.path == models["A"].model.path == "linear"
    absolute = {name for name, preset in models.items() if preset.model.rope.kind == "absolute"}
    assert absolute == {"DiT", "SiT"}
    assert {name for name, preset in models.items() if preset.model.qk_norm} == {
        "B",
        "C",
        "E",
        "F",
        "FiTv2",
        "fast",
    }
    assert {name for name, preset in models.items() if preset.model.depth == 5} == {"C", "FiTv2", "fast"}
    rates = {name: preset.training.learning_rate for name, preset in models.items() if name != "fast"}
    assert set(rates.values()) == {1e-3}
    with pytest.raises(UserError, match="did you mean FiT"):
        variant("FiTv3", Scale(), LATENTS)


def test_what_is_added_to_a_variant_changes_that_alone():
    plain = variant("fast", Scale(), LATENTS)
    for name, expected in {
        "half": {"steps": 1000, "decay_steps": 666, "sample_every": 1000},
        "rampup": {"steps": 2250, "batch_rampup_steps": 571, "sample_every": 2250},
        "levels": {"clean_share": 0.25},
        "early": {"early_head": 2},
        "aligned": {"early_head": 2, "early_prediction": "data"},
        "muon-3": {"muon_iterations": 3},
        "muon-alternate": {"muon_every": 2},
        "squared": {"direction_weight": 0.0},
        "logit-normal": {"time_mean": 0.0},
        "rate=3e-3": {"learning_rate": 3e-3},
    }.items():
        found = variant(f"fast+{name}", Scale(), LATENTS)
        both = zip((found.model, found.training), (plain.model, plain.training), strict=True)
        changed = {
            key: value for one, other in both for key, value in vars(one).items() if value != vars(other)[key]
        }
        assert changed == expected, name
    two = variant("FiTv2+muon+half", Scale(), LATENTS)
    assert (two.training.optimizer, two.training.steps, two.model.depth) == ("muon", 1000, 5)
    with pytest.raises(UserError, match="did you mean levels"):
        variant("fast+level", Scale(), LATENTS)
    with pytest.raises(UserError, match="rate=fast is no learning rate: write rate=3e-3"):
        variant("fast+rate=fast", Scale(), LATENTS)


def test_a_ramp_up_has_as_many_images():
    with_it, without = (variant(name, Scale(), LATENTS).training for name in ("fast+rampup", "fast"))
    images = images_before(with_it.steps, with_it.batch_size, with_it.batch_rampup_steps)
    assert images == pytest.approx(without.steps * without.batch_size, rel=0.01)


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
    assert all(one.steps == (2, 4) and len(one.losses) == 2 and one.losses[1] > 0 for one in curves)
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
