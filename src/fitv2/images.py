"""Pictures and their sizes: reading any image as RGB, and resizing under a token budget."""

import math
import warnings
from pathlib import Path
from typing import IO

from PIL import Image, UnidentifiedImageError

from fitv2.errors import UserError

MAX_PIXELS = 2 * (Image.MAX_IMAGE_PIXELS or 0)  # Pillow's own limit for decompression bombs: 179 megapixels


class UnusableImage(Exception):  # noqa: N818 (the noun reads better where it is caught)
    """A picture that cannot be used, with the reason as its message."""


def resized(width: int, height: int, max_tokens: int, unit: int) -> tuple[int, int]:
    """The flexible resize of FiT: (width, height) in pixels after it, both multiples of `unit`.

    Keeps the aspect ratio, shrinks to an area of `max_tokens`·unit² pixels if larger, and floors
    both sides to a multiple of `unit`, the pixels a token covers. Never enlarges, except a side
    under one unit. A strip so thin that this leaves more than `max_tokens` is shortened to fit
    (the released rule would exceed its own limit there).
    """
    if width < 1 or height < 1:
        raise UnusableImage("zero-sized image")
    area = max_tokens * unit**2
    scale = math.sqrt(area / (width * height)) if width * height > area else 1.0
    w, h = width * scale, height * scale
    if min(w, h) < unit:
        scale = unit / min(w, h)
        w, h = w * scale, h * scale
    # At least one: 16/side·side can round to just under 16.
    columns, rows = (min(max(1, int(side) // unit), max_tokens) for side in (w, h))
    return columns * unit, rows * unit


def load_rgb(source: Path | IO[bytes]) -> Image.Image:
    """A picture as RGB; transparent pixels become white. Raises UnusableImage with the reason."""
    try:
        with warnings.catch_warnings(), Image.open(source) as opened:
            warnings.simplefilter("ignore")  # Pillow's notes on odd metadata are not ours to pass on
            if opened.width * opened.height > MAX_PIXELS:
                raise UnusableImage(f"{opened.width}x{opened.height} pixels: too large to be safe")
            return _on_white(opened)
    except UnidentifiedImageError as error:
        raise UnusableImage("not an image that can be read") from error
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise UnusableImage(str(error) or type(error).__name__) from error


def _on_white(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        return image.convert("RGB")
    rgba = image.convert("RGBA")
    white = Image.new("RGBA", rgba.size, "white")
    return Image.alpha_composite(white, rgba).convert("RGB")


def flexible_resize(image: Image.Image, max_tokens: int, unit: int) -> Image.Image:
    """`image` at the size that `resized` gives; see there."""
    size = resized(*image.size, max_tokens, unit)
    if size == image.size:
        return image
    return image.resize(size, Image.Resampling.BICUBIC, reducing_gap=3.0)


def parse_size(text: str, unit: int) -> tuple[int, int]:
    """HEIGHTxWIDTH in pixels as (rows, columns) of tokens of `unit` pixels.

    Raises UserError naming the nearest valid size when a side is not a positive multiple of `unit`.
    """
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isdecimal() for part in parts):
        raise UserError(f"size {text!r} is not HEIGHTxWIDTH in pixels, such as {4 * unit}x{6 * unit}")
    height, width = map(int, parts)
    fitting = [max(unit, round(side / unit) * unit) for side in (height, width)]
    if [height, width] != fitting:
        raise UserError(
            f"size {text} is not a multiple of the token size {unit}: "
            f"the nearest is {fitting[0]}x{fitting[1]}"
        )
    return height // unit, width // unit
