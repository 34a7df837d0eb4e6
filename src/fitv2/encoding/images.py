"""Images and their sizes: reading any image as RGB, and resizing under a token budget."""

import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from fitv2.errors import UserError

# Raster formats alone: Pillow would hand PostScript to an interpreter, where there is one.
FORMATS = (
    "AVIF", "BMP", "DDS", "DIB", "GIF", "ICO", "JPEG", "JPEG2000", "PCX", "PNG", "PPM", "PSD", "QOI", "SGI",
    "TGA", "TIFF", "WEBP",
)  # fmt: skip


MOST_BYTES = 1536 << 20  # of memory that an image may take
LARGE = 128 << 20  # of these there is one at a time
# What decoders hold beside Pillow's own image, as measured: so many images of four bytes a pixel.
DECODER_COPIES = {"JPEG2000": 3, "WEBP": 2, "AVIF": 1}
TILE_WIDTH, TILE_LENGTH = 322, 323


class UnusableImage(Exception):  # noqa: N818 (the noun reads better where it is caught)
    """An image that cannot be used, with the reason as its message."""


class NoImage(UnusableImage):
    """There is none in its place."""


def resized(width: int, height: int, max_tokens: int, unit: int) -> tuple[int, int]:
    """The flexible resize of FiT: (width, height) in pixels after it, both multiples of `unit`.

    Keeps the aspect ratio, shrinks to an area of `max_tokens`·unit² pixels if larger, and floors
    both sides to a multiple of `unit`, the pixels a token covers. Never enlarges, except a side
    under one unit. A strip so thin that this leaves more than `max_tokens` is shortened to fit
    (the released rule would exceed its own limit, or fail, there).
    """
    if width < 1 or height < 1:
        raise UnusableImage("zero-sized image")
    side = unit * math.sqrt(max_tokens)
    w, h = float(width), float(height)
    if width * height >= side**2:  # in the released order of operations: squares stay exact
        w = math.sqrt(width / height) * side
        h = w * height / width
    if min(w, h) < unit:
        w, h = (unit, unit * height / width) if w < h else (unit * width / height, unit)
    columns, rows = (min(int(pixels / unit), max_tokens) for pixels in (w, h))
    return columns * unit, rows * unit


def load_rgb(
    source: Path | IO[bytes],
    hold: Callable[[], object] = lambda: None,
    *,
    background: str = "white",
    size: tuple[int, int] | None = None,
) -> Image.Image:
    """An image as RGB, upright; transparent pixels become white. Raises UnusableImage with the reason.

    One of another size than `size` is refused before it is decoded.

    How much memory it takes is known from its header, before it is decoded. A JPEG of more than MOST_BYTES
    is decoded smaller; others are refused. Before one of more than LARGE `hold` is called, which may wait
    for others to be done. Pillow itself refuses images above 179 megapixels.
    """
    Image.init()  # else a format that was not met yet is unknown
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's notes on odd metadata are not ours to pass on
            with Image.open(source, formats=FORMATS) as opened:
                if size is not None and sorted(opened.size) != sorted(size):
                    raise UnusableImage(other_size(opened, size))
                if memory_of(opened) > MOST_BYTES:
                    decode_smaller(opened)
                if memory_of(opened) > LARGE:
                    hold()
                ImageOps.exif_transpose(opened, in_place=True)
                return _on(background, _eight_bits(opened, opened.format))
    except (UnusableImage, MemoryError):
        raise
    except UnidentifiedImageError as error:
        raise UnusableImage("not an image that can be read") from error
    except Exception as error:  # decoders raise anything at all on damaged files
        raise UnusableImage(str(error) or type(error).__name__) from error


def memory_of(image: Image.Image) -> int:
    """Bytes that decoding an image and putting it on white takes: Pillow holds four a pixel, each time."""
    copies = 5 if image.has_transparency_data or image.mode[0] in "IF" else 2
    copies += DECODER_COPIES.get(image.format or "", 0)
    tags = getattr(image, "tag_v2", {})  # of a TIFF, whose tiles may be larger than the image
    tile = tags.get(TILE_WIDTH, 0) * tags.get(TILE_LENGTH, 0)
    return 4 * copies * max(image.width * image.height, tile)


