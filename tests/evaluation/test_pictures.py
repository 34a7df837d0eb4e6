"""Sets of pictures: the rule of a reference, labels, and npz files."""

import numpy as np
import pytest
from PIL import Image

from conftest import picture
from fitv2.errors import UserError
from fitv2.evaluation.pictures import Batch, draw_labels, fit


@pytest.mark.parametrize(
    ("size", "pixels", "cropped"),
    [
        ((64, 64), (32, 32), 0),
        ((64, 60), (32, 32), 0),
        ((128, 64), (32, 32), 0.5),
        ((64, 64), (16, 48), 2 / 3),
    ],
)
def test_a_picture_is_resized_whole_or_cropped_as_little_as_possible(size, pixels, cropped):
    fitted, share = fit(Image.new("RGB", size), pixels)
    assert fitted.size == pixels[::-1]
    assert share == pytest.approx(cropped)


def test_what_is_kept_is_the_middle():
    array = np.zeros((32, 96, 3), np.uint8)
    array[:, 32:64] = 255
    fitted, _ = fit(Image.fromarray(array), (32, 32))
    assert np.asarray(fitted).min() == 255


def test_a_picture_of_the_size_is_not_touched():
    image = picture(24, 16)
    assert fit(image, (16, 24))[0] is image


@pytest.mark.parametrize("balanced", [False, True])
def test_labels_by_chance_or_as_many_of_each(balanced):
    labels = [subject.label for subject in draw_labels(100, 4, 0, balanced)]
    counts = np.bincount(labels, minlength=4)
    assert (counts == 25).all() == balanced
    assert draw_labels(100, 4, 0, False) != draw_labels(100, 4, 1, False)


def test_a_batch_is_read_piece_by_piece(npz):
    batch = Batch(npz)
    images = np.load(npz)["arr_0"]
    assert (len(batch), batch.pixels) == (30, (16, 16))
    assert all(np.array_equal(*pair) for pair in zip(batch.read(range(7, 12)), images[7:12], strict=True))


def test_a_packed_batch_is_read_too(npz, tmp_path):
    images = np.load(npz)["arr_0"]
    np.savez_compressed(tmp_path / "packed.npz", images)
    assert np.array_equal(Batch(tmp_path / "packed.npz").read(range(3, 4))[0], images[3])


def test_an_npz_of_objects_is_not_unpickled(tmp_path):
    np.savez(tmp_path / "evil.npz", np.array([print], dtype=object))
    with pytest.raises(UserError, match="arr_0 is object"):
        Batch(tmp_path / "evil.npz")
