"""Masks: from where people put them to the loss."""

import io
import json
import tarfile
from dataclasses import replace
from unicodedata import normalize

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset, Features, Image, Value
from PIL import Image as Pictures

from conftest import encoded_picture, fitv2, picture
from fitv2.config import Encoding
from fitv2.data.dataset import Steps, TokenDataset, open_card, verify_files
from fitv2.data.packing import Step
from fitv2.data.storage import Store
from fitv2.diffusion.flow import Flow
from fitv2.encoding import images
from fitv2.encoding.encode import encode
from fitv2.encoding.kinds import open_source
from fitv2.encoding.manifest import list_images, read_mask
from fitv2.errors import UserError
from fitv2.training.noising import Draws
from fitv2.training.validation import HeldOut

LEFT = np.zeros((32, 64), np.uint8)  # of two by four tokens: the left half, and a quarter of one token more
LEFT[:, :32] = 255
LEFT[:8, 32:40] = 255
TOKENS = [[255, 255, 64, 0], [255, 255, 0, 0]]


def png(array):
    file = io.BytesIO()
    Pictures.fromarray(array).save(file, "PNG")
    return file.getvalue()


PICTURE, MASK = encoded_picture(64, 32), png(LEFT)
CLEAR = np.full((32, 64, 4), 255, np.uint8)
CLEAR[..., 3] = 0  # white, but one sees through it


