import math

import pytest
import torch

from conftest import noise_of, randomized
from fitv2.config import Guidance
from fitv2.diffusion.guidance import guided, velocity_of
from fitv2.errors import UserError
from fitv2.model import FiT
from fitv2.tokens import layout

SIZES = [(2, 2), (1, 3)]
LABELS = torch.tensor([3, 1])


def pair(model, packed, x, t_B):
    """The model with and without the labels."""
    state = packed.with_tokens(x)
    return model(state, t_B, LABELS), model(state, t_B, torch.full((2,), model.null_label))


@pytest.mark.parametrize("scale", [0.0, 1.0, 1.5, 4.0])
def test_guided_output_is_the_formula(model, scale):
    packed, t_B = layout(SIZES), torch.tensor([0.3, 0.6])
    x = noise_of(packed, 6)
    conditional, unconditional = pair(model, packed, x, t_B)
    expected = unconditional + scale * (conditional - unconditional)
    result = guided(model, packed, LABELS, Guidance(scale))(x, t_B)
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(velocity_of(model, packed, LABELS, Guidance(scale))(x, t_B), result)


def test_channels_that_are_not_guided_are_conditional(model):
    packed, t_B = layout(SIZES), torch.tensor([0.3, 0.6])
    x = noise_of(packed, 6)
    conditional, unconditional = pair(model, packed, x, t_B)
    result = guided(model, packed, LABELS, Guidance(3.0, channels=4))(x, t_B)
    expected = unconditional + 3 * (conditional - unconditional)
    torch.testing.assert_close(result[:, :4], expected[:, :4], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(result[:, 4:], conditional[:, 4:], rtol=1e-5, atol=1e-5)


def test_more_channels_than_there_are_is_refused(model):
    with pytest.raises(UserError, match="--guidance-channels is 7; the latent has 6"):
        guided(model, layout(SIZES), LABELS, Guidance(3.0, channels=7))


def test_power_cosine_falls_from_noise_to_data(model):
    packed = layout(SIZES)
    x = noise_of(packed, 6)
    for t, power in ((0.0, 2.0), (0.25, 0.5), (1.0, 3.0)):
        t_B = torch.full((2,), t)
        conditional, unconditional = pair(model, packed, x, t_B)
        strength = 1 + (4 - 1) * (1 - math.cos(math.pi * (1 - t) ** power)) / 2
        result = guided(model, packed, LABELS, Guidance(4.0, power=power))(x, t_B)
        expected = unconditional + strength * (conditional - unconditional)
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)


def counted(model, monkeypatch):
    """The list to which every forward pass adds its number of images."""
    seen, forward = [], type(model).forward

    def spy(self, packed, *rest):
        seen.append(len(packed.sizes))
        return forward(self, packed, *rest)

    monkeypatch.setattr(type(model), "forward", spy)
    return seen


def test_the_unconditional_half_is_computed_only_where_it_counts(model, monkeypatch):
    seen = counted(model, monkeypatch)
    packed = layout(SIZES)
    interval = Guidance(2.0, interval=(0.25, 0.5))
    for settings, times in (
        (Guidance(1.0), [0.5, 0.5]),
        (Guidance(2.0), [0.5, 0.5]),
        (interval, [0.1, 0.9]),
        (interval, [0.25, 0.5]),
        (interval, [0.3, 0.7]),
    ):
        guided(model, packed, LABELS, settings)(torch.zeros(7, 6), torch.tensor(times))
    assert seen == [2, 4, 2, 4, 3]


@pytest.mark.parametrize("times", [[0.3, 0.7], [0.7, 0.3], [0.3, 0.4], [0.1, 0.9]])
def test_an_interval_guides_each_image_by_its_own_time(model, times):
    packed, t_B = layout(SIZES), torch.tensor(times)
    x = noise_of(packed, 6)
    conditional, unconditional = pair(model, packed, x, t_B)
    inside = packed.spread((t_B >= 0.25) & (t_B <= 0.5))[:, None]
    expected = torch.where(inside, unconditional + 3 * (conditional - unconditional), conditional)
    result = guided(model, packed, LABELS, Guidance(3.0, interval=(0.25, 0.5)))(x, t_B)
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)


def test_a_predicted_variance_is_not_guided_and_time_runs_to_data():
    shape = {"depth": 1, "width": 32, "heads": 2, "patch_size": 1, "in_channels": 6, "num_classes": 5}
    model = randomized(FiT(**shape, path="ddpm", prediction="noise")).eval()
    packed, steps = layout(SIZES), torch.tensor([900, 900])
    x = noise_of(packed, 6)
    conditional, unconditional = pair(model, packed, x, steps)
    early = guided(model, packed, LABELS, Guidance(3.0, interval=(0.0, 0.2)))(x, steps)
    torch.testing.assert_close(early[:, 6:], conditional[:, 6:], rtol=1e-5, atol=1e-5)
    expected = unconditional + 3 * (conditional - unconditional)
    torch.testing.assert_close(early[:, :6], expected[:, :6], rtol=1e-4, atol=1e-4)
    late = guided(model, packed, LABELS, Guidance(3.0, interval=(0.2, 1.0)))(x, steps)
    torch.testing.assert_close(late, conditional, rtol=1e-5, atol=1e-5)
