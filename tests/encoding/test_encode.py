import contextlib
import io
import json
import multiprocessing
import os
import shutil
import tarfile
import threading
import time
from dataclasses import replace
from pathlib import Path

import datasets
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import ClassLabel, Dataset, Features
from PIL import Image

import fitv2.encoding.encode
from conftest import picture
from fitv2.autoencoder import Pixels
from fitv2.config import Encoding
from fitv2.data.dataset import TokenDataset
from fitv2.encoding.encode import encode, list_once
from fitv2.encoding.images import flexible_resize
from fitv2.errors import UserError
from fitv2.tokens import unpack, unpatchify


def test_tokens_hold_the_resized_pictures(folder, tokens):
    dataset = TokenDataset(tokens)
    assert dataset.card.about.labels == ("blue", "red")
    assert dataset.card.pictures == {"train": 12}
    sources = dataset.sources(range(24))
    for row in range(0, len(sources), 2):
        expected = np.array(flexible_resize(Image.open(folder / sources[row]), 16, 16)) / 127.5 - 1
        image, mirrored = unpack(dataset.batch(np.array([row, row + 1]))[0])
        pixels = unpatchify(image[None], 16)[0]
        np.testing.assert_allclose(pixels.permute(1, 2, 0), expected, atol=1e-3)
        assert torch.equal(unpatchify(mirrored[None], 16)[0], pixels.flip(2))
        assert dataset.card.about.labels[dataset.labels[row]] == sources[row].split("/")[0]


def test_several_limits_store_several_sizes(folder, tmp_path):
    encode(folder, tmp_path / "set", Encoding(max_tokens=(16, 4), mirror=False), workers=0)
    dataset = TokenDataset(tmp_path / "set")
    lengths = dataset.sizes.prod(axis=1)
    assert dataset.first_rows.tolist() == list(range(0, 24, 2))
    assert lengths[1::2].max() <= 4 < lengths[::2].max() <= 16


def test_parquet_splits_and_labels(tmp_path):
    for split, seeds in (("train", range(3)), ("validation", range(3, 5))):
        rows = []
        for seed in seeds:
            file = io.BytesIO()
            picture(32, 48, seed).save(file, "WEBP", lossless=True)
            rows.append({"image": {"bytes": file.getvalue(), "path": None}, "label": f"l{seed % 2}"})
        (tmp_path / "source").mkdir(exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "source" / f"{split}.parquet")
    report = encode(tmp_path / "source", tmp_path / "set", workers=0)
    assert report.encoded == {"train": 3, "validation": 2}
    assert len(TokenDataset(tmp_path / "set", "validation").first_rows) == 2


def test_broken_pictures_are_listed_and_the_rest_goes_on(folder, tmp_path):
    source = tmp_path / "source"
    (source / "a").mkdir(parents=True)
    whole = (folder / "blue" / "0.png").read_bytes()
    (source / "a" / "good.png").write_bytes(whole)
    (source / "a" / "cut.png").write_bytes(whole[:60])
    (source / "a" / "empty.png").write_bytes(b"")
    (source / "a" / "text.jpg").write_text("not an image")
    (source / "a" / "notes.txt").write_text("not meant as one")
    report = encode(source, tmp_path / "set", workers=0)
    listed = [json.loads(line) for line in (tmp_path / "set" / "skipped.jsonl").read_text().splitlines()]
    assert (report.encoded, report.skipped, report.others) == ({"train": 1}, 3, 1)
    assert [entry["source"] for entry in listed] == ["a/notes.txt", "a/cut.png", "a/empty.png", "a/text.jpg"]
    assert all(entry["reason"] for entry in listed)


def test_a_name_that_is_not_utf8_is_kept_as_well_as_can_be(folder, tmp_path):
    odd = os.fsencode(tmp_path / "source") + b"/caf\xe9"
    Path(os.fsdecode(odd)).mkdir(parents=True)
    Path(os.fsdecode(odd + b"/a.png")).write_bytes((folder / "blue" / "0.png").read_bytes())
    encode(tmp_path / "source", tmp_path / "set", workers=0)
    assert TokenDataset(tmp_path / "set").card.about.labels == ("caf\ufffd",)


