"""Released latents: what they become, and that one bad file ends nothing."""

import gzip
import io
import json
import os
import random
import re

import pytest
import torch
from safetensors.torch import load_file, save, save_file

from conftest import write_latent
from fitv2.conversion.latents import convert_latents, find_latents
from fitv2.data.dataset import TokenDataset
from fitv2.errors import UserError


def pickled(held, old=False):
    file = io.BytesIO()
    torch.save(held, file, _use_new_zipfile_serialization=not old)
    return file.getvalue()


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 2684262720\n"


def headed(header):
    return len(header).to_bytes(8, "little") + header


# Released latents


def latent(**changes):
    """A released file of 2×3 tokens, with some of its tensors changed or, if None, left out."""
    row, column = torch.meshgrid(torch.arange(2), torch.arange(3), indexing="ij")
    tensors = {
        "feature": torch.randn(2, 2, 3, 16, generator=torch.Generator().manual_seed(0)),
        "grid": torch.stack([column.flatten(), row.flatten()]),
        "size": torch.tensor([2, 3], dtype=torch.int32),
        "label": torch.tensor(5),
    }
    return {name: tensor for name, tensor in (tensors | changes).items() if tensor is not None}


FEATURE, GRID = latent()["feature"], latent()["grid"]
GOOD = {
    "as it is": {},
    "label of one number": {"label": torch.tensor([5])},
    "label of 8 bits": {"label": torch.tensor(5, dtype=torch.uint8)},
    "size as a row": {"size": torch.tensor([[2, 3]])},
    "grid of floats": {"grid": GRID.float()},
    "grid of halves": {"grid": GRID.bfloat16()},
    "feature of halves": {"feature": FEATURE.half()},
    "feature of doubles": {"feature": FEATURE.double()},
    "something more": {"mask": torch.ones(6)},
}
BAD = {
    "label 3.7": ({"label": torch.tensor(3.7)}, "label is .* expected whole numbers"),
    "label 5.0": ({"label": torch.tensor(5.0)}, "label is .* expected whole numbers"),
    "label nan": ({"label": torch.tensor(torch.nan)}, "label is .* expected whole numbers"),
    "label true": ({"label": torch.tensor(True)}, "label is .* expected whole numbers"),
    "label complex": ({"label": torch.tensor(5j)}, "label is .* expected whole numbers"),
    "two labels": ({"label": torch.tensor([5, 5])}, "label has 2 numbers"),
    "no label": ({"label": torch.tensor([], dtype=torch.int64)}, "label has 0 numbers"),
    "label -1": ({"label": torch.tensor(-1)}, "label -1 is none of 1000"),
    "label of 63 bits": ({"label": torch.tensor(2**63 - 1)}, "is none of 1000"),
    "label left out": ({"label": None}, "has not feature, grid, size and label"),
    "size of floats": ({"size": torch.tensor([2.0, 3.0])}, "size is .* expected whole numbers"),
    "size of flags": ({"size": torch.tensor([True, True])}, "size is .* expected whole numbers"),
    "size of three": ({"size": torch.tensor([2, 3, 1])}, r"size is \[2, 3, 1\]"),
    "size of rank 3": ({"size": torch.tensor([[[2, 3]]])}, "size is .* expected whole numbers"),
    "size of none": ({"size": torch.tensor(6)}, r"size is \[6\]"),
    "grid between": ({"grid": GRID + 0.5}, "not row by row"),
    "grid nan": ({"grid": GRID * torch.nan}, "not row by row"),
    "grid of flags": ({"grid": GRID.bool()}, "grid is .* expected"),
    "grid complex": ({"grid": GRID.to(torch.complex64)}, "grid is .* expected"),
    "grid of rank 1": ({"grid": GRID.flatten()}, "grid is .* expected"),
    "grid of rank 3": ({"grid": GRID[None].clone()}, "grid is .* expected"),
    "grid rows first": ({"grid": GRID.flip(0)}, "not row by row"),
    "grid too long": ({"grid": torch.cat([GRID, GRID], 1)}, "not row by row"),
    "feature of whole numbers": ({"feature": FEATURE.long()}, "feature is of .* expected floating"),
    "feature of flags": ({"feature": FEATURE > 0}, "feature is of .* expected floating"),
    "feature complex": ({"feature": FEATURE.to(torch.complex64)}, "feature is of .* expected floating"),
    "feature of 8 bits": ({"feature": FEATURE.to(torch.float8_e5m2)}, "feature is of .* expected floating"),
    "feature nan": ({"feature": FEATURE * torch.nan}, "finite in float16"),
    "feature inf": ({"feature": FEATURE / 0}, "finite in float16"),
    "feature of rank 3": ({"feature": FEATURE[0].clone()}, "expected .2, rows, columns, 16"),
    "feature of rank 0": ({"feature": torch.tensor(1.0)}, "expected .2, rows, columns, 16"),
    "feature of one flip": ({"feature": FEATURE[:1].clone()}, "expected .2, rows, columns, 16"),
    "feature of no rows": ({"feature": FEATURE[:, :0].clone(), "size": torch.tensor([0, 3])}, "or none"),
    "feature too large": ({"feature": torch.zeros(2, 5, 5, 16), "size": torch.tensor([5, 5])}, "more than"),
    "nothing in it": (dict.fromkeys(latent()), "has not feature"),
}  # fmt: skip
BAD_FILES = {
    "empty": (b"", "is empty"),
    "pointer": (POINTER, "is a Git LFS pointer"),
    "html": (b"<html><body>404</body></html>", "is a page of HTML"),
    "gzip": (gzip.compress(save(latent())), "compressed by gzip"),
    "pickle": (pickled(latent()), "damaged"),
    "deep": (headed(b'{"a":' + b"[" * 5000 + b"]" * 5000 + b"}"), "damaged"),
    "wide": (headed(b'{"feature":{"dtype":"F32","shape":[' + b"9" * 400 + b'],"data_offsets":[0,0]}}'),
             "damaged"),
    **{f"cut at {length}": (save(latent())[:length], "damaged")
       for length in (1, 7, 8, 9, 40, 200, 400, 900)},
}  # fmt: skip