def fill(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def table(folder):
    file = io.BytesIO()
    pq.write_table(pa.table({"image": [PICTURE] * 3, "mask": [MASK, None, MASK], "label": ["x"] * 3}), file)
    return fill(folder, {"x.parquet": file.getvalue()})


def saved(folder):
    features = Features({"image": Image(), "mask": Image(), "label": Value("string")})
    rows = {"image": [{"bytes": PICTURE, "path": None}] * 3, "label": ["x"] * 3}
    rows["mask"] = [{"bytes": MASK, "path": None}, None, {"bytes": MASK, "path": None}]
    Dataset.from_dict(rows, features=features).save_to_disk(str(folder))
    return folder


def beside(folder):
    names = {
        "x/1.png": PICTURE,
        "x/1.mask.png": MASK,
        "x/2.png": PICTURE,
        "x/3.png": PICTURE,
        "x/3_mask.png": MASK,
    }
    return fill(folder, names)


def said(folder):
    lines = [{"file_name": "1.png", "mask_file_name": "m/one.png"}, {"file_name": "2.png"},
             {"file_name": "3.png", "mask_file_name": "m/one.png"}]  # fmt: skip
    table = "\n".join(map(json.dumps, lines)).encode()
    files = {f"{n}.png": PICTURE for n in (1, 2, 3)}
    return fill(folder, files | {"m/one.png": MASK, "metadata.jsonl": table})


def archive(folder, *names):
    """A tar of pictures and masks of these names; of three pictures, the first and last with masks."""
    file = io.BytesIO()
    names = names or ("1.png", "1.mask.png", "2.png", "3.mask.png", "3.png")
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name in names:
            content = MASK if "mask" in name.lower() else PICTURE
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return fill(folder, {"x.tar": file.getvalue()})


@pytest.mark.parametrize("kind", [table, saved, beside, said, archive])
def test_masks_lie_where_people_put_them(kind, tmp_path):
    out = tmp_path / "set"
    report = encode(kind(tmp_path / "source"), out, Encoding(mask_column="mask"), workers=0)
    dataset = TokenDataset(out)
    assert dataset.card.pictures == {"train": 3}
    assert any("mask" in line for line in report.summary)
    assert (out / "skipped.jsonl").read_text() == ""
    assert dataset.masked.tolist() == [True, True, False, False, True, True]
    found = [one.unflatten(0, (2, 4)) * 255 for one in dataset.learned(np.arange(6)).split(8)]
    expected = torch.tensor(TOKENS)
    for place, mask in enumerate((expected, expected.flip(1), 255, 255, expected, expected.flip(1))):
        assert torch.equal(found[place].round(), torch.zeros(2, 4) + mask)  # the second of each is mirrored
    assert dataset.learned(np.array([2, 3])) is None
    verify_files(Store(out), open_card(Store(out)))


def named(folder, *masks, pictures=("1.png", "2.png"), column="mask", lines=()):
    """Whether each picture of a folder has a mask; `lines` are metadata, as (picture, mask)."""
    files = dict.fromkeys(pictures, PICTURE) | dict.fromkeys(masks, MASK)
    if lines:
        said = [{"file_name": name} | ({"mask_file_name": mask} if mask else {}) for name, mask in lines]
        files["metadata.jsonl"] = "\n".join(map(json.dumps, said)).encode()
    manifest = list_images(open_source(str(fill(folder, files)), mask_column=column))
    assert not manifest.others
    found = [manifest.picture(row) for row in range(manifest.table.num_rows)]
    return {picture.source: bool(picture.mask) for picture in found}


@pytest.mark.parametrize("mask", [
    "1.mask.png", "1_mask.png", "1-mask.png", "1_Mask.jpg", "mask/1.png", "masks/1.webp", "Masks/1.png",
])  # fmt: skip
def test_files_of_masks_are_named_in_many_ways(mask, tmp_path):
    assert named(tmp_path, mask) == {"1.png": True, "2.png": False}


@pytest.mark.parametrize("mask", ["masks/a/1.png", "images/a/1_mask.png", "images/masks/a/1.png"])
def test_so_are_those_of_pictures_in_folders(mask, tmp_path):
    pictures = ("images/a/1.png", "images/a/2.png")
    assert named(tmp_path, mask, pictures=pictures) == dict(zip(pictures, (True, False), strict=True))


def test_one_mask_may_be_of_two_pictures_and_spelled_otherwise(tmp_path):
    composed, apart = normalize("NFC", "é"), normalize("NFD", "é")
    pictures = ("1.png", "1.jpg", f"{apart}.png")
    found = named(tmp_path / "a", "1.mask.png", f"{composed}.mask.png", pictures=pictures)
    assert found == dict.fromkeys(pictures, True)
    lines = [(f"{composed}.png", f"m/{composed}.png"), ("1.png", f"m/{composed}.png"), ("1.png", "")]
    pictures = ("1.png", f"{apart}.png")
    found = named(tmp_path / "b", f"m/{apart}.png", pictures=pictures, lines=lines)
    assert found == dict.fromkeys(pictures, True)


def test_what_metadata_names_as_another_image_is_no_picture_without_the_option_either(tmp_path):
    found = named(tmp_path, "m/one.png", column=None, lines=[("1.png", "m/one.png"), ("2.png", "")])
    assert found == {"1.png": False, "2.png": False}


def test_two_masks_of_a_picture_and_none_at_all_are_refused(tmp_path):
    with pytest.raises(UserError, match="names two masks of 1"):
        named(tmp_path / "a", "m/1.png", "m/2.png", lines=[("1.png", "m/1.png"), ("1.png", "m/2.png")])
    with pytest.raises(UserError, match="has no mask of any image for `mask_column` mask"):
        named(tmp_path / "b")


@pytest.mark.parametrize("relative", [True, False])
def test_masks_outside_of_the_collection_are_missing(relative, tmp_path):
    (tmp_path / "outside.png").write_bytes(MASK)
    outside = "../outside.png" if relative else str(tmp_path / "outside.png")
    line = json.dumps({"file_name": "1.png", "mask_file_name": outside}).encode()
    files = {"1.png": PICTURE, "2.png": PICTURE, "2.mask.png": MASK, "metadata.jsonl": line}
    encode(fill(tmp_path / "source", files), tmp_path / "set", Encoding(mask_column="mask"), workers=0)
    (first,) = map(json.loads, (tmp_path / "set" / "skipped.jsonl").read_text().splitlines())
    assert first["reason"].endswith("outside.png is missing")


def test_masks_of_zeros_and_ones_are_meant_as_black_and_white(tmp_path):
    files = {"x/1.png": PICTURE, "x/1.mask.png": png((LEFT > 0).astype(np.uint8))}
    encode(fill(tmp_path / "source", files), tmp_path / "set", Encoding(mask_column="mask"), workers=0)
    found = TokenDataset(tmp_path / "set").learned(np.array([0])) * 255
    assert found.round().tolist() == np.array(TOKENS).flatten().tolist()


def test_a_large_picture_waits_once_for_it_and_its_mask(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "LARGE", 100)
    encode(beside(tmp_path / "source"), tmp_path / "set", Encoding(mask_column="mask"), workers=0)
    assert TokenDataset(tmp_path / "set").masked.sum() == 4


def test_views_without_anything_to_learn_are_left_out(tmp_path):
    """A point that is seen at many tokens and not at one; and a border that the square does not have."""
    point = np.zeros((160, 320), np.uint8)
    point[:8, :8] = 255
    files = {"x/1.png": encoded_picture(320, 160), "x/1.mask.png": png(point)}
    source = fill(tmp_path / "source", files)
    for limits in ((1, 100), (100, 1)):
        out = tmp_path / f"set{limits[0]}"
        encode(source, out, Encoding(max_tokens=limits, mask_column="mask", mirror=False), workers=0)
        dataset = TokenDataset(out)
        assert len(dataset.sizes) == len(dataset.first_rows) == 1
        assert dataset.lengths[0] > 50
    square = Encoding(max_tokens=(16,), preprocess="square", mask_column="mask")
    with pytest.raises(UserError, match="black where it is stored"):
        encode(source, tmp_path / "square", square, workers=0)


def test_what_another_version_began_is_done_again(tmp_path, monkeypatch):
    source = fill(tmp_path / "source", {f"x/{i}.png": PICTURE for i in range(4)})
    out, settings = tmp_path / "set", Encoding(shard_size=2)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("fitv2.encoding.encode.finish", interrupt)
        encode(source, out, settings, workers=0)
    notes = sorted((out / ".encode").glob("train-0000*.json"))
    assert len(notes) == 2
    for note in notes:
        said = json.loads(note.read_text())
        del said["format"]
        note.write_text(json.dumps(said))
    (out / "train-00000.arrow").write_bytes((out / "train-00000.arrow").read_bytes()[::-1])
    encode(source, out, settings, workers=0)
    verify_files(Store(out), open_card(Store(out)))


def interrupt(*_):
    raise KeyboardInterrupt


@pytest.mark.parametrize("kind", [beside, archive])
def test_without_the_option_masks_are_no_masks(kind, tmp_path):
    encode(kind(tmp_path / "source"), tmp_path / "set", workers=0)
    dataset = TokenDataset(tmp_path / "set")
    assert dataset.card.pictures == {"train": 3}
    assert not dataset.masked.any()


def test_views_are_masked_as_they_are_resized_and_cropped(tmp_path):
    """A mask that is white where the picture is gives tokens of what the picture has there."""
    rng = np.random.default_rng(0)
    grey = np.repeat(np.repeat(rng.integers(0, 2, (10, 14)) * 255, 10, 0), 10, 1).astype(np.uint8)
    same = png(np.stack([grey] * 3, axis=2))
    source = fill(tmp_path / "source", {"x/1.png": same, "x/1.mask.png": png(grey)})
    settings = Encoding(max_tokens=(16, 9), preprocess="mixed", mask_column="mask")
    encode(source, tmp_path / "set", settings, workers=0)
    dataset = TokenDataset(tmp_path / "set")
    rows = np.arange(len(dataset.sizes))
    assert dataset.cropped.any()
    whiteness_T = (dataset.batch(rows)[0].x_TC.mean(1) + 1) / 2
    torch.testing.assert_close(dataset.learned(rows), whiteness_T, atol=3e-3, rtol=0)


@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        (png(LEFT[:16]), "its mask cannot be used: it has 64x16 pixels, not 64x32"),
        (png(LEFT.T), "its mask cannot be used: it has 32x64 pixels, not 64x32"),
        (png(np.zeros((32, 64), np.uint8)), "its mask is black where it is stored: nothing of it is learned"),
        (png(CLEAR), "its mask is black where it is stored: nothing of it is learned"),
        (b"nothing", "its mask cannot be used: not an image that can be read"),
    ],
    ids=["lower", "on its side", "black", "transparent", "none"],
)
def test_a_mask_that_does_not_fit_is_said(mask, reason, tmp_path):
    source = fill(tmp_path / "source", {"x/1.png": PICTURE, "x/2.png": PICTURE, "x/2.mask.png": mask})
    encode(source, tmp_path / "set", Encoding(mask_column="mask"), workers=0)
    entry = {"source": "x/2.png", "reason": reason}
    assert entry in map(json.loads, (tmp_path / "set" / "skipped.jsonl").read_text().splitlines())


