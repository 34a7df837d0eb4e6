import numpy as np
from PIL import Image

from conftest import picture
from fitv2.figures import contact_sheet, dataset_plots, loss_curve


def test_sheet_shows_every_picture_unscaled():
    pictures = [picture(32, 16, 1), picture(16, 48, 2), picture(64, 64, 3)]
    sheet = np.array(contact_sheet([[("a", pictures[0]), ("b", pictures[1])], [("c", pictures[2])]], "title"))
    for image in map(np.array, pictures):
        windows = np.lib.stride_tricks.sliding_window_view(sheet, image.shape)[:, :, 0]
        assert (windows == image).all(axis=(2, 3, 4)).any()


def test_loss_curve_is_a_picture(tmp_path):
    lines = [{"step": i, "loss": 1 / i} for i in range(1, 50)] + [{"step": 49, "validation": 0.5}]
    loss_curve(lines, tmp_path / "loss.png", "title")
    loss_curve([], tmp_path / "empty.png", "a run that ended before its first line")
    assert Image.open(tmp_path / "loss.png").size == (960, 540)


def test_dataset_plots_are_a_picture_for_many_labels_too(tmp_path):
    labels = {f"label {i}": i for i in range(100)}
    dataset_plots(np.array([4, 16]), np.array([1.0, 2.0]), labels, tmp_path / "plots.png", "title")
    assert Image.open(tmp_path / "plots.png").size == (1500, 450)
