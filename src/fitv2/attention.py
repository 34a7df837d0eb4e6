"""Attention of every token to all tokens of its own image, without padding and without a mask."""

from typing import cast

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from fitv2.tokens import PackedTokens


@torch.compiler.disable  # what is compiled must hold for images of any lengths
def attention(q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, packed: PackedTokens) -> Tensor:
    """Softmax attention within each image of `packed`; (T, H, K) in and out.

    On CUDA in half precision this is PyTorch's variable-length kernel; elsewhere images of equal
    length go through `scaled_dot_product_attention` together, which is also the oracle in tests.
    """
    half = q_THK.dtype in (torch.bfloat16, torch.float16)
    if q_THK.is_cuda and half and q_THK.shape[-1] % 8 == 0:  # the kernel's alignment
        return _varlen(q_THK, k_THK, v_THK, packed)
    return _by_length(q_THK, k_THK, v_THK, packed)


def _varlen(q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, packed: PackedTokens) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    # Positional arguments only: the keywords after these seven changed between releases.
    longest = max(packed.lengths)
    ends = packed.cu_seqlens
    out = varlen_attn(q_THK, k_THK, v_THK, ends, ends, longest, longest)
    return cast(Tensor, out)  # a pair only where the logarithms of the sums are asked for too


def _by_length(q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, packed: PackedTokens) -> Tensor:
    # In bfloat16 on a CPU the flash kernel's backward pass is 2 to 6 times slower than two plain
    # products (64 to 1024 tokens, Zen 4, torch 2.13); in float32 it is the faster one.
    plain = q_THK.device.type == "cpu" and q_THK.dtype == torch.bfloat16
    attend = _two_products if plain else scaled_dot_product_attention
    runs = packed.runs
    tokens = [images * length for images, length in runs]
    outputs = []
    for run, *qkv in zip(runs, *(x.split(tokens) for x in (q_THK, k_THK, v_THK)), strict=True):
        q, k, v = (x.unflatten(0, run).transpose(1, 2) for x in qkv)  # (images, H, length, K)
        outputs.append(attend(q, k, v).transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs)


def _two_products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = ((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)).softmax(-1)
    return weights @ v
