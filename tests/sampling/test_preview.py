from conftest import randomized
from fitv2.checkpoint import Card
from fitv2.model import FiT
from fitv2.pipeline import FiTPipeline
from fitv2.sampling.preview import grids, preview


def test_three_rows_of_at_most_eight_labels_the_same_each_time():
    labels = tuple("abcdefghijkl")
    model = FiT(depth=1, width=16, heads=2, patch_size=4, in_channels=3, num_classes=len(labels))
    pipeline = FiTPipeline.of(randomized(model).eval(), Card(labels, "pixels", 16))
    sheet, again = (preview(pipeline, "step 3") for _ in range(2))
    assert sheet.tobytes() == again.tobytes()
    assert sheet.width > sheet.height > 100


def test_no_size_has_more_tokens_than_were_trained_on():
    for most in (1, 4, 16, 64, 256, 1024):
        assert all(1 <= rows * columns <= max(most, 4) for rows, columns in grids(most))
