from dataclasses import asdict, replace

import pytest
import torch

from conftest import randomized
from fitv2.config import Architecture, Rope
from fitv2.conversion.released import (
    RELEASES,
    architecture_of,
    from_released,
    ours,
    recognised,
    released_forward,
    to_released,
)
from fitv2.errors import UserError
from fitv2.model import FiT
from fitv2.presets import PRESETS

TINY = {
    "fitv2": Architecture(depth=2, width=64, heads=4, num_classes=10),
    "fit": Architecture(
        2, 64, 4, num_classes=10, prediction="noise", path="ddpm", adaln="full", qk_norm=False, mlp_width=256
    ),
    "a step between": Architecture(2, 64, 4, num_classes=10, adaln="full", mlp_width=256, qk_norm=False),
}
FITV2 = {
    "hidden_size": 64, "depth": 2, "num_heads": 4, "num_classes": 10, "learn_sigma": False, "use_sit": True,
    "use_swiglu": True, "q_norm": "layernorm", "k_norm": "layernorm", "adaln_type": "lora",
    "adaln_lora_dim": 16,
}  # fmt: skip
FIT = {
    "hidden_size": 64, "depth": 2, "num_heads": 4, "num_classes": 10, "use_swiglu": True,
    "use_swiglu_large": True,
}  # fmt: skip


def weights(architecture, dtype=torch.float32):
    return randomized(FiT(**asdict(architecture))).to(dtype).state_dict()


def meta(architecture):
    with torch.device("meta"):
        return FiT(**asdict(architecture)).state_dict()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("architecture", TINY.values(), ids=TINY)
def test_a_round_trip_keeps_every_bit(architecture, dtype):
    mine = weights(architecture, dtype)
    theirs = to_released(mine)
    again = ours(architecture, theirs)
    assert list(again) == list(mine)
    assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(
        again.values(), mine.values(), strict=True))  # fmt: skip
    back = to_released(again)
    assert all(torch.equal(back[name], tensor) for name, tensor in theirs.items())


# Tensors and numbers of the released code's five models, and the shape of one that tells them apart.
RELEASED = {
    "fit-xl": (823_599_392, 12 * 28 + 11, "blocks.27.adaLN_modulation.1.weight", (6912, 1152)),
    "fitv2-xl": (671_045_776, 14 * 36 + 13, "blocks.35.adaLN_modulation.2.weight", (6912, 288)),
    "fitv2-3b": (2_971_928_080, 14 * 40 + 13, "blocks.39.mlp.fc1_g.weight", (6144, 2304)),
    "fitv2-xl-hr": (671_045_776, 14 * 36 + 13, "blocks.0.mlp.fc2.weight", (1152, 3072)),
    "fitv2-3b-hr": (2_971_928_080, 14 * 40 + 13, "global_adaLN_modulation.1.weight", (13824, 2304)),
}


@pytest.mark.parametrize("name", RELEASES)
def test_the_five_released_models_by_shape(name):
    """On the meta device: names, shapes and counts there and back, and recognition."""
    architecture = RELEASES[name].architecture
    mine = meta(architecture)
    theirs = to_released(mine)
    count, tensors, telling, shape = RELEASED[name]
    assert sum(tensor.numel() for tensor in theirs.values()) == count
    assert len(theirs) == tensors
    assert theirs[telling].shape == shape
    again = ours(architecture, theirs)
    assert {k: v.shape for k, v in again.items()} == {k: v.shape for k, v in mine.items()}
    assert recognised(theirs) == replace(architecture, rope=Rope())


def test_released_arguments_are_the_presets():
    """The network_config of the released config_fitv2_hr_xl.yaml and config_fit_xl.yaml."""
    shared = {"context_size": 1024, "patch_size": 2, "in_channels": 4, "mlp_ratio": 4.0,
              "class_dropout_prob": 0.1, "num_classes": 1000, "rel_pos_embed": "rope"}  # fmt: skip
    xl = shared | FITV2 | {
        "hidden_size": 1152, "depth": 36, "num_heads": 16, "num_classes": 1000, "use_swiglu_large": False,
        "qk_norm_weight": False, "custom_freqs": "ntk-aware", "decouple": True, "ori_max_pe_len": 16,
        "online_rope": True, "abs_pos_embed": None, "adaln_lora_dim": 288, "finetune": "partial",
    }  # fmt: skip
    expected = RELEASES["fitv2-xl-hr"].architecture
    assert architecture_of(xl) == replace(expected, mlp_width=3072, lora_rank=288)
    fit = shared | FIT | {"hidden_size": 1152, "depth": 28, "num_heads": 16, "num_classes": 1000,
                          "learn_sigma": True}  # fmt: skip
    assert architecture_of(fit) == PRESETS["fit-xl"].model


