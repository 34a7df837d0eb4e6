"""Evaluations from a model or pictures to figures: alone, shared, interrupted, refused."""

import json
import shutil
import time

import numpy as np
import pytest
from PIL import Image

from conftest import picture, together
from fitv2.checkpoint import Card
from fitv2.config import Guidance, Sampling
from fitv2.errors import UserError
from fitv2.evaluation import extract as extraction
from fitv2.evaluation.evaluate import RESULT, Result, evaluate
from fitv2.evaluation.extract import collect, extract, is_whole, piece_paths
from fitv2.evaluation.features import EXTRACTORS
from fitv2.evaluation.judged import How, choose_subjects, is_model, shown_by
from fitv2.evaluation.pictures import Batch, draw_labels, fit
from fitv2.evaluation.reference import About, Collection, kept_reference, statistics
from fitv2.evaluation.settings import Evaluation
from fitv2.evaluation.table import draw_plots, table
from fitv2.model import FiT
from fitv2.pipeline import FiTPipeline

QUICK = How(Guidance(1.0), Sampling(steps=2))


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(extraction, "PIECE", 8)


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """60 pictures of two labels and many shapes."""
    folder = tmp_path_factory.mktemp("real")
    for i in range(60):
        path = folder / ("blue" if i % 2 else "red") / f"{i:02}.png"
        path.parent.mkdir(exist_ok=True)
        picture(20 + i % 7, 18 + i % 5, i).save(path)
    return folder


# The rule


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
    from fitv2.pipeline import FiTPipeline

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


def test_two_people_have_the_same_reference(real, tmp_path, colours):
    hashes = [
        Collection.open(str(real), None).reference((12, 20), 1.0, [colours], tmp_path / name).about.sha256
        for name in ("one", "other")
    ]
    assert hashes[0] == hashes[1]
    other = Collection.open(str(real), None).reference(
        (12, 21), 1.0, [colours], tmp_path / "x", (0, 1), print
    )
    assert other.about.sha256 != hashes[0]


def test_pictures_of_which_too_much_would_be_lost_are_left_out(real, tmp_path, colours):
    wide = Collection.open(str(real), None).reference((8, 16), 0.4, [colours], tmp_path)
    kept = kept_reference(tmp_path, (8, 16), [colours]).features()["efficientnet"].features
    assert 0 < wide.about.pictures < 60
    assert wide.about.pictures + wide.about.left_out == 60
    assert len(wide.about.labels) == len(kept) == wide.about.pictures


def test_samples_are_taken_by_their_size(tmp_path, real, colours):
    for i in range(30):
        picture(16, 16, i).resize((16, 16 if i < 20 else 24)).save(tmp_path / f"{i}.png")
    result = evaluate(str(tmp_path), str(real), tmp_path.parent / "by-size", sizes=[(16, 16), (24, 16)])
    counts = [result.about["references"][name]["pictures_judged"] for name in ("16x16", "24x16")]
    assert counts == [20, 10]


@pytest.mark.parametrize("balanced", [False, True])
def test_labels_by_chance_or_as_many_of_each(balanced):
    labels = [subject.label for subject in draw_labels(100, 4, 0, balanced)]
    counts = np.bincount(labels, minlength=4)
    assert (counts == 25).all() == balanced
    assert draw_labels(100, 4, 0, False) != draw_labels(100, 4, 1, False)


# ADM's npz


@pytest.fixture
def npz(tmp_path):
    images = np.stack([np.asarray(picture(16, 16, i)) for i in range(30)])
    np.savez(tmp_path / "batch.npz", images)
    return tmp_path / "batch.npz"


def test_a_batch_is_read_piece_by_piece(npz):
    batch = Batch(npz)
    images = np.load(npz)["arr_0"]
    assert (len(batch), batch.pixels) == (30, (16, 16))
    assert all(np.array_equal(*pair) for pair in zip(batch.read(range(7, 12)), images[7:12], strict=True))


