import contextlib

import numpy as np
import pytest
from PIL import Image

from fitv2.checkpoint import load_model
from fitv2.cli.demo import BEYOND, LABELS, TRAINED, demo, scale_grid
from fitv2.presets import preset

CARD = load_model("clipart")[1]


def test_grids_have_the_ratios_of_the_papers_tables():
    for size in (*TRAINED, *BEYOND):
        rows, columns = scale_grid(size, CARD)
        assert columns * size[0] == rows * size[1]
    assert all(rows * columns <= CARD.max_tokens for rows, columns in (scale_grid(s, CARD) for s in TRAINED))
    assert all(rows * columns > CARD.max_tokens for rows, columns in (scale_grid(s, CARD) for s in BEYOND))


def test_the_shipped_model_is_small_and_is_its_preset():
    from fitv2.checkpoint import SHIPPED

    assert sum(path.stat().st_size for path in (SHIPPED / "clipart").iterdir()) <= 12_000_000
    assert load_model("clipart")[0].architecture == preset("clipart").model


@pytest.mark.slow
def test_demo_makes_what_it_says(tmp_path, capsys):
    """The whole of `make demo`, with seconds of training."""

    @contextlib.contextmanager
    def bar(*_):
        yield lambda _: None

    source = tmp_path / "source"
    for label in CARD.labels:
        (source / label).mkdir(parents=True)
        Image.effect_noise((64, 48), 80).save(source / label / "x.png")
    demo(tmp_path / "demo", source, 0.02, bar, bar)
    pictures = sorted((tmp_path / "demo" / "images").iterdir())
    assert len(pictures) == 6 * len(LABELS)
    sizes = {Image.open(path).size for path in pictures}
    assert sizes == {(c * 16, r * 16) for r, c in (scale_grid(s, CARD) for s in (*TRAINED, *BEYOND))}
    assert min(np.array(Image.open(path)).std() for path in pictures) > 5
    said = capsys.readouterr().out
    for line in said.strip().splitlines():
        assert "demo" in line
    for name in ("contact_sheet.png", "run/loss.png"):
        assert Image.open(tmp_path / "demo" / name).width > 300
