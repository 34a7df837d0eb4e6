from dataclasses import asdict

import pytest

from fitv2.errors import UserError
from fitv2.presets import POST_TRAINED, PRESETS, preset


def test_every_preset_says_what_it_is():
    assert all(value.about for value in PRESETS.values())
    assert {"fitv2-b", "fitv2-xl", "fitv2-3b", "clipart", "debug"} <= set(PRESETS)


def test_presets_are_values():
    with pytest.raises(AttributeError):
        preset("debug").model.depth = 3


def test_unknown_preset_names_the_nearest():
    with pytest.raises(UserError, match="did you mean fitv2-xl"):
        preset("fitv2-xxl")


def changes(one, other):
    """The fields in which two presets differ."""
    parts = [(asdict(p.model), asdict(p.training)) for p in (preset(one), preset(other))]
    return {key for mine, theirs in zip(*parts, strict=True) for key in mine if mine[key] != theirs[key]}


@pytest.mark.parametrize(
    ("one", "other", "differing"),
    [
        ("fit-b", "ablation-a", {"path", "prediction", "times"}),
        ("ablation-a", "ablation-b", {"qk_norm"}),
        ("ablation-b", "ablation-c", {"depth", "adaln", "mlp_width"}),
        ("ablation-a", "ablation-d", {"crop_probability"}),
        ("ablation-b", "ablation-e", {"crop_probability"}),
        ("ablation-e", "ablation-f", {"times"}),
        ("ablation-f", "fitv2-b", {"depth", "adaln", "mlp_width"}),
        ("fitv2-xl", "fitv2-xl-hr", {"rope", "steps", "trainable", "warmup_steps"}),
    ],
)
def test_the_paper_s_rows_differ_in_what_they_change(one, other, differing):
    assert changes(one, other) == differing


def test_post_training_scales_each_image_by_its_own_size():
    assert preset("fitv2-3b-hr").model.rope == POST_TRAINED
    assert (POST_TRAINED.extrapolation, POST_TRAINED.per_axis, POST_TRAINED.train_side) == ("ntk", True, 16)
    assert POST_TRAINED.grid is None
