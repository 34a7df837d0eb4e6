"""From captions to numbers: encoders of texts behind one interface, each by the name that a card holds."""

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol
from unicodedata import normalize

import torch
from torch import Tensor

from fitv2.autoencoder import offline
from fitv2.conditioning import Text
from fitv2.errors import UserError, in_one_line, reading

MOST_TOKENS = 77  # of a text, CLIP's: what is longer is cut there
CLIP = "openai/clip-vit-large-patch14"  # the paper's
PADDED = ":padded"  # behind the name of a CLIP: every text has 77 tokens, as in the released layout


class TextEncoder(Protocol):
    """Captions to the states of their tokens (tokens, channels) and of each as a whole (pooled_channels,)."""

    name: str  # what `load_text_encoder` rebuilds it from
    channels: int
    pooled_channels: int

    def encode(self, captions: Sequence[str]) -> Text:
        """Captions as they are, each with as many tokens as it has, float32. An empty one has none."""


class WordLlama:
    """A table of 32,000 tokens × 256 numbers, distilled from embeddings of language models.

    Of the package `wordllama` (Miller 2024, MIT), whose weights and tokenizer are read; its code is not run.
    What a text is as a whole is the mean of its tokens, at unit variance.
    """

    name = "wordllama"
    channels = pooled_channels = 256

    def __init__(self) -> None:
        from safetensors.torch import load_file
        from tokenizers import Tokenizer

        found = importlib.util.find_spec(self.name)
        if found is None or found.origin is None:
            raise UserError(
                f"text encoder {self.name}: the package is not installed: pip install 'fitv2[text]'"
            )
        folder = Path(found.origin).parent
        with reading(folder):
            self.tokenizer = Tokenizer.from_file(
                str(folder / "tokenizers" / "l2_supercat_tokenizer_config.json")
            )
            self.table = load_file(folder / "weights" / "l2_supercat_256.safetensors")["embedding.weight"]

    def encode(self, captions: Sequence[str]) -> Text:
        """See `TextEncoder`."""
        tokens = [
            self.tokenizer.encode(caption, add_special_tokens=False).ids[:MOST_TOKENS] for caption in captions
        ]
        states = [self.table[torch.tensor(ids, dtype=torch.int64)].float() for ids in tokens]
        return Text.of([(state, self._whole(state)) for state in states])

    def _whole(self, state: Tensor) -> Tensor:
        mean = state.sum(0)
        return mean / mean.std().clamp_min(1e-6) if len(state) else mean


class ClipText:
    """The text half of a CLIP (Radford et al., arXiv 2103.00020): its penultimate states, as in FiTv2.

    From the hub or a folder, by `transformers`. A text has the tokens from its start to its end; where
    `PADDED` is behind the name it has 77, those behind its end too.
    """

    def __init__(self, name: str, device: torch.device | str, allow_download: bool) -> None:
        from transformers import CLIPTextModel, CLIPTokenizer

        source, padded = name.removesuffix(PADDED), name.endswith(PADDED)
        local = Path(source).is_dir() or not allow_download
        with offline(local):
            self.tokenizer: Any = CLIPTokenizer.from_pretrained(source, local_files_only=local)
            model: Any = CLIPTextModel.from_pretrained(source, local_files_only=local, use_safetensors=True)
        self.model = model.eval().requires_grad_(False).to(device)
        self.name, self.padded = name, padded
        self.channels = self.pooled_channels = int(model.config.hidden_size)

    @torch.inference_mode()
    def encode(self, captions: Sequence[str]) -> Text:
        """See `TextEncoder`."""
        inputs = self.tokenizer(
            list(captions), padding="max_length", truncation=True, max_length=MOST_TOKENS, return_tensors="pt"
        )
        ids = inputs.input_ids.to(self.model.device)
        out = self.model(input_ids=ids, output_hidden_states=True)
        states = out.hidden_states[-2].float().cpu()
        ends = (inputs.input_ids == self.tokenizer.eos_token_id).int().argmax(1) + 1
        lengths = [MOST_TOKENS if self.padded else int(end) for end in ends]
        pooled = out.pooler_output.float().cpu()
        return Text.of([(state[:n], whole) for state, n, whole in zip(states, lengths, pooled, strict=True)])


SHIPPED: dict[str, Callable[[], TextEncoder]] = {WordLlama.name: WordLlama}


def load_text_encoder(
    name: str, device: torch.device | str = "cpu", *, allow_download: bool = False
) -> TextEncoder:
    """`"wordllama"`, or a CLIP from a folder or a hub name; one of the hub is fetched with `allow_download`.

    `PADDED` behind the name of a CLIP gives every text 77 tokens.

    Raises UserError when there is none of that name, or the package that it needs is missing.
    """
    if name in SHIPPED:
        return SHIPPED[name]()
    source = name.removesuffix(PADDED)
    if source.startswith(("/", ".", "~")) and not Path(source).is_dir():
        raise UserError(f"text encoder {source}: there is no such folder")
    try:
        return ClipText(name, device, allow_download)
    except ModuleNotFoundError as error:
        raise UserError(f"text encoder {name} needs {error.name}: pip install 'fitv2[text]'") from error
    except MemoryError:
        raise
    except Exception as error:  # a file from elsewhere can be anything at all
        hint = (
            "" if Path(source).is_dir() or allow_download else "; to fetch it from the hub, `allow_download`"
        )
        raise UserError(f"text encoder {name!r} cannot be loaded: {in_one_line(error, 200)}{hint}") from error


LONGEST_CAPTION = 10_000  # letters; what lies behind is no caption


def caption_of(value: object) -> str:
    """A caption as it is stored: NFC, one space between words, cut where it is too long for one.

    Of several it is the first. Empty for what is no text.
    """
    if isinstance(value, list | tuple):
        value = next((one for one in value if isinstance(one, str) and one.strip()), "")
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    text = value if isinstance(value, str) else ""
    return " ".join(normalize("NFC", text[: 2 * LONGEST_CAPTION]).split())[:LONGEST_CAPTION]
