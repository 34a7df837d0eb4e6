from dataclasses import replace

import pytest
import torch

from fitv2.diffusion.ddpm import DDPM
from fitv2.diffusion.flow import Flow
from fitv2.diffusion.objective import objective_of
from fitv2.errors import UserError
from fitv2.presets import preset
from fitv2.tokens import Layout, PackedTokens
from fitv2.training.noising import add_noise


def blank(sizes, channels):
    """Images of these sizes that are zero everywhere."""
    layout = Layout.of(sizes)
    return PackedTokens(torch.zeros(layout.tokens, channels), layout)


@pytest.mark.parametrize("objective", [Flow(), DDPM()])
def test_an_image_gets_the_noise_of_its_own_key_whatever_its_neighbours(objective):
    data = blank([(2, 3), (1, 4), (5, 1)], 6)
    keys = [(0, 7), (0, 8), (0, 9)]
    together, dropped = add_noise(data, keys, objective, 0.5)
    alone, dropped_alone = add_noise(data.select([2]), keys[2:], objective, 0.5)
    assert torch.equal(together.noise_TC[-5:], alone.noise_TC)
    assert torch.equal(together.t_B[2:], alone.t_B)
    assert dropped[2] == dropped_alone[0]
    other, _ = add_noise(data.select([2]), [(0, 10)], objective, 0.5)
    assert not torch.equal(other.noise_TC, alone.noise_TC)


DEBUG = preset("debug")


def test_labels_are_dropped_as_often_as_asked():
    data = blank([(1, 1)] * 2_000, 1)
    keys = [(0, i) for i in range(2_000)]
    shares = [add_noise(data, keys, Flow(), share)[1].float().mean().item() for share in (0.0, 0.1, 1.0)]
    assert shares == [0.0, pytest.approx(0.1, abs=0.02), 1.0]


@pytest.mark.parametrize(("name", "kind"), [("fit-b", DDPM), ("fitv2-b", Flow), ("ablation-a", Flow)])
def test_the_objective_follows_from_the_path(name, kind):
    chosen = preset(name)
    assert isinstance(objective_of(chosen.model, chosen.training), kind)


def test_a_direction_is_refused_where_there_is_no_velocity():
    chosen = preset("fit-b")
    with pytest.raises(UserError, match="`direction_weight` is for velocities"):
        objective_of(chosen.model, replace(chosen.training, direction_weight=0.5))
