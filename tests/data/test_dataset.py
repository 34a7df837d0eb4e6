import hashlib
import json
import pickle
import shutil
from dataclasses import replace

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch

from conftest import encoded_picture
from fitv2.config import Encoding
from fitv2.data.dataset import Steps, TokenDataset, batches, verify_files
from fitv2.data.packing import FixedCount, TokenBudget
from fitv2.encoding.encode import encode
from fitv2.errors import UserError
from fitv2.presets import preset
from fitv2.training.trainer import train


def test_batch_is_the_rows_in_order(tokens):
    dataset = TokenDataset(tokens)
    rows = np.array([5, 0, 9])
    packed, condition = dataset.batch(rows)
    assert packed.layout.sizes == tuple(tuple(size) for size in dataset.sizes[rows].tolist())
    alone = torch.cat([dataset.batch(np.array([row]))[0].x_TC for row in rows])
    assert torch.equal(packed.x_TC, alone)
    assert condition.values["label"].tolist() == dataset.labels[rows].tolist()
    assert condition.present_B.all()
    assert packed.x_TC.dtype == torch.float32


def test_by_length_sorts(tokens):
    dataset = TokenDataset(tokens)
    rows = np.arange(len(dataset.sizes))
    lengths = dataset.sizes[rows[dataset.by_length(rows)]].prod(axis=1)
    assert (np.diff(lengths) >= 0).all()


def damaged(tokens, tmp_path, damage):
    copy = tmp_path / "set"
    shutil.copytree(tokens, copy)
    damage(copy)
    return copy


def test_what_is_no_dataset_is_named(tokens, tmp_path):
    with pytest.raises(UserError, match=r"dataset\.json is missing: a dataset is made by fitv2 encode"):
        TokenDataset(tmp_path)
    with pytest.raises(UserError, match="no validation images"):
        TokenDataset(tokens, "validation")


def change(name, edit):
    """Damage that changes a file's bytes."""

    def damage(copy):
        (copy / name).write_bytes(edit((copy / name).read_bytes()))

    return damage