def test_a_mask_that_is_not_there_is_said(tmp_path):
    line = b'{"file_name": "1.png", "mask_file_name": "m/../gone.png"}\n{"file_name": "2.png"}'
    source = fill(tmp_path / "source", {"1.png": PICTURE, "2.png": PICTURE, "metadata.jsonl": line})
    encode(source, tmp_path / "set", Encoding(mask_column="mask"), workers=0)
    (first,) = map(json.loads, (tmp_path / "set" / "skipped.jsonl").read_text().splitlines())
    assert first == {"source": "1.png", "reason": "its mask gone.png is missing"}


@pytest.mark.parametrize(
    "names",
    [("1.jpg", "1.mask.png", "2.jpg"), ("1.Mask.png", "1.jpg", "2.jpg"), ("1.jpg", "1_mask.png", "2.jpg"),
     ("1.image.png", "1.mask.png", "2.image.png"), ("images/1.jpg", "masks/1.png", "images/2.jpg")],
    ids=lambda names: "_".join(names).replace("/", "-"),
)  # fmt: skip
def test_masks_in_archives_are_named_in_many_ways(names, tmp_path):
    manifest = list_images(open_source(str(archive(tmp_path, *names)), mask_column="mask"))
    found = [manifest.picture(row) for row in range(manifest.table.num_rows)]
    assert [bool(picture.mask) for picture in found] == [True, False]
    assert read_mask(manifest, found[0], (64, 32)).tobytes() == LEFT.tobytes()
    assert read_mask(manifest, found[1], (64, 32)) is None