@pytest.fixture
def place(tmp_path):
    """A folder of released latents with one good file, `good`."""
    place = tmp_path / "latents" / "from_16_to_16"
    place.mkdir(parents=True)
    save_file(latent(), place / "good.safetensors")
    return place


def reasons(place, out):
    """Why each file was left out; that all others were taken is checked."""
    found = find_latents(place.parent)
    kept, skipped = convert_latents(found, out)
    lines = [json.loads(line) for line in (out / "skipped.jsonl").read_text().splitlines()]
    assert (kept, skipped) == (len(found.pictures) - len(lines), len(lines))
    assert all(line["reason"].isprintable() for line in lines)
    return {line["source"]: line["reason"] for line in lines}


@pytest.mark.parametrize("how", GOOD)
def test_latents_in_other_dtypes_are_taken(how, place, tmp_path):
    save_file(latent(**GOOD[how]), place / "other.safetensors")
    assert reasons(place, tmp_path / "set") == {}


@pytest.mark.parametrize("how", BAD)
def test_a_wrong_latent_is_left_out_and_the_others_are_taken(how, place, tmp_path):
    changes, said = BAD[how]
    save_file(latent(**changes), place / "bad.safetensors")
    told = reasons(place, tmp_path / "set")
    assert list(told) == ["bad.safetensors"]
    assert re.search(said, told["bad.safetensors"])
    assert "bad.safetensors" in told["bad.safetensors"]


def test_damaged_latents_are_left_out_each_with_its_reason(place, tmp_path):
    for how, (content, _) in BAD_FILES.items():
        (place / f"{how}.safetensors").write_bytes(content)
    os.mkfifo(place / "pipe.safetensors")
    (place / "folder.safetensors").mkdir()
    (place / "link.safetensors").symlink_to(place / "nowhere")
    told = reasons(place, tmp_path / "set")
    names = {f"{how}.safetensors" for how in (*BAD_FILES, "pipe", "folder", "link")}
    assert told.keys() == names
    for how, (_, said) in BAD_FILES.items():
        assert said in told[f"{how}.safetensors"]
    assert "is no file" in told["pipe.safetensors"]


def test_flipped_bytes_of_latents_never_end_the_conversion(place, tmp_path):
    whole, rng = save(latent()), random.Random(0)
    for number in range(60):
        content = bytearray(whole)
        content[rng.randrange(300 if number % 2 else len(whole))] ^= rng.randrange(1, 256)
        (place / f"{number}.safetensors").write_bytes(content)
    assert 0 < len(reasons(place, tmp_path / "set")) < 60


def test_any_error_while_reading_leaves_out_one_latent(place, tmp_path, monkeypatch):
    """Whatever a library raises; but a full memory says nothing of the file."""

    raised: list[Exception] = []

    def failing(path):
        if path.name == "bad.safetensors":
            raise raised[-1]
        return load_file(path)

    save_file(latent(), place / "bad.safetensors")
    monkeypatch.setattr("fitv2.conversion.reader.load_file", failing)
    for error in (RecursionError("deep"), KeyError("a"), OSError(5, "Input/output error"),
                  TypeError("of\ntwo lines"), ZeroDivisionError()):  # fmt: skip
        raised.append(error)
        assert list(reasons(place, tmp_path / f"set-{len(raised)}")) == ["bad.safetensors"]
    raised.append(MemoryError())
    with pytest.raises(MemoryError):
        convert_latents(find_latents(place.parent), tmp_path / "set")
    assert not (tmp_path / "set").exists()


