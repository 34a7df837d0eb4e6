import pickle
import tracemalloc

import numpy as np
import pytest

from fitv2.data.packing import (
    FixedCount,
    Images,
    TokenBudget,
    assign_to_packs,
    images_before,
    rebalance,
)
from fitv2.errors import UserError


def images(pictures=4_000, variants=2, seed=0, low=60, high=256):
    """Lengths of ImageNet-like images: most near the limit, some far below."""
    rng = np.random.default_rng([seed, 1, 2, 3])  # numpy pads with zeros: (0,) and (0, 0) are one seed
    common = rng.choice([234, 224, 240, 256], pictures)
    lengths = np.where(rng.random(pictures) < 0.8, common, rng.integers(low, high + 1, pictures))
    rows = np.repeat(lengths, variants)
    rows[1::variants] = high  # the cropped variant
    return Images(np.arange(0, pictures * variants, variants), rows)


CROPPED = np.array([0, 0, 1, 0, 0, 0, 0, 1, 1, 1])  # of UNEVEN: one of 3, none, one of 4, both
UNEVEN = Images(np.array([0, 3, 4, 8]), np.array([5, 6, 7, 3, 1, 2, 3, 4, 9, 9]))  # 3, 1, 4, 2 variants


@pytest.mark.parametrize("sampler", [FixedCount(UNEVEN, 4, 0), TokenBudget(UNEVEN, 30, 0)])
def test_every_image_once_an_epoch_and_every_variant_in_time(sampler):
    steps = [sampler.step(i) for i in range(400)]
    assert all(len(step.rows) == 4 for step in steps)  # each pack holds all four
    rows = np.concatenate([step.rows for step in steps])
    of_image = np.searchsorted(UNEVEN.first_rows, rows, side="right") - 1
    assert (np.sort(of_image.reshape(-1, 4), axis=1) == np.arange(4)).all()
    counts = np.bincount(rows, minlength=10)
    assert (counts[8:] > 160).all()
    assert (counts[4:8] > 70).all()
    keys = np.concatenate([step.keys for step in steps])
    assert len(np.unique(keys)) == len(keys) == 1600


def test_a_fixed_count_goes_on_over_the_end_of_an_epoch():
    by_three, by_five = (FixedCount(UNEVEN, count, seed=3) for count in (3, 5))
    threes = np.concatenate([by_three.step(i).rows for i in range(20)])
    fives = np.concatenate([by_five.step(i).rows for i in range(12)])
    assert (threes == fives).all()
    assert not (threes == np.concatenate([FixedCount(UNEVEN, 3, 4).step(i).rows for i in range(20)])).all()


def test_a_ramp_up_takes_the_same_images_in_smaller_steps_first():
    whole, growing = FixedCount(images(), 32, 0), FixedCount(images(), 32, 0, rampup=10)
    steps = [growing.step(i) for i in range(40)]
    counts = [len(step.rows) for step in steps]
    assert counts[:10] == [4, 7, 10, 13, 16, 18, 21, 24, 27, 30]
    assert set(counts[10:]) == {32}
    rows = np.concatenate([step.rows for step in steps])
    every = np.concatenate([whole.step(i).rows for i in range(40)])
    assert (rows == every[: len(rows)]).all()
    keys = np.concatenate([step.keys for step in steps])
    assert (keys == np.arange(len(rows))).all()
    assert [images_before(i, 32, 10) for i in (0, 1, 10, 12)] == [0, 4, 170, 234]
    assert images_before(7, 32) == 7 * 32


@pytest.mark.parametrize("budget", [4_096, 8_192, 16_384, 65_536])
def test_packs_are_full_equal_and_within_the_budget(budget):
    many = images(40_000)
    sampler = TokenBudget(many, budget, seed=0)
    for epoch in range(3):
        chosen, rows, bounds = sampler.plan(epoch)
        assert (np.sort(chosen) == np.arange(40_000)).all()
        assert (np.searchsorted(many.first_rows, rows, side="right") - 1 == chosen).all()
        filled = np.add.reduceat(many.lengths[rows], bounds[:-1])
        assert filled.max() <= budget
        assert filled.sum() / (budget * sampler.packs) > 0.99
        assert filled.min() > 0.95 * filled.max()


def test_a_step_is_a_function_of_seed_and_number():
    first, second = (TokenBudget(images(), 4_096, seed=1) for _ in range(2))
    ahead = second.step(500)
    for i in range(0, 501, 100):
        step = first.step(i)
    assert (step.rows == ahead.rows).all()
    assert (step.keys == ahead.keys).all()
    other = TokenBudget(images(), 4_096, seed=2).step(500)
    assert len(other.rows) != len(ahead.rows) or (other.rows != ahead.rows).any()


@pytest.mark.parametrize("sampler", [FixedCount(UNEVEN, 3, 0), TokenBudget(UNEVEN, 30, 0)])
def test_a_sampler_can_be_sent_to_another_process(sampler):
    before = sampler.step(5)
    sent = pickle.loads(pickle.dumps(sampler)).step(5)
    assert (sent.rows == before.rows).all()
    assert (sent.keys == before.keys).all()


def test_neighbours_in_a_pack_change_from_epoch_to_epoch():
    sampler = TokenBudget(images(400), 4_096, seed=0)
    packs = [frozenset(sampler.step(i).keys % 400) for i in range(3 * sampler.packs)]
    assert len(set(packs)) == len(packs)


