"""The variants of the study of convergence, and what is added to them."""

import pytest

from fitv2.config import Architecture
from fitv2.data.packing import images_before
from fitv2.errors import UserError
from fitv2.evaluation.settings import Scale
from fitv2.evaluation.variants import VARIANTS, variant

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
        "late-decay": {"decay_steps": 400},
        "muon-3": {"muon_iterations": 3},
        "muon-alternate": {"muon_every": 2},
        "squared": {"direction_weight": 0.0},
        "logit-normal": {"time_mean": 0.0},
        "rate=3e-3": {"learning_rate": 3e-3},
        "mean=-0.3": {"time_mean": -0.3},
    }.items():
        found = variant(f"fast+{name}", Scale(), LATENTS)
        both = zip((found.model, found.training), (plain.model, plain.training), strict=True)
        changed = {
            key: value for one, other in both for key, value in vars(one).items() if value != vars(other)[key]
        }
        assert changed == expected, name
    two = variant("FiTv2+muon+half", Scale(), LATENTS)
    assert (two.training.optimizer, two.training.steps, two.model.depth) == ("muon", 1000, 5)
    with pytest.raises(UserError, match="`clean_share` is for flows"):
        variant("FiT+levels", Scale(), LATENTS)
    with pytest.raises(UserError, match="`muon_iterations` and `muon_every` are for `optimizer` muon"):
        variant("FiTv2+muon-3", Scale(), LATENTS)
    with pytest.raises(UserError, match="did you mean levels"):
        variant("fast+level", Scale(), LATENTS)
    with pytest.raises(UserError, match="rate=fast: a number has to stand behind rate="):
        variant("fast+rate=fast", Scale(), LATENTS)


def test_a_ramp_up_has_as_many_images():
    with_it, without = (variant(name, Scale(), LATENTS).training for name in ("fast+rampup", "fast"))
    images = images_before(with_it.steps, with_it.batch_size, with_it.batch_rampup_steps)
    assert images == pytest.approx(without.steps * without.batch_size, rel=0.01)
