import hashlib
import json

import numpy as np
import pyarrow as pa
import pytest

from fitv2.data.format import About, ShardRows, described, finish, gathered, shard_name, shards_of

ABOUT = About(("a", "b"), "vae", 0.5, 0.25, 2, 4, 64, {"mirror": True})
SIZES = [(1, 2), (3, 1), (2, 2)]


def tokens(size, seed=0):
    return np.random.default_rng(seed).standard_normal((*size, 16)).astype(np.float16)


@pytest.fixture
def written(tmp_path):
    """One shard of two images, the first with two variants."""
    rows = ShardRows()
    for i, (size, variant) in enumerate(zip(SIZES, [0, 1, 0], strict=True)):
        rows.add(tokens(size, i), i % 2, f"{i}.png", variant, crop=i == 1)
    assert rows.bytes == 9 * 32
    return tmp_path / "train-00000.arrow", rows.write(tmp_path / "train-00000.arrow", ABOUT)


def test_pyarrow_alone_reads_a_shard(written):
    table = pa.ipc.open_stream(written[0]).read_all()
    assert table.num_rows == 3
    assert table["rows"].to_pylist() == [1, 3, 2]
    assert table["crop"].to_pylist() == [False, True, False]
    for i, size in enumerate(SIZES):
        numbers = np.array(table["tokens"][i].as_py(), np.float16)
        assert (numbers == tokens(size, i).reshape(-1, 16)).all()
    assert json.loads(table.schema.metadata[b"fitv2"])["scale"] == 0.5


def test_datasets_reads_a_shard_with_the_names_of_its_labels(written):
    from datasets import Dataset

    rows = Dataset.from_file(str(written[0]))
    assert rows.features["label"].names == ["a", "b"]
    assert rows.features["tokens"].feature.length == 16
    assert rows[1]["source"] == "1.png"
    assert np.shape(rows[2]["tokens"]) == (4, 16)


def test_rows_lie_where_the_shard_says(written):
    path, shard = written
    content = path.read_bytes()
    assert (shard.rows, shard.bytes) == (3, len(content))
    assert shard.sha256 == hashlib.sha256(content).hexdigest() == described(path).sha256
    numbers = np.concatenate([tokens(size, i).ravel() for i, size in enumerate(SIZES)])
    assert content[shard.tokens_at : shard.tokens_at + numbers.nbytes] == numbers.tobytes()


def test_a_dataset_is_described_by_its_card_and_its_readme(written, tmp_path):
    path, shard = written
    card = finish(tmp_path, ABOUT, {path.name: shard}, [{"source": "x", "reason": "é"}])
    assert (card.pictures, card.rows, card.tokens) == ({"train": 2}, {"train": 3}, {"train": 9})
    assert (tmp_path / "skipped.jsonl").read_text() == '{"source": "x", "reason": "é"}\n'
    text = (tmp_path / "README.md").read_text()
    assert "| train | 2 | 3 | 9 |" in text
    assert "(the autoencoder's − 0.25) · 0.5" in text
    assert "- `mirror`: true" in text
    index = gathered([path])
    assert index["crop"].to_pylist() == [0, 1, 0]


def test_load_dataset_finds_the_splits(written, tmp_path):
    from datasets import load_dataset

    path, shard = written
    other = shard_name("validation", 0)
    (tmp_path / other).write_bytes(path.read_bytes())
    finish(tmp_path, ABOUT, {path.name: shard, other: shard}, [])
    loaded = load_dataset(str(tmp_path), cache_dir=str(tmp_path / "cache"))
    assert {split: len(rows) for split, rows in loaded.items()} == {"train": 3, "validation": 3}
    assert loaded["validation"][1]["label"] == 1


def test_shards_are_in_order_beyond_five_digits():
    names = [shard_name("train", i) for i in (100_000, 7, 99_999)] + [shard_name("train-extra", 3)]
    assert shards_of(names, "train") == ["train-00007.arrow", "train-99999.arrow", "train-100000.arrow"]
