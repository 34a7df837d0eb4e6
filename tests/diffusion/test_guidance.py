import math
from dataclasses import replace

import pytest
import torch

from conftest import noise_of, randomized
from fitv2.conditioning import Condition
from fitv2.config import Guidance
from fitv2.diffusion.flow import Flow
from fitv2.diffusion.guidance import guide
from fitv2.errors import UserError
from fitv2.model import FiT
from fitv2.tokens import Layout

SIZES = [(2, 2), (1, 3)]
CONDITION = Condition.of(label=torch.tensor([3, 1]))


def pair(model, layout, x, t_B):
    """The model with and without the labels; the row after those of all labels is that of none."""
    none = Condition.of(label=torch.full((2,), model.architecture.num_classes))
    return model(x, layout, t_B, CONDITION), model(x, layout, t_B, none)


@pytest.mark.parametrize("scale", [0.0, 1.0, 1.5, 4.0])
def test_guided_output_is_the_formula(model, scale):
    layout, t_B = Layout.of(SIZES), torch.tensor([0.3, 0.6])
    x = noise_of(layout, 6)
    conditional, unconditional = pair(model, layout, x, t_B)
    expected = unconditional + scale * (conditional - unconditional)
    output = guide(model, layout, CONDITION, Guidance(scale))
    result = output(x, t_B)
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(Flow.of(model.architecture).follow(output, layout)(x, t_B), result)


def test_guidance_without_a_scale_is_that_of_the_paper(model):
    layout, t_B = Layout.of(SIZES), torch.tensor([0.3, 0.6])
    x = noise_of(layout, 6)
    chosen = guide(model, layout, CONDITION, Guidance())(x, t_B)
    assert torch.equal(chosen, guide(model, layout, CONDITION, Guidance(1.5))(x, t_B))


def test_channels_that_are_not_guided_are_conditional(model):
    layout, t_B = Layout.of(SIZES), torch.tensor([0.3, 0.6])
    x = noise_of(layout, 6)
    conditional, unconditional = pair(model, layout, x, t_B)
    result = guide(model, layout, CONDITION, Guidance(3.0, guidance_channels=4))(x, t_B)
    expected = unconditional + 3 * (conditional - unconditional)
    torch.testing.assert_close(result[:, :4], expected[:, :4], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(result[:, 4:], conditional[:, 4:], rtol=1e-5, atol=1e-5)


def test_more_channels_than_there_are_is_refused(model):
    with pytest.raises(UserError, match="`guidance_channels` is 7; the latent has 6"):
        guide(model, Layout.of(SIZES), CONDITION, Guidance(3.0, guidance_channels=7))


def test_power_cosine_falls_from_noise_to_data(model):
    layout = Layout.of(SIZES)
    x = noise_of(layout, 6)
    for t, power in ((0.0, 2.0), (0.25, 0.5), (1.0, 3.0)):
        t_B = torch.full((2,), t)
        conditional, unconditional = pair(model, layout, x, t_B)
        strength = 1 + (4 - 1) * (1 - math.cos(math.pi * (1 - t) ** power)) / 2
        result = guide(model, layout, CONDITION, Guidance(4.0, guidance_power=power))(x, t_B)
        expected = unconditional + strength * (conditional - unconditional)
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)


def counted(model, monkeypatch):
    """The list to which every forward pass adds its number of images."""
    seen, forward = [], type(model).forward

    def spy(self, x, layout, *rest, **named):
        seen.append(len(layout))
        return forward(self, x, layout, *rest, **named)

    monkeypatch.setattr(type(model), "forward", spy)
    return seen


def test_the_unconditional_half_is_computed_only_where_it_counts(model, monkeypatch):
    seen = counted(model, monkeypatch)
    layout = Layout.of(SIZES)
    interval = Guidance(2.0, guidance_interval=(0.25, 0.5))
    for settings, times in (
        (Guidance(1.0), [0.5, 0.5]),
        (Guidance(2.0), [0.5, 0.5]),
        (interval, [0.1, 0.9]),
        (interval, [0.25, 0.5]),
        (interval, [0.3, 0.7]),
    ):
        guide(model, layout, CONDITION, settings)(torch.zeros(7, 6), torch.tensor(times))
    assert seen == [2, 4, 2, 4, 3]


