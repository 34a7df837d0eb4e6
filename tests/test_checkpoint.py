import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from safetensors.torch import save as to_bytes
from torch import nn

from conftest import randomized
from fitv2 import checkpoint
from fitv2.autoencoder import load_autoencoder
from fitv2.checkpoint import Card, export_model, find_model, load_model, save_model, weights_digest
from fitv2.config import Rope
from fitv2.errors import UserError
from fitv2.model import FiT

CARD = Card(labels=("flags", "flowers", "fruit", "cards", "birds"), autoencoder="pixels", max_tokens=16)


def test_saved_model_loads_the_same(model, tmp_path):
    save_model(model, CARD, tmp_path)
    again, card = load_model(tmp_path)
    assert card == CARD
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_an_early_head_has_a_file_of_its_own_beside_an_unchanged_model(model, tmp_path, monkeypatch):
    save_model(model, CARD, tmp_path / "without")
    shape = asdict(model.architecture)
    headed = randomized(FiT(**{**shape, "early_head": 1})).eval()
    headed.load_state_dict(model.state_dict(), strict=False)
    save_model(headed, CARD, tmp_path / "with")
    weights = [tmp_path / name / "diffusion_pytorch_model.safetensors" for name in ("with", "without")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert {name.split(".")[0] for name in load_file(tmp_path / "with" / "early_head.safetensors")} == {
        "early"
    }
    opened = FiT.from_pretrained(tmp_path / "with")
    for again in (load_model(tmp_path / "with")[0], opened):
        assert weights_digest(again) == weights_digest(headed)
    # As older versions of safetensors write: into the file itself, which what was read from it still is.
    in_place = lambda tensors, path, about: Path(path).write_bytes(to_bytes(tensors, about))  # noqa: E731
    monkeypatch.setattr(checkpoint, "save_file", in_place)
    save_model(headed, CARD, tmp_path / "older")
    names = ("diffusion_pytorch_model.safetensors", "early_head.safetensors")
    assert all((tmp_path / "older" / n).read_bytes() == (tmp_path / "with" / n).read_bytes() for n in names)
    (tmp_path / "with" / "early_head.safetensors").unlink()
    with pytest.raises(UserError, match=r"early_head\.safetensors is damaged"):
        load_model(tmp_path / "with")


def test_positions_and_everything_else_of_the_model_come_back(model, tmp_path):
    rope = Rope("yarn", train_side=4, grid=(3, 5))
    save_model(model.with_rope(rope), CARD, tmp_path)
    assert load_model(tmp_path)[0].architecture == replace(model.architecture, rope=rope)


def test_an_exported_model_decodes_where_its_autoencoder_never_was(tiny_vae, tmp_path):
    here = tmp_path / "here" / "vae"
    shutil.copytree(tiny_vae, here)
    model, latents = FiT(2, 32, 2, in_channels=4, num_classes=5), torch.randn(1, 4, 2, 3)
    expected = load_autoencoder(str(here)).decode(latents)
    export_model(model, replace(CARD, autoencoder=str(here)), tmp_path / "made")
    shutil.rmtree(here)
    (tmp_path / "made").rename(tmp_path / "there")
    _, card = load_model(tmp_path / "there")
    assert torch.equal(load_autoencoder(card.autoencoder).decode(latents), expected)
    assert str(tmp_path) not in (tmp_path / "there" / "card.json").read_text()
    # And from there again; a changed autoencoder is seen.
    export_model(model, card, tmp_path / "again")
    shutil.rmtree(tmp_path / "there")
    assert torch.equal(
        load_autoencoder(load_model(tmp_path / "again")[1].autoencoder).decode(latents), expected
    )
    (tmp_path / "again" / "autoencoder" / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"autoencoder/config\.json is damaged or was changed"):
        load_model(tmp_path / "again")


def test_autoencoders_that_everybody_has_are_named_and_lost_ones_are_asked_for(model, tmp_path):
    for name in ("pixels", "emoji", "stabilityai/sd-vae-ft-ema"):
        export_model(model, replace(CARD, autoencoder=name), tmp_path / name)
        assert load_model(tmp_path / name)[1].autoencoder == name
        assert not (tmp_path / name / "autoencoder").exists()
    with pytest.raises(UserError, match=r"/nowhere/vae, is not there: give `autoencoder`"):
        export_model(model, replace(CARD, autoencoder="/nowhere/vae"), tmp_path / "lost")
    assert not (tmp_path / "lost").exists()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_an_export_in_half_precision_is_half_as_large_and_rounds_once(model, tmp_path, dtype):
    sizes = []
    for name, chosen in (("whole", torch.float32), ("half", dtype)):
        export_model(model, CARD, tmp_path / name, chosen)
        sizes.append((tmp_path / name / "diffusion_pytorch_model.safetensors").stat().st_size)
    assert sizes[1] < 0.6 * sizes[0]
    for mine, read in zip(model.parameters(), load_model(tmp_path / "half")[0].parameters(), strict=True):
        assert mine.dtype == torch.float32  # the model itself stays
        assert torch.equal(read, mine.to(dtype).float())


def test_weights_beyond_float16_are_not_exported_in_it(model, tmp_path):
    with torch.no_grad():
        model.patch_embed.weight[0, 0] = 1e6
    with pytest.raises(UserError, match=r"patch_embed\.weight has values beyond the range of float16"):
        export_model(model, CARD, tmp_path / "half", torch.float16)
    export_model(model, CARD, tmp_path / "other", torch.bfloat16)


def test_half_precision_weights_load_as_float32(model, tmp_path):
    save_model(model.half(), CARD, tmp_path)
    assert load_model(tmp_path)[0].dtype == torch.float32


def weights_of(folder):
    return folder / "diffusion_pytorch_model.safetensors"


WRONG = {
    "missing": "head.out.bias is missing",
    "extra": "head.more is not one of its tensors",
    "misshapen": r"head.out.bias is \(3,\) float32, not",
    "whole numbers": "head.out.bias is .* int64, not",
    "truncated": "is damaged or missing",
    "another file": "is damaged or missing",
}


@pytest.mark.parametrize("damage", WRONG)
def test_wrong_weights_are_refused(model, tmp_path, damage):
    save_model(model, CARD, tmp_path)
    (tmp_path / "files.json").unlink()
    weights = load_file(weights_of(tmp_path))
    if damage == "missing":
        del weights["head.out.bias"]
    elif damage == "extra":
        weights["head.more"] = torch.zeros(3)
    elif damage == "misshapen":
        weights["head.out.bias"] = torch.zeros(3)
    elif damage == "whole numbers":
        weights["head.out.bias"] = weights["head.out.bias"].long()
    save_file(weights, weights_of(tmp_path))
    if damage == "truncated":
        weights_of(tmp_path).write_bytes(weights_of(tmp_path).read_bytes()[:-100])
    elif damage == "another file":
        weights_of(tmp_path).write_bytes(b"<!DOCTYPE html>")
    with pytest.raises(UserError, match=WRONG[damage]) as raised:
        load_model(tmp_path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["config.json", "card.json", "diffusion_pytorch_model.safetensors"])
@pytest.mark.parametrize("how", ["changed", "missing"])
def test_a_file_that_is_not_the_one_written_is_refused(model, tmp_path, name, how):
    save_model(model, CARD, tmp_path)
    content = bytearray((tmp_path / name).read_bytes())
    content[-3] ^= 1
    (tmp_path / name).unlink()
    if how == "changed":
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name} is (damaged|missing)|has neither"):
        load_model(tmp_path)


