"""Models in folders: saving and loading. The released weights come in through `fitv2.conversion.released`.

A model folder holds what diffusers writes (config.json, diffusion_pytorch_model.safetensors) and
card.json, which says how to use the weights: labels, autoencoder, token limit.
"""

import math
import re
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from fitv2.errors import UserError, nearest
from fitv2.model import FiT
from fitv2.runtime.files import write_json
from fitv2.runtime.serialization import from_dict, read_json
from fitv2.tokens import Size

SHIPPED = Path(__file__).parent / "models"
WEIGHTS = "diffusion_pytorch_model.safetensors"
CARD = "card.json"
NAME = re.compile(r"step-\d{7,}")  # of a checkpoint


@dataclass(frozen=True)
class Card:
    """How to use a model's weights."""

    labels: tuple[str, ...]
    autoencoder: str
    max_tokens: int  # the longest image it was trained on
    guidance: float = 1.5

    @property
    def square(self) -> Size:
        """The largest square of the training token limit."""
        return (math.isqrt(self.max_tokens),) * 2

    def label_index(self, text: str) -> int:
        """The index of a label given as its number, its name, or the unambiguous start of its name.

        Raises UserError naming the nearest labels.
        """
        if text in self.labels:
            return self.labels.index(text)
        if text.isdecimal() and int(text) < len(self.labels):
            return int(text)
        starting = [i for i, label in enumerate(self.labels) if label.startswith(text)]
        if len(starting) == 1:
            return starting[0]
        if starting:
            raise UserError(f"label {text!r} could be {' or '.join(self.labels[i] for i in starting)}")
        if text.lstrip("-").isdecimal():
            raise UserError(f"unknown label {text}: numbers go from 0 to {len(self.labels) - 1}")
        raise nearest("label", text, self.labels)


def save_model(model: FiT, card: Card, folder: Path) -> None:
    """Write a model folder."""
    model.save_pretrained(folder)
    for weights in folder.glob("*.safetensors"):
        weights.chmod(0o644)  # safetensors makes files that only their owner can read
    write_config(model, folder)
    write_json(folder / CARD, asdict(card))


def write_config(model: FiT, folder: Path) -> None:
    """Write config.json, which rebuilds the model."""
    model.save_config(folder)
    config = read_json(folder / "config.json")
    config.pop("_name_or_path", None)  # where it was loaded from is nobody else's business
    write_json(folder / "config.json", config)


def load_model(name: str | Path) -> tuple[FiT, Card]:
    """A model in float32 and its card, from a model folder, a run folder or a shipped model's name.

    Of a run folder it is the EMA model of the newest checkpoint. Raises UserError.
    """
    folder = find_model(name)
    card = from_dict(Card, read_json(folder / CARD))
    try:
        model, report = FiT.from_pretrained(
            folder,
            torch_dtype=torch.float32,
            low_cpu_mem_usage=False,
            output_loading_info=True,
            use_safetensors=True,
        )
    except (OSError, ValueError, TypeError, RuntimeError, UserError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{folder} holds no FiT that can be loaded: {reason}") from error
    wrong = [f"{kind}: {', '.join(map(str, names))}" for kind, names in report.items() if names]
    if wrong:
        raise UserError(f"{folder} holds another model's weights ({'; '.join(wrong)[:300]})")
    if len(card.labels) != model.architecture.num_classes:
        raise UserError(
            f"{folder}/{CARD} has {len(card.labels)} labels, its model {model.architecture.num_classes}"
        )
    return model.eval(), card


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
    if path.exists():
        raise UserError(f"{path} is no model: it has neither a {CARD} nor a run.json")
    shipped = sorted(folder.name for folder in SHIPPED.glob("*/"))
    if str(name) in shipped:
        return SHIPPED / str(name)
    raise nearest("model", str(name), shipped)


def checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run, oldest first. Only complete ones carry this name."""
    return sorted(path for path in run.glob("checkpoints/step-*") if NAME.fullmatch(path.name))


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
