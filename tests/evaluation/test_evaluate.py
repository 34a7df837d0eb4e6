"""Evaluations from a model or pictures to figures: alone, shared, interrupted, refused."""

import json
import shutil
import time

import numpy as np
import pytest
from PIL import Image

from conftest import picture, together
from fitv2.config import Guidance, Sampling
from fitv2.errors import UserError
from fitv2.evaluation import extract as extraction
from fitv2.evaluation.evaluate import RESULT, Result, evaluate
from fitv2.evaluation.extract import piece_paths
from fitv2.evaluation.features import EXTRACTORS
from fitv2.evaluation.judged import How
from fitv2.evaluation.settings import Evaluation
from fitv2.evaluation.table import draw_plots, table
from fitv2.pipeline import FiTPipeline

QUICK = How(Guidance(1.0), Sampling(steps=2))


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(extraction, "PIECE", 8)


# The rule


# Evaluations


def test_a_model_beside_real_pictures(pixel_model, real, tmp_path, colours):
    settings = Evaluation(num=40)
    result = evaluate(str(pixel_model), str(real), tmp_path / "out", settings, QUICK, [(16, 16), (8, 24)])
    assert list(result.sizes) == ["16x16", "8x24"]
    found = result.sizes["8x24"]["efficientnet"]
    assert set(found) == {"FD", "KD", "precision", "recall", "density", "coverage", "top 1", "top 5"}
    assert all(np.isfinite([figure.value, figure.error]).all() for figure in found.values())
    assert result.about["references"]["8x24"]["pictures"] == 60
    written = json.loads((tmp_path / "out" / RESULT).read_text())
    assert written["sizes"]["8x24"]["efficientnet"]["FD"]["value"] == found["FD"].value
    assert Image.open(tmp_path / "out" / "8x24.png").width > 24
    assert Image.open(tmp_path / "out" / "8x24_nearest.png").width > 48
    assert "8x24 | 40 : 60" in table(result)
    assert all(said in table(result) for said in ("guidance 1 at times 0 to 1", "seeds from 0", "steps 2"))
    draw_plots(result, tmp_path / "plots.png")


def test_a_set_beside_itself_has_no_distance(real, tmp_path, colours):
    settings = Evaluation(fit_samples=True)
    result = evaluate(str(real), str(real), tmp_path / "out", settings, sizes=[(16, 16)])
    found = result.sizes["16x16"]["efficientnet"]
    assert found["FD"].value == pytest.approx(0, abs=1e-6)
    assert found["precision"].value == found["recall"].value == found["coverage"].value == 1
    assert found["top 1"].value == 1  # the labels


@pytest.mark.parametrize("kept", [False, True])
def test_several_processes_find_the_same(pixel_model, real, tmp_path, colours, kept):
    """One process, then two and three; the first is not the first to begin."""
    settings, sizes = Evaluation(num=40), [(16, 16), (8, 24)]
    alone = evaluate(str(pixel_model), str(real), tmp_path / "1", settings, QUICK, sizes)
    reference = str(tmp_path / "1" / "reference") if kept else str(real)
    for size in (2, 3):
        out = tmp_path / str(size)

        def work(rank, size=size, out=out):
            time.sleep(0.3 * ((rank + 1) % size))
            evaluate(str(pixel_model), reference, out, settings, QUICK, sizes)

        assert together(size, work) == [None] * size
        found = Result.read(out)
        assert found.sizes == alone.sizes


def test_figures_are_there_whoever_ends_last_at_each_size(pixel_model, real, tmp_path, colours):
    """Process 1 of 2 ends last at the first size, process 2 at the second: one of them has to see both."""
    settings, sizes = Evaluation(num=40), [(16, 16), (8, 24)]

    def work(rank):
        def slowly(stage, done, total):
            if stage == ("16x16", "8x24")[rank]:
                time.sleep(0.2)

        evaluate(str(pixel_model), str(real), tmp_path / "out", settings, QUICK, sizes, progress=slowly)

    assert together(2, work) == [None, None]
    assert list(Result.read(tmp_path / "out").sizes) == ["16x16", "8x24"]


def test_a_further_size_is_added_to_those_that_are_known(pixel_model, real, tmp_path, colours):
    arguments = str(pixel_model), str(real), tmp_path / "out", Evaluation(num=20), QUICK
    first = evaluate(*arguments, [(16, 16)])
    both = evaluate(*arguments, [(8, 24)])
    assert list(both.sizes) == ["16x16", "8x24"]
    assert both.sizes["16x16"] == first.sizes["16x16"]


