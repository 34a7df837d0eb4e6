"""Which figures there are, under which names."""

import torch

from fitv2.evaluation.metrics import RealFeatures
from fitv2.evaluation.score import figures


def features(count, seed, width=4):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def test_words_of_inception_are_for_inception_alone():
    names = ("inception", "inception_spatial", "inception_logits", "dinov2")
    made = {name: features(60, 0) for name in names}
    found = figures(made, {name: RealFeatures(features(60, 1)) for name in names})
    shared = {"precision", "recall", "density", "coverage"}
    assert set(found["inception"]) == {"FID", "FID∞", "sFID", "IS", "KID"} | shared
    assert set(found["dinov2"]) == {"FD", "FD∞", "KD"} | shared


def test_too_few_pictures_for_a_distance_of_infinitely_many():
    found = figures({"dinov2": features(19, 0)}, {"dinov2": RealFeatures(features(60, 1))})
    assert "FD∞" not in found["dinov2"]


def test_accuracy_is_left_out_where_names_do_not_meet():
    made, real = {"dinov2": features(30, 0)}, {"dinov2": RealFeatures(features(60, 1))}
    asked, shown = ["fox", "owl"] * 15, ["fox", "owl", "cat"] * 20
    assert "top 1" in figures(made, real, asked, shown)["dinov2"]
    for others in (["n01440764"] * 60, ["fox"] * 60, []):
        assert "top 1" not in figures(made, real, asked, others)["dinov2"]
    same = figures(real_as_made := {"dinov2": features(60, 1)}, real, shown, shown)["dinov2"]
    assert same["top 1"].value == same["top 5"].value == 1
    assert len(real_as_made["dinov2"]) == 60


def test_pictures_of_what_no_real_one_shows_do_not_count():
    real = features(60, 1)
    shown = ["fox", "owl", "cat"] * 20
    asked = [*shown[:30], *["newt"] * 30]
    found = figures({"dinov2": real}, {"dinov2": RealFeatures(real)}, asked, shown)["dinov2"]
    assert found["top 1"].value == found["top 5"].value == 1
