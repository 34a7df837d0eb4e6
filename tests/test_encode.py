import io
import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from conftest import picture
from fitv2.data import TokenDataset
from fitv2.encode import encode
from fitv2.errors import UserError
from fitv2.images import flexible_resize
from fitv2.settings import Encoding
from fitv2.tokens import unpack, unpatchify


def test_tokens_hold_the_resized_pictures(folder, tokens):
    dataset = TokenDataset(tokens)
    assert dataset.card.about.labels == ("blue", "red")
    assert dataset.card.pictures == {"train": 12}
    sources = dataset.rows.data.column("source").to_pylist()
    for row in range(0, len(sources), 2):
        from PIL import Image

        expected = np.array(flexible_resize(Image.open(folder / sources[row]), 16, 16)) / 127.5 - 1
        image, mirrored = unpack(dataset.batch(np.array([row, row + 1]))[0])
        pixels = unpatchify(image[None], 16)[0]
        np.testing.assert_allclose(pixels.permute(1, 2, 0), expected, atol=1e-3)
        assert torch.equal(unpatchify(mirrored[None], 16)[0], pixels.flip(2))
        assert dataset.card.about.labels[dataset.labels[row]] == sources[row].split("/")[0]


def test_several_limits_store_several_sizes(folder, tmp_path):
    encode(folder, tmp_path / "set", Encoding(max_tokens=(16, 4), mirror=False), workers=0)
    dataset = TokenDataset(tmp_path / "set")
    lengths = dataset.sizes.prod(axis=1)
    assert dataset.first_rows.tolist() == list(range(0, 24, 2))
    assert lengths[1::2].max() <= 4 < lengths[::2].max() <= 16


def test_parquet_splits_and_labels(tmp_path):
    for split, seeds in (("train", range(3)), ("validation", range(3, 5))):
        rows = []
        for seed in seeds:
            file = io.BytesIO()
            picture(32, 48, seed).save(file, "WEBP", lossless=True)
            rows.append({"image": {"bytes": file.getvalue(), "path": None}, "label": f"l{seed % 2}"})
        (tmp_path / "source").mkdir(exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "source" / f"{split}.parquet")
    report = encode(tmp_path / "source", tmp_path / "set", workers=0)
    assert report.encoded == {"train": 3, "validation": 2}
    assert len(TokenDataset(tmp_path / "set", "validation").first_rows) == 2


def test_broken_pictures_are_listed_and_the_rest_goes_on(folder, tmp_path):
    source = tmp_path / "source"
    (source / "a").mkdir(parents=True)
    whole = (folder / "blue" / "0.png").read_bytes()
    (source / "a" / "good.png").write_bytes(whole)
    (source / "a" / "cut.png").write_bytes(whole[:60])
    (source / "a" / "empty.png").write_bytes(b"")
    (source / "a" / "text.jpg").write_text("not a picture")
    (source / "a" / "notes.txt").write_text("not meant as one")
    report = encode(source, tmp_path / "set", workers=0)
    listed = [json.loads(line) for line in (tmp_path / "set" / "skipped.jsonl").read_text().splitlines()]
    assert (report.encoded, report.skipped) == ({"train": 1}, 3)
    assert [entry["source"] for entry in listed] == ["a/cut.png", "a/empty.png", "a/text.jpg"]
    assert all(entry["reason"] for entry in listed)


def test_a_name_that_is_not_utf8_is_kept_as_well_as_can_be(folder, tmp_path):
    odd = os.fsencode(tmp_path / "source") + b"/caf\xe9"
    Path(os.fsdecode(odd)).mkdir(parents=True)
    Path(os.fsdecode(odd + b"/a.png")).write_bytes((folder / "blue" / "0.png").read_bytes())
    encode(tmp_path / "source", tmp_path / "set", workers=0)
    assert TokenDataset(tmp_path / "set").card.about.labels == ("caf\ufffd",)


def test_parquet_that_is_none_or_has_other_columns_is_named(tmp_path):
    (tmp_path / "train.parquet").write_text("not parquet")
    with pytest.raises(UserError, match=r"train\.parquet is not a Parquet file"):
        encode(tmp_path, tmp_path / "set", workers=0)
    pq.write_table(pa.table({"picture": [b""]}), tmp_path / "train.parquet")
    with pytest.raises(UserError, match="no columns image and label, but picture"):
        encode(tmp_path, tmp_path / "set", workers=0)


def test_nothing_to_encode_leaves_nothing(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    with pytest.raises(UserError, match="no pictures"):
        encode(source, tmp_path / "set", workers=0)
    with pytest.raises(UserError, match="not a folder"):
        encode(source / "none", tmp_path / "set", workers=0)
    (source / "bad.png").write_text("x")
    with pytest.raises(UserError, match="none of the 1 pictures"):
        encode(source, tmp_path / "set", workers=0)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_full_disk_leaves_nothing(folder, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fitv2.encode.ShardWriter.flush", full)
    with pytest.raises(OSError, match="No space left"):
        encode(folder, tmp_path / "set", workers=0)
    assert not list(tmp_path.iterdir())


def test_the_same_bytes_each_time(folder, tokens, tmp_path):
    encode(folder, tmp_path / "again", Encoding(max_tokens=(16,)), workers=2)
    for path in tokens.iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()
