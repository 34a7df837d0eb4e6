"""The range of every number that can be chosen: of settings, of config.json, of options."""

import math
from dataclasses import fields
from typing import TYPE_CHECKING, NamedTuple

from fitv2.errors import UserError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

MAX_TOKENS = 32_767  # of an image: the sides of a token grid are stored in 16 bits
MAX_PATCH = 128  # pixels of a latent
MAX_SIDE = 32_768  # pixels of an image that is made
MAX_IMAGES = 100_000  # that one command makes
MAX_PARAMETERS = 1e11  # of a model


class Range(NamedTuple):
    """From `least` to `most`; `above` and `below` leave out the end itself. NaN lies in none."""

    least: float
    most: float
    above: bool = False
    below: bool = False

    def holds(self, value: float) -> bool:
        """Whether a number lies in it."""
        from_least = value > self.least if self.above else value >= self.least
        return from_least and (value < self.most if self.below else value <= self.most)

    def __str__(self) -> str:
        least = f"{'above' if self.above else 'at least'} {show(self.least)}"
        return f"{least} and {'below' if self.below else 'at most'} {show(self.most)}"


def show(number: float) -> str:
    """A number as a person would type it."""
    return f"{number:g}" if abs(number) >= 1e6 or number != int(number) else str(int(number))


BILLION = 10**9
SHARE = Range(0, 1)
COUNT = Range(1, BILLION)
DECAY = Range(0, 1, below=True)
POSITIVE = Range(0, 1e6, above=True)
SEED = Range(0, 2**63 - 1)

# By field; by class and field, where another class has a field of that name.
LIMITS = {
    # The model
    "depth": Range(1, 1_000),
    "width": Range(4, 65_536),
    "heads": Range(1, 1_024),
    "mlp_width": Range(1, 262_144),
    "lora_rank": Range(1, 65_536),
    "early_head": Range(0, 1_000),
    "time_shift": Range(1e-3, 1e3),
    "patch_size": Range(1, MAX_PATCH),
    "in_channels": Range(1, 65_536),
    "num_classes": Range(1, 100_000_000),
    "text_channels": Range(0, 65_536),
    "pooled_channels": Range(0, 65_536),
    "train_side": Range(2, MAX_TOKENS),
    "pixels_per_token": Range(1, 65_536),
    "grid": Range(1, MAX_TOKENS),
    "restart": Range(0, 1),
    "base": Range(1, 1e12, above=True),
    # Encoding
    "max_tokens": Range(1, MAX_TOKENS),
    "shard_size": Range(1, 1_000_000),
    "workers": Range(0, 256),
    # Training
    "steps": COUNT,
    "batch_size": Range(1, 1_048_576),
    "tokens_per_step": COUNT,
    "batch_rampup_steps": Range(0, 10_000_000),
    "crop_probability": SHARE,
    "grad_accum_steps": Range(1, 65_536),
    "learning_rate": Range(0, 10),
    "warmup_steps": Range(0, BILLION),
    "decay_steps": Range(0, BILLION),
    "weight_decay": Range(0, 10),
    "beta2": DECAY,
    "muon_iterations": Range(1, 20),
    "muon_every": Range(1, 1_000),
    "lora": Range(0, 65_536),
    "max_grad_norm": Range(0, 1e9, above=True),
    "ema_decay": DECAY,
    "label_dropout": SHARE,
    "time_mean": Range(-20, 20),
    "time_std": Range(0, 20),
    "direction_weight": Range(0, 1e3),
    "early_weight": Range(0, 1e3),
    "clean_share": Range(0, 1, below=True),
    "jump_share": SHARE,
    "curriculum_steps": Range(0, BILLION),
    "learned_guidance": Range(1, 1e3),
    "learned_guidance_interval": SHARE,
    "difference": Range(1e-5, 0.1),
    "toward_seed": SEED,
    "seed": SEED,
    "fsdp_size": Range(1, 65_536),
    "stall_minutes": POSITIVE,
    "minutes": Range(0, 1e6),
    "log_every": COUNT,
    "validate_every": COUNT,
    "sample_every": COUNT,
    "save_every": COUNT,
    "keep": COUNT,
    "milestone_every": COUNT,
    "evaluate_every": COUNT,
    "evaluate_num": Range(10, MAX_IMAGES),
    # Sampling
    "guidance_scale": Range(-1e3, 1e3),
    "guidance": Range(-1e3, 1e3),
    "guidance_channels": Range(1, 65_536),
    "guidance_power": Range(0, 1e3),
    "guidance_interval": SHARE,
    "internal_scale": Range(-1e3, 1e3),
    "internal_interval": SHARE,
    "Sampling.steps": Range(1, 10_000),
    "Sampling.shift": Range(0.05, 20),
    "shifts": Range(0.05, 20),
    "rtol": Range(0, 1),
    "atol": Range(1e-12, 1),
    "diffusion_norm": Range(0, 1e3),
    "last_step_size": Range(0, 1, below=True),
    "eta": SHARE,
    "num": Range(1, MAX_IMAGES),
    "size": Range(1, MAX_SIDE),
    "height": Range(1, MAX_SIDE),
    "Recipe.width": Range(1, MAX_SIDE),
    "label_number": Range(0, 100_000_000),
    "at": Range(0, MAX_SIDE),
    "port": Range(1, 65_535),
    "max_side": Range(16, MAX_SIDE),
    "max_images": Range(1, 1_000),
    "queue": Range(1, 10_000),
    "strength": Range(0, 1, above=True),
    "samples": Range(0, 10_000),
    # Evaluation
    "Evaluation.num": Range(10, MAX_IMAGES),
    "crop_at_most": SHARE,
    "most_real": Range(10, 10_000_000),
    "every": COUNT,
    "evaluations": Range(2, 10_000),
    "seeds": SEED,
    "widths": Range(4, 65_536),
    "depths": Range(1, 1_000),
    # The card of a dataset
    "scale": Range(0, 1e6, above=True),
    "shift": Range(-1e6, 1e6),
}


def check_limits(settings: "DataclassInstance") -> None:
    """UserError naming a field whose number lies outside its range.

    A number without a range is a mistake in the code: LookupError.
    """
    kind = type(settings).__name__
    for field in fields(settings):
        value = getattr(settings, field.name)
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, int | float) and not isinstance(number, bool):
                check_limit(field.name, number, kind)


def check_limit(name: str, number: float, kind: str = "") -> None:
    """UserError when a number lies outside the range of the field `name`."""
    limit = LIMITS.get(f"{kind}.{name}") or LIMITS[name]
    if not limit.holds(number):
        given = number if abs(number) < 1e15 or not math.isfinite(number) else f"{float(number):g}"
        raise UserError(f"`{name}` is {given}; it must be {limit}")
