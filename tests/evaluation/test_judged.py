"""What is judged, and what a model is to show."""

import pytest

from fitv2.checkpoint import Card
from fitv2.config import Guidance
from fitv2.errors import UserError
from fitv2.evaluation.judged import How, choose_subjects, is_model, open_judged, shown_by
from fitv2.evaluation.reference import About
from fitv2.evaluation.settings import Evaluation
from fitv2.model import FiT
from fitv2.pipeline import FiTPipeline


def about(captions, labels):
    return About("", "", "", "", 1.0, (), "", captions=tuple(captions), labels=tuple(labels))


def pipeline(conditions, labels=("noto", "fluent")):
    shape = {
        "depth": 1,
        "width": 32,
        "heads": 2,
        "patch_size": 4,
        "in_channels": 3,
        "num_classes": len(labels),
    }
    texts = {"text_channels": 256, "pooled_channels": 256} if "text" in conditions else {}
    return FiTPipeline.of(FiT(**shape, **texts, conditions=conditions), Card(labels, "pixels", 16))


def test_a_model_of_texts_gets_captions_and_of_labels_and_texts_both():
    captions, labels = ["fox", "", "owl", "cat"], ["noto", "noto", "fluent", "other"]
    pairs = {("fox", 0), ("owl", 1), ("cat", None)}
    both = choose_subjects(pipeline(("label", "text")), about(captions, labels), Evaluation(num=12))
    assert {(subject.prompt, subject.label) for subject in both} == pairs
    texts = choose_subjects(pipeline(("text",)), about(captions, labels), Evaluation(num=12))
    assert {subject.label for subject in texts} == {None}
    assert [subject.prompt for subject in texts] == [subject.prompt for subject in both]
    assert len({subject.prompt for subject in texts[:3]}) == 3  # each once before any again
    with pytest.raises(UserError, match="give `caption_column`"):
        choose_subjects(pipeline(("text",)), about([""], ["noto"]), Evaluation(num=12))


def test_a_model_of_labels_is_compared_by_labels():
    known = about(["fox", "owl"], ["noto", "fluent"])
    assert shown_by(known, pipeline(("label",))) == ["noto", "fluent"]
    assert shown_by(known, pipeline(("text",))) == ["fox", "owl"]


@pytest.mark.parametrize(("name", "whether"), [
    ("emoji", True), ("emojii", True), ("organization/name", True), ("shards/*.tar", False),
    ("s3://bucket/x", False),
])  # fmt: skip
def test_names_of_models(name, whether):
    assert is_model(name) == whether


def test_settings_of_models_are_refused_for_pictures(tmp_path):
    for name in (str(tmp_path), "made.npz"):
        with pytest.raises(UserError, match="has pictures: settings of guidance, solver and positions are"):
            open_judged(name, Evaluation(), How(Guidance(2.0)), allow_download=False)
