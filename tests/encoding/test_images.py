import io
import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fitv2.encoding.images import (
    UnusableImage,
    center_crop,
    flexible_resize,
    load_rgb,
    memory_of,
    parse_size,
    resized,
    views,
)
from fitv2.errors import UserError

TABLE = json.loads((Path(__file__).parents[1] / "golden" / "manifest.json").read_text())["resize"]


def test_resizing_equals_the_released_table():
    for limit, width, height, new_width, new_height in TABLE["rows"]:
        assert resized(width, height, (limit // 16) ** 2, 16) == (new_width, new_height)


def test_no_picture_exceeds_the_budget_or_breaks_a_token():
    rng = np.random.default_rng(0)
    for width, height in np.exp(rng.uniform(0, 10, (500, 2))).astype(int):
        w, h = resized(int(width), int(height), 64, 16)
        assert w % 16 == h % 16 == 0
        assert 1 <= w * h <= 64 * 256


def test_zero_sized_is_unusable():
    with pytest.raises(UnusableImage, match="zero"):
        resized(0, 5, 64, 16)


def saved(image, form="PNG", **options):
    file = io.BytesIO()
    image.save(file, form, **options)
    file.seek(0)
    return file


def test_transparent_pixels_become_white():
    image = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    image.putpixel((1, 2), (255, 0, 0, 255))
    image.putpixel((2, 2), (0, 0, 0, 128))
    result = load_rgb(saved(image))
    assert result.getpixel((0, 0)) == (255, 255, 255)
    assert result.getpixel((1, 2)) == (255, 0, 0)
    assert result.getpixel((2, 2)) == (127, 127, 127)


def test_sixteen_bits_are_scaled_not_clipped():
    grey = np.linspace(0, 65535, 256).astype(np.uint16).reshape(1, 256)
    result = np.array(load_rgb(saved(Image.fromarray(grey))))
    assert (result[0, :, 0] == grey[0] >> 8).all()


def test_orientation_in_the_metadata_is_honoured():
    image = Image.new("RGB", (6, 4), "red")
    image.putpixel((0, 0), (0, 0, 255))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by a quarter, clockwise
    result = load_rgb(saved(image, exif=exif))
    assert result.size == (4, 6)
    assert result.getpixel((3, 0)) == (0, 0, 255)


def test_squares_lose_nothing_to_rounding():
    assert all(resized(side, side, 64, 16) == (128, 128) for side in range(128, 1200))


@pytest.mark.parametrize("mode", ["P", "L", "LA", "RGB", "RGBA", "1", "I;16"])
def test_every_mode_arrives_as_rgb(mode):
    result = load_rgb(saved(Image.new(mode, (5, 3))))
    assert (result.mode, result.size) == ("RGB", (5, 3))


def test_palette_transparency_becomes_white():
    image = Image.new("P", (2, 1), 1)
    image.putpalette([255, 0, 0, 0, 255, 0])
    image.putpixel((0, 0), 0)
    assert load_rgb(saved(image, transparency=0)).getpixel((0, 0)) == (255, 255, 255)


def bomb():
    """A PNG that says it holds 50000×50000 pixels."""
    chunk = lambda name, body: (  # noqa: E731
        len(body).to_bytes(4, "big") + name + body + zlib.crc32(name + body).to_bytes(4, "big")
    )
    header = (50000).to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )


def test_broken_pictures_are_unusable_with_a_reason():
    whole = saved(Image.effect_noise((64, 64), 50)).read()
    cases = {"not an image": b"hello", "truncated": whole[: len(whole) // 2], "": b"", "exceeds": bomb()}
    for reason, content in cases.items():
        with pytest.raises(UnusableImage, match=f"(?i){reason}"):
            load_rgb(io.BytesIO(content))


def tile(side):
    """A TIFF of 16×16 pixels whose tiles are `side`² large."""
    packed = zlib.compress(bytes(64))
    tags = {256: 16, 257: 16, 258: 8, 259: 8, 262: 1, 277: 1, 284: 1, 322: side, 323: side, 324: 146,
            325: len(packed)}  # fmt: skip
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + packed


def test_how_much_memory_an_image_takes_is_known_from_its_header():
    with pytest.raises(UnusableImage, match="16x16 pixels take 12207 MB of memory"):
        load_rgb(io.BytesIO(tile(40_000)))
    sizes = {form: memory_of(Image.open(saved(Image.new("RGB", (64, 32)), form)))
             for form in ("PNG", "JPEG", "WEBP", "JPEG2000")}  # fmt: skip
    assert sizes == {"PNG": 8 * 2048, "JPEG": 8 * 2048, "WEBP": 16 * 2048, "JPEG2000": 20 * 2048}
    assert memory_of(Image.open(saved(Image.new("RGBA", (64, 32))))) == 20 * 2048


def test_flexible_resize_gives_that_size_and_keeps_what_fits():
    image = Image.effect_noise((64, 32), 50)
    assert flexible_resize(image, 64, 16) is image
    assert flexible_resize(image, 2, 16).size == resized(64, 32, 2, 16)


def adm_crop(image, side):
    """ADM's centre crop, in the steps and the rounding of its own code."""
    while min(*image.size) >= 2 * side:
        image = image.resize(tuple(x // 2 for x in image.size), resample=Image.Resampling.BOX)
    scale = side / min(*image.size)
    size = tuple(round(x * scale) for x in image.size)
    array = np.array(image.resize(size, resample=Image.Resampling.BICUBIC))
    top, left = (array.shape[0] - side) // 2, (array.shape[1] - side) // 2
    return array[top : top + side, left : left + side]


@pytest.mark.parametrize("size", [(64, 64), (130, 64), (65, 200), (300, 257), (512, 400), (33, 500)])
def test_crops_are_those_of_adm(size):
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3)).astype(np.uint8)
    cropped = center_crop(Image.fromarray(noise), 32)
    assert cropped.size == (32, 32)
    assert (np.asarray(cropped) == adm_crop(Image.fromarray(noise), 32)).all()


def test_the_centre_is_kept():
    array = np.zeros((40, 100, 3), np.uint8)
    array[:, 45:55] = 255
    columns = np.asarray(center_crop(Image.fromarray(array), 40))[20, :, 0]
    assert columns[20] == 255
    assert columns[0] == columns[39] == 0


@pytest.mark.parametrize(
    ("size", "crops"),
    [((200, 129), [128, 32]), ((200, 128), [32]), ((129, 200), [128, 32]), ((200, 33), [32]), ((32, 90), [])],
)
def test_views_are_the_resized_ones_and_crops_of_what_is_larger(size, crops):
    image = Image.new("RGB", size)
    sizes = [resized(*size, limit, 16) for limit in (64, 4)]
    whole, cropped = [(size, False) for size in sizes], [((side, side), True) for side in crops]
    assert [(view.size, crop) for view, crop in views(image, (64, 4), 16, "mixed")] == whole + cropped
    assert [(view.size, crop) for view, crop in views(image, (64, 4), 16, "flexible")] == whole
    square = [((128, 128), True), ((32, 32), True)]  # also of an image that is smaller
    assert [(view.size, crop) for view, crop in views(image, (64, 4), 16, "square")] == square


def test_sizes_are_height_by_width_in_pixels_whatever_a_token_covers():
    assert parse_size("48x96") == (48, 96)
    assert parse_size("50X97") == (50, 97)
    assert parse_size("1x1") == (1, 1)


@pytest.mark.parametrize("text", ["0x16", "16x0", "-16x16", "1.5x16", "big", "16", "16x", "x16", "1x2x3", ""])
def test_what_is_no_size_is_refused_with_an_example(text):
    with pytest.raises(UserError, match=f"size '{text}' is not HEIGHTxWIDTH in pixels, such as 64x96"):
        parse_size(text)
