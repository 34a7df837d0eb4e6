"""What a run starts from: random weights, or those of another model."""

import warnings
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path

import numpy as np
import torch

from fitv2.checkpoint import find_model, load_model, read_architecture
from fitv2.config import ANY_STEP, Architecture, Network, Rope
from fitv2.data.dataset import TokenDataset
from fitv2.data.texts import TextCache
from fitv2.errors import UserError
from fitv2.model import FiT
from fitv2.presets import PRESETS, Preset
from fitv2.runtime.rng import WEIGHTS, derive_seed
from fitv2.text_encoder import TextEncoder
from fitv2.training.lora import add_lora
from fitv2.training.optim import freeze


def initialize(preset: Preset, dataset: TokenDataset, labels: tuple[str, ...], init: str | None) -> FiT:
    """What a run starts from, in float32 on the CPU: random weights, or those of another model.

    Raises UserError when a part of a model is to be trained and there is none.
    """
    config = preset.training
    architecture = fit_to_data(preset.model, dataset)
    if config.trainable != "all" and not init:
        raise UserError(f"`trainable` {config.trainable} trains a part of a trained model: give `init`")
    if config.trainable == "early-head" and not architecture.early_head:
        raise UserError(
            "`trainable` early-head trains a second head: give `early_head`, the blocks before it"
        )
    if config.lora and not init:
        raise UserError("`lora` changes a trained model: give `init`")
    if config.lora and config.trainable != "all":
        raise UserError("give `lora` or `trainable`")
    torch.manual_seed(derive_seed(config.seed, WEIGHTS))
    model, new = load_initial(init, architecture, labels) if init else (FiT(**asdict(architecture)), ())
    if config.trainable == "early-head" and any(not name.startswith("early.") for name in new):
        raise UserError("`trainable` early-head leaves all else as it is: data need the model's own labels")
    freeze(model, config.trainable)
    if config.lora:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in new)  # what is random cannot stay so
        add_lora(model, config.lora)
    if config.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    return model.train()


def shape_of_initial(preset: Preset, init: str | None) -> Preset:
    """The preset; where it makes a flow an any-step model, with the shape of that flow.

    Raises UserError if there is none.
    """
    if preset.model.objective != ANY_STEP:
        return preset
    if init is None:
        raise UserError("`objective` any-step makes a trained flow one of few steps: give `init`")
    theirs, chosen = read_architecture(find_model(init)), preset.model
    if chosen.early_head:
        raise UserError("`early_head` is not for `objective` any-step")
    usual = PRESETS["any-step"].model
    for name in {field.name for field in fields(Network)} - {"objective", "rope", *EARLY}:
        if getattr(chosen, name) not in (getattr(usual, name), getattr(theirs, name)):
            raise UserError(f"`{name}` cannot be chosen: an any-step model has the shape of its flow, {init}")
    rope = theirs.rope if chosen.rope == Rope() else chosen.rope
    steps, growing = preset.training.steps, preset.training.curriculum_steps
    if growing > steps:
        warnings.warn(
            f"the learned steps reach {steps / growing:.0%} of their length: give fewer `curriculum_steps`",
            stacklevel=2,
        )
    return replace(
        preset, model=replace(theirs, objective=ANY_STEP, rope=rope, early_head=0, early_prediction=None)
    )


EARLY = ("early_head", "early_prediction")
CONDITIONS = {"conditions", "num_classes", "text_channels", "pooled_channels", "labels"}


def load_initial(name: str, architecture: Architecture, labels: tuple[str, ...]) -> tuple[FiT, Sequence[str]]:
    """The model `name`, with the positions of `architecture` if it scales any: they hold no weights.

    If it has other conditions or labels, their embeddings start at random: a warning says so, and their names
    are given too. Raises UserError when it has another architecture else, or other labels of the same
    number.
    """
    model, card = load_model(name)
    if architecture.rope == Rope():
        architecture = replace(architecture, rope=model.architecture.rope)
    model = model.with_rope(architecture.rope)
    if architecture.objective == ANY_STEP and model.architecture.objective_name == "flow":
        model = model.with_objective(ANY_STEP)
    theirs = asdict(model.architecture)
    differing = [key for key, value in asdict(architecture).items() if theirs[key] != value]
    if card.labels != labels:
        differing.append("labels")
    others = set(differing) - {*EARLY}
    if others and not ({"conditions", "num_classes"} & others and others <= CONDITIONS):
        raise UserError(f"{name} cannot start this run: it has another {', '.join(differing)}")
    if not differing:
        return model, ()
    return with_conditions(model, architecture, "labels" in differing)


def with_conditions(model: FiT, architecture: Architecture, other_labels: bool) -> tuple[FiT, Sequence[str]]:
    """A model of other conditions with the weights of `model` for all that both have; and what is new."""
    made = FiT(**asdict(architecture))
    empty, given = made.state_dict(), model.state_dict()
    misfits = {key for key in empty if key not in given or given[key].shape != empty[key].shape}
    anew = {key.split(".")[0] for key in misfits}  # an embedding is kept whole or not at all
    early, theirs = (
        (one.early_head, one.early_prediction or one.prediction) for one in (architecture, model.architecture)
    )
    if architecture.early_head and early != theirs:
        anew.add("early")
    if model.architecture.early_head and not architecture.early_head:
        warnings.warn("the early head of the initial model is left out", stacklevel=2)
    if other_labels and "label" in architecture.conditions:  # perhaps as many, but of other things
        anew.add("label_embed")
    kept = {key: given[key] for key in empty if key.split(".")[0] not in anew}
    made.load_state_dict(kept, strict=False)
    if anew:
        named = ", ".join(sorted(anew))
        warnings.warn(f"{named} start at random: the initial model has others, or none", stacklevel=2)
    return made, sorted(empty.keys() - kept.keys())


def give_texts(dataset: TokenDataset, encoder: TextEncoder) -> None:
    """Have a dataset's captions encoded, or read where they were before. Raises UserError if it has none."""
    captions = dataset.captions(np.arange(len(dataset.lengths)))
    folder = Path(dataset.store.url) if dataset.store.is_local else None
    dataset.use_texts(TextCache(encoder, captions, folder))


def fit_to_data(architecture: Architecture, dataset: TokenDataset) -> Architecture:
    """`architecture` with the token layout and labels of the dataset."""
    about = dataset.card.about
    return replace(
        architecture,
        patch_size=about.patch_size,
        in_channels=about.in_channels,
        num_classes=len(about.labels),
        text_channels=dataset.texts.channels if dataset.texts else 0,
        pooled_channels=dataset.texts.pooled_channels if dataset.texts else 0,
    )
