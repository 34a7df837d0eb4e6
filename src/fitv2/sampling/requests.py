"""Images to make, one request each, and what a pipeline is called with as such."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Generator, Tensor

from fitv2.conditioning import Condition, Text
from fitv2.errors import UserError
from fitv2.limits import MAX_TOKENS, check_limit
from fitv2.sampling.editing import Edit, resize, to_mask, to_pixels
from fitv2.sampling.growth import Growth
from fitv2.tokens import Size

STRENGTH = 0.6  # of a variation: what it shows stays, how it looks changes
Conditions = Callable[[Sequence[Any], Sequence[str | None]], list[Condition]]  # of labels and prompts


@dataclass(frozen=True, eq=False)
class Request:
    """One image to make. The same request gives the same image, whatever is made beside it."""

    condition: Condition  # of one image
    pixels: tuple[int, int]  # height, width
    generator: Generator
    negative: Condition | None = None  # what guidance leads away from [default: nothing in particular]
    edit: Edit | None = None  # the picture, of these pixels, that it is made from
    noise: Tensor | None = None  # (rows, columns, C) [default: drawn by the generator]

    def grid(self, unit: int) -> Size:
        """The smallest grid of tokens of `unit` pixels that covers the image."""
        height, width = self.pixels
        return -(-height // unit), -(-width // unit)

    def length(self, unit: int) -> int:
        """Tokens of its text and of the image."""
        rows, columns = self.grid(unit)
        text = self.condition.values.get("text")
        return rows * columns + (sum(text.lengths) if isinstance(text, Text) else 0)

    def covering(self, unit: int) -> Edit | None:
        """The picture that it is made from, on its whole grid."""
        rows, columns = self.grid(unit)
        return self.edit and self.edit.covering((rows * unit, columns * unit))

    def way(self, growth: Growth | None, unit: int) -> tuple[bool, float]:
        """Whether it grows, and the time from which it is made: what has to be alike in a pack.

        A picture that is there from a later time on than growth's has its size already.
        """
        start = self.edit.start if self.edit else 0.0
        grows = bool(
            growth and growth.applies(self.grid(unit)) and start < growth.time and self.noise is None
        )
        return grows, start


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """The arguments of `FiTPipeline.stream`: a single value serves all images, or there is one for each."""

    class_labels: Any = None
    height: Any = None
    width: Any = None
    prompt: Any = None
    negative_prompt: Any = None
    image: Any = None
    mask_image: Any = None
    strength: Any = None
    latents: Any = None

    def requests(
        self,
        generator: Generator | Sequence[Generator] | None,
        conditions: Conditions,
        side: int,
        unit: int,
    ) -> list[Request]:
        """One for each image; `side` in pixels is the default, `unit` that of a token.

        Raises UserError for what does not fit.
        """
        labels, heights, widths, prompts, negatives, images, masks, strengths, noises = broadcast(
            len(generator) if isinstance(generator, Sequence) else 1, **vars(self)
        )
        for picture in (*images, *masks):
            if not (picture is None or isinstance(picture, Image.Image)):
                raise UserError(f"a picture is a PIL image, not a {type(picture).__name__}")
        for text in (*prompts, *negatives):
            if not (text is None or isinstance(text, str)):
                raise UserError(f"a prompt is a text, not a {type(text).__name__}")
        own = [(side, side) if image is None else (image.height, image.width) for image in images]
        sizes = [
            (
                _pixels("height", of[0] if height is None else height),
                _pixels("width", of[1] if width is None else width),
            )
            for of, height, width in zip(own, heights, widths, strict=True)
        ]
        rngs = generators_for(generator, len(labels))
        shown = conditions(labels, prompts)
        away = [None] * len(labels) if self.negative_prompt is None else conditions([None], negatives)
        edits = [_edit(*values) for values in zip(images, masks, strengths, sizes, strict=True)]
        requests = [Request(*values) for values in zip(shown, sizes, rngs, away, edits, noises, strict=True)]
        for request in requests:
            _check_tokens(request, unit)
        return requests


def _edit(
    image: Image.Image | None, mask: Image.Image | None, strength: float | None, size: tuple[int, int]
) -> Edit | None:
    """What an image is made from, at a size (height, width)."""
    if image is None:
        if mask is not None or strength is not None:
            raise UserError("`mask_image` and `strength` go with `image`")
        return None
    pixels = to_pixels(image)
    if pixels.shape[1:] != size:
        pixels = resize(pixels, size)
    anew = None if mask is None else to_mask(mask.resize(size[::-1], Image.Resampling.NEAREST))
    if mask is not None and mask.size != image.size:
        shapes = [f"{each.height}x{each.width}" for each in (mask, image)]
        raise UserError(f"`mask_image` is {shapes[0]}, `image` {shapes[1]}")
    return Edit(pixels, anew, (STRENGTH if mask is None else 1.0) if strength is None else strength)


def broadcast(fewest: int, /, **values: Any) -> list[list[Any]]:
    """Lists of one length; where all have a single value, of the length `fewest`. Raises UserError."""
    lists = [listed(value) for value in values.values()]
    most = max(map(len, lists))
    count = fewest if most == 1 else most
    if 0 in map(len, lists) or {len(one) for one in lists} - {1, count}:
        given = [f"{len(one)} of {name}" for (name, v), one in zip(values.items(), lists, strict=True)
                 if v is not None]  # fmt: skip
        raise UserError(f"there are {', '.join(given)}: give one of each, or as many")
    return [one * count if len(one) == 1 else one for one in lists]


def listed(value: Any) -> list[Any]:
    """A value for each image; latents (rows, columns, C) are a single one."""
    if isinstance(value, list | tuple | range) or (
        isinstance(value, np.ndarray | Tensor) and value.ndim == 1
    ):
        return list(value)
    return [value]


def _pixels(name: str, value: Any) -> int:
    known = isinstance(value, int | float | np.number) and not isinstance(value, bool)
    if not known or value != value // 1 or value < 1:  # NaN differs from itself
        raise UserError(f"{name} is {value}; it must be a whole number of pixels")
    check_limit("size", int(value))
    return int(value)


def _check_tokens(request: Request, unit: int) -> None:
    rows, columns = request.grid(unit)
    if rows * columns > MAX_TOKENS:
        height, width = request.pixels
        raise UserError(
            f"an image of {height}x{width} pixels has {rows * columns} tokens; there can be {MAX_TOKENS}"
        )


def generators_for(generator: Generator | Sequence[Generator] | None, count: int) -> list[Generator]:
    """A generator for each image, on the CPU: one of another device gives it a seed. Raises UserError."""
    if isinstance(generator, list | tuple):
        if not all(isinstance(one, Generator) for one in generator) or len(generator) != count:
            raise UserError(f"{len(generator)} generators for {count} images: give one, or one for each")
        return [one if one.device.type == "cpu" else generators_for(one, 1)[0] for one in generator]
    if generator is not None and not isinstance(generator, Generator):
        raise UserError(
            f"`generator` is a torch.Generator or a list of them, not a {type(generator).__name__}"
        )
    device = "cpu" if generator is None else generator.device
    seeds = torch.randint(1 << 62, (count,), generator=generator, device=device).tolist()
    return [Generator().manual_seed(seed) for seed in seeds]