def change_config(folder, **changes):
    (folder / "files.json").unlink()
    config = json.loads((folder / "config.json").read_text()) | changes
    kept = {key: value for key, value in config.items() if value is not MISSING}
    (folder / "config.json").write_text(json.dumps(kept))


MISSING = object()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"qk_norm": MISSING}, "lacks qk_norm"),
        ({"depth": MISSING}, "lacks depth"),
        ({"rope": {"extrapolation": "ntk", "train_side": 4}}, "Rope lacks attention_scale"),
        ({"widht": 32}, "did you mean width"),
        ({"depth": True}, "not of the right type"),
        ({"depth": 10**9}, "`depth` is 1000000000"),
        ({"time_shift": float("nan")}, "`time_shift` is nan"),
        ({"conditions": ["label", "mood"]}, "mood"),
        ({"_class_name": "UNet2DModel"}, "UNet2DModel"),
        ({"_class_name": MISSING}, "not of a FiT"),
    ],
)
def test_a_config_is_read_strictly(model, tmp_path, changes, said):
    save_model(model, CARD, tmp_path)
    change_config(tmp_path, **changes)
    with pytest.raises(UserError, match=said):
        load_model(tmp_path)


def test_what_came_later_to_a_config_may_be_missing(model, tmp_path):
    save_model(model, CARD, tmp_path)
    change_config(tmp_path, objective=MISSING, conditions=MISSING)
    assert load_model(tmp_path)[0].architecture == model.architecture


