"""Pictures as a start: variations, parts made anew, new shapes, and what lies between two noises.

A variation begins on the way, at the picture with noise in it (SDEdit: Meng et al., arXiv 2108.01073). Where
a mask says what is made anew, the rest is known all along: see `Flow.follow_around`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Generator, Tensor
from torch.nn.functional import adaptive_max_pool2d, interpolate, max_pool2d, pad

from fitv2.autoencoder import Autoencoder
from fitv2.errors import UserError
from fitv2.limits import check_limit
from fitv2.runtime.rng import generator as seeded
from fitv2.tokens import Size, patchify


@dataclass(frozen=True, eq=False)
class Edit:
    """A picture that an image is made from.

    With a mask all but what is made anew stays as it is, to the last bit. `strength` is how much of the way
    from noise to data is gone again: 1 is all of it, 0 would be none.
    """

    pixels: Tensor  # (3, H, W) in [−1, 1]
    mask: Tensor | None = None  # (H, W), bool: what is made anew [default: everything]
    strength: float = 1.0

    def __post_init__(self) -> None:
        """UserError for a strength or a mask that does not fit."""
        check_limit("strength", self.strength)
        if self.mask is not None and self.mask.shape != self.pixels.shape[1:]:
            sizes = ["x".join(map(str, shape)) for shape in (self.mask.shape, self.pixels.shape[1:])]
            raise UserError(f"`mask_image` is {sizes[0]}, the picture {sizes[1]}")
        if self.mask is not None and not self.mask.any():
            raise UserError("`mask_image` is black: nothing would be made anew")

    @property
    def start(self) -> float:
        """The time from which on it is made, 0 noise to 1 data."""
        return 1.0 - self.strength

    def covering(self, pixels: Size) -> Edit:
        """On a larger size: the middle is the picture, the rest repeats its border."""
        rows, columns = (all_ - own for all_, own in zip(pixels, self.pixels.shape[1:], strict=True))
        sides = columns // 2, columns - columns // 2, rows // 2, rows - rows // 2
        mask = None
        if self.mask is not None:
            mask = pad(self.mask[None].float(), sides, "replicate")[0] > 0
        return Edit(pad(self.pixels, sides, "replicate"), mask, self.strength)

    def scaled(self, pixels: Size) -> Edit:
        """At another size; what is made anew covers all that it covered."""
        if pixels == tuple(self.pixels.shape[1:]):
            return self
        mask = None if self.mask is None else adaptive_max_pool2d(self.mask[None].float(), pixels)[0] > 0
        return Edit(resize(self.pixels, pixels), mask, self.strength)

    def known(self, grid: Size, autoencoder: Autoencoder, patch: int) -> Tensor:
        """Which numbers of its tokens stay as they are, (rows·columns, C), bool.

        A cell of the latent stays if all its pixels do.
        """
        rows, columns = grid
        if self.mask is None:
            return torch.zeros(rows * columns, patch**2 * autoencoder.channels, dtype=torch.bool)
        anew = max_pool2d(self.mask[None, None].float(), autoencoder.downsample)
        return patchify(1 - anew.expand(-1, autoencoder.channels, -1, -1), patch).flatten(0, 2) > 0

    def around(self, made: Tensor) -> Tensor:
        """The picture with what was made anew of it, (3, H, W)."""
        return made if self.mask is None else torch.where(self.mask, made, self.pixels)


def resize(pixels: Tensor, size: Size) -> Tensor:
    """Pixels (3, h, w) at a size: bicubic, with the filter that shrinking needs."""
    return interpolate(
        pixels[None], size, mode="bicubic", align_corners=False, antialias=True
    )[0].clamp(-1, 1)  # fmt: skip


def to_pixels(image: Image.Image) -> Tensor:
    """A picture as pixels (3, H, W) in [−1, 1]; what is transparent becomes white.

    Raises UserError for what is no PIL image.
    """
    if not isinstance(image, Image.Image):
        raise UserError(f"a picture is a PIL image, not a {type(image).__name__}")
    levels = torch.from_numpy(np.array(on_background(eight_bits(image), "white").convert("RGB")))
    return levels.permute(2, 0, 1).float() / 127.5 - 1


def to_mask(image: Image.Image) -> Tensor:
    """A picture of a mask as (H, W), bool: white is made anew, as with diffusers' inpainting.

    What is transparent is black. A mask of 0 and 1 is meant as black and white.
    """
    levels = np.array(on_background(eight_bits(image), "black").convert("L"))
    return torch.from_numpy(levels) > (0 if levels.max() == 1 else 127)


def on_background(image: Image.Image, colour: str) -> Image.Image:
    """An image with what is transparent in one colour."""
    if not image.has_transparency_data:
        return image
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, colour), image)


def eight_bits(image: Image.Image) -> Image.Image:
    """An image of 16 bits in 8; Pillow would cut its values off. Raises UserError for 32 bits."""
    if image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM")):
        raise UserError("a picture of 32 bits a pixel has no known range: convert it to 8 bits first")
    if not image.mode.startswith("I"):
        return image
    return Image.fromarray((np.asarray(image).astype(np.int64) // 257).clip(0, 255).astype(np.uint8))


def place(picture: Image.Image, size: Size, at: Size | None = None) -> tuple[Image.Image, Image.Image]:
    """A picture on a larger canvas, and the mask of what is to be painted there: for outpainting.

    `size` is (height, width), `at` the row and column of its upper left corner [default: in the middle].
    Around it its border is repeated. Raises UserError where it would not lie on the canvas.
    """
    room = size[0] - picture.height, size[1] - picture.width
    top, left = (side // 2 for side in room) if at is None else at
    if not (0 <= top <= room[0] and 0 <= left <= room[1]):
        shapes = f"{picture.height}x{picture.width} at {top},{left}", f"{size[0]}x{size[1]}"
        raise UserError(f"a picture of {shapes[0]} does not lie on a canvas of {shapes[1]}")
    sides = left, room[1] - left, top, room[0] - top
    mask = Image.new("L", (size[1], size[0]), "white")
    mask.paste(0, (left, top, left + picture.width, top + picture.height))
    levels = (pad(to_pixels(picture), sides, "replicate") + 1) * 127.5
    return Image.fromarray(levels.round().byte().permute(1, 2, 0).numpy()), mask


def between(first: Tensor, second: Tensor, share: float) -> Tensor:
    """Noise on the way from one to another, of the same variance: spherical interpolation.

    For independent normal noises it has unit variance everywhere (Shoemake 1985; White, arXiv 1609.04468).
    """
    cosine = torch.cosine_similarity(first.flatten(), second.flatten(), dim=0).clamp(-1, 1)
    angle = torch.acos(cosine)
    if math.sin(angle) < 1e-4:  # the same direction
        return torch.lerp(first, second, share)
    weights = torch.sin((1 - share) * angle), torch.sin(share * angle)
    return (weights[0] * first + weights[1] * second) / torch.sin(angle)


def on_the_way(first: Tensor, last: Tensor, count: int) -> list[Tensor]:
    """`count` noises from one to another, both with them: see `between`."""
    return [between(first, last, i / max(1, count - 1)) for i in range(count)]


def shared_noises(
    grids: Sequence[Size], channels: int, seed: int, count: int, toward_seed: int | None = None
) -> list[list[Tensor]]:
    """`count` noises (rows, columns, channels) for each size: those of seed, seed + 1, …, alike at all sizes.

    With `toward_seed` those on the way from the noise of `seed` to that of the other, at each size its own.
    """
    if toward_seed is not None:
        ends = (seed, toward_seed)
        pairs = ([noise_at_sizes([grid], channels, seeded(end))[0] for end in ends] for grid in grids)
        return [on_the_way(first, last, count) for first, last in pairs]
    of_seed = [noise_at_sizes(grids, channels, seeded(seed + i)) for i in range(count)]
    return [list(noises) for noises in zip(*of_seed, strict=True)]


def noise_at_sizes(grids: Sequence[Size], channels: int, generator: Generator) -> list[Tensor]:
    """One noise seen at several sizes, each (rows, columns, channels): the middle of one large field."""
    rows, columns = (max(sides) for sides in zip(*grids, strict=True))
    field = torch.randn(rows, columns, channels, generator=generator)
    noises = []
    for own_rows, own_columns in grids:
        top, left = (rows - own_rows) // 2, (columns - own_columns) // 2
        noises.append(field[top : top + own_rows, left : left + own_columns].clone())
    return noises
