from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from fitv2.checkpoint import Card, find_model, load_model, save_model
from fitv2.config import Rope
from fitv2.errors import UserError

CARD = Card(labels=("flags", "flowers", "fruit", "cards", "birds"), autoencoder="pixels", max_tokens=16)


def test_saved_model_loads_the_same(model, tmp_path):
    save_model(model, CARD, tmp_path)
    again, card = load_model(tmp_path)
    assert card == CARD
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_positions_and_everything_else_of_the_model_come_back(model, tmp_path):
    rope = Rope("yarn", train_side=4, grid=(3, 5))
    save_model(model.with_rope(rope), CARD, tmp_path)
    assert load_model(tmp_path)[0].architecture == replace(model.architecture, rope=rope)


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