def test_a_name_that_is_not_utf8_is_no_trouble(place, tmp_path):
    for name, changes in ((b"\xff.safetensors", {}), (b"\xfe.safetensors", {"label": None})):
        path = place / os.fsdecode(name)
        save_file(latent(**changes), tmp_path / "one")
        (tmp_path / "one").rename(path)
    assert list(reasons(place, tmp_path / "set")) == ["�.safetensors"]


def test_a_crop_with_another_label_is_left_out(place, tmp_path):
    for kind, label in (("resize", 5), ("crop", 6)):
        folder = place.parent / f"greater_than_16_{kind}"
        folder.mkdir()
        save_file(latent(label=torch.tensor(label)), folder / "a.safetensors")
    assert "another label" in reasons(place, tmp_path / "set")["a.safetensors"]


def test_where_none_can_be_used_nothing_is_written(place, tmp_path):
    (place / "good.safetensors").write_bytes(POINTER)
    with pytest.raises(UserError, match=r"no latent of 1 can be used: .*Git LFS pointer"):
        convert_latents(find_latents(place.parent), tmp_path / "set")
    (place / "good.safetensors").unlink()
    with pytest.raises(UserError, match="there are no latents"):
        convert_latents(find_latents(place.parent), tmp_path / "set")
    assert [path.name for path in tmp_path.iterdir()] == ["latents"]


# Latents


def test_latents_become_pictures_with_all_their_variants(latents, tmp_path):
    found = find_latents(latents)
    assert found.max_tokens == 16
    assert convert_latents(found, tmp_path / "set") == (3, 0)
    dataset = TokenDataset(tmp_path / "set")
    assert dataset.first_rows.tolist() == [0, 2, 4]
    shapes = [tuple(size) for size in dataset.sizes]
    assert shapes == [(2, 3)] * 2 + [(2, 8)] * 2 + [(3, 5)] * 2 + [(4, 4)] * 2
    assert dataset.labels.tolist() == [5, 5, 6, 6, 7, 7, 7, 7]
    packed, _ = dataset.batch(torch.arange(8).numpy())
    whole = load_file(latents / "from_16_to_16" / "a.safetensors")["feature"]
    torch.testing.assert_close(packed.x_TC[:12], whole.half().float().flatten(0, 2), rtol=0, atol=0)
    assert dataset.cropped.tolist() == [0] * 6 + [1] * 2
    about = dataset.card.about
    assert (about.autoencoder, about.scale, about.shift) == ("stabilityai/sd-vae-ft-ema", 0.18215, 0)
    assert (about.patch_size, about.in_channels, about.max_tokens) == (2, 4, 16)
    assert about.labels[7] == "cock"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"feature": torch.zeros(2, 2, 3, 8)}, "expected (2, rows, columns, 16)"),
        ({"feature": torch.full((2, 2, 3, 16), 1e6)}, "finite in float16"),
        ({"size": torch.tensor([3, 2])}, "size is [3, 2], its feature [2, 3]"),
        ({"grid": torch.zeros(2, 6)}, "not row by row"),
        ({"label": torch.tensor(1000)}, "label 1000 is none of 1000"),
    ],
)
def test_wrong_latents_are_left_out_and_listed(latents, tmp_path, changes, said):
    write_latent(latents / "from_16_to_16" / "e.safetensors", (2, 3), 5, **changes)
    (latents / "from_16_to_16" / "f.safetensors").write_bytes(b"cut off")
    write_latent(latents / "from_16_to_16" / "g.safetensors", (4, 5), 5)
    assert convert_latents(find_latents(latents), tmp_path / "set") == (3, 3)
    lines = [json.loads(line) for line in (tmp_path / "set" / "skipped.jsonl").read_text().splitlines()]
    assert [line["source"][0] for line in lines] == ["e", "f", "g"]
    assert said in lines[0]["reason"]
    assert "damaged" in lines[1]["reason"]
    assert "more than 16 tokens" in lines[2]["reason"]


def test_folders_that_are_no_latents(latents, tmp_path):
    assert find_latents(tmp_path) is None
    (latents / "from_16_to_256").mkdir()
    with pytest.raises(UserError, match="several limits: 16, 256"):
        find_latents(latents)
