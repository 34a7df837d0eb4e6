"""Kernels, each beside the plain formula that it computes.

The formula is the reference in tests. It also runs where a kernel cannot: under `torch.compile`, and under
the transforms of `torch.func` (Jacobian products, vmap over seeds). What each kernel gains is measured by
benchmarks/kernels.py.
"""

from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.functional import silu

from fitv2.tokens import Layout


def use_formulas() -> bool:
    """Whether operations are being traced or transformed, so that only plain formulas will do."""
    transformed = torch._C._functorch.peek_interpreter_stack() is not None
    return transformed or forward_ad._current_level >= 0 or torch.compiler.is_compiling()


# base + x·scale -----------------------------------------------------------------------------------


def scaled_sum(base: Tensor, x_TD: Tensor, scale_BD: Tensor, layout: Layout) -> Tensor:
    """base + x·scale, each image's scale over its tokens; `base` is per token or per image.

    A spread copy of what is per image would cost as many bytes as the tokens; on the CPU runs of equal
    length broadcast instead. On an accelerator, where that would be many small kernels, values are
    gathered, and summed back by segment: the scatter that autograd would use rounds at every addition
    and adds in no fixed order.
    """
    if use_formulas():  # a compiled graph must not depend on the runs
        return scaled_sum_formula(base, x_TD, scale_BD, layout)
    if x_TD.device.type != "cpu":
        return _GatheredScaledSum.apply(base, x_TD, scale_BD, layout)
    if torch.is_grad_enabled():
        return _ScaledSum.apply(base, x_TD, scale_BD, layout)
    return _scaled_sum_by_runs(base, x_TD, scale_BD, layout)


def scaled_sum_formula(base: Tensor, x_TD: Tensor, scale_BD: Tensor, layout: Layout) -> Tensor:
    """`scaled_sum` in plain operations."""
    # Not len(): it would fix the number in what is exported.
    base_TD = base if base.shape[0] == x_TD.shape[0] else layout.spread(base)
    return torch.addcmul(base_TD, x_TD, layout.spread(scale_BD))


IN_CACHE = 1 << 16  # numbers


def _scaled_sum_by_runs(base: Tensor, x_TD: Tensor, scale_BD: Tensor, layout: Layout) -> Tensor:
    out_TD = torch.empty_like(x_TD)
    for out, start, x, scale in layout.by_length_group(out_TD, base, x_TD, scale_BD):
        torch.addcmul(start, x, scale, out=out)
    return out_TD


