"""The captions of a dataset as their encoder gives them, each once."""

import hashlib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from fitv2.conditioning import Text
from fitv2.errors import UserError
from fitv2.runtime.files import atomic_file
from fitv2.text_encoder import TextEncoder

BATCH = 256  # captions that are encoded at once


class TextCache:
    """Different captions, encoded once, in float16; kept in `folder` where that can be written.

    An image without a caption has no text: it is trained without.
    """

    def __init__(self, encoder: TextEncoder, captions: Sequence[str], folder: Path | None = None) -> None:
        self.captions = sorted({caption for caption in captions if caption})
        self.number = {caption: i for i, caption in enumerate(self.captions)}
        self.channels, self.pooled_channels = encoder.channels, encoder.pooled_channels
        key = hashlib.sha256("\0".join([encoder.name, *self.captions]).encode()).hexdigest()[:16]
        path = folder / f"texts-{key}.safetensors" if folder else None
        held = _read(path) if path else None
        if held is None:
            held = _encode(encoder, self.captions)
            if path:
                with suppress(OSError), atomic_file(path) as partial:  # a disk that is read alone
                    save_file(held, partial)
        self.states_ME, self.pooled_BE = held["states"], held["pooled"]
        self.lengths: np.ndarray = held["lengths"].numpy()
        self.starts = np.concatenate([[0], np.cumsum(self.lengths)])

    def of(self, captions: Sequence[str]) -> Text:
        """The texts of images with these captions, float32."""
        return self.numbered(self.numbers(captions))

    def numbers(self, captions: Sequence[str]) -> np.ndarray:
        """Captions by their number here, −1 where there is none."""
        return np.array([self.number[caption] if caption else -1 for caption in captions], np.int64)

    def numbered(self, number_B: np.ndarray) -> Text:
        """The texts of images whose captions have these numbers, float32."""
        held_B = number_B >= 0
        length_B = np.where(held_B, self.lengths[number_B], 0)
        first_B = self.starts[number_B] - (np.cumsum(length_B) - length_B)
        state_M = np.repeat(first_B, length_B) + np.arange(length_B.sum())
        held = torch.from_numpy(held_B)
        pooled_BE = self.pooled_BE[torch.from_numpy(number_B)].float() * held[:, None]
        states_ME = self.states_ME[torch.from_numpy(state_M)].float()
        lengths = torch.from_numpy(length_B).long()
        return Text(states_ME, lengths, pooled_BE, held & (lengths > 0))


def _encode(encoder: TextEncoder, captions: Sequence[str]) -> dict[str, torch.Tensor]:
    parts = [encoder.encode(captions[i : i + BATCH]) for i in range(0, len(captions), BATCH)]
    if not parts:
        raise UserError("no image of the dataset has a caption: a model of texts has nothing to learn")
    text = Text.concatenate(parts)
    lengths = text.length_B.int()
    return {"states": text.states_ME.half(), "pooled": text.pooled_BE.half(), "lengths": lengths}


def _read(path: Path) -> dict[str, torch.Tensor] | None:
    """What was kept; None if it is not there, or damaged."""
    with suppress(OSError, SafetensorError):
        held = load_file(path)
        if held.keys() == {"states", "pooled", "lengths"} and len(held["states"]) == held["lengths"].sum():
            return held
    return None