def test_a_batch_is_judged(npz, real, tmp_path, colours):
    result = evaluate(str(npz), str(real), tmp_path / "out", Evaluation(num=24))
    assert result.about["references"]["16x16"]["pictures_judged"] == 30  # all, whatever `num` is
    with pytest.raises(UserError, match="has pictures of 16x16"):
        evaluate(str(npz), str(real), tmp_path / "other", sizes=[(8, 8)])


def test_statistics_of_a_reference_batch_are_those_in_the_file(tmp_path):
    rng = np.random.default_rng(0)
    values = {
        "mu": rng.normal(size=6),
        "sigma": np.eye(6),
        "mu_s": rng.normal(size=3),
        "sigma_s": 2 * np.eye(3),
    }
    np.savez(tmp_path / "reference.npz", arr_0=np.zeros((2, 4, 4, 3), np.uint8), **values)
    found = statistics(tmp_path / "reference.npz")
    assert np.array_equal(found["inception"].mean, values["mu"])
    assert np.array_equal(found["inception_spatial"].covariance, values["sigma_s"])


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


def test_a_packed_batch_is_read_too(npz, tmp_path):
    images = np.load(npz)["arr_0"]
    np.savez_compressed(tmp_path / "packed.npz", images)
    assert np.array_equal(Batch(tmp_path / "packed.npz").read(range(3, 4))[0], images[3])


def test_an_npz_of_objects_is_not_unpickled(tmp_path):
    np.savez(tmp_path / "evil.npz", np.array([print], dtype=object))
    with pytest.raises(UserError, match="arr_0 is object"):
        Batch(tmp_path / "evil.npz")


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
    assert result.about["references"]["16x16"]["evaluations"] == 4  # Heun's two steps
    how = How(Guidance(1.0), Sampling("euler", 3))
    result = evaluate(str(pixel_model), str(real), tmp_path / "2", settings, how, [(16, 16)])
    assert result.about["references"]["16x16"]["evaluations"] == 3


def test_a_large_reference_is_thinned_evenly(real):
    few = Collection.open(str(real), None, most=20)
    assert list(few.rows) == list(range(0, 60, 3))


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


def test_a_split_that_there_is_not_is_an_error(folder, tmp_path):
    for name in ("train", "val"):
        (tmp_path / name / "blue").mkdir(parents=True)
        picture(16, 16).save(tmp_path / name / "blue" / "0.png")
    with pytest.raises(UserError, match="has no split test, only train, validation"):
        Collection.open(str(tmp_path), "test")


def test_a_batch_of_another_size_is_no_reference(pixel_model, npz, tmp_path, colours):
    with pytest.raises(UserError, match="has pictures of 16x16, not 8x8"):
        evaluate(str(pixel_model), str(npz), tmp_path / "out", Evaluation(num=10), QUICK, [(8, 8)])


# What a model is to show


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


def test_pieces_are_shared_and_never_done_twice(tmp_path, colours):
    class Counted:
        def __init__(self):
            self.read_numbers = []

        def __len__(self):
            return 20

        def read(self, numbers):
            self.read_numbers += numbers
            return [picture(8, 8, number) for number in numbers]

    pictures = Counted()
    extract(pictures, [colours], tmp_path, (1, 2))
    assert pictures.read_numbers == list(range(8, 16))
    assert not is_whole(tmp_path, 20)
    extract(pictures, [colours], tmp_path, (0, 1))
    assert sorted(pictures.read_numbers) == list(range(20))
    assert collect(tmp_path, 20).numbers == list(range(20))


def test_a_damaged_piece_is_named(tmp_path, colours, real):
    taken = Collection.open(str(real), None).pictures((8, 8), 1.0)
    extract(taken, [colours], tmp_path)
    piece_paths(tmp_path, 60)[2].write_bytes(b"nonsense")
    with pytest.raises(UserError, match=r"00002\.safetensors"):
        collect(tmp_path, len(taken))


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