class _ScaledSum(torch.autograd.Function):
    """On the CPU, reading and writing every token once each way.

    Left to autograd, a gather's backward is a serial scatter, and cutting into runs copies twice.
    """

    @staticmethod
    def forward(ctx: Any, base: Tensor, x_TD: Tensor, scale_BD: Tensor, layout: Layout) -> Tensor:
        ctx.save_for_backward(x_TD, scale_BD)
        ctx.layout, ctx.base_per_token = layout, len(base) == len(x_TD)
        return _scaled_sum_by_runs(base, x_TD, scale_BD, layout)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x_TD, scale_BD = ctx.saved_tensors
        layout = ctx.layout
        x_grad, scale_grad = torch.empty_like(x_TD), torch.empty_like(scale_BD)
        base_grad = grad_TD
        for out, grad, scale in layout.by_length_group(x_grad, grad_TD, scale_BD):
            torch.mul(grad, scale, out=out)
        # A few images at a time: their product stays in the cache until it is summed.
        for grads, xs, outs in layout.by_length_group(grad_TD, x_TD, scale_grad):
            few = max(1, IN_CACHE // (grads.shape[1] * grads.shape[2]))
            pieces = zip(grads.split(few), xs.split(few), outs.split(few), strict=True)
            for grad, x, out in pieces:
                torch.sum(grad * x, 1, keepdim=True, out=out)
        if not ctx.base_per_token:
            base_grad = torch.empty_like(scale_BD)
            for grads, outs in layout.by_length_group(grad_TD, base_grad):
                torch.sum(grads, 1, keepdim=True, out=outs)
        return base_grad, x_grad, scale_grad, None


class _GatheredScaledSum(torch.autograd.Function):
    """On an accelerator."""

    @staticmethod
    def forward(ctx: Any, base: Tensor, x_TD: Tensor, scale_BD: Tensor, layout: Layout) -> Tensor:
        ctx.save_for_backward(x_TD, scale_BD)
        ctx.layout, ctx.base_per_token = layout, len(base) == len(x_TD)
        return scaled_sum_formula(base, x_TD, scale_BD, layout)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x_TD, scale_BD = ctx.saved_tensors
        layout = ctx.layout

        def sum_images(value_TD: Tensor) -> Tensor:
            total = torch.segment_reduce(value_TD.float(), "sum", offsets=layout.cu_seqlens)
            return total.to(value_TD.dtype)

        base_grad = grad_TD if ctx.base_per_token else sum_images(grad_TD)
        return base_grad, grad_TD * layout.spread(scale_BD), sum_images(grad_TD * x_TD), None


# silu(gate)·up ------------------------------------------------------------------------------------


def gated_silu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate)·up, keeping its inputs alone for the backward pass: autograd would keep silu(gate) too.

    In bfloat16 on a CPU computing silu(gate) again costs more than it saves (0.74 times the speed).
    """
    slower = gate.device.type == "cpu" and gate.dtype == torch.bfloat16
    return gated_silu_formula(gate, up) if slower or use_formulas() else _GatedSiLU.apply(gate, up)


def gated_silu_formula(gate: Tensor, up: Tensor) -> Tensor:
    """`gated_silu` in plain operations."""
    return silu(gate) * up


class _GatedSiLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), silu(gate).mul_(grad)


# Rotation of pairs --------------------------------------------------------------------------------


def rotate(x_THK: Tensor, rotation_T1P: Tensor) -> Tensor:
    """Turn interleaved pairs (2i, 2i+1) of every head by complex numbers, in float32.

    Returns the dtype of `x_THK`.
    """
    if use_formulas():  # compilers generate no code for complex numbers
        return rotate_formula(x_THK, rotation_T1P)
    pairs = torch.view_as_complex(x_THK.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotation_T1P).flatten(-2).to(x_THK.dtype)


def rotate_formula(x_THK: Tensor, rotation_T1P: Tensor) -> Tensor:
    """`rotate` in real numbers."""
    wide = x_THK if x_THK.dtype == torch.float64 else x_THK.float()
    a, b = wide.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = torch.view_as_real(rotation_T1P).unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2).to(x_THK.dtype)


# Parts of a linear layer --------------------------------------------------------------------------


def linear_parts(layer: torch.nn.Module, x: Tensor, sizes: tuple[int, ...]) -> list[Tensor]:
    """The output of a linear layer, cut along its last axis, each part contiguous.

    Elementwise kernels are several times slower on parts of one matrix. So a plain `nn.Linear` is
    multiplied part by part; anything else (an adapter, an offloaded or a quantized layer) is called.
    """
    if not is_plain_linear(layer):
        return list(layer(x).split(sizes, dim=-1))
    weights, biases = layer.weight.split(sizes), layer.bias.split(sizes)
    return [torch.nn.functional.linear(x, w, b) for w, b in zip(weights, biases, strict=True)]


def is_plain_linear(layer: torch.nn.Module) -> TypeGuard[torch.nn.Linear]:
    """Whether calling a layer would do nothing but multiply by its weight and add its bias."""
    hooks = layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks
    return (
        type(layer) is torch.nn.Linear
        and "forward" not in layer.__dict__  # what accelerate and diffusers replace
        and type(layer.weight) in (Tensor, torch.nn.Parameter)
        and not hooks
    )
