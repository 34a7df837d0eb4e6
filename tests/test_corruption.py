from dataclasses import replace

import pytest
import torch

from conftest import held_out_set
from fitv2.corruption import corrupted, filled, held_out, objective_of
from fitv2.ddpm import DDPM
from fitv2.errors import UserError
from fitv2.flow import Flow, flow_of
from fitv2.presets import preset
from fitv2.tokens import layout, select


@pytest.mark.parametrize("objective", [Flow(), DDPM()])
def test_an_image_is_corrupted_by_its_own_key_whatever_its_neighbours(objective):
    data = layout([(2, 3), (1, 4), (5, 1)], 6)
    keys = [(0, 7), (0, 8), (0, 9)]
    together, dropped = corrupted(data, keys, objective, 0.5)
    alone, dropped_alone = corrupted(select(data, [2]), keys[2:], objective, 0.5)
    assert torch.equal(together.noise_TC[-5:], alone.noise_TC)
    assert torch.equal(together.t_B[2:], alone.t_B)
    assert dropped[2] == dropped_alone[0]
    other, _ = corrupted(select(data, [2]), [(0, 10)], objective, 0.5)
    assert not torch.equal(other.noise_TC, alone.noise_TC)


DEBUG = preset("debug")


def test_labels_are_dropped_as_often_as_asked():
    data = layout([(1, 1)] * 2_000, 1)
    keys = [(0, i) for i in range(2_000)]
    shares = [corrupted(data, keys, Flow(), share)[1].float().mean().item() for share in (0.0, 0.1, 1.0)]
    assert shares == [0.0, pytest.approx(0.1, abs=0.02), 1.0]


def test_held_out_pictures_are_the_same_whatever_the_batch(folder, tmp_path):
    data = held_out_set(folder, tmp_path)
    pieces = {count: list(held_out(data, count, Flow())) for count in (1, 50, 1000)}
    for batches in pieces.values():
        times = torch.cat([sample.t_B for sample, _, _ in batches])
        even = torch.special.ndtr(torch.logit(times.sort().values))  # as logit-normal ones have it
        torch.testing.assert_close(even, (torch.arange(12) + 0.5) / 12)
        for name in ("noise_TC", "data_TC"):
            whole = getattr(pieces[1000][0][0], name)
            assert torch.equal(torch.cat([getattr(sample, name) for sample, _, _ in batches]), whole)


def test_a_set_without_held_out_pictures_has_none(tokens):
    assert list(held_out(tokens, 5, Flow())) == []


@pytest.mark.parametrize(("name", "kind"), [("fit-b", DDPM), ("fitv2-b", Flow), ("ablation-a", Flow)])
def test_the_objective_follows_from_the_path(name, kind):
    chosen = preset(name)
    assert isinstance(objective_of(chosen.model, chosen.training), kind)


def test_validation_is_the_same_however_a_run_draws_its_times(folder, tmp_path):
    data = held_out_set(folder, tmp_path)
    flows = [
        flow_of(DEBUG.model, replace(DEBUG.training, **how))
        for how in ({}, {"times": "uniform"}, {"time_mean": 2.0})
    ]
    times = [torch.cat([sample.t_B for sample, _, _ in held_out(data, 5, flow)]) for flow in flows]
    assert torch.equal(times[0], times[1])
    assert torch.equal(times[0], times[2])


def test_a_direction_is_refused_where_there_is_no_velocity():
    chosen = preset("fit-b")
    with pytest.raises(UserError, match="--direction-weight is for velocities"):
        objective_of(chosen.model, replace(chosen.training, direction_weight=0.5))


@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_processes_share_held_out_pictures_in_as_many_batches(folder, tmp_path, ranks):
    data = held_out_set(folder, tmp_path)
    alone = list(held_out(data, 30, Flow()))
    shares = [list(held_out(data, 30, Flow(), rank, ranks)) for rank in range(ranks)]
    assert len({len(share) for share in shares}) == 1
    counted = [sample.t_B for share in shares for sample, _, counts in share if counts]
    assert len(counted) == len(alone)
    expected = torch.cat([sample.t_B for sample, _, _ in alone]).sort().values
    assert torch.equal(torch.cat(counted).sort().values, expected)
    sizes = [sum(sample.noisy.lengths) for sample, _, _ in alone]
    assert max(sizes) <= 30


def test_neighbours_fill_so_many_tokens():
    assert filled([1, 2, 3, 9, 1, 1], 5) == [slice(0, 2), slice(2, 3), slice(3, 4), slice(4, 6)]
    assert filled([4], 1) == [slice(0, 1)]
