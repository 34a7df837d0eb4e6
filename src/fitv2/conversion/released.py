"""The released code's checkpoints (whlzy/FiT) in our names and back, and its padded tensor layout.

All quirks of the released files live here. Nothing is computed on the weights: tensors are renamed,
and the two halves of a SwiGLU's first matrix are joined or split, so every bit survives both ways.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fitv2.conditioning import Condition
from fitv2.config import Architecture, Rope
from fitv2.conversion.reader import Weights, refuse, shown
from fitv2.errors import UserError, nearest
from fitv2.model import FiT
from fitv2.presets import POST_TRAINED, PRESETS
from fitv2.runtime.serialization import from_dict
from fitv2.tokens import Layout


@dataclass(frozen=True)
class Release:
    """One of the released checkpoints, all trained on ImageNet in SD-VAE latents."""

    about: str
    architecture: Architecture
    max_tokens: int
    guidance: float


_XL, _3B = PRESETS["fitv2-xl"].model, PRESETS["fitv2-3b"].model

AUTOENCODER = "stabilityai/sd-vae-ft-ema"

RELEASES = {
    "fit-xl": Release("FiT-XL/2", PRESETS["fit-xl"].model, 256, 1.5),
    "fitv2-xl": Release("FiTv2-XL/2", _XL, 256, 1.5),
    "fitv2-3b": Release("FiTv2-3B/2", _3B, 256, 1.5),
    "fitv2-xl-hr": Release("FiTv2-XL/2 post-trained", replace(_XL, rope=POST_TRAINED), 1024, 1.65),
    "fitv2-3b-hr": Release("FiTv2-3B/2 post-trained", replace(_3B, rope=POST_TRAINED), 1024, 1.6),
}


def imagenet_labels() -> tuple[str, ...]:
    """Names of ImageNet's 1000 classes in order: WordNet's lemmas of their synsets, made unique."""
    return tuple((Path(__file__).parent / "imagenet.txt").read_text().splitlines())


# The constructor arguments that change what is computed, with the values that can be read.
_FIXED: dict[str, Any] = {
    "use_swiglu": True,
    "qk_norm_weight": False,
    "rel_pos_embed": "rope",
    "norm_type": "layernorm",
    "qkv_bias": True,
    "ffn_bias": True,
    "adaln_bias": True,
    "add_rel_pe_to_v": False,
    "abs_pos_embed": None,
}
_DEFAULTS: dict[str, Any] = _FIXED | {
    "use_swiglu": False,
    "context_size": 256,
    "patch_size": 2,
    "in_channels": 4,
    "hidden_size": 1152,
    "depth": 28,
    "num_heads": 16,
    "mlp_ratio": 4.0,
    "class_dropout_prob": 0.1,
    "num_classes": 1000,
    "learn_sigma": True,
    "use_sit": False,
    "use_swiglu_large": False,
    "q_norm": None,
    "k_norm": None,
    "adaln_type": "normal",
    "adaln_lora_dim": None,
    "rope_theta": 10000.0,
    "custom_freqs": "normal",
    "max_pe_len_h": None,
    "max_pe_len_w": None,
    "decouple": False,
    "ori_max_pe_len": None,
    "online_rope": False,
    "time_shifting": 1,
}
_OF_TRAINING = ("use_checkpoint", "pretrain_ckpt", "ignore_keys", "finetune")
_METHODS = {  # custom_freqs → extrapolation, attention_scale
    "normal": ("none", "none"),
    "linear": ("pi", "none"),
    "ntk-aware": ("ntk", "none"),
    "ntk-aware-pro1": ("ntk", "pro1"),
    "ntk-aware-pro2": ("ntk", "pro2"),
    "ntk-by-parts": ("ntk-by-parts", "none"),
    "yarn": ("yarn", "none"),
}


def architecture_of(config: Mapping[str, Any]) -> Architecture:
    """The architecture that arguments of the released constructor describe.

    Raises UserError for unknown arguments, and for variants that no release has.
    """
    for key in config:
        if key not in _DEFAULTS and key not in _OF_TRAINING:
            raise nearest("released argument", key, _DEFAULTS)
    given = _DEFAULTS | dict(config)
    flow, lora = bool(given["use_sit"]), given["adaln_type"] == "lora"
    required = _FIXED | {
        "learn_sigma": not flow,
        "k_norm": given["q_norm"],
        "class_dropout_prob": given["class_dropout_prob"] or 0.1,  # without dropout there is no null label
    }
    odd = [f"{key}={given[key]!r}" for key, value in required.items() if given[key] != value]
    odd += [f"q_norm={given['q_norm']!r}"] if given["q_norm"] not in (None, "", "layernorm") else []
    odd += [f"adaln_type={given['adaln_type']!r}"] if given["adaln_type"] not in ("normal", "lora") else []
    if odd:
        raise UserError(f"no released checkpoint has {', '.join(odd)}: this cannot be read")
    inner = int(given["hidden_size"] * given["mlp_ratio"])
    return Architecture(
        depth=given["depth"],
        width=given["hidden_size"],
        heads=given["num_heads"],
        patch_size=given["patch_size"],
        in_channels=given["in_channels"],
        num_classes=given["num_classes"],
        prediction="velocity" if flow else "noise",
        path="linear" if flow else "ddpm",
        mlp_width=inner if given["use_swiglu_large"] else inner * 2 // 3,
        adaln="lora" if lora else "full",
        lora_rank=given["adaln_lora_dim"] if lora else None,
        qk_norm=given["q_norm"] == "layernorm",
        time_shift=float(given["time_shifting"]),
        rope=_rope(given),
    )


def _rope(given: Mapping[str, Any]) -> Rope:
    name = str(given["custom_freqs"]).lower()
    if name not in _METHODS:
        raise nearest("custom_freqs", name, _METHODS)
    extrapolation, attention_scale = _METHODS[name]
    if name == "normal":
        return Rope(base=float(given["rope_theta"]))
    grid = None
    if not given["online_rope"]:  # one scaling for every image, whatever its size
        if None in (given["max_pe_len_h"], given["max_pe_len_w"]):
            raise UserError(f"custom_freqs={name!r} without online_rope needs max_pe_len_h and max_pe_len_w")
        grid = (int(given["max_pe_len_h"]), int(given["max_pe_len_w"]))
    return from_dict(
        Rope,
        {
            "extrapolation": extrapolation,
            "attention_scale": attention_scale,
            "per_axis": bool(given["decouple"]),
            "train_side": given["ori_max_pe_len"],
            "grid": grid,
            "base": float(given["rope_theta"]),
        },
    )


# Names ------------------------------------------------------------------------------------------

_OURS_TO_RELEASED = (
    (r"^patch_embed\.", "x_embedder.proj."),
    (r"^time_embed\.up\.", "t_embedder.mlp.0."),
    (r"^time_embed\.down\.", "t_embedder.mlp.2."),
    (r"^label_embed\.", "y_embedder.embedding_table."),
    (r"^modulation\.", "global_adaLN_modulation.1."),
    (r"^(blocks\.\d+)\.modulation\.down\.", r"\1.adaLN_modulation.1."),
    (r"^(blocks\.\d+)\.modulation\.up\.", r"\1.adaLN_modulation.2."),
    (r"^(blocks\.\d+)\.modulation\.(weight|bias)$", r"\1.adaLN_modulation.1.\2"),
    (r"^(blocks\.\d+)\.attention\.qkv\.", r"\1.attn.qkv."),
    (r"^(blocks\.\d+)\.attention\.out\.", r"\1.attn.proj."),
    (r"^(blocks\.\d+)\.mlp\.down\.", r"\1.mlp.fc2."),
    (r"^head\.modulation\.", "final_layer.adaLN_modulation.1."),
    (r"^head\.out\.", "final_layer.linear."),
)
_JOINED = re.compile(r"^(blocks\.\d+\.mlp)\.gate_up\.(weight|bias)$")


def released_names(name: str) -> tuple[str, ...]:
    """The released tensors that our tensor `name` is made of, in order along its first axis."""
    joined = _JOINED.match(name)
    if joined:
        return tuple(f"{joined[1]}.{part}.{joined[2]}" for part in ("fc1_g", "fc1_x"))
    for pattern, replacement in _OURS_TO_RELEASED:
        name, replaced = re.subn(pattern, replacement, name)
        if replaced:
            return (name,)
    raise ValueError(f"{name} is no tensor of a FiT")


def ours(architecture: Architecture, released: Weights) -> dict[str, Tensor]:
    """Released weights under our names. Raises UserError naming missing, extra and misshapen tensors."""
    wrong: list[str] = []
    result: dict[str, Tensor] = {}
    used: set[str] = set()
    for name, shape in _shapes(architecture).items():
        parts = released_names(name)
        used.update(parts)
        missing = [f"{part} is missing" for part in parts if part not in released]
        wrong += missing
        if missing:
            continue
        part_shape = torch.Size([shape[0] // len(parts), *shape[1:]])
        tensors = [released[part] for part in parts]
        misshapen = [
            f"{part} is {tuple(tensor.shape)}, expected {tuple(part_shape)}"
            for part, tensor in zip(parts, tensors, strict=True)
            if tensor.shape != part_shape
        ]
        wrong += misshapen
        if not misshapen:
            result[name] = torch.cat(tensors) if len(tensors) > 1 else tensors[0]
    wrong += [f"{shown(name)} is not one of its tensors" for name in released if name not in used]
    refuse("not the tensors of this model", wrong)
    return result


def to_released(weights: Weights) -> dict[str, Tensor]:
    """Our weights under the released names: the exact inverse of `ours`."""
    result = {}
    for name, tensor in weights.items():
        parts = released_names(name)
        for part, piece in zip(parts, tensor.chunk(len(parts)), strict=True):
            result[part] = piece.contiguous()
    return result


def _shapes(architecture: Architecture) -> dict[str, torch.Size]:
    with torch.device("meta"):
        model = FiT(**asdict(architecture))
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


# Recognition ------------------------------------------------------------------------------------


_OF_LORA = ("global_adaLN_modulation.1.weight", "blocks.0.adaLN_modulation.2.weight")


def recognised(released: Weights, heads: int | None = None) -> Architecture:
    """The architecture of released weights, from their names and shapes.

    Their shapes say all but the number of heads, which is known for the released widths: heads of 72
    numbers for XL, 96 for 3B, 64 for B. Raises UserError when these are not weights of a FiT, or the
    heads must be given.
    """
    shape = {name: tuple(tensor.shape) for name, tensor in released.items()}
    try:
        width, channels = shape["x_embedder.proj.weight"]
        lora = not shape.keys().isdisjoint(_OF_LORA)
        variance = shape["final_layer.linear.weight"][0] == 2 * channels
        depth = len([name for name in shape if re.fullmatch(r"blocks\.\d+\.attn\.qkv\.weight", name)])
        if not depth:
            raise KeyError("blocks.0.attn.qkv.weight")
        architecture = Architecture(
            depth=depth,
            width=width,
            heads=heads or _heads(width),
            in_channels=channels // 4,
            num_classes=shape["y_embedder.embedding_table.weight"][0] - 1,
            prediction="noise" if variance else "velocity",
            path="ddpm" if variance else "linear",
            mlp_width=shape["blocks.0.mlp.fc2.weight"][1],
            adaln="lora" if lora else "full",
            lora_rank=shape["blocks.0.adaLN_modulation.1.weight"][0] if lora else None,
            qk_norm=lora,  # not seen in the shapes: FiTv2 has both, FiT neither
        )
    except UserError:
        raise
    except (KeyError, ValueError, IndexError) as error:
        raise UserError(f"these are not weights of a released FiT: {error} is missing or odd") from error
    architecture = _plain(architecture)
    if heads is None:  # else a lost block would look like a smaller model
        known = [
            p.model
            for p in PRESETS.values()
            if p.model.width == width and p.model.adaln == architecture.adaln
        ]
        if known and architecture not in known:
            ours(known[0], released)
    return architecture


def _heads(width: int) -> int:
    known = {p.model.width: p.model.heads for name, p in PRESETS.items() if name.startswith("fit")}
    if width not in known:
        raise UserError(f"a model of width {width} is none of the released ones: give its `heads`")
    return known[width]


def _plain(architecture: Architecture) -> Architecture:
    """The architecture without sizes that are the defaults, so that it equals a preset where it is one."""
    width = architecture.width
    mlp_width = None if architecture.mlp_width == 2 * 4 * width // 3 else architecture.mlp_width
    lora_rank = None if architecture.lora_rank == width // 4 else architecture.lora_rank
    return replace(architecture, mlp_width=mlp_width, lora_rank=lora_rank)


# The padded layout ------------------------------------------------------------------------------


def from_released(config: dict[str, Any], state_dict: dict[str, Tensor]) -> FiT:
    """A released FiT or FiTv2 as ours. `config`: arguments of the released constructor.

    Raises UserError for variants that no release has, and for missing, extra or misshapen tensors.
    """
    architecture = _plain(architecture_of(config))
    weights = ours(architecture, state_dict)
    with torch.device("meta"):
        model = FiT(**asdict(architecture))
    model.load_state_dict(weights, strict=True, assign=True)
    return model.eval()


@torch.inference_mode()
def released_forward(
    model: FiT, x: Tensor, t: Tensor, y: Tensor, grid: Tensor, mask: Tensor, size: Tensor
) -> Tensor:
    """`model` on the released padded layout: x (B, N, C), or (B, C, N) for FiT v1; the same comes back.

    size (B, 1, 2) is (rows, columns); grid (B, 2, N), columns first, and mask (B, N) are what it
    implies: real tokens come first, row by row. What lies on padding is zero in the result.
    """
    channels_first = model.architecture.output_channels > model.token_channels  # v1
    if channels_first:
        x = x.transpose(1, 2)
    sizes = [(int(rows), int(columns)) for rows, columns in size.reshape(-1, 2)]
    real = mask.bool()
    counts = [math.prod(pair) for pair in sizes]
    if real.sum(1).tolist() != counts or not all(row[:n].all() for row, n in zip(real, counts, strict=True)):
        raise UserError("the mask is not that of whole images, real tokens first")
    layout = Layout.of(sizes).to(x.device)
    if not torch.equal(grid.transpose(1, 2)[real].flip(1).long(), layout.pos_T2):
        raise UserError("the grid is not that of whole images, row by row")
    out_TC = model(x[real], layout, t, Condition.of(label=y))
    out = torch.zeros(*x.shape[:2], out_TC.shape[1], dtype=out_TC.dtype, device=x.device)
    out[real] = out_TC
    return out.transpose(1, 2) if channels_first else out
