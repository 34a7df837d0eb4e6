"""Every kernel equals its formula, forward and backward."""

import pytest
import torch
from torch import nn

from fitv2.kernels import (
    _GatedSiLU,
    _GatheredScaledSum,
    _ScaledSum,
    gated_silu,
    gated_silu_formula,
    linear_parts,
    rotate,
    rotate_formula,
    scaled_sum,
    scaled_sum_formula,
    use_formulas,
)
from fitv2.tokens import Layout

SIZES = [(1, 1), (2, 7), (7, 2), (3, 3)]


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


@pytest.mark.parametrize("layout", [Layout.of(SIZES), Layout.of([(2, 7)] * 4 + [(3, 3)] * 3).divide(0.25)])
@pytest.mark.parametrize("per_token", [True, False])
@pytest.mark.parametrize("kind", [_ScaledSum, _GatheredScaledSum])
def test_scaled_sum_and_its_gradients_equal_the_formula(kind, per_token, layout):
    tokens, images = layout.tokens, len(layout)
    inputs = (
        randn(tokens if per_token else images, 6, seed=1), randn(tokens, 6, seed=2), randn(images, 6, seed=3)
    )  # fmt: skip
    for tensor in inputs:
        tensor.requires_grad_()
    out, expected = kind.apply(*inputs, layout), scaled_sum_formula(*inputs, layout)
    torch.testing.assert_close(out, expected)
    base = inputs[0] if per_token else inputs[0][layout.image_T]
    torch.testing.assert_close(expected, base + inputs[1] * inputs[2][layout.image_T])
    gradients = [torch.autograd.grad(value.square().sum(), inputs) for value in (out, expected)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_gated_silu_and_its_gradients_equal_the_formula():
    gate, up = (randn(3, 5, seed=seed).requires_grad_() for seed in (0, 1))
    torch.testing.assert_close(gated_silu(gate, up), gate * gate.sigmoid() * up)
    torch.testing.assert_close(gated_silu(gate, up), gated_silu_formula(gate, up))
    assert torch.autograd.gradcheck(_GatedSiLU.apply, (gate, up))


def test_complex_rotation_equals_the_real_one():
    x = randn(5, 3, 8).float()
    rotation = torch.polar(torch.ones(5, 1, 4), randn(5, 1, 4, seed=1).float())
    torch.testing.assert_close(rotate(x, rotation), rotate_formula(x, rotation))


def test_parts_of_a_linear_layer_are_those_of_its_output():
    layer, x = nn.Linear(4, 10), randn(3, 4).float()
    for part, expected in zip(linear_parts(layer, x, (4, 6)), layer(x).split((4, 6), -1), strict=True):
        torch.testing.assert_close(part, expected)
        assert part.is_contiguous()


def test_a_layer_that_is_more_than_its_weight_is_called():
    layer, x, called = nn.Linear(4, 10), randn(3, 4).float(), []
    layer.register_forward_hook(lambda *_: called.append("hook"))
    linear_parts(layer, x, (4, 6))
    layer = nn.Linear(4, 10)
    plain, layer.forward = layer.forward, lambda value: called.append("forward") or plain(value)
    linear_parts(layer, x, (4, 6))

    class Adapted(nn.Linear):
        def forward(self, value):
            called.append("subclass")
            return super().forward(value)

    linear_parts(Adapted(4, 10), x, (4, 6))
    assert called == ["hook", "forward", "subclass"]


def test_formulas_are_used_where_operations_are_transformed():
    seen = []
    look = lambda x: seen.append(use_formulas()) or x.sum()  # noqa: E731
    x = torch.ones(2, 3)
    look(x)
    torch.func.jvp(look, (x,), (x,))
    torch.func.vmap(look)(x)
    with torch.autograd.forward_ad.dual_level():
        look(x)
    torch.compile(lambda x: x + use_formulas(), backend="eager", fullgraph=True)(x)
    assert seen == [False, True, True, True]
    layout, scale = Layout.of([(1, 2)]), torch.ones(1, 3)
    _, tangent = torch.func.jvp(lambda x: scaled_sum(x, x, scale, layout), (x,), (x,))
    torch.testing.assert_close(tangent, 2 * x)
