import pickle
from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest
import torch

from fitv2.conditioning import Condition
from fitv2.data.dataset import Steps, TokenDataset
from fitv2.data.packing import FixedCount
from fitv2.diffusion.ddpm import DDPM
from fitv2.diffusion.flow import Flow
from fitv2.diffusion.objective import objective_of
from fitv2.errors import UserError
from fitv2.presets import preset
from fitv2.tokens import Layout, PackedTokens
from fitv2.training.noising import Draws, Reading, drawn_batches, places


def draws(data, keys, objective):
    """What chance decides of images with these keys."""
    return Draws.of(keys, data.layout.lengths, data.x_TC.shape[1], objective)


def blank(sizes, channels):
    """Images of these sizes that are zero everywhere."""
    layout = Layout.of(sizes)
    return PackedTokens(torch.zeros(layout.tokens, channels), layout)


@pytest.mark.parametrize("objective", [Flow(), DDPM()])
def test_an_image_gets_the_noise_of_its_own_key_whatever_its_neighbours(objective):
    data = blank([(2, 3), (1, 4), (5, 1)], 6)
    keys = [(0, 7), (0, 8), (0, 9)]
    three, one = draws(data, keys, objective), draws(data.select([2]), keys[2:], objective)
    together, alone = three.add_noise(data, objective), one.add_noise(data.select([2]), objective)
    assert torch.equal(together.noise_TC[-5:], alone.noise_TC)
    assert torch.equal(together.t_B[2:], alone.t_B)
    assert three.chance_B[2] == one.chance_B[0] and three.label_chance_B[2] == one.label_chance_B[0]
    other = draws(data.select([2]), [(0, 10)], objective)
    assert not np.array_equal(other.noise_TC, one.noise_TC)


def test_the_places_of_some_keys_in_any_order():
    assert places(np.array([7, 3, 9, 5]), np.array([5, 7, 9])) == [3, 0, 2]


def test_draws_of_some_images_are_those_that_they_had():
    data = blank([(2, 3), (1, 4), (5, 1)], 6)
    keys = [(0, 7), (0, 8), (0, 9)]
    chosen, direct = draws(data, keys, Flow()).select([2, 0]), draws(data.select([2, 0]), keys[2::-2], Flow())
    for name in ("times_BN", "chance_B", "label_chance_B", "noise_TC", "lengths"):
        assert np.array_equal(getattr(chosen, name), getattr(direct, name))


@pytest.mark.parametrize(
    "objective",
    [Flow(), Flow(clean_share=0.25), DDPM(), objective_of(preset("emoji").model, preset("emoji").training)],
)
def test_batches_and_draws_are_the_same_from_any_number_of_processes(tokens, objective):
    dataset = TokenDataset(tokens)
    steps = Steps(dataset, FixedCount(dataset.images(), 5, seed=0))
    reading = pickle.loads(pickle.dumps(Reading(steps, objective, seed=3)))  # as it goes to another process
    made = []
    for workers in (0, 2):
        with closing(drawn_batches(reading, 4, workers)) as batches:
            made.append([next(batches) for _ in range(3)])
    for (batch, drawn), (other, others) in zip(*made, strict=True):
        assert torch.equal(batch.packed.x_TC, other.packed.x_TC)
        assert np.array_equal(drawn.noise_TC, others.noise_TC)
        assert np.array_equal(drawn.times_BN, others.times_BN)


def test_tokens_are_shuffled_within_their_image_by_its_own_key_alone():
    data = blank([(2, 3), (1, 4), (5, 1)], 6)
    data = PackedTokens(torch.arange(15.0)[:, None].expand(15, 6), data.layout)
    keys = [(0, 7), (0, 8), (0, 9)]
    two = Flow(clean_share=0.25)
    three, one = draws(data, keys, two), draws(data.select([2]), keys[2:], two)
    learned_T = torch.arange(15) / 15
    together = three.add_noise(data, two, learned_T)
    alone = one.add_noise(data.select([2]), two, learned_T[-5:])
    for name in ("x_TC", "data_TC", "learned_T"):
        assert torch.equal(getattr(together, name)[-5:], getattr(alone, name))
    assert torch.equal(together.layout.pos_T2[-5:], alone.layout.pos_T2)
    assert torch.equal(together.levels.t_L[-2:], alone.levels.t_L)
    # Each token keeps its place, its mask and its content, within its image.
    came_from = together.data_TC[:, 0].long()
    assert came_from.tolist() != list(range(15)) and sorted(came_from.tolist()) == list(range(15))
    assert torch.equal(data.layout.image_T[came_from], data.layout.image_T)
    assert torch.equal(together.layout.pos_T2, data.layout.pos_T2[came_from])
    assert torch.equal(together.learned_T, learned_T[came_from])
    plain = draws(data, keys, Flow())
    assert plain.order_T is None and np.array_equal(plain.label_chance_B, three.label_chance_B)
    torch.testing.assert_close(together.mean_time_B, data.layout.mean_per_image(together.t_T1[:, 0]))
    chosen, direct = three.select([2, 0]), draws(data.select([2, 0]), keys[2::-2], two)
    assert np.array_equal(chosen.order_T, direct.order_T)


DEBUG = preset("debug")


def test_conditions_are_dropped_as_often_as_asked_and_labels_beside_texts_on_their_own():
    count = 2_000
    drawn = draws(blank([(1, 1)] * count, 1), [(0, i) for i in range(count)], Flow())
    condition = Condition.of(label=torch.zeros(count, dtype=torch.int64))
    for share in (0.0, 0.1, 1.0):
        shown = drawn.drop(condition, share, labels=True)
        assert shown.present_B.float().mean() == pytest.approx(1 - share, abs=0.02)
        assert (shown.values["label"] < 0).float().mean() == pytest.approx(share, abs=0.02)
    assert (drawn.drop(condition, 0.5, labels=False).values["label"] == 0).all()


@pytest.mark.parametrize(("name", "kind"), [("fit-b", DDPM), ("fitv2-b", Flow), ("ablation-a", Flow)])
def test_the_objective_follows_from_the_path(name, kind):
    chosen = preset(name)
    assert isinstance(objective_of(chosen.model, chosen.training), kind)


def test_a_direction_is_refused_where_there_is_no_velocity():
    chosen = preset("fit-b")
    with pytest.raises(UserError, match="`direction_weight` is for velocities"):
        objective_of(chosen.model, replace(chosen.training, direction_weight=0.5))


@pytest.mark.parametrize(
    ("name", "said"),
    [("fit-b", "for flows, not for `path` ddpm"), ("any-step", "not for `objective` any-step")],
)
def test_two_times_are_for_flows_alone(name, said):
    chosen = preset(name)
    with pytest.raises(UserError, match=f"`clean_share` is {said}"):
        objective_of(chosen.model, replace(chosen.training, clean_share=0.25))
