"""A released checkpoint into a model folder, and a model back."""

import re
from dataclasses import asdict, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from fitv2.checkpoint import (
    CARD,
    WEIGHTS,
    Card,
    find_model,
    note_files,
    read_architecture,
    read_weights,
    verify_model,
    write_config,
)
from fitv2.config import Architecture, Rope
from fitv2.conversion.reader import naming, read_checkpoint, refuse_infinite, refuse_unfit
from fitv2.conversion.released import AUTOENCODER, RELEASES, imagenet_labels, ours, recognised, to_released
from fitv2.errors import UserError, reading
from fitv2.model import FiT
from fitv2.presets import POST_TRAINED
from fitv2.runtime.files import atomic_file, atomic_folder, write_json

OBJECTIVES = ("flow", "ddpm")  # of the released code


def convert_checkpoint(
    source: Path,
    out: Path,
    *,
    post_trained: bool | None = None,
    heads: int | None = None,
    autoencoder: str = AUTOENCODER,
) -> str:
    """A released checkpoint, safetensors or a plain state dict in .bin, as the new model folder `out`.

    Which model it is, is seen from its shapes, except whether it was post-trained to 1024 tokens:
    unless `post_trained` says so, "hr" in the file's or its folder's name does. `heads` are needed
    for sizes that were not released. Every bit is kept. Returns what it was taken for, and what was taken
    off it: "FiTv2-XL/2 (taken from 'ema', prefix 'module.' removed)". Raises UserError for files that are no
    such checkpoint, naming missing, extra and misshapen tensors, and such as are not finite.
    """
    released, removed = read_checkpoint(source)
    with reading(source), naming(source):
        architecture = recognised(released, heads)
        weights = ours(architecture, released)
        refuse_infinite(released)
    if post_trained is None:
        post_trained = any(re.search(r"(^|[^a-z])hr(ft)?([^a-z]|$)", name.lower())
                           for name in (source.stem, source.absolute().parent.name))  # fmt: skip
    if post_trained and architecture.objective_name != "flow":
        raise UserError(f"{source} is a FiT v1: none of them was post-trained")
    if post_trained:
        architecture = replace(architecture, rope=POST_TRAINED)
    known = [release for release in RELEASES.values() if release.architecture == architecture]
    labels = imagenet_labels()
    if architecture.num_classes != len(labels):
        labels = tuple(str(i) for i in range(architecture.num_classes))
    tokens = 1024 if post_trained else 256
    card = Card(labels, autoencoder, tokens, known[0].guidance if known else 1.5)
    with atomic_folder(out) as folder:
        with torch.device("meta"):
            write_config(FiT(**asdict(architecture)), folder)
        save_file(_apart(weights), folder / WEIGHTS, metadata={"format": "pt"})
        (folder / WEIGHTS).chmod(0o644)
        write_json(folder / CARD, asdict(card))
        note_files(folder)
    taken_for = known[0].about if known else f"{_kind(architecture)} of width {architecture.width}"
    return f"{taken_for} ({', '.join(removed)})" if removed else taken_for


def _kind(architecture: Architecture) -> str:
    kind = "FiT" if architecture.objective_name != "flow" else "FiTv2"
    return kind + (" post-trained" if architecture.rope != Rope() else "")


def _apart(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors that share no memory, which safetensors would refuse."""
    seen: set[int] = set()
    for name, tensor in weights.items():
        weights[name] = tensor = tensor.contiguous()
        place = tensor.untyped_storage().data_ptr()
        if place in seen:
            weights[name] = tensor.clone()
        seen.add(place)
    return weights


def convert_to_released(name: str | Path, out: Path) -> None:
    """The model `name` as a released checkpoint, the new file `out` (.safetensors). Every bit is kept.

    Raises UserError when there is no such model, when it is damaged or not finite, and for one that the
    released code could not run.
    """
    if out.suffix != ".safetensors":
        raise UserError(f"{out} should end in .safetensors, which the released code reads too")
    if out.exists():
        raise UserError(f"{out} already exists: remove it or choose another")
    folder = find_model(name)
    with reading(folder):
        weights = _released_weights(folder)
    with atomic_file(out) as partial:
        save_file(weights, partial, metadata={"format": "pt"})
        partial.chmod(0o644)


def _released_weights(folder: Path) -> dict[str, Tensor]:
    verify_model(folder)
    architecture = read_architecture(folder)
    if architecture.conditions != ("label",):
        said = " and ".join(architecture.conditions) or "nothing"
        raise UserError(f"{folder} is conditioned on {said}: the released code knows labels alone")
    if architecture.objective_name not in OBJECTIVES:
        raise UserError(
            f"{folder} has the objective {architecture.objective_name}: the released code knows"
            f" {' and '.join(OBJECTIVES)}"
        )
    if architecture.early_head:
        raise UserError(f"{folder} has an early head, which the released code does not know")
    weights = read_weights(folder, architecture)
    with naming(folder):
        refuse_unfit(weights)
        refuse_infinite(weights)
    return to_released(weights)
