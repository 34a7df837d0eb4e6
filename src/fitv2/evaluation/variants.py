"""The variants of the study of convergence: models of the paper's tables, and what may be added to each."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from fitv2.config import Architecture, Training
from fitv2.diffusion.objective import objective_of
from fitv2.errors import UserError, nearest
from fitv2.evaluation.settings import Scale
from fitv2.presets import PRESETS, Preset

SQUARE = ("DiT", "SiT")  # trained on square crops
# By the names of the paper's table: the preset that each is taken from.
FROM_PRESET = {
    "FiT": "fit-b", "A": "ablation-a", "B": "ablation-b", "C": "ablation-c", "D": "ablation-d",
    "E": "ablation-e", "F": "ablation-f", "FiTv2": "fitv2-b", "fast": "fast",
}  # fmt: skip
VARIANTS = ("DiT", "SiT", *FROM_PRESET)


def halve(model: Architecture, training: Training) -> tuple[dict[str, Any], dict[str, Any]]:
    """Half the steps; over the last two thirds of them the rate falls to zero."""
    every = training.evaluate_every
    steps = max(every, round(training.steps / 2 / every) * every)
    return {}, {"steps": steps, "decay_steps": 2 * steps // 3, "sample_every": steps}


def ramp_up(times: int, model: Architecture, training: Training) -> tuple[dict[str, Any], dict[str, Any]]:
    """Small steps first, and as many images in all: more steps, by `times` those between evaluations."""
    every = training.evaluate_every
    fit = int(training.steps * 7 / 9 / every) * every  # else the ramp-up would be longer than the training
    more = min(times * every, fit)
    steps = training.steps + more
    return {}, {"steps": steps, "sample_every": steps, "batch_rampup_steps": round(more / (7 / 16))}


def add_early_head(model: Architecture, training: Training) -> tuple[dict[str, Any], dict[str, Any]]:
    """A second head after about a third of the blocks."""
    return {"early_head": max(1, round(model.depth / 3))}, {}


# What may stand behind a variant's name: "fast+half+levels". Changes of its model, and of its training.
Changes = Callable[[Architecture, Training], tuple[dict[str, Any], dict[str, Any]]]
ADDITIONS: dict[str, Changes] = {
    "half": halve,
    "constant": lambda model, training: ({}, {"decay_steps": 0}),
    "late-decay": lambda model, training: ({}, {"decay_steps": training.steps // 5}),
    "rampup": partial(ramp_up, 1),
    "long-rampup": partial(ramp_up, 3),
    "early": add_early_head,
    "aligned": lambda model, training: (
        {**add_early_head(model, training)[0], "early_prediction": "data"}, {}
    ),
    "levels": lambda model, training: ({}, {"clean_share": 0.25}),
    "muon": lambda model, training: ({}, {"optimizer": "muon", "learning_rate": 6e-3, "beta2": 0.99}),
    "muon-3": lambda model, training: ({}, {"muon_iterations": 3}),
    "muon-alternate": lambda model, training: ({}, {"muon_every": 2}),
    "squared": lambda model, training: ({}, {"direction_weight": 0.0}),
    "logit-normal": lambda model, training: ({}, {"times": "logit-normal", "time_mean": 0.0}),
}  # fmt: skip


NUMBERS = {"rate": "learning_rate", "mean": "time_mean"}  # additions with a number behind them


def variant(name: str, scale: Scale, tokens: Architecture) -> Preset:
    """A variant at a scale, with what is added to it by "+", in order; `tokens` has what the data decide.

    Raises UserError for an unknown name, and for an addition that is not for that variant.
    """
    base, *added = name.split("+")
    found = plain_variant(base, scale, tokens)
    for addition in added:
        of_model, of_training = changes_of(addition)(found.model, found.training)
        found = replace(
            found, model=replace(found.model, **of_model), training=replace(found.training, **of_training)
        )
    objective_of(found.model, found.training)
    return replace(found, about=f"{name} of the study of convergence")


def changes_of(addition: str) -> Changes:
    """What an addition changes; "rate=3e-3" sets the learning rate. Raises UserError for an unknown one."""
    name, _, value = addition.partition("=")
    if name in NUMBERS:
        try:
            number = float(value)
        except ValueError as error:
            raise UserError(f"{addition}: a number has to stand behind {name}=") from error
        return lambda model, training: ({}, {NUMBERS[name]: number})
    if addition not in ADDITIONS:
        raise nearest("addition to a variant", addition, (*ADDITIONS, *NUMBERS))
    return ADDITIONS[addition]


def plain_variant(name: str, scale: Scale, tokens: Architecture) -> Preset:
    """A variant with nothing added."""
    if name not in VARIANTS:
        raise nearest("variant", name, VARIANTS)
    based_on = PRESETS[FROM_PRESET.get(name, "fit-b")]
    model = based_on.model
    depth = round(scale.depth * 1.25) if model.depth == 15 or name == "fast" else scale.depth
    changes: dict[str, Any] = {
        "width": scale.width, "heads": scale.heads, "depth": depth,
        "mlp_width": 4 * scale.width if model.mlp_width else None,
        **{field: getattr(tokens, field) for field in ("patch_size", "in_channels", "num_classes")},
    }  # fmt: skip
    if name in SQUARE:  # SwiGLU of 8/3 of the width has as many weights as DiT's MLP of 4
        changes |= {"mlp_width": None, "rope": replace(model.rope, kind="absolute")}
    if name == "SiT":
        changes |= {"path": "linear", "prediction": "velocity"}
    if name == "fast":
        changes |= {"prediction": "velocity" if tokens.token_channels <= scale.width // 4 else "data"}
    training = replace(
        based_on.training, steps=scale.steps, batch_size=scale.batch_size, warmup_steps=scale.steps // 40,
        decay_steps=0, ema_decay=max(0.0, 1 - 20 / scale.steps), validate_every=scale.every,
        evaluate_every=scale.every, save_every=scale.every, sample_every=scale.steps, track=(), keep=1,
        precision=scale.precision,
    )  # fmt: skip
    if name == "SiT":
        training = replace(training, times="uniform")
    if name != "fast":
        training = replace(training, learning_rate=scale.learning_rate)
    return Preset("", replace(model, **changes), training)