def test_an_image_above_the_budget_is_named():
    with pytest.raises(UserError, match="`tokens_per_step` is 200; the longest image has 256 tokens"):
        TokenBudget(images(), 200, seed=0)


@pytest.mark.parametrize("count", [1, 10, 400])
def test_no_pack_is_empty(count):
    alone = Images(np.arange(count), np.full(count, 256))
    sampler = TokenBudget(alone, 256, seed=0)
    assert sampler.packs == count
    assert all(len(sampler.step(i).rows) == 1 for i in range(2 * count))


def test_a_budget_for_everything_is_one_pack():
    sampler = TokenBudget(UNEVEN, 1000, seed=0)
    assert sampler.packs == 1
    assert len(sampler.step(7).rows) == 4


def test_assigning_evens_out():
    pack, filled = assign_to_packs(np.array([9, 8, 7, 5, 3, 1]), 3)
    assert filled.tolist() == [np.array([9, 8, 7, 5, 3, 1])[pack == i].sum() for i in range(3)]
    assert filled.max() - filled.min() <= 3


@pytest.mark.parametrize(
    ("lengths", "before", "budget"),
    [
        ([6, 5, 4, 3], [0, 0, 1, 1], 10),
        ([6, 5, 4, 3], [0, 0, 0, 1], 11),
        ([9, 8, 7, 3, 2, 1], [0, 0, 1, 1, 2, 2], 11),
    ],
)
def test_rebalancing_swaps_and_moves(lengths, before, budget):
    lengths, pack = np.array(lengths), np.array(before)
    filled = np.bincount(pack, lengths).astype(np.int64)
    assert filled.max() > budget
    rebalance(pack, filled, lengths, budget)
    assert filled.max() <= budget
    assert filled.tolist() == np.bincount(pack, lengths).tolist()


def test_rebalancing_packs_of_very_many_images_takes_little_memory():
    lengths = np.sort(np.random.default_rng(0).integers(1, 9, 40_000))[::-1].astype(np.int64)
    pack, filled = assign_to_packs(lengths, 2)
    pack[np.flatnonzero(pack == 1)[:20]] = 0  # twenty images of 8 tokens too many
    filled = np.bincount(pack, lengths).astype(np.int64)
    budget = int(filled.mean()) + 5
    assert filled.max() > budget + 100
    tracemalloc.start()
    rebalance(pack, filled, lengths, budget)
    assert tracemalloc.get_traced_memory()[1] < 100e6
    tracemalloc.stop()
    assert filled.max() <= budget


def test_rebalancing_stops_where_nothing_helps():
    pack, filled = np.array([0, 0, 1]), np.array([11, 6])
    rebalance(pack, filled, np.array([6, 5, 6]), 10)
    assert (pack.tolist(), filled.tolist()) == ([0, 0, 1], [11, 6])


@pytest.mark.parametrize("seed", range(40))
def test_every_epoch_of_any_set_fits(seed):
    rng = np.random.default_rng([seed, 7])
    variants = rng.integers(1, 4, rng.integers(1, 60))
    lengths = rng.integers(1, 100, variants.sum())
    some = Images(np.cumsum([0, *variants[:-1]]), lengths)
    sampler = TokenBudget(some, int(rng.integers(100, 500)), seed)
    for epoch in range(20):
        chosen, rows, bounds = sampler.plan(epoch)
        assert (np.sort(chosen) == np.arange(len(variants))).all()
        assert (np.diff(bounds) > 0).all()
        assert np.add.reduceat(lengths[rows], bounds[:-1]).max() <= sampler.budget


@pytest.mark.parametrize("probability", [0.0, 0.2, 1.0])
def test_crops_are_chosen_with_their_probability(probability):
    mixed = Images(UNEVEN.first_rows, UNEVEN.lengths, CROPPED, probability)
    rng = np.random.default_rng(0)
    counts = np.bincount(np.concatenate([mixed.draw(rng) for _ in range(6_000)]), minlength=10) / 6_000
    expected = [
        (1 - probability) / 2, (1 - probability) / 2, probability, 1,
        *[(1 - probability) / 3] * 3, probability, 0.5, 0.5,
    ]  # fmt: skip
    np.testing.assert_allclose(counts, expected, atol=0.025)
    mean, variance = mixed.moments()
    np.testing.assert_allclose(mean, np.add.reduceat(expected * mixed.lengths, mixed.first_rows))
    square = np.add.reduceat(expected * mixed.lengths**2, mixed.first_rows)
    np.testing.assert_allclose(variance, square - mean**2, atol=1e-9)


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_ranks_get_equal_work_and_every_image_once(ranks):
    many = images(40_000)
    sampler = TokenBudget(many, 4_096 * ranks, seed=0)
    for number in range(20):
        step = sampler.step(number)
        parts = step.split(many.lengths[step.rows], ranks)
        assert sorted(np.concatenate([part.keys for part in parts])) == sorted(step.keys)
        assert sorted(np.concatenate([part.rows for part in parts])) == sorted(step.rows)
        work = [many.lengths[part.rows].sum() for part in parts]
        assert max(work) - min(work) <= 0.02 * 4_096


def test_fewer_images_than_ranks_leave_some_without():
    step = FixedCount(UNEVEN, 2, 0).step(0)
    assert sorted(len(part.rows) for part in step.split(UNEVEN.lengths[step.rows], 4)) == [0, 0, 1, 1]
