"""Named configurations as values. A preset is an architecture and how it is trained.

Nothing heavy is imported here: the command line builds its help from these.
"""

from dataclasses import dataclass, field, replace
from typing import Any

from fitv2.config import Architecture, Rope, Training
from fitv2.errors import nearest


@dataclass(frozen=True)
class Preset:
    """An architecture and its training."""

    about: str
    model: Architecture
    training: Training = field(default_factory=Training)


_SMALL = Training(
    steps=20_000,
    batch_size=64,
    learning_rate=1e-3,
    warmup_steps=200,
    decay_steps=4_000,
    weight_decay=0.01,
    beta2=0.99,
    ema_decay=0.999,
    time_mean=-1.4,
)


def _on_pixels(depth: int, width: int, heads: int) -> Architecture:
    """Tokens of 16×16 RGB pixels. With so many channels per token, predicting the image is better."""
    return Architecture(depth, width, heads, "data", patch_size=16, in_channels=3, num_classes=19)


def _fit(depth: int, width: int, heads: int) -> Architecture:
    """FiT v1 (arXiv 2402.12376)."""
    return Architecture(
        depth, width, heads, prediction="noise", path="ddpm", mlp_width=4 * width, adaln="full", qk_norm=False
    )


def _derived(base: Preset, about: str, model: dict[str, Any] | None = None, **training: Any) -> Preset:
    """Another preset with some of its fields changed."""
    return Preset(about, replace(base.model, **model or {}), replace(base.training, **training))


POST_TRAINED = Rope("ntk", train_side=16)  # NTK-aware, per image and per axis

_FIT_B = Preset(
    "FiT-B/2 of the first paper: 159M parameters, DDPM. Its FID on ImageNet at 400k steps: 18.86.",
    _fit(depth=12, width=768, heads=12),
    Training(crop_probability=0.0),
)
_FITV2_B = Preset(
    "FiTv2-B/2: 128M parameters. The paper's FID on ImageNet at 400k steps: 9.45; at 2M: 4.30.",
    Architecture(depth=15, width=768, heads=12),
)
_FITV2_XL = Preset(
    "FiTv2-XL/2: 671M parameters. The paper's FID on ImageNet at 2M steps: 2.26.",
    Architecture(depth=36, width=1152, heads=16),
    Training(steps=2_000_000),
)
_FITV2_3B = Preset(
    "FiTv2-3B/2: 3B parameters. The paper's FID on ImageNet at 1M steps: 2.15.",
    Architecture(depth=40, width=2304, heads=24),
    Training(steps=1_000_000),
)
_HR: dict[str, Any] = {"trainable": "post-training", "warmup_steps": 0}

# The ablation of the paper, from FiT-B/2 to FiTv2-B/2; FID at their 400k steps with guidance 1.5.
_A = _derived(
    _FIT_B, "Ablation A: fit-b + rectified flow. The paper's FID 13.14.",
    {"path": "linear", "prediction": "velocity"}, times="uniform",
)  # fmt: skip
_B = _derived(_A, "Ablation B: A + norm of queries and keys. The paper's FID 13.21.", {"qk_norm": True})
_C = _derived(
    _B, "Ablation C: B + parameters reassigned, from modulation and MLP to depth. The paper's FID 12.74.",
    {"depth": 15, "adaln": "lora", "mlp_width": None},
)  # fmt: skip
_D = _derived(
    _A,
    "Ablation D: A + mixed preprocessing. The paper's FID 13.99; breaks at 2M steps.",
    crop_probability=0.5,
)
_E = _derived(_B, "Ablation E: B + mixed preprocessing. The paper's FID 14.19.", crop_probability=0.5)
_F = _derived(_E, "Ablation F: E + logit-normal times. The paper's FID 9.98.", times="logit-normal")

