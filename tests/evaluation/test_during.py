"""Judging a model in training by the folder that an evaluation keeps."""

import pytest
from PIL import Image

from conftest import randomized
from fitv2.checkpoint import Card, load_model
from fitv2.config import Guidance, Sampling
from fitv2.errors import UserError
from fitv2.evaluation.during import TrainingJudge
from fitv2.evaluation.evaluate import evaluate
from fitv2.evaluation.judged import How, JudgedModel
from fitv2.evaluation.settings import Evaluation
from fitv2.model import FiT
from fitv2.pipeline import FiTPipeline


@pytest.fixture
def reference(pixel_model, folder, tmp_path, colours):
    quick = How(Guidance(1.0), Sampling(steps=2))
    evaluate(str(pixel_model), str(folder), tmp_path / "out", Evaluation(num=10), quick, [(16, 16), (8, 24)])
    return tmp_path / "out" / "reference"


def test_figures_at_every_size_and_their_mean(reference, pixel_model):
    judge = TrainingJudge(reference, 12)
    found = judge(FiTPipeline.of(*load_model(pixel_model)))
    distances = [found["judge/FD_16x16"], found["judge/FD_8x24"]]
    assert found["judge/distance"] == pytest.approx(sum(distances) / 2)
    assert found["judge/top_5_16x16"] == 1  # there are two labels
    assert judge.identity != TrainingJudge(reference, 13).identity
    assert judge(FiTPipeline.of(*load_model(pixel_model))) == found


@pytest.mark.parametrize(("path", "solver"), [("linear", "heun"), ("ddpm", "ddim")])
def test_every_model_takes_as_many_evaluations(reference, path, solver):
    shape = {"depth": 1, "width": 16, "heads": 2, "patch_size": 4, "in_channels": 3, "num_classes": 2}
    prediction = "noise" if path == "ddpm" else "velocity"
    model = randomized(FiT(**shape, path=path, prediction=prediction))
    pipeline = FiTPipeline.of(model, Card(("red", "blue"), "pixels", 16))
    judge = TrainingJudge(reference, 10, evaluations=8)
    assert judge.sampling(pipeline).solver == solver
    judged = JudgedModel(pipeline, judge.settings, How(Guidance(1.0), judge.sampling(pipeline)))
    pictures, _ = judged.pictures((16, 16), judge.references[16, 16].about)
    assert judged.evaluations(pictures) == 8
    assert judge.identity != TrainingJudge(reference, 10).identity


def test_a_folder_that_is_no_reference(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    with pytest.raises(UserError, match="not the folder `reference` of an evaluation"):
        TrainingJudge(tmp_path, 10)