def decode_smaller(image: Image.Image) -> None:
    """Have an image decoded at a half to an eighth of its sides. Raises UnusableImage if it cannot be."""
    width, height = image.size
    for part in (2, 4, 8):
        if memory_of(image) > MOST_BYTES:
            image.draft(None, (width // part, height // part))
    if memory_of(image) > MOST_BYTES:
        megabytes = f"{memory_of(image) >> 20} MB of memory; at most {MOST_BYTES >> 20} are used"
        raise UnusableImage(f"its {width}x{height} pixels take {megabytes}")


def _eight_bits(image: Image.Image, form: str | None) -> Image.Image:
    """Pillow would clip wider grey pixels at 255; their high byte is meant."""
    if image.mode == "F" or (image.mode == "I" and form not in ("PNG", "PPM")):
        raise UnusableImage("pixels of 32 bits have no known range")
    if not image.mode.startswith("I"):
        return image
    deep = np.asarray(image)  # 16 bits, which Pillow may hold in 32
    grey = Image.fromarray((deep.clip(0, 65535) >> 8).astype(np.uint8))
    clear = image.info.get("transparency")
    if isinstance(clear, int):
        grey.putalpha(Image.fromarray(np.where(deep == clear, 0, 255).astype(np.uint8)))
    return grey


def _on(background: str, image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        image.load()  # before its file is closed
        return image if image.mode == "RGB" else image.convert("RGB")  # which copies what is RGB
    rgba = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, background), rgba).convert("RGB")


def other_size(image: Image.Image, size: tuple[int, int]) -> str:
    """What is wrong with an image that has not this size."""
    return f"it has {image.width}x{image.height} pixels, not {size[0]}x{size[1]}"


def load_mask(source: IO[bytes], size: tuple[int, int], hold: Callable[[], object]) -> Image.Image:
    """The mask of an image of this size, grey: white, or 1 of masks of 0 and 1, is what is learned.

    Raises UnusableImage as `load_rgb` does, and for another size.
    """
    mask = load_rgb(source, hold, background="black", size=size).convert("L")
    if mask.size != size:  # it lies on its side
        raise UnusableImage(other_size(mask, size))
    return mask.point(lambda level: 255 * level) if mask.getextrema()[1] == 1 else mask


def flexible_resize(image: Image.Image, max_tokens: int, unit: int) -> Image.Image:
    """`image` at the size that `resized` gives; see there."""
    size = resized(*image.size, max_tokens, unit)
    if size == image.size:
        return image
    return image.resize(size, Image.Resampling.BICUBIC, reducing_gap=3.0)


def center_crop(image: Image.Image, side: int) -> Image.Image:
    """The centre of `image` as a square, as ADM (arXiv 2105.05233) crops ImageNet.

    Halved by a box filter while its short side is at least 2·side, then resized bicubically so
    that the short side is `side`, then cropped.
    """
    while min(image.size) >= 2 * side:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = side / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


def views(
    image: Image.Image, max_tokens: Sequence[int], unit: int, preprocess: str
) -> list[tuple[Image.Image, bool]]:
    """What is stored of an image: resized for each limit, then cropped ones; and whether each is cropped.

    Only an image with both sides above the square of a limit is cropped to it (FiTv2's mixed
    preprocessing), so every image has at least its resized view; but square images alone are stored of
    all with DiT's and SiT's preprocessing.
    """
    sides = [math.isqrt(limit) * unit for limit in max_tokens]
    if preprocess == "square":
        return [(center_crop(image, side), True) for side in sides]
    resized_views = [(flexible_resize(image, limit, unit), False) for limit in max_tokens]
    cropped = [side for side in sides if preprocess == "mixed" and min(image.size) > side]
    return resized_views + [(center_crop(image, side), True) for side in cropped]


def tokens_of_mask(mask: Image.Image, unit: int) -> np.ndarray:
    """How much of each token of a view is white in its grey mask, (rows, columns) uint8."""
    rows, columns = mask.height // unit, mask.width // unit
    pixels = np.asarray(mask, np.float64).reshape(rows, unit, columns, unit)
    return pixels.mean((1, 3)).round().astype(np.uint8)


def parse_size(text: str) -> tuple[int, int]:
    """HEIGHTxWIDTH as (height, width) in pixels. Raises UserError."""
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isascii() and part.isdecimal() and part.strip("0") for part in parts):
        raise UserError(f"size {text!r} is not HEIGHTxWIDTH in pixels, such as 64x96")
    return int(parts[0]), int(parts[1])
