from dataclasses import replace

import pytest
import torch

from conftest import held_out_set
from fitv2.diffusion.flow import Flow
from fitv2.diffusion.objective import objective_of
from fitv2.presets import preset
from fitv2.training.validation import HeldOut, fill

DEBUG = preset("debug")


def test_held_out_pictures_are_the_same_whatever_the_batch(folder, tmp_path):
    data = held_out_set(folder, tmp_path)
    pieces = {count: list(HeldOut(data, count, Flow())) for count in (1, 50, 1000)}
    for batches in pieces.values():
        times = torch.cat([sample.t_B for sample, _, _ in batches])
        even = torch.special.ndtr(torch.logit(times.sort().values))  # as logit-normal ones have it
        torch.testing.assert_close(even, (torch.arange(12) + 0.5) / 12)
        for name in ("noise_TC", "data_TC"):
            whole = getattr(pieces[1000][0][0], name)
            assert torch.equal(torch.cat([getattr(sample, name) for sample, _, _ in batches]), whole)


def test_a_set_without_held_out_pictures_has_none(tokens):
    assert list(HeldOut(tokens, 5, Flow())) == []


def test_validation_is_the_same_however_a_run_draws_its_times(folder, tmp_path):
    data = held_out_set(folder, tmp_path)
    objectives = [
        objective_of(DEBUG.model, replace(DEBUG.training, **how))
        for how in ({}, {"times": "uniform"}, {"time_mean": 2.0})
    ]
    times = [
        torch.cat([sample.t_B for sample, _, _ in HeldOut(data, 5, objective)]) for objective in objectives
    ]
    assert torch.equal(times[0], times[1])
    assert torch.equal(times[0], times[2])


@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_processes_share_held_out_pictures_in_as_many_batches(folder, tmp_path, ranks):
    data = held_out_set(folder, tmp_path)
    alone = list(HeldOut(data, 30, Flow()))
    shares = [list(HeldOut(data, 30, Flow(), rank, ranks)) for rank in range(ranks)]
    assert len({len(share) for share in shares}) == 1
    counted = [sample.t_B for share in shares for sample, _, counts in share if counts]
    assert len(counted) == len(alone)
    expected = torch.cat([sample.t_B for sample, _, _ in alone]).sort().values
    assert torch.equal(torch.cat(counted).sort().values, expected)
    sizes = [sum(sample.layout.lengths) for sample, _, _ in alone]
    assert max(sizes) <= 30


def test_neighbours_fill_so_many_tokens():
    assert fill([1, 2, 3, 9, 1, 1], 5) == [slice(0, 2), slice(2, 3), slice(3, 4), slice(4, 6)]
    assert fill([4], 1) == [slice(0, 1)]
