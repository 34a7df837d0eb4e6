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

    def tokens(self, caption: str) -> int:
        """How many tokens a caption has."""
        return int(self.lengths[self.number[caption]]) if caption else 0

    def of(self, captions: Sequence[str]) -> Text:
        """The texts of images with these captions, float32."""
        texts = []
        for caption in captions:
            if not caption:
                texts.append((torch.zeros(0, self.channels), torch.zeros(self.pooled_channels)))
                continue
            number = self.number[caption]
            states = self.states_ME[self.starts[number] : self.starts[number + 1]]
            texts.append((states.float(), self.pooled_BE[number].float()))
        return Text.of(texts)


def _encode(encoder: TextEncoder, captions: Sequence[str]) -> dict[str, torch.Tensor]:
    parts = [encoder.encode(captions[i : i + BATCH]) for i in range(0, len(captions), BATCH)]
    if not parts:
        raise UserError("no image of the dataset has a caption: a model of texts has nothing to learn")
    text = Text.concatenate(parts)
    lengths = torch.tensor(text.lengths, dtype=torch.int32)
    return {"states": text.states_ME.half(), "pooled": text.pooled_BE.half(), "lengths": lengths}


def _read(path: Path) -> dict[str, torch.Tensor] | None:
    """What was kept; None if it is not there, or damaged."""
    with suppress(OSError, SafetensorError):
        held = load_file(path)
        if held.keys() == {"states", "pooled", "lengths"} and len(held["states"]) == held["lengths"].sum():
            return held
    return None
