import json
import shutil

import numpy as np
import pytest
import torch

from fitv2.data import EndlessOrder, TokenDataset
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


def test_every_picture_once_an_epoch():
    first = np.array([0, 3, 4, 8])  # 3, 1, 4 and 2 variants
    order = EndlessOrder(first, 10, seed=0)
    seen = np.concatenate([order.rows(4 * epoch, 4 * epoch + 4) for epoch in range(300)])
    pictures = np.searchsorted(first, seen, side="right") - 1
    assert (np.sort(pictures.reshape(-1, 4), axis=1) == np.arange(4)).all()
    assert set(seen) == set(range(10))
    of_last = np.bincount(seen)[8:]  # its two variants are equally likely
    assert of_last.min() > 110


def test_epochs_differ():
    order = EndlessOrder(np.arange(0, 30, 3), 30, seed=0)
    assert len({tuple(order.rows(e * 10, e * 10 + 10)) for e in range(5)}) == 5


def test_a_position_does_not_depend_on_how_it_is_reached():
    order, other = (EndlessOrder(np.arange(0, 30, 3), 30, seed=0) for _ in range(2))
    whole = order.rows(0, 40)
    pieces = np.concatenate([other.rows(start, start + 7) for start in (0, 7, 14, 21, 28)])
    assert (pieces == whole[:35]).all()
    assert not (EndlessOrder(np.arange(0, 30, 3), 30, seed=1).rows(0, 40) == whole).all()


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

    with pytest.raises(UserError, match=r"set.*(damaged|incomplete)"):
        TokenDataset(damaged(tokens, tmp_path, cut))


def test_an_incomplete_set_is_named(tokens, tmp_path):
    def more(copy):
        card = json.loads((copy / "dataset.json").read_text())
        (copy / "dataset.json").write_text(json.dumps(card | {"pictures": {"train": 99}}))

    with pytest.raises(UserError, match="incomplete"):
        TokenDataset(damaged(tokens, tmp_path, more))
