import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from fitv2.config import Encoding
from fitv2.data.format import About
from fitv2.encoding.kinds import open_source
from fitv2.encoding.manifest import list_images
from fitv2.encoding.shard_encoder import Fitted, Reader, ShardEncoder, View
from fitv2.encoding.sources import WHOLE, ImageRef
from fitv2.runtime.workers import read_ahead


class Recorder:
    """An autoencoder of one latent pixel for 8 of the image, that notes its batches."""

    name, channels, downsample, scale, shift = "recorder", 1, 8, 1.0, 0.0

    def __init__(self):
        self.batches = []

    def encode(self, pixels, noise=None):
        self.batches.append(tuple(pixels.shape))
        latents = pixels[:, :1, ::8, ::8]
        return latents if noise is None else latents + noise


ABOUT = About(("a", "b"), "recorder", 1.0, 0.0, 2, 1, 64)


def fitted(row, sizes, crops=(), reason=None):
    picture = ImageRef("train", "ab"[row % 2], f"{row}.png", b"", WHOLE)
    rng = np.random.default_rng(row)
    views = [rng.integers(0, 256, (*size, 3)).astype(np.uint8) for size in (*sizes, *crops)]
    marked = [View(view, i >= len(sizes)) for i, view in enumerate(views)]
    return Fitted(row, picture, [] if reason else marked, reason)


def encoded(pictures, **settings):
    codec = Recorder()
    with ThreadPoolExecutor(1) as pool:
        shard = ShardEncoder(ABOUT, Encoding("recorder", **settings), codec, pool, 2)
        for picture in pictures:
            shard.add(picture)
        shard.encode_rest()
        return shard.rows(), codec, shard


MIXED = [fitted(i, [(16, 32) if i % 3 else (32, 16)]) for i in range(11)]


def test_batches_are_of_equal_shape_and_as_large_as_can_be():
    _, codec, _ = encoded(MIXED, batch_size=4, mirror=False)
    assert sorted(codec.batches) == [(3, 3, 16, 32), (4, 3, 16, 32), (4, 3, 32, 16)]
    _, codec, _ = encoded(MIXED, batch_size=4)
    assert sorted(codec.batches) == [(6, 3, 16, 32), (8, 3, 16, 32), (8, 3, 32, 16)]


def test_rows_are_in_the_order_of_the_pictures_however_they_were_batched():
    rows, _, _ = encoded(MIXED, batch_size=2)
    other, _, _ = encoded(MIXED, batch_size=5)
    assert rows.columns == other.columns
    assert all((a == b).all() for a, b in zip(rows.tokens, other.tokens, strict=True))
    assert rows.columns["source"] == [f"{i}.png" for i in range(11) for _ in range(2)]
    assert rows.columns["label"] == [i % 2 for i in range(11) for _ in range(2)]
    pixels = MIXED[3].views[0][0][::8, ::8, 0] / 127.5 - 1
    plain, mirrored = rows.tokens[6], rows.tokens[7]
    expected = pixels.reshape(2, 2, 1, 2).transpose(0, 2, 1, 3).reshape(2, 4)
    np.testing.assert_allclose(plain, expected, atol=1e-3)
    flipped = (MIXED[3].views[0][0][:, ::-1] / 127.5 - 1)[::8, ::8, 0]
    np.testing.assert_allclose(mirrored, flipped.reshape(2, 2, 1, 2).reshape(2, 4), atol=1e-3)


def test_views_are_variants_and_crops_come_last():
    rows, _, _ = encoded([fitted(0, [(16, 32), (16, 16)], [(16, 16)]), fitted(1, [(32, 32)])])
    assert rows.columns["variant"] == [0, 1, 2, 3, 4, 5, 0, 1]
    assert rows.columns["crop"] == [False] * 4 + [True] * 2 + [False] * 2
    assert list(zip(rows.columns["rows"], rows.columns["columns"], strict=True)) == [
        (1, 2), (1, 2), (1, 1), (1, 1), (1, 1), (1, 1), (2, 2), (2, 2)
    ]  # fmt: skip


def test_what_cannot_be_used_is_noted_and_takes_no_row():
    rows, _, shard = encoded([fitted(0, [(16, 16)]), fitted(1, [], reason="broken"), fitted(2, [(16, 16)])])
    assert shard.skipped == [{"source": "1.png", "reason": "broken"}]
    assert rows.columns["source"] == ["0.png"] * 2 + ["2.png"] * 2


def test_sampled_latents_have_noise_of_their_own_whatever_the_batch():
    rows, _, _ = encoded(MIXED, batch_size=2, latents="sample")
    other, _, _ = encoded(MIXED, batch_size=5, latents="sample")
    plain, _, _ = encoded(MIXED)
    noise = [a.astype(np.float32) - b for a, b in zip(rows.tokens, plain.tokens, strict=True)]
    assert all((a == b).all() for a, b in zip(rows.tokens, other.tokens, strict=True))
    assert np.concatenate([n.ravel() for n in noise]).std() == pytest.approx(1, abs=0.2)
    assert len({n.ravel()[0].item() for n in noise}) == len(noise)


def test_pictures_whose_latents_float16_cannot_hold_are_left_out():
    class Loud(Recorder):
        def encode(self, pixels, noise=None):
            return super().encode(pixels) * torch.tensor([1.0, 1e6, 1.0]).view(3, 1, 1, 1)

    with ThreadPoolExecutor(1) as pool:
        shard = ShardEncoder(ABOUT, Encoding("recorder", mirror=False), Loud(), pool, 2)
        for row in range(3):
            shard.add(fitted(row, [(16, 32)]))
        shard.encode_rest()
        rows = shard.rows()
    assert rows.columns["source"] == ["0.png", "2.png"]
    reason = "the autoencoder gives numbers that float16 cannot hold"
    assert shard.skipped == [{"source": "1.png", "reason": reason}]


def test_an_error_of_the_autoencoder_is_not_lost():
    class Broken(Recorder):
        def encode(self, pixels, noise=None):
            raise RuntimeError("out of memory")

    with ThreadPoolExecutor(1) as pool:
        shard = ShardEncoder(ABOUT, Encoding("recorder"), Broken(), pool, 2)
        shard.add(MIXED[0])
        shard.encode_rest()
        with pytest.raises(RuntimeError, match="out of memory"):
            shard.rows()


@pytest.mark.parametrize("workers", [0, 2])
def test_pictures_are_read_in_order_at_all_their_sizes(folder, tmp_path, workers):
    manifest = list_images(open_source(str(folder)))
    manifest.save(tmp_path / "list.arrow", tmp_path)
    reader = Reader(tmp_path / "list.arrow", Encoding(max_tokens=(16, 4)), 16)
    chunks = list(read_ahead(reader.read, [range(2, 9), range(10, 12)], workers))
    assert [[fitted.row for fitted in chunk] for chunk in chunks] == [list(range(2, 9)), [10, 11]]
    first = reader.fitted(0)
    assert [view.pixels.shape for view in first.views] == [(64, 64, 3), (32, 32, 3)]
    again = pickle.loads(pickle.dumps(reader)).fitted(3)
    assert (again.views[1][0] == reader.fitted(3).views[1][0]).all()
