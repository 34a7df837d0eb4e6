"""Images of any sizes as one flat sequence of tokens: the types every stage speaks.

Shape suffixes, here and everywhere: B images, T tokens in all images together, C channels per token,
D model width, H heads, K channels per head. Only this module flattens images or makes positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

Size = tuple[int, int]  # (rows, columns) of tokens


@dataclass(frozen=True, eq=False)
class Layout:
    """Which images lie in a flat sequence of tokens, and where. Token r·columns + c of an image is (r, c).

    Immutable, made by `Layout.of` on the host and moved to a device once. Neighbouring images of equal
    length are computed together on the CPU, so a sequence sorted by length is fastest; any order is right.
    """

    sizes: tuple[
        Size, ...
    ]  # (rows, columns) of each image, on the host: no length is read back from a device
    size_B2: Tensor  # the same, int64
    pos_T2: Tensor  # (row, column) within the image, int64
    image_T: Tensor  # the image a token belongs to, int64
    cu_seqlens: Tensor  # (B+1,) int32: the first token of each image, then T
    before: tuple[int, ...] = ()  # tokens of text in front of each image; left out where there is no text

    @classmethod
    def of(cls, sizes: Sequence[Size] | np.ndarray) -> Layout:
        """The layout of images of these sizes, in order. Raises ValueError for an empty image."""
        size_B2 = np.asarray(sizes, dtype=np.int64).reshape(-1, 2)
        if not len(size_B2) or size_B2.min() < 1:
            raise ValueError(f"a sequence needs at least one image, each of at least one token: {sizes}")
        lengths = size_B2.prod(axis=1)
        cu_seqlens = np.concatenate([[0], np.cumsum(lengths)])
        image_T = np.repeat(np.arange(len(size_B2)), lengths)
        number_T = np.arange(cu_seqlens[-1]) - cu_seqlens[image_T]  # r·columns + c
        position_T2 = np.stack(np.divmod(number_T, size_B2[image_T, 1]), axis=1)
        return cls(
            sizes=tuple((rows, columns) for rows, columns in size_B2.tolist()),
            size_B2=torch.from_numpy(size_B2.copy()),
            pos_T2=torch.from_numpy(position_T2),
            image_T=torch.from_numpy(image_T),
            cu_seqlens=torch.from_numpy(cu_seqlens.astype(np.int32)),
        )

    @classmethod
    def concatenate(cls, layouts: Sequence[Layout]) -> Layout:
        """All images of several layouts on one device, in order."""
        first_image = np.cumsum([0, *(len(one) for one in layouts[:-1])]).tolist()
        first_token = np.cumsum([0, *(one.tokens for one in layouts[:-1])]).tolist()
        starts = [one.cu_seqlens[:-1] + first for one, first in zip(layouts, first_token, strict=True)]
        return cls(
            sizes=tuple(size for one in layouts for size in one.sizes),
            size_B2=torch.cat([one.size_B2 for one in layouts]),
            pos_T2=torch.cat([one.pos_T2 for one in layouts]),
            image_T=torch.cat([one.image_T + n for one, n in zip(layouts, first_image, strict=True)]),
            cu_seqlens=torch.cat([*starts, layouts[-1].cu_seqlens[-1:] + first_token[-1]]),
        )

    def __len__(self) -> int:
        """Images."""
        return len(self.sizes)

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each image and its text, on the host."""
        before = self.before or (0,) * len(self)
        return tuple(m + rows * columns for m, (rows, columns) in zip(before, self.sizes, strict=True))

    @cached_property
    def tokens(self) -> int:
        """Tokens of all images together, T."""
        return sum(self.lengths)

    @cached_property
    def length_groups(self) -> tuple[tuple[int, int], ...]:
        """Neighbouring images of equal length, as (images, tokens of each)."""
        return tuple((len(list(same)), length) for length, same in groupby(self.lengths))

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Layout:
        """The layout on another device."""
        names = ("size_B2", "pos_T2", "image_T", "cu_seqlens")
        moved = {name: getattr(self, name).to(device, non_blocking=non_blocking) for name in names}
        return replace(self, **moved)

    def select(self, images: Sequence[int]) -> Layout:
        """The layout of some of the images, in the given order. Raises ValueError when there are none."""
        return Layout.of([self.sizes[i] for i in images]).to(self.size_B2.device)

    def behind(self, text_lengths: tuple[int, ...]) -> Joint:
        """The same images, each behind so many tokens of text of its own, in one sequence.

        Text token m is at (m, m), and an image behind M of them begins at (M, M) (FiTv2's text-to-image).
        """
        if text_lengths not in self._joints:
            self._joints.clear()
            self._joints[text_lengths] = self._joined(text_lengths)
        return self._joints[text_lengths]

    @cached_property
    def _joints(self) -> dict[tuple[int, ...], Joint]:
        """The last one that was asked for: a sampling asks at every step."""
        return {}

    def _joined(self, text_lengths: tuple[int, ...]) -> Joint:
        texts, images = np.asarray(text_lengths), np.asarray(self.lengths)
        starts = np.concatenate([[0], np.cumsum(texts + images)])
        image_T = np.repeat(np.arange(len(self)), texts + images)
        number_T = np.arange(starts[-1]) - starts[image_T]  # within a text and its image
        is_text_T = number_T < texts[image_T]
        # Of each token, its place among all texts followed by all images.
        order_T = np.empty(starts[-1], np.int64)
        order_T[is_text_T] = np.arange(texts.sum())
        order_T[~is_text_T] = texts.sum() + np.arange(images.sum())
        number_in_image = (number_T - texts[image_T])[~is_text_T]
        columns = np.asarray(self.sizes)[image_T[~is_text_T], 1]
        position_T2 = np.stack([number_T, number_T], axis=1)
        position_T2[~is_text_T] = np.stack(np.divmod(number_in_image, columns), axis=1)
        position_T2[~is_text_T] += texts[image_T[~is_text_T]][:, None]
        layout = Layout(
            self.sizes, self.size_B2, torch.from_numpy(position_T2), torch.from_numpy(image_T),
            torch.from_numpy(starts.astype(np.int32)), text_lengths,
        )  # fmt: skip
        device = self.size_B2.device
        images_N = torch.from_numpy(np.flatnonzero(~is_text_T)).to(device)
        return Joint(layout.to(device), torch.from_numpy(order_T).to(device), images_N)

    def spread(self, value_B: Tensor) -> Tensor:
        """Repeat each image's value for all of its tokens: (B, …) → (T, …)."""
        return value_B.index_select(0, self.image_T)

    def mean_per_image(self, value_T: Tensor) -> Tensor:
        """Average each image's tokens: (T, …) → (B, …)."""
        if value_T.is_cuda:  # one kernel in place of one for every length
            return torch.segment_reduce(value_T, "mean", offsets=self.cu_seqlens)
        return torch.cat([value.mean(1) for (value,) in self.by_length_group(value_T)])

    def sum_per_image(self, value_T: Tensor) -> Tensor:
        """Add up each image's tokens: (T, …) → (B, …)."""
        return torch.cat([value.sum(1) for (value,) in self.by_length_group(value_T)])

    def by_length_group(self, *values: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """Values per token or per image, cut into runs: (images, length or 1, …) each, as views."""
        tokens, images = [n * length for n, length in self.length_groups], [n for n, _ in self.length_groups]
        pieces = [value.split(tokens if len(value) == self.tokens else images) for value in values]
        for i, (count, length) in enumerate(self.length_groups):
            yield tuple(
                piece[i].unflatten(0, (count, length if len(value) == self.tokens else 1))
                for piece, value in zip(pieces, values, strict=True)
            )


class Joint(NamedTuple):
    """Texts and images in one sequence."""

    layout: Layout
    order_T: Tensor  # where each token lies when all texts come first, then all images
    images_N: Tensor  # the tokens of images

    def join(self, text_MD: Tensor, image_ND: Tensor) -> Tensor:
        """Each text in front of its image: (M, D) and (N, D) → (M + N, D)."""
        return torch.cat([text_MD, image_ND]).index_select(0, self.order_T)

    def images(self, joined_TD: Tensor) -> Tensor:
        """What `join` joined, without the texts: (M + N, D) → (N, D)."""
        return joined_TD.index_select(0, self.images_N)


@dataclass(frozen=True, eq=False)
class PackedTokens:
    """The tokens of images, (T, C), and how they lie."""

    x_TC: Tensor
    layout: Layout

    def __len__(self) -> int:
        """Images."""
        return len(self.layout)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedTokens:
        """The tokens and their layout on another device."""
        x_TC = self.x_TC.to(device, non_blocking=non_blocking)
        return PackedTokens(x_TC, self.layout.to(device, non_blocking))

    def select(self, images: Sequence[int]) -> PackedTokens:
        """Some of the images, in the given order. Raises ValueError when there are none."""
        pieces = self.x_TC.split(self.layout.lengths)
        return PackedTokens(torch.cat([pieces[i] for i in images]), self.layout.select(images))


def pack(images: Sequence[Tensor]) -> PackedTokens:
    """Images of tokens, each (rows, columns, C), as one sequence."""
    layout = Layout.of([(image.shape[0], image.shape[1]) for image in images])
    x_TC = torch.cat([image.flatten(0, 1) for image in images])
    return PackedTokens(x_TC, layout.to(x_TC.device))


def unpack(packed: PackedTokens) -> list[Tensor]:
    """The images of a sequence, each (rows, columns, C)."""
    pieces = packed.x_TC.split(packed.layout.lengths)
    return [piece.unflatten(0, size) for piece, size in zip(pieces, packed.layout.sizes, strict=True)]


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
