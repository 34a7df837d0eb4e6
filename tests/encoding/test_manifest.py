import io
import json
import zlib
from dataclasses import replace

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from conftest import encoded_picture, picture
from fitv2.encoding.images import UnusableImage
from fitv2.encoding.kinds import KINDS, open_source
from fitv2.encoding.manifest import PAUSES, list_images, load_manifest, read_image, sorted_labels
from fitv2.errors import UserError


@pytest.fixture
def listed(tmp_path):
    def listed(files, url=None):
        system = fsspec.filesystem("file" if url is None else "memory")
        root = url or str(tmp_path / "source")
        for name, content in files.items():
            path = f"{root.removeprefix('memory:/')}/{name}"
            system.makedirs(path.rpartition("/")[0], exist_ok=True)
            system.pipe(path, content)
        list_images(open_source(root)).save(tmp_path / "list.arrow", tmp_path)
        return load_manifest(tmp_path / "list.arrow")

    return listed


def pictures_of(manifest):
    return [manifest.picture(row) for row in range(len(manifest.table))]


@pytest.mark.parametrize("url", [None, "memory://manifest/folders"])
def test_folders_are_labels_wherever_they_lie(listed, url):
    png = encoded_picture(32, 16)
    manifest = listed({"b/2.png": png, "a/1.png": png, "a/deep/3.png": png, "top.png": png}, url)
    assert manifest.labels == ("a", "b")
    assert manifest.splits == {"train": (0, 4)}
    found = [(p.label, p.source) for p in pictures_of(manifest)]
    assert found == [("a", "a/1.png"), ("a", "a/deep/3.png"), ("b", "b/2.png"), ("", "top.png")]
    assert read_image(manifest, manifest.picture(0)).size == (32, 16)


def test_folders_of_splits(listed):
    png = encoded_picture()
    manifest = listed({"val/b/1.png": png, "train/a/1.png": png, "train/b/2.png": png})
    assert manifest.splits == {"train": (0, 2), "validation": (2, 3)}
    assert [(p.split, p.label) for p in pictures_of(manifest)] == [
        ("train", "a"), ("train", "b"), ("validation", "b")
    ]  # fmt: skip


def test_labels_that_are_numbers_are_in_their_order():
    assert sorted_labels({"10", "9", "100"}) == ["9", "10", "100"]
    assert sorted_labels({"10", "9", "x"}) == ["10", "9", "x"]
    assert sorted_labels(["1", "001", "01"]) == sorted_labels(["01", "1", "001"]) == ["001", "01", "1"]


def test_nothing_of_use_is_said(listed):
    with pytest.raises(UserError, match="has no images: expected folders of images"):
        listed({"a/notes.txt": b"x", "b/c.html": b"x"})


def test_files_that_are_no_pictures_are_counted_by_their_endings(listed):
    texts = {f"a/{i}.txt": b"x" for i in (4, 2, 3)}  # none is beside an image
    manifest = listed({"a/1.png": encoded_picture(), "b/sound.OGG": b"x", **texts})
    assert manifest.labels == ("a",)
    assert [p.source for p in pictures_of(manifest)] == ["a/1.png"]
    assert manifest.others == [
        {"source": "b/sound.OGG", "reason": "no image by its name, which ends in .ogg", "files_like_it": 1},
        {"source": "a/2.txt", "reason": "no image by its name, which ends in .txt", "files_like_it": 3},
    ]