PRESETS = {
    "fitv2-b": _FITV2_B,
    "fitv2-xl": _FITV2_XL,
    "fitv2-3b": _FITV2_3B,
    "fitv2-xl-hr": _derived(
        _FITV2_XL, "Post-training of fitv2-xl (--init) to 1024 tokens. The paper's FID at 512x512: 2.90.",
        {"rope": POST_TRAINED}, steps=400_000, **_HR,
    ),
    "fitv2-3b-hr": _derived(
        _FITV2_3B, "Post-training of fitv2-3b (--init) to 1024 tokens. The paper's FID at 512x512: 2.41.",
        {"rope": POST_TRAINED}, steps=200_000, **_HR,
    ),
    "t2i-b": _derived(
        _FITV2_B, "fitv2-b of texts, as the paper's text-to-image: CLIP-L's states in front of the image.",
        {"conditions": ("text",), "text_channels": 768, "pooled_channels": 768},
        text_encoder="openai/clip-vit-large-patch14",
    ),
    "fit-b": _FIT_B,
    "fit-xl": Preset(
        "FiT-XL/2 of the first paper: 824M parameters, DDPM. Its FID on ImageNet at 2M steps: 4.21.",
        _fit(depth=28, width=1152, heads=16),
        Training(steps=2_000_000, warmup_steps=500, crop_probability=0.0),
    ),
    "ablation-a": _A,
    "ablation-b": _B,
    "ablation-c": _C,
    "ablation-d": _D,
    "ablation-e": _E,
    "ablation-f": _F,
    "small": Preset(
        "31M parameters on pixels, for one small GPU.",
        _on_pixels(depth=14, width=384, heads=6),
        replace(_SMALL, learning_rate=5e-4, steps=100_000, decay_steps=20_000),
    ),
    "emoji": Preset(
        "The shipped model: 8M parameters, captions, latents of 8x8 pixels (docs/results/models/emoji).",
        Architecture(
            depth=8, width=256, heads=4, patch_size=2, in_channels=8, num_classes=7,
            conditions=("label", "text"), text_channels=256, pooled_channels=256,
        ),
        replace(
            _SMALL, steps=40_000, optimizer="muon", learning_rate=4e-3, warmup_steps=20, decay_steps=8_000,
            direction_weight=0.5, weight_decay=0.0,
        ),
    ),
    "any-step": Preset(
        "A trained flow (--init), whose shape it takes, made an any-step model: pictures in 1 to 8 steps.",
        Architecture(depth=8, width=256, heads=4, objective="any-step"),
        replace(
            _SMALL, steps=10_000, optimizer="muon", learning_rate=1e-3, warmup_steps=100, decay_steps=5_000,
            curriculum_steps=2_000, weight_decay=0.0,
        ),
    ),
    "clipart": Preset(
        "On pixels, of labels: 5.6M parameters, an hour on two CPU cores (docs/results/models/clipart).",
        _on_pixels(depth=5, width=256, heads=4),
        replace(_SMALL, batch_size=48, steps=8_000, decay_steps=2_000),
    ),
    "fast": Preset(
        "clipart in half the steps: what was found to learn it faster; see docs/results/fast.md.",
        _on_pixels(depth=5, width=256, heads=4),
        replace(
            _SMALL, batch_size=48, steps=4_000, optimizer="muon", learning_rate=6e-3, warmup_steps=20,
            decay_steps=2_667, direction_weight=0.5, weight_decay=0.0, ema_decay=0.99,
        ),
    ),
    "fast-latents": Preset(
        "8M parameters on latents of labels, with the recipe that halved the steps of a model of 1.3M; not"
        " measured at this size (docs/results/convergence.md).",
        Architecture(
            depth=8, width=256, heads=4, patch_size=2, in_channels=8, num_classes=19, early_head=3,
        ),
        replace(
            _SMALL, batch_size=48, steps=8_750, batch_rampup_steps=8_575, optimizer="muon",
            learning_rate=4e-3, warmup_steps=100, decay_steps=0, direction_weight=0.5, weight_decay=0.0,
            ema_decay=0.995, time_mean=0.0, clean_share=0.25,
        ),
    ),
    "debug": Preset(
        "Small enough that a step takes milliseconds; learns nothing worth seeing.",
        _on_pixels(depth=2, width=32, heads=2),
        replace(
            _SMALL, steps=20, batch_size=4, warmup_steps=2, decay_steps=0, precision="float32",
            log_every=1, validate_every=10, sample_every=10, save_every=10,
        ),
    ),
}  # fmt: skip


def preset(name: str) -> Preset:
    """The preset of that name; UserError naming the nearest ones when there is none."""
    if name not in PRESETS:
        raise nearest("preset", name, PRESETS)
    return PRESETS[name]
