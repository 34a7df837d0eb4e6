"""Metrics against torch-fidelity, ADM's formulas and closed forms."""

import importlib

import numpy as np
import pytest
import torch

from fitv2.errors import UserError
from fitv2.evaluation.metrics import (
    Moments,
    RealFeatures,
    density_coverage,
    frechet,
    frechet_infinity,
    inception_score,
    kernel_distance,
    nearest_names,
    precision_recall,
    radii,
    with_errors,
)


def features(count, width=16, shift=0.0, scale=1.0, seed=0):
    draw = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=torch.Generator().manual_seed(99)) / width**0.5
    return torch.randn(count, width, generator=draw) @ mix * scale + shift


@pytest.fixture
def pair():
    return features(600, shift=0.1, scale=1.2), features(500, seed=1)


def test_frechet_is_that_of_torch_fidelity(fidelity, pair):
    metric = importlib.import_module("torch_fidelity.metric_fid")
    theirs = metric.fid_statistics_to_metric(
        *(metric.fid_features_to_statistics(one.double()) for one in pair), verbose=False
    )
    ours = frechet(*map(Moments.of, pair))
    assert ours == pytest.approx(theirs["frechet_inception_distance"], rel=1e-9)
    assert ours > 0.1


def test_frechet_with_fewer_pictures_than_features(fidelity):
    """Covariances are singular there, and the plain root of their product breaks down in float32."""
    made, real = features(30, 64, 0.1), features(40, 64, seed=1)
    metric = importlib.import_module("torch_fidelity.metric_fid")
    theirs = metric.fid_statistics_to_metric(
        *(metric.fid_features_to_statistics(one.double()) for one in (made, real)), verbose=False
    )
    assert frechet(Moments.of(made), Moments.of(real)) == pytest.approx(
        theirs["frechet_inception_distance"], rel=1e-5
    )


def test_frechet_of_gaussians_that_are_known():
    """Diagonal covariances: Σ (μ1 − μ2)² + (σ1 − σ2)²."""
    one = Moments(torch.tensor([1.0, 2.0]).double(), torch.diag(torch.tensor([4.0, 9.0])).double())
    other = Moments(torch.tensor([0.0, 4.0]).double(), torch.diag(torch.tensor([1.0, 25.0])).double())
    assert frechet(one, other) == pytest.approx(1 + 4 + 1 + 4)
    assert frechet(one, one) == pytest.approx(0, abs=1e-12)


def test_frechet_infinity_takes_the_bias_away():
    """Of one distribution the distance of few pictures is far above 0, that of infinitely many is not."""
    real = Moments.of(features(100_000, 8, seed=1))
    few = [features(400, 8, seed=seed) for seed in range(2, 42)]
    plain = [frechet(Moments.of(one), real) for one in few]
    infinite = [frechet_infinity(one, real) for one in few]
    error = np.std(infinite) / len(few) ** 0.5
    assert abs(np.mean(infinite)) < 3 * error < np.mean(plain) / 3


def test_kernel_distance_is_that_of_torch_fidelity(fidelity, pair):
    metric = importlib.import_module("torch_fidelity.metric_kid")
    made, real = pair[0][:500], pair[1]
    theirs = metric.kid_features_to_metric(made.double(), real.double(), kid_subsets=1, kid_subset_size=500)
    assert kernel_distance(made, RealFeatures(real)) == pytest.approx(
        theirs["kernel_inception_distance_mean"], rel=1e-6, abs=1e-9
    )


def test_kernel_distance_in_blocks(monkeypatch, pair):
    whole = kernel_distance(pair[0], RealFeatures(pair[1]))
    monkeypatch.setattr("fitv2.evaluation.metrics.BLOCK", 64)
    assert kernel_distance(pair[0], RealFeatures(pair[1])) == pytest.approx(whole, rel=1e-9)


def test_kernel_distance_of_one_distribution_is_0_on_average():
    found = [
        kernel_distance(features(200, seed=2 * i), RealFeatures(features(200, seed=2 * i + 1)))
        for i in range(40)
    ]
    assert abs(np.mean(found)) < 3 * np.std(found) / 40**0.5


def test_inception_score_is_that_of_torch_fidelity(fidelity):
    metric = importlib.import_module("torch_fidelity.metric_isc")
    logits = 3 * features(1003)
    order = torch.randperm(1003, generator=torch.Generator().manual_seed(0))
    theirs = metric.isc_features_to_metric(logits[order], splits=10, shuffle=False)
    assert inception_score(logits) == pytest.approx(theirs["inception_score_mean"], rel=1e-9)


