"""Named configurations as values. A preset is an architecture and how it is trained.

Nothing heavy is imported here: the command line builds its help from these.
"""

from dataclasses import dataclass, field, replace
from typing import Literal

from fitv2.errors import UserError, nearest

Prediction = Literal["velocity", "data"]


def at_least(least: float, **values: float) -> None:
    """UserError naming the option whose value is less."""
    for name, value in values.items():
        if value < least:
            raise UserError(f"--{name.replace('_', '-')} is {value}; it must be at least {least}")


@dataclass(frozen=True)
class Architecture:
    """What `fitv2.model.FiT` is built from."""

    depth: int
    """Transformer blocks."""
    width: int
    """Numbers a token holds inside the transformer."""
    heads: int
    """Attention heads; width/heads must be a multiple of 4."""
    patch_size: int = 2
    """Side of a token in latent pixels."""
    in_channels: int = 4
    """Channels of the latent."""
    num_classes: int = 1000
    """Labels, not counting the null label of guidance."""
    prediction: Prediction = "velocity"
    """What the output means; see `fitv2.flow`."""

    def __post_init__(self) -> None:
        """UserError for a shape that no model can have."""
        at_least(1, depth=self.depth, width=self.width, heads=self.heads, patch_size=self.patch_size)
        at_least(1, in_channels=self.in_channels, num_classes=self.num_classes)
        if self.width % (4 * self.heads):
            raise UserError(f"width {self.width} over {self.heads} heads is not a multiple of 4 numbers each")


@dataclass(frozen=True)
class Training:
    """How a model is trained. The defaults are the paper's."""

    steps: int = 400_000
    """Optimizer steps in all."""
    batch_size: int = 256
    """Images a step, whatever their sizes."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """Muon is for the matrices of the blocks; the rest is AdamW's always."""
    learning_rate: float = 1e-4
    """After warm-up."""
    warmup_steps: int = 5_000
    """Steps over which the learning rate rises linearly from zero."""
    decay_steps: int = 0
    """Last steps, over which it falls linearly to zero."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay."""
    beta2: float = 0.999
    """AdamW's second beta; the first is 0.9."""
    clip: float = 1.0
    """Largest gradient norm."""
    ema_decay: float = 0.9999
    """How much of the averaged weights is kept each step."""
    label_dropout: float = 0.1
    """Share of images trained without their label, for guidance."""
    time_mean: float = 0.0
    """Mean of the logit-normal times; below 0 is nearer to noise."""
    time_std: float = 1.0
    """Its standard deviation."""
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    """Of the matrix products; weights, optimizer, path and loss are float32 always."""
    seed: int = 0
    """All randomness of a run follows from it."""
    minutes: float | None = None
    """Stop after this long, even before `steps`."""
    log_every: int = 10
    """Steps between lines of the log."""
    validate_every: int = 500
    """Steps between validation losses."""
    sample_every: int = 2_000
    """Steps between sheets of samples."""
    save_every: int = 1_000
    """Steps between checkpoints."""
    keep: int = 2
    """Newest checkpoints that are kept."""

    def __post_init__(self) -> None:
        """UserError for settings that cannot work."""
        at_least(1, steps=self.steps, batch_size=self.batch_size, keep=self.keep)
        at_least(1, log_every=self.log_every, validate_every=self.validate_every)
        at_least(1, sample_every=self.sample_every, save_every=self.save_every)
        at_least(0, seed=self.seed, minutes=self.minutes or 0, learning_rate=self.learning_rate)
        at_least(0, warmup_steps=self.warmup_steps, decay_steps=self.decay_steps)


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
    """Tokens of 16×16 RGB pixels. With so many numbers a token, predicting the image is better."""
    return Architecture(depth, width, heads, 16, in_channels=3, num_classes=19, prediction="data")


PRESETS = {
    "fitv2-b": Preset(
        "FiTv2-B/2 of the paper: 128M parameters. ImageNet, 2M steps: FID 4.30 with guidance 1.5.",
        Architecture(depth=15, width=768, heads=12),
    ),
    "fitv2-xl": Preset(
        "FiTv2-XL/2 of the paper: 671M parameters. ImageNet, 2M steps: FID 2.26, guidance 1.5.",
        Architecture(depth=36, width=1152, heads=16),
        Training(steps=2_000_000),
    ),
    "fitv2-3b": Preset(
        "FiTv2-3B/2 of the paper: 3B parameters. ImageNet, 1M steps: FID 2.15, guidance 1.5.",
        Architecture(depth=40, width=2304, heads=24),
        Training(steps=1_000_000),
    ),
    "small": Preset(
        "31M parameters on pixels, for one small GPU.",
        _on_pixels(depth=14, width=384, heads=6),
        replace(_SMALL, learning_rate=5e-4, steps=100_000, decay_steps=20_000),
    ),
    "clipart": Preset(
        "The shipped model: 5.6M parameters on pixels, an hour on two CPU cores; see docs/models/clipart.",
        _on_pixels(depth=5, width=256, heads=4),
        replace(_SMALL, batch_size=48, steps=8_000, decay_steps=2_000),
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
