"""The study of solvers: as many evaluations for all, nearer the exact solution with more, and it resumes."""

import json

import pytest
from PIL import Image

from conftest import randomized
from fitv2.checkpoint import Card
from fitv2.config import Guidance, Sampling
from fitv2.errors import UserError
from fitv2.evaluation.evaluate import evaluate
from fitv2.evaluation.judged import How
from fitv2.evaluation.settings import Evaluation
from fitv2.evaluation.solver_study import SolverStudy, plan, study_solvers
from fitv2.model import FiT
from fitv2.pipeline import FiTPipeline

SHAPE = {"depth": 1, "width": 32, "heads": 2, "patch_size": 4, "in_channels": 3, "num_classes": 2}


@pytest.fixture
def reference(pixel_model, folder, tmp_path, colours):
    quick = How(Guidance(1.0), Sampling(steps=2))
    evaluate(str(pixel_model), str(folder), tmp_path / "judged", Evaluation(num=10), quick, [(16, 16)])
    return tmp_path / "judged" / "reference"


def test_steps_are_as_many_as_the_evaluations_allow():
    planned = plan(["heun", "ab2", "rk4", "unipc", "bosh3"], [1.0, 2.0], [8])
    assert [sampling.steps for _, sampling in planned] == [4, 4, 8, 8, 2, 2, 8, 8, None]
    assert len({name for name, _ in planned}) == len(planned)


def test_a_study(pixel_model, reference, tmp_path, monkeypatch):
    pipeline = FiTPipeline.from_pretrained(pixel_model)
    tried = plan(["euler", "heun", "ab2", "unipc", "bosh3"], [1.0], [4, 16])
    arguments = pipeline, reference, tmp_path / "out", tried
    cells = study_solvers(*arguments, num=10, guidance=Guidance(1.0), command="fitv2 study")
    found = {(cell.solver, cell.evaluations): cell for cell in cells}
    for solver in ("euler", "heun", "ab2", "unipc"):
        assert found[solver, 16].difference < found[solver, 4].difference
    assert found["ab2", 16].difference < found["euler", 16].difference
    assert (tmp_path / "out" / "table.md").read_text().count("| ab2 |") == 2
    assert Image.open(tmp_path / "out" / "solvers.png").width > 1000
    written = json.loads((tmp_path / "out" / "solvers.json").read_text())
    assert len(written["cells"]) == len(tried)

    monkeypatch.setattr("fitv2.pipeline.FiTPipeline.stream", lambda *_, **__: pytest.fail("made again"))
    assert study_solvers(*arguments, num=10, guidance=Guidance(1.0)) == cells
    with pytest.raises(UserError, match="num was 10, now 11"):
        study_solvers(*arguments, num=11, guidance=Guidance(1.0))


def test_what_it_cannot_study(pixel_model, tmp_path, colours):
    pipeline = FiTPipeline.from_pretrained(pixel_model)
    with pytest.raises(UserError, match="is not the folder `reference`"):
        SolverStudy(pipeline, tmp_path, tmp_path / "out", 10, Guidance())
    first = FiT(**SHAPE, path="ddpm", prediction="noise")
    old = FiTPipeline.of(randomized(first), Card(("red", "blue"), "pixels", 16))
    with pytest.raises(UserError, match="models with a flow"):
        SolverStudy(old, tmp_path, tmp_path / "out", 10, Guidance())