def test_what_was_interrupted_is_finished_to_the_same_figures(
    pixel_model, real, tmp_path, colours, monkeypatch
):
    arguments = str(pixel_model), str(real)
    settings = Evaluation(num=40)
    whole = evaluate(*arguments, tmp_path / "whole", settings, QUICK, [(16, 16)])

    def stop(stage, done, total):
        if stage == "16x16" and done >= 16:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(*arguments, tmp_path / "cut", settings, QUICK, [(16, 16)], progress=stop)
    assert not (tmp_path / "cut" / RESULT).exists()
    made = []
    monkeypatch.setattr("fitv2.pipeline.FiTPipeline.stream", counting(made))
    again = evaluate(*arguments, tmp_path / "cut", settings, QUICK, [(16, 16)])
    assert sum(made) == 24 + 1  # the last to count evaluations
    assert again.sizes == whole.sizes
    assert evaluate(*arguments, tmp_path / "cut", settings, QUICK, [(16, 16)]).sizes == again.sizes
    assert sum(made) == 25


def counting(made):

    stream = FiTPipeline.stream

    def counted(self, labels, *arguments, **options):
        made.append(len(labels))
        return stream(self, labels, *arguments, **options)

    return counted


def test_a_kept_reference_serves_again(pixel_model, real, tmp_path, colours):
    settings = Evaluation(num=20)
    first = evaluate(str(pixel_model), str(real), tmp_path / "1", settings, QUICK, [(16, 16)])
    kept = str(tmp_path / "1" / "reference")
    second = evaluate(str(pixel_model), kept, tmp_path / "2", settings, QUICK, [(16, 16)])
    assert second.sizes == first.sizes
    with pytest.raises(UserError, match="no reference of 8x8"):
        evaluate(str(pixel_model), kept, tmp_path / "3", settings, QUICK, [(8, 8)])


def test_samples_are_taken_by_their_size(tmp_path, real, colours):
    for i in range(30):
        picture(16, 16, i).resize((16, 16 if i < 20 else 24)).save(tmp_path / f"{i}.png")
    result = evaluate(str(tmp_path), str(real), tmp_path.parent / "by-size", sizes=[(16, 16), (24, 16)])
    counts = [result.about["references"][name]["pictures_judged"] for name in ("16x16", "24x16")]
    assert counts == [20, 10]


# ADM's npz


def test_a_batch_is_judged(npz, real, tmp_path, colours):
    result = evaluate(str(npz), str(real), tmp_path / "out", Evaluation(num=24))
    assert result.about["references"]["16x16"]["pictures_judged"] == 30  # all, whatever `num` is
    with pytest.raises(UserError, match="has pictures of 16x16"):
        evaluate(str(npz), str(real), tmp_path / "other", sizes=[(8, 8)])


def test_statistics_alone_serve_as_a_reference(pixel_model, tmp_path, fidelity, monkeypatch):
    """Of Inception's features; precision and its like need pictures."""

    class Inception:
        names, digest = ("inception", "inception_spatial", "inception_logits"), "0" * 64

        def __call__(self, pixels):
            means = pixels.float().mean((2, 3))
            return {name: means.clone() for name in self.names}

    monkeypatch.setitem(EXTRACTORS, "inception", lambda *_: Inception())
    settings = Evaluation(num=20, features=("inception",), npz=True)
    rng = np.random.default_rng(0)
    values = {"mu": rng.normal(size=3), "sigma": np.eye(3), "mu_s": rng.normal(size=3), "sigma_s": np.eye(3)}
    np.savez(tmp_path / "statistics.npz", **values)
    first = evaluate(str(pixel_model), str(tmp_path / "statistics.npz"), tmp_path / "1", settings, QUICK)
    assert set(first.sizes["16x16"]["inception"]) == {"FID", "FID∞", "sFID", "IS"}
    # What is written with the pictures is such statistics too, and those of the same pictures are no way off.
    again = evaluate(str(tmp_path / "1" / "16x16.npz"), str(tmp_path / "1" / "16x16.npz"), tmp_path / "2",
                     Evaluation(features=("inception",)))  # fmt: skip
    assert again.sizes["16x16"]["inception"]["FID"].value == pytest.approx(0, abs=1e-3)


# What is refused


def test_pictures_are_written_for_adms_evaluator(pixel_model, real, tmp_path, colours):
    settings = Evaluation(num=20, npz=True)
    first = evaluate(str(pixel_model), str(real), tmp_path / "1", settings, QUICK, [(16, 16)])
    written = np.load(tmp_path / "1" / "16x16.npz")["arr_0"]
    assert (written.shape, written.dtype) == ((20, 16, 16, 3), np.uint8)
    again = evaluate(str(tmp_path / "1" / "16x16.npz"), str(real), tmp_path / "2", Evaluation(num=20))
    before, now = (one.sizes["16x16"]["efficientnet"] for one in (first, again))
    assert all(now[name] == before[name] for name in now)