def test_parquet_that_is_none_or_has_other_columns_is_named(tmp_path):
    source = tmp_path / "train.parquet"
    source.write_text("not parquet")
    with pytest.raises(UserError, match=r"train\.parquet is not a Parquet file"):
        encode(source, tmp_path / "set", workers=0)
    pq.write_table(pa.table({"colour": [3]}), source)
    with pytest.raises(UserError, match="no column of images that could be recognized, but colour"):
        encode(source, tmp_path / "set", workers=0)
    assert [path.name for path in tmp_path.iterdir()] == ["train.parquet"]


def test_nothing_to_encode_leaves_nothing(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    with pytest.raises(UserError, match="no images"):
        encode(source, tmp_path / "set", workers=0)
    with pytest.raises(UserError, match="none does not exist"):
        encode(source / "none", tmp_path / "set", workers=0)
    (source / "bad.png").write_text("x")
    with pytest.raises(UserError, match="none of the 1 images"):
        encode(source, tmp_path / "set", workers=0)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_after_a_full_disk_it_goes_on(folder, tokens, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        written = []

        def full(*arguments):
            written.append(arguments)
            if len(written) > 1:
                raise OSError(28, "No space left on device")
            return fsync(*arguments)

        fsync = os.fsync
        patch.setattr("fitv2.runtime.files.os.fsync", full)
        encode(folder, tmp_path / "set", Encoding(max_tokens=(16,)), workers=0)
    assert len(written) > 1
    assert not (tmp_path / "set" / "dataset.json").exists()
    encode(folder, tmp_path / "set", Encoding(max_tokens=(16,)), workers=0)
    assert contents(tmp_path / "set") == contents(tokens)


def contents(folder):
    """Every file below a folder, by name."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_the_same_bytes_each_time(folder, tokens, tmp_path):
    encode(folder, tmp_path / "again", Encoding(max_tokens=(16,)), workers=2)
    assert contents(tmp_path / "again") == contents(tokens)


def test_a_finished_dataset_stays_as_it_is(folder, tokens):
    before = contents(tokens)
    report = encode(folder, tokens, Encoding(max_tokens=(16,)), workers=0)
    assert (report.encoded, report.skipped) == ({"train": 12}, 0)
    assert contents(tokens) == before


def test_other_settings_or_another_source_are_refused_with_the_difference(folder, tokens, tmp_path):
    with pytest.raises(
        UserError, match=r"mirror was True, now False; latents was 'mean', now 'sample'\. Choose"
    ):
        encode(folder, tokens, Encoding(max_tokens=(16,), mirror=False, latents="sample"), workers=0)
    (tmp_path / "source" / "red").mkdir(parents=True)
    picture(16, 16).save(tmp_path / "source" / "red" / "1.png")
    with pytest.raises(UserError, match=r"source was '12 files, .*', now '1 files, "):
        encode(tmp_path / "source", tokens, Encoding(max_tokens=(16,)), workers=0)
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(UserError, match="not empty"):
        encode(folder, tmp_path, workers=0)


def test_the_folder_for_tokens_is_one_of_this_machine_and_not_the_source(folder):
    with pytest.raises(UserError, match="s3:/bucket/set is no folder on this machine"):
        encode(folder, Path("s3://bucket/set"), SMALL)
    with pytest.raises(UserError, match=r"lies in .*, the source"):
        encode(folder, folder / "tokens", SMALL)


def test_settings_are_compared_in_an_unfinished_folder_too(many, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("fitv2.encoding.encode.conclude", lambda _: None)
        encode(many, tmp_path / "set", SMALL, workers=0)
    assert not (tmp_path / "set" / "dataset.json").exists()
    with pytest.raises(UserError, match="shard_size was 7, now 9"):
        encode(many, tmp_path / "set", replace(SMALL, shard_size=9), workers=0)
    assert encode(many, tmp_path / "set", SMALL, workers=0).encoded == {"train": 40, "validation": 10}


SMALL = Encoding(max_tokens=(16, 4), preprocess="mixed", batch_size=3, shard_size=7)


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """50 images in two splits, and three that cannot be used."""
    root = tmp_path_factory.mktemp("many")
    for i in range(50):
        path = root / ("val" if i % 5 == 0 else "train") / f"label {i % 3}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(20 + 7 * i % 90, 100 - 3 * i % 80, i).save(path)
    for i in range(3):
        (root / "train" / "label 0" / f"bad {i}.png").write_text("x")
    return root


@pytest.fixture(scope="module")
def whole(many, tmp_path_factory):
    """Those, encoded without interruption."""
    out = tmp_path_factory.mktemp("whole") / "set"
    report = encode(many, out, SMALL, workers=2)
    assert (report.encoded, report.skipped) == ({"train": 40, "validation": 10}, 3)
    return contents(out)


FORK = multiprocessing.get_context("fork")  # a fresh interpreter would take seconds to import


def start(many, out, rank=0, world=1, settings=SMALL):
    """An encode in a process of its own, as torchrun would start it."""

    def run():
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world))
        encode(many, out, settings, workers=2)

    process = FORK.Process(target=run)
    process.start()
    return process


@pytest.mark.parametrize("world", [1, 2, 3])
def test_any_number_of_processes_makes_the_same_dataset(many, whole, tmp_path, world):
    processes = [start(many, tmp_path / "set", rank, world) for rank in range(world)]
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    assert contents(tmp_path / "set") == whole


def test_the_last_to_finish_makes_it_whole(many, whole, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert encode(many, tmp_path / "set", SMALL, workers=0) is None
    assert not (tmp_path / "set" / "dataset.json").exists()
    monkeypatch.setenv("RANK", "1")
    assert encode(many, tmp_path / "set", SMALL, workers=0).encoded == {"train": 40, "validation": 10}
    assert contents(tmp_path / "set") == whole


@pytest.mark.slow
def test_killed_at_30_random_moments_it_ends_with_the_same_bytes(many, whole, tmp_path):
    """Each kill meets another number of processes; a dataset that gets finished in between begins anew."""
    rng, out = np.random.default_rng(0), tmp_path / "set"
    started = time.monotonic()
    start(many, tmp_path / "timed").join()
    seconds = time.monotonic() - started
    kills, at_work = 0, 0
    while kills < 30:
        world = int(rng.integers(1, 4))
        processes = [start(many, out, rank, world) for rank in range(world)]
        time.sleep(rng.uniform(0, seconds))
        for process in processes:
            at_work += process.is_alive()
            process.kill()
            process.join()
        kills += 1
        if (out / "dataset.json").exists():
            assert encode(many, out, SMALL, workers=0).skipped == 3
            assert contents(out) == whole
            shutil.rmtree(out)
    assert at_work >= 15  # the kills came in time
    start(many, out).join()
    assert contents(out) == whole
    deadline = time.monotonic() + 10
    while children_of_nobody(out) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not children_of_nobody(out)


def children_of_nobody(out):
    """Processes that were left behind: those that have a file of `out` mapped and no test for a parent."""
    left = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if str(out) in (process / "maps").read_text() and int(process.name) != os.getpid():
                left.append(process.name)
    return left


@pytest.mark.parametrize("moment", ["list_once", "load_manifest", "pieces_of", "work", "conclude"])
def test_one_process_may_finish_while_another_begins(many, whole, tmp_path, monkeypatch, moment):
    """All shards are done but the card is not; one process makes it whole, and clears up under the other."""
    out = tmp_path / "set"
    with monkeypatch.context() as patch:
        patch.setattr("fitv2.encoding.encode.conclude", lambda _: None)
        encode(many, out, SMALL, workers=0)
    true = getattr(fitv2.encoding.encode, moment)

    def finish_first(*arguments):
        monkeypatch.setattr(f"fitv2.encoding.encode.{moment}", true)
        monkeypatch.setenv("WORLD_SIZE", "1")
        monkeypatch.setenv("RANK", "0")
        encode(many, out, SMALL, workers=0)
        return true(*arguments)

    monkeypatch.setattr(f"fitv2.encoding.encode.{moment}", finish_first)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    report = encode(many, out, SMALL, workers=0)
    assert (report.encoded, report.skipped) == ({"train": 40, "validation": 10}, 3)
    assert contents(out) == whole


def test_a_process_that_waits_does_not_wait_for_ever(tmp_path, monkeypatch):
    work = tmp_path / "set" / ".encode"
    work.mkdir(parents=True)
    (work / "plan.json").write_text("{}")

    def found_nothing(stage, seconds, _):
        if (seconds, stage) == (1, "wait for process 1 to list the images"):
            shutil.rmtree(tmp_path / "set")

    with pytest.raises(UserError, match="process 1 found no images: see what it says"):
        list_once(tmp_path / "set", None, {}, False, found_nothing)
    monkeypatch.setattr("fitv2.encoding.encode.PATIENCE", 0.6)
    with pytest.raises(UserError, match=r"process 1 has not begun in .*set for 1 seconds: all need the same"):
        list_once(tmp_path / "set", None, {}, False, lambda *_: None)


def test_a_process_with_another_source_is_refused(many, folder, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("fitv2.encoding.encode.conclude", lambda _: None)
        encode(many, tmp_path / "set", SMALL, workers=0)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(UserError, match="source was"):
        encode(folder, tmp_path / "set", SMALL, workers=0)


def test_a_shard_damaged_before_the_end_is_encoded_again(many, whole, tmp_path, monkeypatch):
    out = tmp_path / "set"
    with monkeypatch.context() as patch:
        patch.setattr("fitv2.encoding.encode.conclude", lambda _: None)
        encode(many, out, SMALL, workers=0)
    shard = out / "train-00001.arrow"
    shard.write_bytes(bytes(len(shard.read_bytes())))
    encode(many, out, SMALL, workers=0)
    assert contents(out) == whole


def test_the_threads_of_the_autoencoder_compute_with_one_thread_each(many, tmp_path, monkeypatch):
    counted = set()

    class Counting(Pixels):
        def encode(self, pixels, noise=None):
            counted.add((threading.current_thread().name, torch.get_num_threads()))
            return pixels

    monkeypatch.setattr("fitv2.encoding.encode.load_autoencoder", lambda *_, **__: Counting())
    torch.set_num_threads(2)
    encode(many, tmp_path / "set", SMALL, workers=0)
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)
    assert {threads for _, threads in counted} == {1}
    assert threading.current_thread().name not in {name for name, _ in counted}


def test_every_source_gives_the_same_tokens(many, tmp_path):
    """Folders, tars, Parquet, `datasets` folders, here or in a remote store: the tokens are the images'."""
    files = sorted((many / "train").rglob("[0-9]*.png"), key=lambda path: int(path.stem))
    labels = [path.parent.name for path in files]
    tars = tmp_path / "tars" / "train-0.tar"
    tars.parent.mkdir()
    with tarfile.open(tars, "w") as tar:
        for path in files:
            tar.add(path, f"{path.parent.name}/{path.name}")
    features = Features({"image": datasets.Image(), "label": ClassLabel(names=sorted(set(labels)))})
    content = [{"bytes": path.read_bytes(), "path": None} for path in files]
    table = Dataset.from_dict({"image": content, "label": labels}, features)
    (tmp_path / "parquet").mkdir()
    table.to_parquet(str(tmp_path / "parquet" / "train.parquet"), batch_size=7)
    table.save_to_disk(str(tmp_path / "saved"))
    fsspec.filesystem("memory").put(str(tmp_path / "parquet"), "/everywhere", recursive=True)
    expected = None
    for number, source in enumerate([tars, tmp_path / "parquet", tmp_path / "saved", "memory://everywhere"]):
        out = tmp_path / f"set {number}"
        encode(source, out, SMALL, workers=number % 2 * 2)
        held = TokenDataset(out)
        packed, condition = held.batch(np.arange(len(held.sizes)))
        assert held.card.about.labels == ("label 0", "label 1", "label 2")
        expected = (packed.x_TC, condition.values["label"]) if expected is None else expected
        assert torch.equal(packed.x_TC, expected[0])
        assert torch.equal(condition.values["label"], expected[1])
    assert len(held.first_rows) == 40


def test_an_autoencoder_makes_the_same_bytes_with_any_number_of_threads(many, tiny_vae, tmp_path):
    settings = replace(SMALL, autoencoder=str(tiny_vae), latents="sample")
    for threads in (1, 2):
        torch.set_num_threads(threads)
        encode(many, tmp_path / str(threads), settings, workers=0)
    torch.set_num_threads(1)
    assert contents(tmp_path / "1") == contents(tmp_path / "2")
    about = TokenDataset(tmp_path / "1").card.about
    assert (about.scale, about.shift, about.in_channels, about.patch_size) == (0.5, 0.25, 4, 2)


def test_mixed_preprocessing_stores_crops_of_large_pictures_alone(many, tmp_path):
    encode(many, tmp_path / "set", SMALL, workers=0)
    dataset = TokenDataset(tmp_path / "set")
    sources = dataset.sources(np.arange(len(dataset.sizes)))
    crops: dict[str, set] = {}
    for source, size, crop in zip(sources, dataset.sizes.tolist(), dataset.cropped, strict=True):
        crops.setdefault(source, set()).update([tuple(size)] if crop else [])
    for source, sizes in crops.items():
        with Image.open(many / source) as image:
            large = [side for side in (4, 2) if min(image.size) > 16 * side]
        assert sizes == {(side, side) for side in large}
