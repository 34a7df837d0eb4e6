"""References: their hashes, what is left out, and statistics."""

import numpy as np
import pytest

from conftest import picture
from fitv2.errors import UserError
from fitv2.evaluation.reference import Collection, kept_reference, statistics


def test_two_people_have_the_same_reference(real, tmp_path, colours):
    hashes = [
        Collection.open(str(real), None).reference((12, 20), 1.0, [colours], tmp_path / name).about.sha256
        for name in ("one", "other")
    ]
    assert hashes[0] == hashes[1]
    other = Collection.open(str(real), None).reference(
        (12, 21), 1.0, [colours], tmp_path / "x", (0, 1), print
    )
    assert other.about.sha256 != hashes[0]


def test_pictures_of_which_too_much_would_be_lost_are_left_out(real, tmp_path, colours):
    wide = Collection.open(str(real), None).reference((8, 16), 0.4, [colours], tmp_path)
    kept = kept_reference(tmp_path, (8, 16), [colours]).features()["efficientnet"].features
    assert 0 < wide.about.pictures < 60
    assert wide.about.pictures + wide.about.left_out == 60
    assert len(wide.about.labels) == len(kept) == wide.about.pictures


def test_statistics_of_a_reference_batch_are_those_in_the_file(tmp_path):
    rng = np.random.default_rng(0)
    values = {
        "mu": rng.normal(size=6),
        "sigma": np.eye(6),
        "mu_s": rng.normal(size=3),
        "sigma_s": 2 * np.eye(3),
    }
    np.savez(tmp_path / "reference.npz", arr_0=np.zeros((2, 4, 4, 3), np.uint8), **values)
    found = statistics(tmp_path / "reference.npz")
    assert np.array_equal(found["inception"].mean, values["mu"])
    assert np.array_equal(found["inception_spatial"].covariance, values["sigma_s"])


def test_a_large_reference_is_thinned_evenly(real):
    few = Collection.open(str(real), None, most=20)
    assert list(few.rows) == list(range(0, 60, 3))


def test_a_split_that_there_is_not_is_an_error(folder, tmp_path):
    for name in ("train", "val"):
        (tmp_path / name / "blue").mkdir(parents=True)
        picture(16, 16).save(tmp_path / name / "blue" / "0.png")
    with pytest.raises(UserError, match="has no split test, only train, validation"):
        Collection.open(str(tmp_path), "test")
