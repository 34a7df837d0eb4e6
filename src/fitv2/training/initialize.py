"""What a run starts from: random weights, or those of another model."""

from dataclasses import asdict, replace
from pathlib import Path

import torch

from fitv2.checkpoint import load_model
from fitv2.config import Architecture, Rope
from fitv2.data.dataset import TokenDataset
from fitv2.data.texts import TextCache
from fitv2.errors import UserError
from fitv2.model import FiT
from fitv2.presets import Preset
from fitv2.runtime.rng import WEIGHTS, derive_seed
from fitv2.text_encoder import TextEncoder
from fitv2.training.optim import freeze


def initialize(preset: Preset, dataset: TokenDataset, labels: tuple[str, ...], init: str | None) -> FiT:
    """What a run starts from, in float32 on the CPU: random weights, or those of another model.

    Raises UserError when a part of a model is to be trained and there is none.
    """
    config = preset.training
    architecture = fit_to_data(preset.model, dataset)
    if config.trainable != "all" and not init:
        raise UserError(f"`trainable` {config.trainable} trains a part of a trained model: give `init`")
    torch.manual_seed(derive_seed(config.seed, WEIGHTS))
    model = load_initial(init, architecture, labels) if init else FiT(**asdict(architecture))
    freeze(model, config.trainable)
    if config.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    return model.train()


def load_initial(name: str, architecture: Architecture, labels: tuple[str, ...]) -> FiT:
    """The model `name`, with the positions of `architecture` if it scales any: they hold no weights.

    Raises UserError when it has another architecture else, or other labels.
    """
    model, card = load_model(name)
    if architecture.rope == Rope():
        architecture = replace(architecture, rope=model.architecture.rope)
    model = model.with_rope(architecture.rope)
    theirs = asdict(model.architecture)
    differing = [key for key, value in asdict(architecture).items() if theirs[key] != value]
    if card.labels != labels:
        differing.append("labels")
    if differing:
        raise UserError(f"{name} cannot start this run: it has another {', '.join(differing)}")
    return model


def give_texts(dataset: TokenDataset, encoder: TextEncoder) -> None:
    """Have a dataset's captions encoded, or read where they were before. Raises UserError if it has none."""
    captions = dataset.captions(dataset.first_rows)
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
