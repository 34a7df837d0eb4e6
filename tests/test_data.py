import json
import shutil

import numpy as np
import pytest
import torch

from fitv2.data import TokenDataset
from fitv2.errors import UserError


def test_batch_is_the_rows_in_order(tokens):
    dataset = TokenDataset(tokens)
    rows = np.array([5, 0, 9])
    packed, labels = dataset.batch(rows)
    assert packed.sizes == tuple(tuple(size) for size in dataset.sizes[rows].tolist())
    alone = torch.cat([dataset.batch(np.array([row]))[0].x_TC for row in rows])
    assert torch.equal(packed.x_TC, alone)
    assert labels.tolist() == dataset.labels[rows].tolist()
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
    with pytest.raises(UserError, match=r"dataset\.json is missing"):
        TokenDataset(tmp_path)
    with pytest.raises(UserError, match="no validation pictures"):
        TokenDataset(tokens, "validation")


def test_a_missing_or_cut_shard_is_named(tokens, tmp_path):
    def cut(copy):
        shard = next(copy.glob("*.arrow"))
        shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])

    with pytest.raises(UserError, match=r"set/train-00000\.arrow is damaged: it has \d+ of \d+ bytes"):
        TokenDataset(damaged(tokens, tmp_path, cut))


def test_an_incomplete_set_is_named(tokens, tmp_path):
    def more(copy):
        card = json.loads((copy / "dataset.json").read_text())
        (copy / "dataset.json").write_text(json.dumps(card | {"pictures": {"train": 99}}))

    with pytest.raises(UserError, match="incomplete"):
        TokenDataset(damaged(tokens, tmp_path, more))
