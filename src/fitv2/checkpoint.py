"""Models in folders: saving and loading. The released weights come in through `fitv2.conversion.released`.

A model folder holds what diffusers writes (config.json, diffusion_pytorch_model.safetensors),
card.json, which says how to use the weights (labels, autoencoder, token limit), and files.json, the
SHA-256 of these files. One that travels holds an autoencoder that nobody else has, in its folder
`autoencoder`.
"""

import hashlib
import math
import re
import shutil
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar
from unicodedata import normalize

import torch
from diffusers.models.modeling_utils import ModelMixin
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fitv2.autoencoder import is_folder
from fitv2.config import Architecture, Rope
from fitv2.errors import UserError, in_one_line, nearest, reading
from fitv2.limits import check_limits
from fitv2.model import FiT
from fitv2.runtime.files import sha256, write_json
from fitv2.runtime.serialization import from_dict, read_json
from fitv2.tokens import Size

SHIPPED = Path(__file__).parent / "models"
WEIGHTS = "diffusion_pytorch_model.safetensors"
EARLY_HEAD = "early_head.safetensors"
LORA = "pytorch_lora_weights.safetensors"  # as diffusers names it
CONFIG = "config.json"
CARD = "card.json"
FILES = "files.json"
HELD = "./autoencoder"  # what a card says of an autoencoder in the model's own folder
PART = re.compile(r"[\w.-]+\.safetensors")  # of a large model
NAME = re.compile(r"step-\d{7,}")  # of a checkpoint


@dataclass(frozen=True)
class Card:
    """How to use a model's weights."""

    labels: tuple[str, ...]
    autoencoder: str
    max_tokens: int  # the longest image it was trained on
    guidance: float = 1.5
    text_encoder: str = ""  # of a model of texts

    ADDED: ClassVar[frozenset[str]] = frozenset({"text_encoder"})

    def __post_init__(self) -> None:
        """UserError for a number outside its range."""
        check_limits(self)

    @property
    def square(self) -> Size:
        """The largest square of the training token limit."""
        return (math.isqrt(self.max_tokens),) * 2

    def label_index(self, text: str) -> int:
        """The index of a label given as its number, its name, or the unambiguous start of its name.

        Names are compared as Unicode's NFC has them. Raises UserError naming the nearest labels, and
        the numbers of a name that several labels have.
        """
        text = normalize("NFC", text)
        labels = [normalize("NFC", label) for label in self.labels]
        same = [i for i, label in enumerate(labels) if label == text]
        if len(same) > 1:
            raise UserError(f"label {text!r} is that of {' and '.join(map(str, same))}: give its number")
        if same:
            return same[0]
        if text.isascii() and text.isdecimal() and len(text) < 10 and int(text) < len(labels):
            return int(text)
        starting = [i for i, label in enumerate(labels) if label.startswith(text)]
        if len(starting) == 1:
            return starting[0]
        if starting:
            some = [labels[i] for i in starting[:10]] + ["…"] * (len(starting) > 10)
            raise UserError(f"label {text!r} could be {' or '.join(some)}")
        if text.lstrip("-").isdecimal():
            raise UserError(f"unknown label {text}: numbers go from 0 to {len(self.labels) - 1}")
        raise nearest("label", text, self.labels)


def save_model(model: FiT, card: Card, folder: Path, adapter: Mapping[str, Tensor] | None = None) -> None:
    """Write a model folder; beside the model the LoRA that is in it, if it has one, as diffusers reads it."""
    ModelMixin.save_pretrained(model, folder)  # without a README: a checkpoint needs none
    if model.early is not None:
        split_early_head(folder)
    for weights in weight_files(folder):
        weights.chmod(0o644)  # safetensors makes files that only their owner can read
    if adapter:
        save_file(dict(adapter), folder / LORA, {"format": "pt"})
        (folder / LORA).chmod(0o644)
    write_config(model, folder)
    write_json(folder / CARD, asdict(card))
    note_files(folder)