def test_masks_that_are_in_no_archive_and_in_no_column_are_missed(tmp_path):
    with pytest.raises(UserError, match="has no mask of any image for `mask_column` trimap"):
        encode(archive(tmp_path / "tars"), tmp_path / "out", Encoding(mask_column="trimap"), workers=0)
    with pytest.raises(UserError, match="has no column trimap, but image, mask, label"):
        encode(table(tmp_path / "table"), tmp_path / "out", Encoding(mask_column="trimap"), workers=0)


@pytest.fixture(scope="module")
def masked(tmp_path_factory):
    """Six pictures of several sizes, every other one of which has a mask; two of them held out."""
    folder, rng = tmp_path_factory.mktemp("masked"), np.random.default_rng(1)
    for i in range(6):
        size = (64, 32 + 16 * (i % 3))
        file = folder / "source" / ("validation" if i > 3 else "train") / "x" / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        picture(*size, i).save(file)
        if i % 2:
            mask = rng.integers(0, 256, size[::-1]).astype(np.uint8)
            Pictures.fromarray(mask).save(file.with_suffix(".mask.png"))
    encode(folder / "source", folder / "set", Encoding(mask_column="mask"), workers=0)
    return folder / "set"


def model(x_TC, layout, t_B, condition):
    return 0.3 * x_TC


def test_the_loss_is_the_mean_over_what_is_learned(masked):
    dataset = TokenDataset(masked)
    flow, rows = Flow(), np.arange(len(dataset.sizes))
    batch = Steps(dataset, None).pack((Step(rows, rows), len(rows), len(rows), dataset.read(rows)))
    keys = [(0, int(key)) for key in rows]
    draws = Draws.of(keys, batch.packed.layout.lengths, dataset.token_channels, flow)
    plain = draws.add_noise(batch.packed, flow)
    loss_B = flow.loss(model, replace(plain, learned_T=batch.learned_T), batch.condition).total_B
    error_T = (0.3 * plain.x_TC - (plain.data_TC - plain.noise_TC)).square().mean(1)
    lengths = batch.packed.layout.lengths
    every = zip(error_T.split(lengths), batch.learned_T.split(lengths), strict=True)
    expected = torch.stack([(error * learned).sum() / learned.sum() for error, learned in every])
    torch.testing.assert_close(loss_B, expected)
    whole = flow.loss(model, plain, batch.condition).total_B
    assert (loss_B != whole).tolist() == dataset.masked.tolist()

    # A part of the step has the same masks beside the same images.
    for part in batch.split(3):
        at = [rows.tolist().index(row) for row in part.rows]
        sample = draws.select(at).add_noise(part.packed, flow)
        mine_B = flow.loss(model, replace(sample, learned_T=part.learned_T), part.condition).total_B
        torch.testing.assert_close(mine_B, loss_B[at])


def test_what_is_not_learned_at_all_has_no_gradient(masked):
    dataset = TokenDataset(masked)
    rows = np.flatnonzero(dataset.masked)
    packed, condition = dataset.batch(rows)
    sample = Flow().add_noise(
        packed.x_TC, packed.layout, torch.randn_like(packed.x_TC), torch.rand(len(rows))
    )
    learned_T = (dataset.learned(rows) > 0.5).float()
    output_TC = sample.x_TC.clone().requires_grad_()
    Flow().loss(
        lambda *_: output_TC, replace(sample, learned_T=learned_T), condition
    ).total_B.sum().backward()
    assert torch.equal(output_TC.grad.abs().sum(1) > 0, learned_T > 0)
    nothing = replace(sample, learned_T=torch.zeros_like(learned_T))
    assert Flow().loss(lambda *_: output_TC, nothing, condition).total_B.tolist() == [0] * len(rows)


def test_training_and_validation_learn_by_masks(masked, tmp_path, capsys):
    held = list(HeldOut(masked, 4096, Flow()))
    assert [sample.learned_T is not None for sample, _, _ in held] == [True]
    run = [
        "train",
        "debug",
        "--data",
        masked,
        "--steps",
        2,
        "--batch-size",
        4,
        "--log-every",
        1,
        "--warmup-steps",
        0,
    ]
    assert fitv2(capsys, *run, "--out", tmp_path / "run")[0] == 0
    assert "train: 2 images have a mask" in fitv2(capsys, "inspect", masked, "--out", tmp_path / "seen")[1]
    first = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[0])
    encode(masked.parent / "source", tmp_path / "whole", workers=0)
    run[3] = tmp_path / "whole"
    assert fitv2(capsys, *run, "--out", tmp_path / "other")[0] == 0
    other = json.loads((tmp_path / "other" / "log.jsonl").read_text().splitlines()[0])
    assert first["loss"] != other["loss"]