def flipped(content):
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.mark.parametrize("name", ["train-00000.arrow", "index-train.arrow"])
@pytest.mark.parametrize(
    "damage",
    [lambda name: change(name, lambda c: c[: len(c) // 2]), lambda name: lambda copy: (copy / name).unlink()],
)
def test_a_missing_or_cut_file_is_named(tokens, tmp_path, name, damage):
    with pytest.raises(UserError, match=rf"set/{name} is (missing|damaged: it has \d+ of \d+ bytes): remove"):
        TokenDataset(damaged(tokens, tmp_path, damage(name)))


def test_a_changed_byte_is_found_by_reading_all(tokens, tmp_path):
    copy = damaged(tokens, tmp_path, change("train-00000.arrow", flipped))
    dataset = TokenDataset(copy)
    seen = []
    with pytest.raises(UserError, match=r"train-00000\.arrow is damaged: its bytes are not those"):
        verify_files(dataset.store, dataset.card, lambda files, total: (seen.append(total), files)[1])
    assert seen == [2]
    verify_files(TokenDataset(tokens).store, TokenDataset(tokens).card)


@pytest.mark.parametrize("change", [('"patch_size": 16', '"patch_size": 8'), ('"blue",', '"green",')])
def test_a_card_that_says_other_things_than_its_shards_is_found(tokens, tmp_path, change):
    def edit(copy):
        (copy / "dataset.json").write_text((copy / "dataset.json").read_text().replace(*change))

    dataset = TokenDataset(damaged(tokens, tmp_path, edit))
    says = r"dataset\.json is damaged: it says other things than train-00000|than dataset\.json says"
    with pytest.raises(UserError, match=says):
        verify_files(dataset.store, dataset.card)


def test_a_changed_byte_of_the_index_is_found_at_once(tokens, tmp_path):
    with pytest.raises(UserError, match=r"index-train\.arrow is damaged: its bytes are not those"):
        TokenDataset(damaged(tokens, tmp_path, change("index-train.arrow", flipped)))


def test_training_checks_all_before_its_first_step(tokens, tmp_path):
    copy = damaged(tokens, tmp_path, change("train-00000.arrow", flipped))
    with pytest.raises(UserError, match=r"train-00000\.arrow is damaged"):
        train(preset("debug"), copy, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def rewritten(tokens, tmp_path, columns, name="train-00000.arrow"):
    """A dataset whose file has other columns under the right hashes."""

    def edit(copy):
        batch = pa.ipc.open_stream((copy / name).read_bytes()).read_next_batch()
        for column, values in columns.items():
            at, field = batch.schema.get_field_index(column), batch.schema.field(column)
            given = values(batch.column(column)) if callable(values) else pa.array(values, field.type)
            batch = batch.set_column(at, field.with_type(given.type), given)
        with pa.OSFile(str(copy / name), "wb") as file, pa.ipc.new_stream(file, batch.schema) as stream:
            stream.write_batch(batch)
        card = json.loads((copy / "dataset.json").read_text())
        content = (copy / name).read_bytes()
        entry = card["shards" if name.startswith("train") else "indexes"][name]
        entry |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        (copy / "dataset.json").write_text(json.dumps(card))

    return damaged(tokens, tmp_path, edit)


def added(more):
    return lambda column: pc.add(column, pa.scalar(more, column.type))


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"label": added(7)}, "labels outside 0 to"),
        ({"label": added(-7)}, "labels outside 0 to"),
        ({"rows": added(99)}, "sizes that none can have"),
        ({"columns": added(-9)}, "sizes that none can have"),
        ({"variant": added(1)}, "variants out of order"),
        ({"rows": lambda column: pc.cast(column, pa.int64())}, "other columns"),
        ({"label": lambda column: pc.if_else(pa.scalar(True), None, column)}, "values are missing"),
        ({"rows": lambda column: pa.array([1] * len(column), column.type)}, "other numbers of rows, images"),
    ],
)  # fmt: skip
def test_an_index_of_impossible_rows_is_refused_under_the_right_hashes(tokens, tmp_path, columns, said):
    with pytest.raises(UserError, match=rf"index-train\.arrow.* {said}"):
        TokenDataset(rewritten(tokens, tmp_path, columns, "index-train.arrow"))


def swapped(column):
    return column.take(pa.array(range(len(column) - 1, -1, -1)))


@pytest.mark.parametrize("columns", [{"label": swapped}, {"crop": pc.invert}])
def test_a_shard_and_an_index_that_disagree_are_found_before_the_first_step(tokens, tmp_path, columns):
    copy = rewritten(tokens, tmp_path, columns)
    dataset = TokenDataset(copy)
    with pytest.raises(
        UserError, match=r"index-train\.arrow is damaged: it says other things than train-00000"
    ):
        verify_files(dataset.store, dataset.card)


