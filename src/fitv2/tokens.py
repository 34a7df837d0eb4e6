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
from torch.export import register_dataclass

Size = tuple[int, int]  # (rows, columns) of tokens
LEVELS = 2  # runs of the tokens of an image that may have times of their own


@dataclass(frozen=True, eq=False)
class Layout:
    """Which images lie in a flat sequence of tokens, and where. Token r·columns + c of an image is (r, c).

    (Unless they were reordered, as training may do.)

    Immutable, made by `Layout.of` on the host and moved to a device once. Neighbouring images of equal
    length are computed together on the CPU, so a sequence sorted by length is fastest; any order is right.
    """

    size_B2: Tensor  # (rows, columns) of each image, int64
    pos_T2: Tensor  # (row, column) within the image, int64
    image_T: Tensor  # the image a token belongs to, int64
    cu_seqlens: Tensor  # (B+1,) int32: the first token of each image, then T
    # Always on the host: nothing is read back from a device.
    host_size_B2: Tensor  # as size_B2
    length_B: Tensor  # tokens of each image and the text in front of it, int64

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
            size_B2=torch.from_numpy(size_B2.copy()),
            pos_T2=torch.from_numpy(position_T2),
            image_T=torch.from_numpy(image_T),
            cu_seqlens=torch.from_numpy(cu_seqlens.astype(np.int32)),
            host_size_B2=torch.from_numpy(size_B2.copy()),
            length_B=torch.from_numpy(lengths),
        )

    @classmethod
    def concatenate(cls, layouts: Sequence[Layout]) -> Layout:
        """All images of several layouts on one device, in order."""
        first_image = np.cumsum([0, *(len(one) for one in layouts[:-1])]).tolist()
        first_token = np.cumsum([0, *(one.tokens for one in layouts[:-1])]).tolist()
        starts = [one.cu_seqlens[:-1] + first for one, first in zip(layouts, first_token, strict=True)]
        return cls(
            size_B2=torch.cat([one.size_B2 for one in layouts]),
            pos_T2=torch.cat([one.pos_T2 for one in layouts]),
            image_T=torch.cat([one.image_T + n for one, n in zip(layouts, first_image, strict=True)]),
            cu_seqlens=torch.cat([*starts, layouts[-1].cu_seqlens[-1:] + first_token[-1]]),
            host_size_B2=torch.cat([one.host_size_B2 for one in layouts]),
            length_B=torch.cat([one.length_B for one in layouts]),
        )

    def __len__(self) -> int:
        """Images."""
        return len(self.length_B)

    @cached_property
    def sizes(self) -> tuple[Size, ...]:
        """(rows, columns) of each image."""
        return tuple((rows, columns) for rows, columns in self.host_size_B2.tolist())

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each image and its text."""
        return tuple(self.length_B.tolist())

    @cached_property
    def tokens(self) -> int:
        """Tokens of all images together, T."""
        return sum(self.lengths)

    @cached_property
    def length_groups(self) -> tuple[tuple[int, int], ...]:
        """Neighbouring images of equal length, as (images, tokens of each)."""
        return equal_neighbours(self.lengths)

    @cached_property
    def pair_groups(self) -> tuple[tuple[int, int, int], ...]:
        """Neighbouring pairs of equal lengths, as (pairs, tokens of the first, of the second).

        None at all where these are no fewer pieces than `length_groups`: they are, where images are divided.
        """
        pairs = zip(self.lengths[::2], self.lengths[1::2], strict=len(self) % 2 == 0)
        found = tuple((len(list(same)), *lengths) for lengths, same in groupby(pairs))
        return found if len(self) % 2 == 0 and 2 * len(found) < len(self.length_groups) else ()

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Layout:
        """The layout on another device."""
        names = ("size_B2", "pos_T2", "image_T", "cu_seqlens")
        moved = {name: getattr(self, name).to(device, non_blocking=non_blocking) for name in names}
        return replace(self, **moved)

    def reorder(self, order_T: Tensor) -> Layout:
        """The same images with the tokens of each in another order: `order_T` says where each was."""
        return replace(self, pos_T2=self.pos_T2.index_select(0, order_T))

    def divide(self, share: float) -> Layout:
        """Every image as two runs of tokens: its first, and its last, which are this share of them.

        A run is as a row of an image, of at least one token. Raises ValueError for an image of one.
        """
        if int(self.length_B.min()) < LEVELS:
            raise ValueError("an image of one token cannot be divided")
        last_B = (share * self.length_B.double()).round().long()
        last_B = last_B.clamp_min(1).minimum(self.length_B - 1)
        length_L = torch.stack([self.length_B - last_B, last_B], dim=1).flatten()
        runs = Layout.of(torch.stack([torch.ones_like(length_L), length_L], dim=1).numpy())
        return runs.to(self.image_T.device)

    def select(self, images: Sequence[int]) -> Layout:
        """The layout of some of the images, in the given order. Raises ValueError when there are none."""
        pieces = self.pos_T2.split(self.lengths)
        chosen = Layout.of([self.sizes[i] for i in images]).to(self.size_B2.device)
        return replace(chosen, pos_T2=torch.cat([pieces[i] for i in images]))

    def behind(self, text_length_B: Tensor, texts: int) -> Joint:
        """The same images, each behind text of its own, (B,) and `texts` tokens in all, in one sequence.

        Text token m is at (m, m), and an image behind M of them begins at (M, M) (FiTv2's text-to-image).
        """
        if torch.compiler.is_compiling():
            return self._joined(text_length_B, texts)
        lengths = tuple(text_length_B.tolist())
        if lengths not in self._joints:
            self._joints.clear()
            self._joints[lengths] = self._joined(text_length_B, texts)
        return self._joints[lengths]

    @cached_property
    def _joints(self) -> dict[tuple[int, ...], Joint]:
        """The last one that was asked for: a sampling asks at every step."""
        return {}

    def _joined(self, text_length_B: Tensor, texts: int) -> Joint:
        text_B = text_length_B.to(self.image_T.device)
        ends_B = text_B.cumsum(0)
        images_B = torch.arange(text_B.shape[0], device=text_B.device)
        image_M = torch.repeat_interleave(images_B, text_B, output_size=texts)
        number_M = torch.arange(texts, device=text_B.device) - (ends_B - text_B).index_select(0, image_M)
        # A text comes before its image; within both the order stays.
        order_T = torch.cat([2 * image_M, 2 * self.image_T + 1]).argsort(stable=True)
        moved_T2 = self.pos_T2 + text_B.index_select(0, self.image_T)[:, None]
        position_T2 = torch.cat([number_M[:, None].expand(-1, 2), moved_T2])
        layout = replace(
            self, pos_T2=position_T2.index_select(0, order_T),
            image_T=torch.cat([image_M, self.image_T]).index_select(0, order_T),
            cu_seqlens=self.cu_seqlens + torch.cat([ends_B.new_zeros(1), ends_B]).int(),
            length_B=self.length_B + text_length_B,
        )  # fmt: skip
        return Joint(layout, order_T, order_T.argsort()[texts:])

    def spread(self, value_B: Tensor) -> Tensor:
        """Repeat each image's value for all of its tokens: (B, …) → (T, …)."""
        return value_B.index_select(0, self.image_T)

    def mean_per_image(self, value_T: Tensor) -> Tensor:
        """Average each image's tokens: (T, …) → (B, …)."""
        if value_T.is_cuda:  # one kernel in place of one for every length
            return torch.segment_reduce(value_T, "mean", offsets=self.cu_seqlens)
        return torch.cat([value.mean(1) for (value,) in self._in_order(value_T)])

    def sum_per_image(self, value_T: Tensor) -> Tensor:
        """Add up each image's tokens: (T, …) → (B, …)."""
        return torch.cat([value.sum(1) for (value,) in self._in_order(value_T)])

    def by_length_group(self, *values: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """Values per token or per image, cut into runs: (images, length or 1, …) each, as views.

        Every image is in one of them; of pairs that are alike all first ones come before the second ones.
        """
        if not self.pair_groups:
            yield from self._in_order(*values)
            return
        of_token = [value.shape[0] == self.tokens for value in values]
        token = pair = 0
        for count, *lengths in self.pair_groups:
            tokens = slice(token, token := token + count * sum(lengths))
            images = slice(pair, pair := pair + 2 * count)
            for place, start, length in ((0, 0, lengths[0]), (1, *lengths)):
                yield tuple(
                    value[tokens].unflatten(0, (count, -1))[:, start : start + length] if each
                    else value[images].unflatten(0, (count, 2))[:, place : place + 1]
                    for value, each in zip(values, of_token, strict=True)
                )  # fmt: skip

    def _in_order(self, *values: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """The same, in order of the images."""
        runs, tokens = self.length_groups, self.tokens
        of_token = [value.shape[0] == tokens for value in values]
        if len(runs) == 1:  # nothing to cut
            (run,) = runs
            both = zip(values, of_token, strict=True)
            yield tuple(value.unflatten(0, run if each else (run[0], 1)) for value, each in both)
            return
        sizes = [n for n, _ in runs], [n * length for n, length in runs]
        pieces = [value.split(sizes[each]) for value, each in zip(values, of_token, strict=True)]
        for i, (count, length) in enumerate(runs):
            both = zip(pieces, of_token, strict=True)
            yield tuple(piece[i].unflatten(0, (count, length if each else 1)) for piece, each in both)


register_dataclass(Layout, serialized_type_name="fitv2.Layout")  # as an argument of what is exported


def equal_neighbours(lengths: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Runs of equal lengths, as (how many, length)."""
    return tuple((len(list(same)), length) for length, same in groupby(lengths))


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