@pytest.mark.parametrize(("config", "tiny"), [(FITV2, "fitv2"), (FIT, "fit")])
def test_a_released_model_is_ready_to_use(config, tiny):
    theirs = to_released(weights(TINY[tiny]))
    model = from_released(config, theirs)
    assert not model.training
    assert model.architecture == TINY[tiny]
    assert FiT.from_config(model.config).architecture == TINY[tiny]
    assert next(model.parameters()).device.type == "cpu"
    assert next(model.parameters()).requires_grad


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"use_swiglu": False}, "use_swiglu=False"),
        ({"qk_norm_weight": True}, "qk_norm_weight=True"),
        ({"q_norm": "rmsnorm", "k_norm": "rmsnorm"}, "q_norm='rmsnorm'"),
        ({"k_norm": None}, "k_norm=None"),
        ({"adaln_type": "swiglu"}, "adaln_type='swiglu'"),
        ({"learn_sigma": True}, "learn_sigma=True"),
        ({"class_dropout_prob": 0.0}, "class_dropout_prob=0.0"),
        ({"custom_freqs": "ntk"}, "did you mean ntk-aware"),
        ({"custom_freqs": "yarn", "online_rope": True}, "extrapolation needs the size trained on"),
        ({"custom_freqs": "yarn", "ori_max_pe_len": 16}, "max_pe_len_h and max_pe_len_w"),
        ({"hiden_size": 32}, "did you mean hidden_size"),
    ],
)
def test_what_no_release_has_is_refused(changes, said):
    with pytest.raises(UserError, match=said):
        architecture_of(FITV2 | changes)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda w: w.pop("blocks.1.mlp.fc2.bias"), "blocks.1.mlp.fc2.bias is missing"),
        (lambda w: w.pop("blocks.0.mlp.fc1_x.weight"), "blocks.0.mlp.fc1_x.weight is missing"),
        (lambda w: w.update(more=torch.zeros(1)), "more is not one of its tensors"),
        (
            lambda w: w.update({"final_layer.linear.bias": torch.zeros(3)}),
            r"final_layer.linear.bias is \(3,\), expected \(16,\)",
        ),
    ],
)
def test_wrong_tensors_are_named(damage, said):
    theirs = to_released(weights(TINY["fitv2"]))
    damage(theirs)
    with pytest.raises(UserError, match=said):
        from_released(FITV2, theirs)


@pytest.mark.parametrize("tiny", TINY)
def test_recognition_of_other_sizes_needs_the_heads(tiny):
    theirs = to_released(weights(TINY[tiny]))
    with pytest.raises(UserError, match="give its `heads`"):
        recognised(theirs)
    if tiny != "a step between":  # QK-norm has no weights, so a mixture cannot be told from them
        assert recognised(theirs, heads=4) == TINY[tiny]


def test_other_weights_are_not_recognised():
    with pytest.raises(UserError, match="not weights of a released FiT"):
        recognised({"weight": torch.zeros(3)})


def padded():
    """Two images, 2×3 and 1×4, in the released layout of 8 tokens."""
    size = torch.tensor([[[2, 3]], [[1, 4]]])
    mask = torch.tensor([[1] * 6 + [0] * 2, [1] * 4 + [0] * 4])
    grid = torch.zeros(2, 2, 8, dtype=torch.long)
    grid[0, :, :6] = torch.tensor([[0, 1, 2, 0, 1, 2], [0, 0, 0, 1, 1, 1]])
    grid[1, 0, :4] = torch.arange(4)
    rng = torch.Generator().manual_seed(0)
    return torch.randn(2, 8, 16, generator=rng), grid, mask, size


@pytest.mark.parametrize(("config", "tiny"), [(FITV2, "fitv2"), (FIT, "fit")])
def test_padding_is_zero_and_its_content_does_not_matter(config, tiny):
    x, grid, mask, size = padded()
    model = from_released(config, to_released(weights(TINY[tiny])))
    other = torch.where(mask[..., None].bool(), x, 99.0)
    if tiny == "fit":
        x, other = x.transpose(1, 2), other.transpose(1, 2)
    t, y = torch.tensor([0.3, 0.9]), torch.tensor([1, 2])
    out, again = (released_forward(model, each, t, y, grid, mask, size) for each in (x, other))
    assert torch.equal(out, again)
    out = out.transpose(1, 2) if tiny == "fit" else out
    assert out.shape == (2, 8, 32 if tiny == "fit" else 16)
    assert out[~mask.bool()].abs().max() == 0
    assert out[mask.bool()].abs().max() > 0.01


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda grid, mask: (grid.flip(1), mask), "grid is not that of whole images"),
        (lambda grid, mask: (grid, mask.flip(1)), "mask is not that of whole images"),
        (lambda grid, mask: (grid, torch.ones_like(mask)), "mask is not that of whole images"),
    ],
)
def test_a_layout_that_is_not_whole_images_is_refused(change, said):
    x, grid, mask, size = padded()
    model = from_released(FITV2, to_released(weights(TINY["fitv2"])))
    grid, mask = change(grid, mask)
    with pytest.raises(UserError, match=said):
        released_forward(model, x, torch.tensor([0.3, 0.9]), torch.tensor([1, 2]), grid, mask, size)