def test_no_offset_of_an_arrow_file_ends_the_process(tokens, tmp_path):
    """Words of a shard but for its tokens changed, under the right hash: one line, or as many rows."""
    name, rng = "train-00000.arrow", np.random.default_rng(0)
    whole = TokenDataset(tokens)
    content, shard = (tokens / name).read_bytes(), whole.card.shards[name]
    after = shard.tokens_at + 2 * whole.token_channels * int(whole.lengths.sum())
    words = [*range(shard.tokens_at // 4), *range(-(-after // 4), len(content) // 4)]
    refused = 0
    for at in rng.choice(words, 300, replace=False).tolist():
        broken = bytearray(content)
        word = int.from_bytes(content[4 * at : 4 * at + 4], "little")
        broken[4 * at : 4 * at + 4] = ((word + int(rng.choice([-1, 1, 1 << 30]))) % (1 << 32)).to_bytes(
            4, "little"
        )
        copy = tmp_path / str(at)
        shutil.copytree(tokens, copy)
        (copy / name).write_bytes(broken)
        card = json.loads((copy / "dataset.json").read_text())
        card["shards"][name]["sha256"] = hashlib.sha256(broken).hexdigest()
        (copy / "dataset.json").write_text(json.dumps(card))
        try:
            dataset = TokenDataset(copy)
            verify_files(dataset.store, dataset.card)
            assert len(dataset.sources(np.arange(len(dataset.sizes)))) == len(whole.sizes)
            dataset.batch(np.arange(len(dataset.sizes)))
        except UserError:
            refused += 1
        shutil.rmtree(copy)
    assert refused > 100


@pytest.mark.parametrize(
    "names",
    [
        {"../train-00000.arrow": None},
        {"train-x.arrow": None},
        {"train-00001.arrow.bak": None},
        {"test-00000.arrow": None},
    ],
)
def test_a_card_names_shards_of_its_own_folder_and_splits(tokens, tmp_path, names):
    def edit(copy):
        card = json.loads((copy / "dataset.json").read_text())
        entry = card["shards"]["train-00000.arrow"]
        card["shards"] |= dict.fromkeys(names, entry)
        (copy / "dataset.json").write_text(json.dumps(card))

    with pytest.raises(UserError, match="it names other files than those of its splits"):
        TokenDataset(damaged(tokens, tmp_path, edit))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format": 1}, "another version of fitv2: remove the folder"),
        ({"formats": 2}, "did you mean format"),
    ],
)
def test_another_format_is_said(tokens, tmp_path, change, said):
    def rewrite(copy):
        card = json.loads((copy / "dataset.json").read_text())
        (copy / "dataset.json").write_text(json.dumps(card | change))

    with pytest.raises(UserError, match=said):
        TokenDataset(damaged(tokens, tmp_path, rewrite))


def test_rows_beyond_the_first_shard(folder, tmp_path):
    settings = Encoding(max_tokens=(16,))
    encode(folder, tmp_path / "one", settings, workers=0)
    encode(folder, tmp_path / "many", replace(settings, shard_size=5), workers=0)
    one, many = TokenDataset(tmp_path / "one"), TokenDataset(tmp_path / "many")
    assert len(many.shards) == 3
    rows = np.random.default_rng(0).permutation(24)
    assert torch.equal(one.batch(rows)[0].x_TC, many.batch(rows)[0].x_TC)
    assert one.sources(rows) == many.sources(rows)


def test_a_dataset_streams_from_remote_storage(tokens, tmp_path):
    """The same batches from a store of fsspec's, of which only what a batch needs is read."""
    system = fsspec.filesystem("memory")
    system.put(str(tokens), "/remote/set", recursive=True)
    here, there = TokenDataset(tokens), TokenDataset("memory://remote/set")
    rows = np.array([5, 0, 23])
    with pytest.MonkeyPatch.context() as patch:
        asked = []
        read = type(system).cat_file

        def noted(self, path, start=None, end=None, **options):
            asked.append(end - start)  # an error, where a whole file is asked for
            return read(self, path, start, end, **options)

        patch.setattr(type(system), "cat_file", noted)
        assert torch.equal(here.batch(rows)[0].x_TC, there.batch(rows)[0].x_TC)
    assert asked == (here.lengths[rows] * 2 * 768).tolist()
    train(preset("debug"), "memory://remote/set", tmp_path / "run")
    system.pipe("/remote/set/train-00000.arrow", system.cat("/remote/set/train-00000.arrow")[:-9])
    with pytest.raises(UserError, match=r"memory://remote/set/train-00000\.arrow is damaged: it has"):
        TokenDataset("memory://remote/set")


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_those_of_the_steps_however_they_are_read(tokens, workers):
    dataset = TokenDataset(tokens)
    steps = Steps(dataset, FixedCount(dataset.images(), 5, seed=0))
    for number, batch in zip(range(3, 9), batches(steps, 3, workers), strict=False):
        chosen = steps.sampler.step(number)
        assert sorted(batch.keys) == sorted(chosen.keys)
        order = [chosen.keys.tolist().index(key) for key in batch.keys]
        packed, condition = dataset.batch(chosen.rows[order])
        assert torch.equal(batch.packed.x_TC, packed.x_TC)
        assert torch.equal(batch.condition.values["label"], condition.values["label"])
        assert list(batch.packed.layout.lengths) == sorted(batch.packed.layout.lengths)