@pytest.mark.parametrize("content", ['"stabilityai/sd-vae-ft-ema"', "[" * 100_000, "1" * 5_000, "{", "\xff"])
@pytest.mark.parametrize("name", ["config.json", "card.json", "files.json"])
def test_json_of_any_kind_is_one_line(model, tmp_path, name, content):
    save_model(model, CARD, tmp_path)
    (tmp_path / "files.json").unlink()
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=f"{name} is damaged"):
        load_model(tmp_path)


@pytest.mark.parametrize("part", ["../other.safetensors", "/etc/passwd", "weights.bin", 3])
def test_parts_of_a_model_lie_in_its_folder(model, tmp_path, part):
    save_model(model, CARD, tmp_path)
    (tmp_path / "files.json").unlink()
    index = tmp_path / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"head.out.bias": part}}))
    with pytest.raises(UserError, match="names no parts, or such as lie elsewhere"):
        load_model(tmp_path)


def test_labels_by_name_number_and_unambiguous_start():
    assert [CARD.label_index(text) for text in ("fruit", "2", "fr", "fla")] == [2, 2, 2, 0]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("fl", "flags or flowers"),
        ("5", "0 to 4"),
        ("-1", "0 to 4"),
        ("fruits", "fruit"),
        ("xyz", "choose from"),
    ],
)
def test_unknown_labels_name_the_nearest(text, said):
    with pytest.raises(UserError, match=said):
        CARD.label_index(text)


def test_a_name_of_several_labels_asks_for_the_number():
    with pytest.raises(UserError, match="is that of 0 and 2: give its number"):
        Card(("crane", "dog", "crane"), "pixels", 16).label_index("crane")


@pytest.mark.parametrize("label", ["caf\u00e9", "cafe\u0301"])
@pytest.mark.parametrize("asked", ["caf\u00e9", "cafe\u0301"])
def test_labels_are_compared_as_people_see_them(label, asked):
    assert Card(("tea", label), "pixels", 16).label_index(asked) == 1


def test_unknown_model_names_the_shipped_ones():
    with pytest.raises(UserError, match="did you mean clipart"):
        find_model("clip-art")


def test_a_pickle_is_never_opened(model, tmp_path):
    save_model(model, CARD, tmp_path)
    (tmp_path / "files.json").unlink()
    weights_of(tmp_path).rename(tmp_path / "diffusion_pytorch_model.bin")
    with pytest.raises(UserError, match=r"safetensors is damaged or missing"):
        load_model(tmp_path)


def test_a_digest_tells_weights_apart():
    one, other = nn.Linear(3, 2), nn.Linear(3, 2)
    assert weights_digest(one) == weights_digest(one, None) != weights_digest(other)
    with torch.no_grad():
        other.load_state_dict(one.state_dict())
        assert weights_digest(other) == weights_digest(one)
        other.bias[0] += 1e-6
    assert weights_digest(other) != weights_digest(one)
