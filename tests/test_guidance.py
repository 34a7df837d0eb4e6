import pytest
import torch

from fitv2.flow import noise, prediction_named
from fitv2.guidance import velocity_of
from fitv2.tokens import layout

SIZES = [(2, 2), (1, 3)]


@pytest.mark.parametrize("scale", [0.0, 1.0, 1.5, 4.0])
def test_guided_velocity_is_the_formula(model, scale):
    packed, labels, t = layout(SIZES), torch.tensor([3, 1]), torch.tensor(0.3)
    x = noise(packed.lengths, 6, [(0,), (1,)])
    state, t_B, read = packed.with_tokens(x), t.expand(2), prediction_named("velocity").velocity
    conditional = read(model(state, t_B, labels), state, t_B)
    unconditional = read(model(state, t_B, torch.full((2,), model.null_label)), state, t_B)
    expected = unconditional + scale * (conditional - unconditional)
    result = velocity_of(model, packed, labels, scale)(x, t)
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)


def test_without_guidance_the_model_runs_once_an_image(model, monkeypatch):
    seen = []
    forward = type(model).forward
    monkeypatch.setattr(
        type(model),
        "forward",
        lambda self, packed, *rest: seen.append(packed.sizes) or forward(self, packed, *rest),
    )
    packed = layout(SIZES)
    for scale in (1.0, 2.0):
        velocity_of(model, packed, torch.tensor([0, 1]), scale)(torch.zeros(7, 6), torch.tensor(0.5))
    assert [len(sizes) for sizes in seen] == [2, 4]


def test_times_may_differ_between_images(model):
    packed, labels = layout(SIZES), torch.tensor([3, 1])
    x = noise(packed.lengths, 6, [(0,), (1,)])
    velocity = velocity_of(model, packed, labels, 1.5)
    mixed = velocity(x, torch.tensor([0.2, 0.7]))
    torch.testing.assert_close(mixed[:4], velocity(x, torch.tensor(0.2))[:4], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mixed[4:], velocity(x, torch.tensor(0.7))[4:], rtol=1e-5, atol=1e-5)