def test_evaluations_of_a_picture_are_counted(pixel_model, real, tmp_path, colours):
    settings = Evaluation(num=10)
    result = evaluate(str(pixel_model), str(real), tmp_path / "1", settings, QUICK, [(16, 16)])
    assert result.about["references"]["16x16"]["evaluations"] == 2  # two steps of ab2
    how = How(Guidance(1.0), Sampling("heun", 3))
    result = evaluate(str(pixel_model), str(real), tmp_path / "2", settings, how, [(16, 16)])
    assert result.about["references"]["16x16"]["evaluations"] == 6


def test_another_evaluation_in_the_folder_is_an_error(pixel_model, real, tmp_path, colours):
    evaluate(str(pixel_model), str(real), tmp_path / "out", Evaluation(num=10), QUICK)
    with pytest.raises(UserError, match=r"settings\.num was 10, now 12"):
        evaluate(str(pixel_model), str(real), tmp_path / "out", Evaluation(num=12), QUICK)
    with pytest.raises(UserError, match="guidance"):
        evaluate(
            str(pixel_model),
            str(real),
            tmp_path / "out",
            Evaluation(num=10),
            How(Guidance(2.0), Sampling(steps=2)),
        )


def test_another_reference_of_the_same_name_is_an_error(pixel_model, real, folder, tmp_path, colours):
    for where, source in (("a", real), ("b", folder)):
        shutil.copytree(source, tmp_path / where / "images")
    arguments = tmp_path / "out", Evaluation(num=10), QUICK, [(16, 16)]
    evaluate(str(pixel_model), str(tmp_path / "a" / "images"), *arguments)
    with pytest.raises(UserError, match=r"reference\.files was"):
        evaluate(str(pixel_model), str(tmp_path / "b" / "images"), *arguments)


def test_a_reference_that_was_changed_is_an_error(pixel_model, real, tmp_path, colours):
    evaluate(str(pixel_model), str(real), tmp_path / "1", Evaluation(num=10), QUICK, [(16, 16)])
    kept = tmp_path / "1" / "reference"
    first, second = piece_paths(kept / "16x16", 60)[:2]
    shutil.copyfile(first, second)
    with pytest.raises(UserError, match=r"holds other pictures than its reference\.json says"):
        evaluate(str(pixel_model), str(kept), tmp_path / "2", Evaluation(num=10), QUICK, [(16, 16)])


def test_a_folder_of_other_things_is_left_alone(pixel_model, real, tmp_path, colours):
    (tmp_path / "mine").write_text("x")
    with pytest.raises(UserError, match="not empty"):
        evaluate(str(pixel_model), str(real), tmp_path, Evaluation(num=10), QUICK)


def test_a_collection_needs_a_size(real, tmp_path, colours):
    with pytest.raises(UserError, match="give `size`"):
        evaluate(str(real), str(real), tmp_path / "out")


def test_a_batch_of_another_size_is_no_reference(pixel_model, npz, tmp_path, colours):
    with pytest.raises(UserError, match="has pictures of 16x16, not 8x8"):
        evaluate(str(pixel_model), str(npz), tmp_path / "out", Evaluation(num=10), QUICK, [(8, 8)])


# What a model is to show


def test_a_mistyped_model_is_answered_as_everywhere(real, tmp_path, colours):
    with pytest.raises(UserError, match="did you mean emoji"):
        evaluate("emojii", str(real), tmp_path / "out")


# Extraction


def test_pictures_of_a_size_may_begin_late(tmp_path, real, colours):
    """None of the first pieces has one."""
    for i in range(120):
        size = (16, 16) if i < 90 else (16, 24)
        picture(*size, i).save(tmp_path / f"{i:03}.png")
    result = evaluate(str(tmp_path), str(real), tmp_path.parent / "late", sizes=[(24, 16)])
    assert result.about["references"]["24x16"]["pictures_judged"] == 30
    assert (tmp_path.parent / "late" / "24x16.png").exists()


def test_the_command_prints_a_table_and_how_to_get_it_again(
    pixel_model, real, tmp_path, colours, capsys, monkeypatch
):
    from fitv2.cli.commands import run

    arguments = [
        "evaluate", str(pixel_model), "--reference", str(real), "--out", str(tmp_path / "out"), "--num", "20",
        "--size", "16x16", "--size", "8x24", "--steps", "2",
    ]  # fmt: skip
    monkeypatch.setattr("sys.argv", ["fitv2", *arguments])
    assert run(arguments) == 0
    said = capsys.readouterr().out
    assert "FD ↓" in said
    assert f"`fitv2 evaluate {pixel_model} --reference {real}" in said
    assert (tmp_path / "out" / "table.md").read_text() in said
    assert (tmp_path / "out" / "plots.png").exists()
