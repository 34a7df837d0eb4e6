"""Images of any sizes as one flat sequence of tokens: the type every stage speaks.

Shape suffixes, here and everywhere: B images, T tokens in all images together, C numbers a token,
D model width, H heads, K numbers a head. Only this module flattens images or makes positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor

Size = tuple[int, int]  # (rows, columns) of tokens


@dataclass(frozen=True, eq=False)
class PackedTokens:
    """B images as one sequence of T tokens, without padding. Token r·columns + c of an image is (r, c).

    Immutable. Neighbouring images of equal length are computed together on the CPU, so a pack
    sorted by length is fastest; any order is right.
    """

    x_TC: Tensor
    pos_T2: Tensor  # (row, column) within the image, int64
    image_T: Tensor  # the image a token belongs to, int64
    cu_seqlens: Tensor  # (B+1,) int32: the first token of each image, then T
    size_B2: Tensor  # (rows, columns) of each image, int64
    sizes: tuple[Size, ...]  # the same on the host, so that no length is ever read back from a device

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each image, on the host."""
        return tuple(rows * columns for rows, columns in self.sizes)

    @property
    def runs(self) -> list[tuple[int, int]]:
        """Neighbouring images of equal length, as (images, tokens of each)."""
        return [(len(list(same)), length) for length, same in groupby(self.lengths)]

    def with_tokens(self, x_TC: Tensor) -> PackedTokens:
        """The same images with other content."""
        return replace(self, x_TC=x_TC)

    def to(self, device: torch.device | str) -> PackedTokens:
        """The pack on another device."""
        names = ("x_TC", "pos_T2", "image_T", "cu_seqlens", "size_B2")
        moved = {name: getattr(self, name).to(device) for name in names}
        return replace(self, **moved)

    def spread(self, value_B: Tensor) -> Tensor:
        """Repeat each image's value for all of its tokens: (B, …) → (T, …)."""
        return value_B.index_select(0, self.image_T)

    def mean_per_image(self, value_T: Tensor) -> Tensor:
        """Average each image's tokens: (T, …) → (B, …)."""
        return torch.cat([value.mean(1) for (value,) in self.by_run(value_T)])

    def sum_per_image(self, value_T: Tensor) -> Tensor:
        """Add up each image's tokens: (T, …) → (B, …)."""
        return torch.cat([value.sum(1) for (value,) in self.by_run(value_T)])

    def scaled_sum(self, base: Tensor, x_TD: Tensor, scale_BD: Tensor) -> Tensor:
        """base + x·scale, each image's scale over its tokens; `base` is per token or per image.

        A spread copy of what is per image would cost as many bytes as the tokens; on the CPU runs
        of equal length broadcast instead. On an accelerator, where that would be many small kernels,
        values are gathered, and summed back by segment: the scatter that autograd would use rounds
        at every addition and adds in no fixed order.
        """
        # A compiled graph must not depend on the runs.
        by_run = x_TD.device.type == "cpu" and not torch.compiler.is_compiling()
        kind = _ScaledSum if by_run else _GatheredScaledSum
        return kind.apply(base, x_TD, scale_BD, self)

    def by_run(self, *values: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """Values per token or per image, cut into runs: (images, length or 1, …) each, as views."""
        runs = self.runs
        tokens, images = [n * length for n, length in runs], [n for n, _ in runs]
        total = sum(tokens)
        pieces = [value.split(tokens if len(value) == total else images) for value in values]
        for i, (count, length) in enumerate(runs):
            yield tuple(
                piece[i].unflatten(0, (count, length if len(value) == total else 1))
                for piece, value in zip(pieces, values, strict=True)
            )


class _ScaledSum(torch.autograd.Function):
    """`PackedTokens.scaled_sum` on the CPU, reading and writing every token once each way.

    Left to autograd, a gather's backward is a serial scatter, and cutting into runs copies twice.
    """

    @staticmethod
    def forward(ctx: Any, base: Tensor, x_TD: Tensor, scale_BD: Tensor, packed: PackedTokens) -> Tensor:
        ctx.save_for_backward(x_TD, scale_BD)
        ctx.packed, ctx.base_per_token = packed, len(base) == len(x_TD)
        out_TD = torch.empty_like(x_TD)
        for out, start, x, scale in packed.by_run(out_TD, base, x_TD, scale_BD):
            torch.addcmul(start, x, scale, out=out)
        return out_TD

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x_TD, scale_BD = ctx.saved_tensors
        packed = ctx.packed
        x_grad, scale_grad = torch.empty_like(x_TD), torch.empty_like(scale_BD)
        for out, grad, scale in packed.by_run(x_grad, grad_TD, scale_BD):
            torch.mul(grad, scale, out=out)
        # Image by image: a product of one image's size stays in the cache until it is summed.
        pieces = zip(grad_TD.split(packed.lengths), x_TD.split(packed.lengths), scale_grad, strict=True)
        for grad, x, out in pieces:
            torch.sum(grad * x, 0, out=out)
        base_grad = grad_TD if ctx.base_per_token else packed.sum_per_image(grad_TD)
        return base_grad, x_grad, scale_grad, None


class _GatheredScaledSum(torch.autograd.Function):
    """`PackedTokens.scaled_sum` on an accelerator."""

    @staticmethod
    def forward(ctx: Any, base: Tensor, x_TD: Tensor, scale_BD: Tensor, packed: PackedTokens) -> Tensor:
        ctx.save_for_backward(x_TD, scale_BD)
        ctx.packed, ctx.base_per_token = packed, len(base) == len(x_TD)
        base_TD = base if ctx.base_per_token else packed.spread(base)
        return torch.addcmul(base_TD, x_TD, packed.spread(scale_BD))

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x_TD, scale_BD = ctx.saved_tensors
        packed = ctx.packed

        def summed(value_TD: Tensor) -> Tensor:
            total = torch.segment_reduce(value_TD.float(), "sum", offsets=packed.cu_seqlens)
            return total.to(value_TD.dtype)

        base_grad = grad_TD if ctx.base_per_token else summed(grad_TD)
        return base_grad, grad_TD * packed.spread(scale_BD), summed(grad_TD * x_TD), None


def layout(sizes: Sequence[Size] | np.ndarray, channels: int = 0) -> PackedTokens:
    """A pack of images of these sizes with all-zero content. Raises ValueError for an empty image."""
    size_B2 = np.asarray(sizes, dtype=np.int64).reshape(-1, 2)
    if not len(size_B2) or size_B2.min() < 1:
        raise ValueError(f"a pack needs at least one image, each of at least one token: {sizes}")
    lengths = size_B2.prod(axis=1)
    cu_seqlens = np.concatenate([[0], np.cumsum(lengths)])
    image_T = np.repeat(np.arange(len(size_B2)), lengths)
    number_T = np.arange(cu_seqlens[-1]) - cu_seqlens[image_T]  # r·columns + c
    position_T2 = np.stack(np.divmod(number_T, size_B2[image_T, 1]), axis=1)
    return PackedTokens(
        x_TC=torch.zeros(len(image_T), channels),
        pos_T2=torch.from_numpy(position_T2),
        image_T=torch.from_numpy(image_T),
        cu_seqlens=torch.from_numpy(cu_seqlens.astype(np.int32)),
        size_B2=torch.from_numpy(size_B2.copy()),
        sizes=tuple((rows, columns) for rows, columns in size_B2.tolist()),
    )


def pack(images: Sequence[Tensor]) -> PackedTokens:
    """Images of tokens, each (rows, columns, C), as one pack."""
    empty = layout([(image.shape[0], image.shape[1]) for image in images])
    return empty.with_tokens(torch.cat([image.flatten(0, 1) for image in images]))


def unpack(packed: PackedTokens) -> list[Tensor]:
    """The images of a pack, each (rows, columns, C)."""
    pieces = packed.x_TC.split(packed.lengths)
    return [piece.unflatten(0, size) for piece, size in zip(pieces, packed.sizes, strict=True)]


def concatenate(packs: Sequence[PackedTokens]) -> PackedTokens:
    """One pack of all images of several packs on one device, in order."""
    images = [0, *(len(p.sizes) for p in packs)]
    tokens = [0, *(p.x_TC.shape[0] for p in packs)]
    first_image = [sum(images[: i + 1]) for i in range(len(packs))]
    first_token = [sum(tokens[: i + 1]) for i in range(len(packs))]
    starts = [p.cu_seqlens[:-1] + first for p, first in zip(packs, first_token, strict=True)]
    return PackedTokens(
        x_TC=torch.cat([p.x_TC for p in packs]),
        pos_T2=torch.cat([p.pos_T2 for p in packs]),
        image_T=torch.cat([p.image_T + n for p, n in zip(packs, first_image, strict=True)]),
        cu_seqlens=torch.cat([*starts, packs[-1].cu_seqlens[-1:] + first_token[-1]]),
        size_B2=torch.cat([p.size_B2 for p in packs]),
        sizes=tuple(size for p in packs for size in p.sizes),
    )


def select(packed: PackedTokens, images: Sequence[int]) -> PackedTokens:
    """The pack of some of the images, in the given order. Raises ValueError when there are none."""
    chosen = layout([packed.sizes[i] for i in images]).to(packed.x_TC.device)
    pieces = packed.x_TC.split(packed.lengths)
    return chosen.with_tokens(torch.cat([pieces[i] for i in images]))


def patchify(image_BCHW: Tensor, patch: int) -> Tensor:
    """Cut images (B, C, H, W) into tokens (B, rows, columns, C·patch²), ordered (channel, row, column).

    Raises ValueError when a side is not a multiple of `patch`.
    """
    height, width = image_BCHW.shape[-2:]
    if height % patch or width % patch:
        raise ValueError(f"{height}x{width} is not a multiple of the patch size {patch}")
    cut = image_BCHW.unflatten(3, (-1, patch)).unflatten(2, (-1, patch))  # B C rows p columns p
    return cut.permute(0, 2, 4, 1, 3, 5).flatten(3)


def unpatchify(tokens_BRCN: Tensor, patch: int) -> Tensor:
    """The inverse of `patchify`: (B, rows, columns, C·patch²) → (B, C, H, W)."""
    cut = tokens_BRCN.unflatten(3, (-1, patch, patch))  # B rows columns C p p
    return cut.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)