def test_steps_can_be_sent_to_another_process(tokens):
    dataset = TokenDataset(tokens)
    steps = Steps(dataset, FixedCount(dataset.images(), 5, seed=0))
    expected = steps.batch(3)
    sent = pickle.loads(pickle.dumps(steps)).batch(3)
    assert torch.equal(sent.packed.x_TC, expected.packed.x_TC)


def test_a_step_of_fewer_images_than_ranks_is_refused(tokens):
    dataset = TokenDataset(tokens)
    steps = Steps(dataset, FixedCount(dataset.images(), 2, seed=0), 0, 3)
    with pytest.raises(
        UserError, match="step 5 has 2 images for 3 processes: raise `batch_size` or `tokens_per_step`"
    ):
        steps.batch(5)


def test_a_shard_cut_after_opening_is_named_by_the_process_that_reads(tokens, tmp_path):
    copy = damaged(tokens, tmp_path, lambda _: None)
    dataset = TokenDataset(copy)
    change("train-00000.arrow", lambda content: content[:5000])(copy)
    with pytest.raises(UserError, match=r"^[^\n]*train-00000\.arrow is damaged: it ends too early$"):
        next(batches(Steps(dataset, FixedCount(dataset.images(), 12, seed=0)), 0, 2))


def test_ranks_share_a_step(tokens):
    dataset = TokenDataset(tokens)
    sampler = TokenBudget(dataset.images(), 60, seed=0)
    parts = [Steps(dataset, sampler, rank, 3).batch(2) for rank in range(3)]
    assert sorted(key for part in parts for key in part.keys) == sorted(sampler.step(2).keys)


def test_captions_come_with_the_images(tmp_path):
    folder = tmp_path / "in" / "cat"
    folder.mkdir(parents=True)
    for name, caption in (("1", "a cat"), ("2", ""), ("3", "caf\u00e9")):
        (folder / f"{name}.png").write_bytes(encoded_picture(40, 40))
        if caption:
            (folder / f"{name}.txt").write_text(caption)
    encode(tmp_path / "in", tmp_path / "set", Encoding(max_tokens=(4,)), workers=0)
    dataset = TokenDataset(tmp_path / "set")
    verify_files(dataset.store, dataset.card)
    assert dataset.captions(np.arange(6)) == ["a cat", "a cat", "", "", "caf\u00e9", "caf\u00e9"]
    assert dataset.captions(dataset.first_rows[::-1]) == ["caf\u00e9", "", "a cat"]


@pytest.mark.parametrize(("form", "lacks"), [(2, ["caption", "mask"]), (3, ["mask"])])
def test_a_dataset_from_before_there_were_captions_or_masks_is_read(form, lacks, tokens, tmp_path):
    def older(copy):
        card = json.loads((copy / "dataset.json").read_text()) | {"format": form}
        for part in ("shards", "indexes"):
            for name, entry in card[part].items():
                batch = pa.ipc.open_stream((copy / name).read_bytes()).read_next_batch()
                batch = batch.drop_columns(lacks)
                with (
                    pa.OSFile(str(copy / name), "wb") as file,
                    pa.ipc.new_stream(file, batch.schema) as stream,
                ):
                    stream.write_batch(batch)
                content = (copy / name).read_bytes()
                entry |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
                if part == "shards":
                    column = pa.ipc.open_stream(pa.py_buffer(content)).read_next_batch().column("tokens")
                    numbers = column.values.values.buffers()[1]
                    entry["tokens_at"] = content.index(numbers.to_pybytes()[:64])
        (copy / "dataset.json").write_text(json.dumps(card))

    before, now = TokenDataset(damaged(tokens, tmp_path, older)), TokenDataset(tokens)
    assert before.captions([0, 1]) == ["", ""]
    rows = np.arange(len(now.sizes))
    assert before.learned(rows) is None
    assert torch.equal(before.batch(rows)[0].x_TC, now.batch(rows)[0].x_TC)
    assert before.sources(rows) == now.sources(rows)