@pytest.mark.parametrize("times", [[0.3, 0.7], [0.7, 0.3], [0.3, 0.4], [0.1, 0.9]])
def test_an_interval_guides_each_image_by_its_own_time(model, times):
    layout, t_B = Layout.of(SIZES), torch.tensor(times)
    x = noise_of(layout, 6)
    conditional, unconditional = pair(model, layout, x, t_B)
    inside = layout.spread((t_B >= 0.25) & (t_B <= 0.5))[:, None]
    expected = torch.where(inside, unconditional + 3 * (conditional - unconditional), conditional)
    result = guide(model, layout, CONDITION, Guidance(3.0, guidance_interval=(0.25, 0.5)))(x, t_B)
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)


def test_a_predicted_variance_is_not_guided_and_time_runs_to_data():
    shape = {"depth": 1, "width": 32, "heads": 2, "patch_size": 1, "in_channels": 6, "num_classes": 5}
    model = randomized(FiT(**shape, path="ddpm", prediction="noise")).eval()
    layout, steps = Layout.of(SIZES), torch.tensor([900, 900])
    x = noise_of(layout, 6)
    conditional, unconditional = pair(model, layout, x, steps)
    early = guide(model, layout, CONDITION, Guidance(3.0, guidance_interval=(0.0, 0.2)))(x, steps)
    torch.testing.assert_close(early[:, 6:], conditional[:, 6:], rtol=1e-5, atol=1e-5)
    expected = unconditional + 3 * (conditional - unconditional)
    torch.testing.assert_close(early[:, :6], expected[:, :6], rtol=1e-4, atol=1e-4)
    late = guide(model, layout, CONDITION, Guidance(3.0, guidance_interval=(0.2, 1.0)))(x, steps)
    torch.testing.assert_close(late, conditional, rtol=1e-5, atol=1e-5)


def test_one_function_guides_images_while_their_times_enter_and_leave_the_interval(model):
    layout, settings = Layout.of(SIZES), Guidance(3.0, guidance_interval=(0.25, 0.5))
    x = noise_of(layout, 6)
    output = guide(model, layout, CONDITION, settings)
    for times in ([0.1, 0.3], [0.3, 0.3], [0.3, 0.6], [0.2, 0.4], [0.2, 0.4], [0.6, 0.7], [0.4, 0.9]):
        t_B = torch.tensor(times)
        fresh = guide(model, layout, CONDITION, settings)(x, t_B)
        assert torch.equal(output(x, t_B), fresh)
        conditional, unconditional = pair(model, layout, x, t_B)
        inside = layout.spread((t_B >= 0.25) & (t_B <= 0.5))[:, None]
        expected = torch.where(inside, unconditional + 3 * (conditional - unconditional), conditional)
        torch.testing.assert_close(fresh, expected, rtol=1e-4, atol=1e-4)


def test_an_image_without_a_condition_is_what_guidance_starts_from(model):
    layout, t_B = Layout.of(SIZES), torch.tensor([0.3, 0.6])
    x = noise_of(layout, 6)
    unconditional = pair(model, layout, x, t_B)[1]
    result = guide(model, layout, CONDITION.null(), Guidance(4.0))(x, t_B)
    torch.testing.assert_close(result, unconditional, rtol=1e-5, atol=1e-5)


def test_the_objective_says_how_far_a_time_is_on_the_way(model):
    class Backwards:
        def progress(self, t_B):
            return 1 - t_B

    layout, t_B = Layout.of(SIZES), torch.tensor([0.9, 0.1])
    x = noise_of(layout, 6)
    conditional, unconditional = pair(model, layout, x, t_B)
    result = guide(model, layout, CONDITION, Guidance(3.0, guidance_interval=(0.0, 0.2)), Backwards())(x, t_B)
    inside = layout.spread(torch.tensor([True, False]))[:, None]
    expected = torch.where(inside, unconditional + 3 * (conditional - unconditional), conditional)
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)


# Internal