def test_inception_score_does_not_depend_on_the_order_of_classes():
    sure = 100 * torch.eye(10).repeat_interleave(100, 0)
    assert inception_score(sure) == pytest.approx(10, rel=0.06)  # 3.6 in order


def test_inception_score_of_known_classes():
    """Sure of four classes in equal parts: 4. Sure of nothing: 1."""
    sure = 100 * torch.eye(4).repeat(50, 1)
    assert inception_score(sure, 1) == pytest.approx(4)
    assert inception_score(torch.zeros(100, 7)) == pytest.approx(1)


def test_precision_and_recall_are_those_of_torch_fidelity(fidelity):
    metric = importlib.import_module("torch_fidelity.metric_prc")
    made, real = features(300, 4, 0.5), features(400, 4, scale=1.5, seed=1)
    theirs = metric.prc_features_to_metric(made, real, prc_neighborhood=3, verbose=False)
    precision, recall = precision_recall(made, RealFeatures(real))
    assert precision == pytest.approx(theirs["precision"], abs=1e-6)
    assert recall == pytest.approx(theirs["recall"], abs=1e-6)
    assert 0 < recall < precision < 1


def test_precision_and_recall_tell_which_set_is_the_wider():
    narrow, wide = features(500, 4, scale=0.3), features(500, 4, seed=1)
    precision, recall = precision_recall(narrow, RealFeatures(wide))
    assert precision > 0.95
    assert recall < 0.5
    assert precision_recall(wide, RealFeatures(narrow)) == (recall, precision)


def test_density_and_coverage_by_their_definitions():
    made, real = features(120, 4, 0.3).double(), features(150, 4, seed=1).double()
    distances = np.linalg.norm(real.numpy()[:, None] - made.numpy()[None], axis=-1)
    own = np.sort(np.linalg.norm(real.numpy()[:, None] - real.numpy()[None], axis=-1), axis=1)[:, 5]
    density, coverage = density_coverage(made, RealFeatures(real))
    assert density == pytest.approx((distances < own[:, None]).sum(0).mean() / 5)
    assert coverage == pytest.approx((distances.min(1) < own).mean())


def test_a_set_beside_itself():
    same = features(300)
    assert frechet(Moments.of(same), Moments.of(same)) == pytest.approx(0, abs=1e-9)
    assert precision_recall(same, RealFeatures(same)) == (1, 1)
    assert density_coverage(same, RealFeatures(same))[1] == 1


def test_radii_are_distances_to_the_kth_other():
    line = torch.tensor([[0.0], [1.0], [3.0], [7.0]])
    assert radii(line, 2).tolist() == [3, 2, 3, 6]


def test_nearest_names_are_distinct():
    real = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [-1.0, 0.0]])
    names = ["cat", "cat", "dog", "house"]
    assert nearest_names(torch.tensor([[2.0, 0.1], [0.1, 3.0]]), real, names, 2) == [
        ["cat", "dog"],
        ["dog", "cat"],
    ]


def test_the_standard_error_of_a_mean_is_that_of_the_textbook():
    values = torch.randn(5000, generator=torch.Generator().manual_seed(0)) * 2
    figure = with_errors(lambda kept: {"mean": float(values[kept].mean())}, 5000, groups=50)["mean"]
    assert figure.value == pytest.approx(float(values.mean()))
    assert figure.error == pytest.approx(2 / 5000**0.5, rel=0.25)


def test_intervals_hold_the_truth_as_often_as_they_say():
    """Of 200 sets of 100 pictures; the truth is that of the mean of what the metric gives."""
    real = Moments.of(features(20_000, 4, seed=1))
    found = []
    for seed in range(200):
        made = features(300, 4, shift=0.5, seed=seed + 2)
        found.append(
            with_errors(lambda kept, made=made: {"d": frechet(Moments.of(made[kept]), real)}, 300)["d"]
        )
    middle = np.mean([figure.value for figure in found])
    held = np.mean([abs(figure.value - middle) < figure.half_width for figure in found])
    assert 0.91 < held < 0.985


@pytest.mark.parametrize("metric", [kernel_distance, precision_recall])
def test_too_few_pictures_are_an_error(metric):
    with pytest.raises(UserError, match="too few"):
        metric(features(1), RealFeatures(features(100)))
