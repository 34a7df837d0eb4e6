"""Attention of every token to all tokens of its own image, without padding and without a mask."""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from fitv2.kernels import use_formulas
from fitv2.tokens import Layout, equal_neighbours

Runs = Sequence[tuple[int, int]]  # neighbouring images of equal length, as (images, length)


def attention(q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, layout: Layout) -> Tensor:
    """Softmax attention within each image of `layout`; (T, H, K) in and out.

    On CUDA in half precision this is PyTorch's variable-length kernel; elsewhere images of equal
    length go through `scaled_dot_product_attention` together, which is also the oracle in tests.

    What is compiled must hold for images of any lengths. So with gradients attention stays out of the
    compiled graph; without it is one operator in it, which reads the lengths when it runs.
    """
    if not torch.compiler.is_compiling():
        return _attend(q_THK, k_THK, v_THK, layout.cu_seqlens, layout.length_groups)
    if torch.is_grad_enabled() and torch.compiler.is_dynamo_compiling():  # torch.export goes another way
        return _attend_outside(q_THK, k_THK, v_THK, layout)
    return attend_packed(q_THK, k_THK, v_THK, layout.cu_seqlens, layout.length_B)


def _attend(q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, cu_seqlens: Tensor, runs: Runs) -> Tensor:
    half = q_THK.dtype in (torch.bfloat16, torch.float16)
    if q_THK.is_cuda and half and q_THK.shape[-1] % 8 == 0 and not use_formulas():  # the kernel's alignment
        return _attend_varlen(q_THK, k_THK, v_THK, cu_seqlens, max(length for _, length in runs))
    return _attend_by_length(q_THK, k_THK, v_THK, runs)


@torch.compiler.disable
def _attend_outside(q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, layout: Layout) -> Tensor:
    return _attend(q_THK, k_THK, v_THK, layout.cu_seqlens, layout.length_groups)


@torch.library.custom_op("fitv2::attention", mutates_args=())
def attend_packed(
    q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, cu_seqlens: Tensor, length_B: Tensor
) -> Tensor:
    """`attention` as an operator for graphs; it has no derivative."""
    runs = equal_neighbours(length_B.tolist())
    return _attend(q_THK, k_THK, v_THK, cu_seqlens, runs).contiguous()


@attend_packed.register_fake
def _(q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, cu_seqlens: Tensor, length_B: Tensor) -> Tensor:
    return torch.empty_like(q_THK, memory_format=torch.contiguous_format)


def _attend_varlen(q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    # Positional arguments only: the keywords after these seven changed between releases.
    out = varlen_attn(q_THK, k_THK, v_THK, cu_seqlens, cu_seqlens, longest, longest)
    return cast(Tensor, out)  # a pair only where the logarithms of the sums are asked for too


def _attend_by_length(q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, runs: Runs) -> Tensor:
    # In bfloat16 on a CPU the flash kernel's backward pass is 2 to 6 times slower than two matmuls
    # (64 to 1024 tokens, Zen 4, torch 2.13); in float32 it is the faster one. No kernel has a forward-mode
    # derivative.
    plain = use_formulas() or (q_THK.device.type == "cpu" and q_THK.dtype == torch.bfloat16)
    attend = attend_formula if plain else scaled_dot_product_attention
    if len(runs) == 1:  # to cut into one piece would copy gradients
        q, k, v = (x.unflatten(0, runs[0]).transpose(1, 2) for x in (q_THK, k_THK, v_THK))
        return attend(q, k, v).transpose(1, 2).flatten(0, 1)
    tokens = [images * length for images, length in runs]
    outputs = []
    for run, *qkv in zip(runs, *(x.split(tokens) for x in (q_THK, k_THK, v_THK)), strict=True):
        q, k, v = (x.unflatten(0, run).transpose(1, 2) for x in qkv)  # (images, H, length, K)
        outputs.append(attend(q, k, v).transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs)


def attend_formula(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q·kᵀ/√K)·v in two matmuls."""
    weights = ((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)).softmax(-1)
    return weights @ v