@pytest.fixture
def with_early():
    shape = {"depth": 3, "width": 32, "heads": 2, "patch_size": 1, "in_channels": 6, "num_classes": 5}
    return randomized(FiT(**shape, early_head=1)).eval()


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_internal_guidance_is_the_formula_between_its_times(with_early, scale):
    layout, t_B = Layout.of(SIZES), torch.tensor([0.3, 0.8])
    x = noise_of(layout, 6)
    internal = Guidance(scale, internal_scale=1.7, internal_interval=(0.2, 0.7))
    with torch.no_grad():
        conditional, early = with_early(x, layout, t_B, CONDITION, early=True)
        plain = guide(with_early, layout, CONDITION, Guidance(scale))(x, t_B)
        made = guide(with_early, layout, CONDITION, internal)(x, t_B)
    more = layout.spread(torch.tensor([0.7, 0.0]))[:, None]
    torch.testing.assert_close(made, plain + more * (conditional - early), rtol=1e-4, atol=1e-4)
    assert torch.equal(with_early(x, layout, t_B, CONDITION), conditional)
    assert (made - plain)[:4].abs().max() > 1e-3


def test_internal_guidance_of_one_is_none_to_the_last_bit_and_costs_nothing(with_early, monkeypatch):
    layout, t_B = Layout.of(SIZES), torch.tensor([0.3, 0.8])
    x = noise_of(layout, 6)
    plain = guide(with_early, layout, CONDITION, Guidance(2.0))(x, t_B)
    assert torch.equal(guide(with_early, layout, CONDITION, Guidance(2.0, internal_scale=1.0))(x, t_B), plain)
    seen = counted(with_early, monkeypatch)
    guide(with_early, layout, CONDITION, Guidance(1.0, internal_scale=1.5))(x, t_B)
    guide(with_early, layout, CONDITION, Guidance(2.0, internal_scale=1.5))(x, t_B)
    assert seen == [2, 4]


def test_internal_guidance_beside_classifier_free_guidance_at_the_other_times(with_early):
    """Each image is guided by the one or the other."""
    layout, t_B = Layout.of(SIZES), torch.tensor([0.3, 0.8])
    x = noise_of(layout, 6)
    either = Guidance(3.0, guidance_interval=(0.7, 1.0), internal_scale=2.0, internal_interval=(0.0, 0.7))
    with torch.no_grad():
        made = guide(with_early, layout, CONDITION, either)(x, t_B)
        conditional, early = with_early(x, layout, t_B, CONDITION, early=True)
        unconditional = pair(with_early, layout, x, t_B)[1]
    torch.testing.assert_close(made[:4], (2 * conditional - early)[:4], rtol=1e-4, atol=1e-4)
    expected = unconditional + 3 * (conditional - unconditional)
    torch.testing.assert_close(made[4:], expected[4:], rtol=1e-4, atol=1e-4)


def test_an_early_head_that_predicts_data_guides_by_the_velocity_to_them():
    shape = {"depth": 3, "width": 32, "heads": 2, "patch_size": 1, "in_channels": 6, "num_classes": 5}
    model = randomized(FiT(**shape, early_head=1, early_prediction="data")).eval()
    layout, t_B = Layout.of(SIZES), torch.tensor([0.3, 0.8])
    x, t_T1 = noise_of(layout, 6), layout.spread(t_B)[:, None]
    with torch.no_grad():
        conditional, early = model(x, layout, t_B, CONDITION, early=True)
        internal = Guidance(1.0, internal_scale=1.7, internal_interval=(0.0, 1.0))
        made = guide(model, layout, CONDITION, internal)(x, t_B)
        at_the_end = guide(model, layout, CONDITION, internal)(x, torch.ones(2))
        plain = guide(model, layout, CONDITION, replace(internal, internal_scale=1.0))(x, t_B)
    velocity = (early - x) / (1 - t_T1)
    torch.testing.assert_close(made, conditional + 0.7 * (conditional - velocity), rtol=1e-4, atol=1e-4)
    assert torch.equal(plain, conditional)
    assert at_the_end.isfinite().all()


def test_internal_guidance_needs_an_early_head(model):
    with pytest.raises(UserError, match="`internal_scale` is for models with an early head"):
        guide(model, Layout.of(SIZES), CONDITION, Guidance(1.0, internal_scale=1.5))
    with pytest.raises(UserError, match=r"`internal_interval` is 0\.5 0\.5"):
        Guidance(internal_interval=(0.5, 0.5))
    with pytest.raises(UserError, match="`early_head` is 2; it must be below the depth, 2"):
        FiT(depth=2, width=32, heads=2, early_head=2)
