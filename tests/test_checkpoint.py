import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fitv2.checkpoint import Card, find_model, from_released, load_model, released_forward, save_model
from fitv2.errors import UserError

GOLDEN = Path(__file__).parent / "golden"
CARD = Card(labels=("flags", "flowers", "fruit", "cards", "birds"), autoencoder="pixels", max_tokens=16)


def golden():
    config = json.loads((GOLDEN / "manifest.json").read_text())["v2_forward"]["config"]
    case = load_file(GOLDEN / "v2_forward.safetensors")
    return config, case, {name[2:]: value for name, value in case.items() if name.startswith("w.")}


def test_forward_equals_the_released_code():
    config, case, weights = golden()
    model = from_released(config, weights)
    out = released_forward(model, *(case[name] for name in ("x", "t", "y", "grid", "mask", "size")))
    assert (out - case["out"]).abs().max() / case["out"].abs().max() < 1e-5
    assert case["out"].abs().max() > 0.1


def test_released_weights_must_be_complete():
    config, _, weights = golden()
    del weights["blocks.1.mlp.fc2.bias"]
    with pytest.raises(UserError, match=r"blocks\.1\.mlp\.down\.bias"):
        from_released(config, weights)


def test_a_released_grid_that_is_not_row_by_row_is_refused():
    config, case, weights = golden()
    model = from_released(config, weights)
    with pytest.raises(UserError, match="row by row"):
        released_forward(
            model, case["x"], case["t"], case["y"], case["grid"].flip(1), case["mask"], case["size"]
        )


def test_saved_model_loads_the_same(model, tmp_path):
    save_model(model, CARD, tmp_path)
    again, card = load_model(tmp_path)
    assert card == CARD
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_half_precision_weights_load_as_float32(model, tmp_path):
    save_model(model.half(), CARD, tmp_path)
    assert load_model(tmp_path)[0].dtype == torch.float32


def weights_of(folder):
    return folder / "diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize("damage", ["missing", "extra", "misshapen", "truncated"])
def test_wrong_weights_are_refused(model, tmp_path, damage):
    save_model(model, CARD, tmp_path)
    weights = load_file(weights_of(tmp_path))
    if damage == "missing":
        del weights["head.out.bias"]
    elif damage == "extra":
        weights["head.more"] = torch.zeros(3)
    elif damage == "misshapen":
        weights["head.out.bias"] = torch.zeros(3)
    save_file(weights, weights_of(tmp_path))
    if damage == "truncated":
        weights_of(tmp_path).write_bytes(weights_of(tmp_path).read_bytes()[:-100])
    with pytest.raises(UserError, match="holds no FiT" if damage == "truncated" else "head") as raised:
        load_model(tmp_path)
    assert "\n" not in str(raised.value)


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


def test_unknown_model_names_the_shipped_ones():
    with pytest.raises(UserError, match="did you mean clipart"):
        find_model("clip-art")


def test_a_pickle_is_never_opened(model, tmp_path):
    save_model(model, CARD, tmp_path)
    weights_of(tmp_path).rename(tmp_path / "diffusion_pytorch_model.bin")
    with pytest.raises(UserError, match=r"no file named .*safetensors"):
        load_model(tmp_path)
