"""The box for sizes, but for the dragging itself: tests/app/test_page.py does that in a browser."""

import pytest

gradio = pytest.importorskip("gradio")
from fitv2.app.drag import add_size_box  # noqa: E402


def test_it_starts_at_the_sizes_of_the_sliders_and_both_follow_each_other():
    with gradio.Blocks() as page:
        height, width = gradio.Slider(16, 64, 32), gradio.Slider(16, 64, 48)
        box = add_size_box(height, width, 64, 16)
    assert box.value == [32, 48]
    moves = [(block.targets[0], [each._id for each in block.outputs]) for block in page.fns.values()]
    assert moves == [
        ((box._id, "input"), [height._id, width._id]),
        ((height._id, "change"), [box._id]),
        ((width._id, "change"), [box._id]),
    ]
