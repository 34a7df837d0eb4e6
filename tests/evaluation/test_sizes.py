"""The study of sizes: which cells there are, and that it resumes."""

import json

import pytest
from PIL import Image

from fitv2.config import Guidance, Positions, Sampling
from fitv2.evaluation import sizes
from fitv2.evaluation.judged import How
from fitv2.evaluation.settings import Evaluation
from fitv2.evaluation.sizes import GROUPS, Method, cells, in_proportion, methods, study_sizes

QUICK = How(Guidance(1.0), Sampling(steps=2))


def test_the_papers_sizes_are_its_own():
    found = [
        cell.sizes for cell in cells(16, 16, ["trained", "beyond"]) if cell.method.name in ("own", "NTK")
    ]
    assert found == [((256, 256), (160, 320), (128, 384)), ((320, 320), (224, 448), (160, 480))]


@pytest.mark.parametrize("side", [8, 12, 24, 32])
def test_other_models_have_sizes_in_proportion(side):
    for group in GROUPS.values():
        for grid in group:
            scaled = in_proportion(grid, side)
            assert scaled[1] / scaled[0] == pytest.approx(grid[1] / grid[0], rel=0.25)
            assert scaled[0] * scaled[1] == pytest.approx(grid[0] * grid[1] * (side / 16) ** 2, rel=0.35)


def test_every_row_of_the_papers_table_is_there():
    names = {method.name for method in methods()}
    assert {"none", "PI", "YaRN", "VisionYaRN", "NTK", "VisionNTK", "VisionNTK + scale"} <= names
    assert len({method.positions for method in methods()}) == len(names)


def test_a_study_of_a_tiny_model(pixel_model, folder, tmp_path, colours, monkeypatch):
    monkeypatch.setattr(
        sizes, "methods", lambda: [Method("none", Positions("none")), Method("PI", Positions("pi"))]
    )
    said = []
    arguments = str(pixel_model), str(folder), tmp_path / "out", Evaluation(num=10), QUICK, (4, 4)
    found = study_sizes(*arguments, report=said.append)
    assert list(found) == ["trained_own", "beyond_none", "beyond_PI"]
    assert len(said) == 3
    table = (tmp_path / "out" / "table.md").read_text()
    assert "| PI |" in table
    assert table.count("**") == 6  # the best of three sizes beyond
    sheet = Image.open(tmp_path / "out" / "beyond_20x20.png")
    assert sheet.height > 40
    written = json.loads((tmp_path / "out" / "sizes.json").read_text())
    assert set(written) == set(found)
    made = []
    monkeypatch.setattr("fitv2.pipeline.FiTPipeline.stream", lambda *_, **__: made.append(1))
    again = study_sizes(*arguments)
    assert not made
    assert {name: one.sizes for name, one in again.items()} == {
        name: one.sizes for name, one in found.items()
    }