def saved(image, form="PNG", **options):
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def bomb():
    """A PNG that says it holds 50000×50000 pixels."""

    def chunk(name, body):
        return len(body).to_bytes(4, "big") + name + body + zlib.crc32(name + body).to_bytes(4, "big")

    header = (50000).to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    parts = (b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


RED = Image.new("RGB", (40, 20), (250, 10, 20))


def turned():
    image = RED.copy()
    image.paste((0, 0, 255), (0, 0, 8, 8))  # a blue corner, top left as stored
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by a quarter, clockwise
    return saved(image, "JPEG", quality=95, exif=exif)


def animated():
    frames = [RED, Image.new("RGB", RED.size, "blue")]
    return saved(frames[0], "GIF", save_all=True, append_images=frames[1:])


CONVERTED = {
    "mislabelled.jpg": saved(RED),  # a PNG by another name
    "nameless": saved(RED),
    "cmyk.jpg": saved(RED.convert("CMYK"), "JPEG", quality=95),
    "cmyk.tif": saved(RED.convert("CMYK"), "TIFF"),
    "animated.gif": animated(),  # its first image
    "palette.png": saved(RED.convert("P", palette=Image.Palette.ADAPTIVE)),
    "transparent.png": saved(RED.convert("RGBA")),
}


@pytest.mark.parametrize("name", CONVERTED)
def test_odd_pictures_are_converted(listed, name):
    manifest = listed({f"a/{name}": CONVERTED[name]})
    image = read_image(manifest, manifest.picture(0))
    assert (image.mode, image.size) == ("RGB", RED.size)
    np.testing.assert_allclose(np.asarray(image)[10, 20], (250, 10, 20), atol=6)


def test_sixteen_bits_keep_their_range(listed):
    grey = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
    manifest = listed({"a/deep.png": saved(Image.fromarray(grey))})
    assert (np.asarray(read_image(manifest, manifest.picture(0)))[..., 1] == grey >> 8).all()


def test_sixteen_bits_with_a_clear_shade(listed):
    grey = np.full((8, 8), 30_000, np.uint16)
    grey[:4] = 1_000
    manifest = listed({"a/clear.png": saved(Image.fromarray(grey), transparency=1_000)})
    image = np.asarray(read_image(manifest, manifest.picture(0)))
    assert (image[0, 0] == 255).all()
    assert (image[7, 7] == 30_000 >> 8).all()


def test_a_picture_that_was_turned_is_upright(listed):
    manifest = listed({"a/turned.jpg": turned()})
    image = np.asarray(read_image(manifest, manifest.picture(0)))
    assert image.shape == (40, 20, 3)
    np.testing.assert_allclose(image[2, 17], (0, 0, 255), atol=40)  # blue is at the top right
    np.testing.assert_allclose(image[2, 2], (250, 10, 20), atol=40)


SKIPPED = {
    "cut.png": (saved(picture(64, 64))[:60], "truncated|cut|broken|cannot"),
    "cut.jpg": (saved(Image.effect_noise((64, 64), 50), "JPEG")[:900], "truncated"),
    "empty.png": (b"", "empty"),
    "text.jpg": (b"not an image", "not an image"),
    "drawing.svg": (b"<svg/>", "not an image"),
    "script.png": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
    "bomb.png": (bomb(), "exceeds limit"),
    "float.tif": (saved(Image.fromarray(np.zeros((4, 4), np.float32)), "TIFF"), "no known range"),
    "wide.tif": (saved(Image.fromarray(np.zeros((4, 4), np.int32)), "TIFF"), "no known range"),
}


@pytest.mark.parametrize("name", SKIPPED)
def test_what_is_no_picture_has_a_reason(listed, name):
    content, reason = SKIPPED[name]
    manifest = listed({f"a/{name}": content, "a/good.png": encoded_picture()})
    chosen = next(p for p in pictures_of(manifest) if name in p.source)
    with pytest.raises(UnusableImage, match=f"(?i){reason}"):
        read_image(manifest, chosen)


def test_a_file_that_went_away_has_a_reason(listed, tmp_path):
    manifest = listed({"a/1.png": encoded_picture()})
    (tmp_path / "source" / "a" / "1.png").unlink()
    with pytest.raises(UnusableImage, match="cannot be read: No such file"):
        read_image(manifest, manifest.picture(0))


@pytest.mark.parametrize("error", [ConnectionResetError("reset"), TimeoutError(), OSError(24, "Too many")])
def test_what_may_pass_is_tried_again_and_then_stops_all(listed, monkeypatch, error):
    """An image is not left out because its store could not be reached for a while."""
    manifest, failing = listed({"a/1.png": encoded_picture()}), [error, error]
    waited = []
    monkeypatch.setattr("fitv2.encoding.manifest.time.sleep", waited.append)

    def read(url, picture):
        if failing:
            raise failing.pop()
        return encoded_picture()

    monkeypatch.setitem(KINDS, "images", replace(KINDS["images"], read=read))
    assert read_image(manifest, manifest.picture(0)).size == (16, 16)
    assert waited == list(PAUSES[:2])
    failing += [error] * 9
    with pytest.raises(UserError, match=r"a/1\.png cannot be read now .*: run the same command again later"):
        read_image(manifest, manifest.picture(0))


def test_chunks_end_with_a_row_group(tmp_path):
    pictures = [encoded_picture()] * 300
    pq.write_table(pa.table({"png": pictures}), tmp_path / "a.parquet", row_group_size=130)
    pq.write_table(pa.table({"png": pictures[:9]}), tmp_path / "b.parquet")
    manifest = list_images(open_source(str(tmp_path)))
    lengths = [len(chunk) for chunk in manifest.chunks(range(5, 309))]
    assert lengths == [125, 128, 2, 40, 9]
    assert [len(chunk) for chunk in replace(manifest, kind="images").chunks(range(3, 25))] == [16, 6]


def test_pictures_without_a_label_are_left_out(tmp_path):
    pq.write_table(pa.table({"png": [encoded_picture()] * 2, "label": ["x", None]}), tmp_path / "a.parquet")
    manifest = list_images(open_source(str(tmp_path)))
    assert manifest.labels == ("x",)
    assert read_image(manifest, manifest.picture(0)).size == (16, 16)
    with pytest.raises(UnusableImage, match="it has no label"):
        read_image(manifest, manifest.picture(1))


def test_a_listing_says_what_it_is_of(listed, tmp_path):
    listed({"a/1.png": encoded_picture()})
    table = pa.ipc.open_file(tmp_path / "list.arrow").read_all()
    assert json.loads(table.schema.metadata[b"manifest"])["kind"] == "images"