def split_early_head(folder: Path) -> None:
    """Give the early head of a model a file of its own: the other is then that of the model without it."""
    index = folder / f"{WEIGHTS}.index.json"
    parts = read_json(index)["weight_map"] if index.exists() else {}
    found: dict[str, Tensor] = {}
    for path in weight_files(folder):
        held = load_file(path)
        # Copies: `held` is the file itself, which older versions of safetensors overwrite in place.
        early = {name: held.pop(name).clone() for name in list(held) if name.startswith("early.")}
        if early:
            save_file({name: tensor.clone() for name, tensor in held.items()}, path, {"format": "pt"})
        found |= early
        parts |= dict.fromkeys(held, path.name) | dict.fromkeys(early, EARLY_HEAD)
    save_file(found, folder / EARLY_HEAD, {"format": "pt"})
    sizes = [path.stat().st_size for path in {folder / name for name in parts.values()}]
    write_json(index, {"metadata": {"total_size": sum(sizes)}, "weight_map": parts})


def export_model(model: FiT, card: Card, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write a model folder that can be opened on any machine, its weights in `dtype`.

    An autoencoder of a folder of this machine is copied into it; one of the hub, and a shipped one, is named.
    Raises UserError when that folder is not there, and for weights beyond the range of `dtype`.
    """
    largest = torch.finfo(dtype).max
    if beyond := [name for name, value in model.state_dict().items() if value.abs().max() > largest]:
        raise UserError(f"{beyond[0]} has values beyond the range of {str(dtype).removeprefix('torch.')}")
    if is_folder(card.autoencoder):
        copy_autoencoder(Path(card.autoencoder), folder / HELD)
        card = replace(card, autoencoder=HELD)
    elif Path(card.autoencoder).is_absolute():
        raise UserError(f"the model's autoencoder, {card.autoencoder}, is not there: give `autoencoder`")
    save_model(torch.nn.Module.to(deepcopy(model), dtype), card, folder)


def copy_autoencoder(source: Path, target: Path) -> None:
    """Copy what diffusers reads of an autoencoder's folder."""
    target.mkdir(parents=True)
    for path in [source / CONFIG, *sorted(source.glob("*.safetensors*"))]:
        with reading(path):
            shutil.copyfile(path, target / path.name)


def write_config(model: FiT, folder: Path) -> None:
    """Write config.json, which rebuilds the model."""
    model.save_config(folder)
    config = read_json(folder / CONFIG)
    config.pop("_name_or_path", None)  # where it was loaded from is nobody else's business
    write_json(folder / CONFIG, config)


def note_files(folder: Path) -> None:
    """Write files.json, the SHA-256 of every file of a model folder."""
    index = folder / f"{WEIGHTS}.index.json"
    files = [folder / CONFIG, folder / CARD, *weight_files(folder)]
    files += [path for path in (index, folder / LORA) if path.exists()]
    files += sorted((folder / HELD).glob("*"))
    write_json(folder / FILES, {path.relative_to(folder).as_posix(): sha256(path) for path in files})


def verify_model(folder: Path) -> None:
    """UserError if a file is not the one that was written. What has no files.json is taken as it is."""
    if not (folder / FILES).exists():
        return
    expected = read_json(folder / FILES)
    if not {CONFIG, CARD} <= expected.keys():
        raise UserError(f"{folder / FILES} is damaged: it names too few files")
    for name, digest in expected.items():
        path = folder / name
        if not path.is_file() or sha256(path) != digest:
            raise UserError(
                f"{path} is damaged or was changed: its bytes are not those that were written"
                f" (where the change is meant, remove {folder / FILES})"
            )


def load_model(name: str | Path) -> tuple[FiT, Card]:
    """A model in float32 and its card, from a model folder, a run folder or a shipped model's name.

    Of a run folder it is the EMA model of the newest checkpoint. Nothing is fetched from a network.
    Raises UserError when a file is missing, damaged, or fits no other.
    """
    folder = find_model(name)
    verify_model(folder)
    card = read_card(folder)
    if card.autoencoder == HELD:
        card = replace(card, autoencoder=str((folder / HELD).resolve()))
    architecture = read_architecture(folder)
    weights = read_weights(folder, architecture)
    with torch.device("meta"):
        model = FiT(**asdict(architecture))
    copies = {key: tensor.to(torch.float32, copy=True) for key, tensor in weights.items()}
    model.load_state_dict(copies, assign=True)
    if len(card.labels) != architecture.num_classes:
        raise UserError(
            f"{folder}/{CARD} has {len(card.labels)} labels, its model {architecture.num_classes}"
        )
    return model.eval(), card


def read_card(folder: Path) -> Card:
    """The card of a model folder, as it is. Raises UserError for a damaged one."""
    with reading(folder / CARD):
        return from_dict(Card, read_json(folder / CARD), complete=True)


def weights_digest(*modules: nn.Module | None) -> str:
    """The SHA-256 of the weights of some modules, in the order of their names."""
    digest = hashlib.sha256()
    for module in modules:
        for name, value in sorted(module.state_dict().items()) if module is not None else ():
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def read_architecture(folder: Path) -> Architecture:
    """What config.json says. Raises UserError when a key is missing, unknown, or of another type."""
    path = folder / CONFIG
    values = read_json(path)
    if values.get("_class_name") != FiT.__name__:
        raise UserError(f"{path} is that of {values.get('_class_name')!r}, not of a {FiT.__name__}")
    chosen = {
        key: value for key, value in values.items() if not key.startswith("_")
    }  # the rest is diffusers'
    if "rope" in chosen and chosen["rope"] is None:
        chosen["rope"] = asdict(Rope())
    try:
        with reading(path):
            return from_dict(Architecture, chosen, complete=True)
    except UserError as error:
        raise UserError(f"{path} describes no model: {error}") from error


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a model's tensors: one, or the parts of a large model. Raises UserError."""
    index = folder / f"{WEIGHTS}.index.json"
    if not index.exists():
        return [folder / WEIGHTS]
    parts = read_json(index).get("weight_map")
    names = set(parts.values()) if isinstance(parts, dict) else set()
    if not names or not all(isinstance(name, str) and PART.fullmatch(name) for name in names):
        raise UserError(f"{index} is damaged: it names no parts, or such as lie elsewhere")
    return [folder / name for name in sorted(names)]


def read_weights(folder: Path, architecture: Architecture) -> dict[str, Tensor]:
    """The tensors of a model as they lie in its folder, in any floating dtype.

    Raises UserError naming those that are missing, extra, misshapen or of another kind.
    """
    with torch.device("meta"):
        expected = {name: tensor.shape for name, tensor in FiT(**asdict(architecture)).state_dict().items()}
    weights: dict[str, Tensor] = {}
    for path in weight_files(folder):
        try:
            held = load_file(path)
        except (SafetensorError, OSError, ValueError) as error:
            raise UserError(f"{path} is damaged or missing: {in_one_line(error)}") from error
        if twice := weights.keys() & held.keys():
            raise UserError(f"{path} is damaged: {min(twice)} is in another part too")
        weights |= held
    wrong = [f"{name} is missing" for name in expected.keys() - weights.keys()]
    for name, tensor in weights.items():
        if name not in expected:
            wrong.append(f"{name} is not one of its tensors")
        elif tensor.shape != expected[name] or not tensor.is_floating_point():
            is_now = f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
            wrong.append(f"{name} is {is_now}, not {tuple(expected[name])} of floating numbers")
    if wrong:
        raise UserError(f"{folder} holds another model's weights: {'; '.join(sorted(wrong))[:300]}")
    return weights


def find_model(name: str | Path) -> Path:
    """The model folder that `name` means; UserError naming the shipped models if there is none."""
    path = Path(name)
    if (path / "run.json").exists():
        newest = newest_checkpoint(path)
        if newest is None:
            raise UserError(f"run {path} has no checkpoint yet")
        return newest / "ema"
    if (path / CARD).exists():
        return path
    shipped = sorted(folder.name for folder in SHIPPED.glob("*/"))
    if str(name) in shipped:  # also where there is a folder so named, of pictures for one
        return SHIPPED / str(name)
    if path.exists():
        raise UserError(f"{path} is no model: it has neither a {CARD} nor a run.json")
    raise nearest("model", str(name), shipped)


def checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run, oldest first. Only complete ones carry this name."""
    found = (path for path in run.glob("checkpoints/step-*") if NAME.fullmatch(path.name))
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step after which a checkpoint was written."""
    return int(checkpoint.name.removeprefix("step-"))


def newest_checkpoint(run: Path) -> Path | None:
    """The checkpoint to resume from, if there is one."""
    return next(reversed(checkpoints(run)), None)


def __getattr__(name: str) -> Any:
    if name not in ("from_released", "released_forward"):
        raise AttributeError(f"module 'fitv2.checkpoint' has no attribute {name!r}")
    return getattr(import_module("fitv2.conversion.released"), name)  # where they lay before
