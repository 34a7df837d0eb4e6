"""What an image is to show: a label, a text, or nothing; and how that becomes numbers for the transformer.

`EMBEDDERS` names the kinds of conditions. A new one is a module there: from values (B, …) and which
images have one, to (B, D). Its values go into a `Condition` under its name. One with a method `tokens` also
gives tokens that stand in front of those of its image.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.export import register_dataclass
from torch.nn.functional import gelu

from fitv2.config import Architecture
from fitv2.errors import UserError


@dataclass(frozen=True, eq=False)
class Text:
    """The texts of B images as an encoder gives them: packed, as many tokens each as it has."""

    states_ME: Tensor  # of the tokens of all texts
    length_B: Tensor  # tokens of each text, int64, on the host; 0 for none
    pooled_BE: Tensor  # of each text as a whole
    held_B: Tensor  # bool: whether there is one

    @classmethod
    def of(cls, texts: Sequence[tuple[Tensor, Tensor]]) -> Text:
        """Texts, each as its states (tokens, E) and what it is as a whole (E,)."""
        states, pooled = zip(*texts, strict=True)
        length_B = torch.tensor([len(one) for one in states])
        return cls(torch.cat(states), length_B, torch.stack(pooled), length_B > 0)

    def __len__(self) -> int:
        return len(self.length_B)

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each text."""
        return tuple(self.length_B.tolist())

    def __getitem__(self, chosen_B: Tensor) -> Text:
        """Some of the texts by their numbers, in the given order."""
        numbers = chosen_B.tolist()
        pieces = self.states_ME.split(self.lengths)
        states = torch.cat([self.states_ME[:0], *(pieces[i] for i in numbers)])
        return Text(states, self.length_B[numbers], self.pooled_BE[chosen_B], self.held_B[chosen_B])

    def drop(self, dropped: Sequence[bool]) -> Text:
        """Without the tokens of some texts."""
        pieces = zip(self.states_ME.split(self.lengths), dropped, strict=True)
        states = torch.cat([self.states_ME[:0], *(piece for piece, gone in pieces if not gone)])
        gone_B = torch.tensor(dropped)
        held_B = self.held_B & ~gone_B.to(self.held_B.device)
        return Text(states, self.length_B.masked_fill(gone_B, 0), self.pooled_BE, held_B)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Text:
        """The texts on another device."""
        tensors = (self.states_ME, self.pooled_BE, self.held_B)
        states, pooled, held = (tensor.to(device, non_blocking=non_blocking) for tensor in tensors)
        return Text(states, self.length_B, pooled, held)

    @classmethod
    def concatenate(cls, texts: Sequence[Text]) -> Text:
        """Several texts' texts, in order."""
        return cls(*(torch.cat([getattr(text, field.name) for text in texts]) for field in fields(cls)))


Value = Tensor | Text


@dataclass(frozen=True, eq=False)
class Condition:
    """What each of B images is to show. Where `present_B` is false it is nothing."""

    values: Mapping[str, Value]  # by kind, (B, …) each
    present_B: Tensor  # bool

    @classmethod
    def of(cls, **values: Value) -> Condition:
        """The condition of images that all have these values: `Condition.of(label=label_B)`.

        Raises ValueError without values: see `nothing`.
        """
        if not values:
            raise ValueError("a condition needs values; Condition.nothing(images) has none")
        first = next(iter(values.values()))
        device = first.pooled_BE.device if isinstance(first, Text) else first.device
        return cls(values, torch.ones(len(first), dtype=torch.bool, device=device))

    @classmethod
    def nothing(cls, images: int) -> Condition:
        """The condition of so many images of which nothing is said."""
        return cls({}, torch.zeros(images, dtype=torch.bool))

    @classmethod
    def concatenate(cls, conditions: Sequence[Condition]) -> Condition:
        """All images of several conditions of the same kinds, in order."""
        names = conditions[0].values
        values = {name: _concatenate([one.values[name] for one in conditions]) for name in names}
        return cls(values, torch.cat([one.present_B for one in conditions]))

    def __len__(self) -> int:
        """Images."""
        return len(self.present_B)

    def null(self) -> Condition:
        """A condition that says nothing of these images: the unconditional branch of guidance."""
        return Condition(self._without([True] * len(self)), torch.zeros_like(self.present_B))

    def drop(self, dropped_B: Tensor) -> Condition:
        """The condition without that of some images. Texts go with their tokens: they are read back."""
        held = any(isinstance(value, Text) for value in self.values.values())
        values = self._without(dropped_B.tolist()) if held else self.values
        return Condition(values, self.present_B & ~dropped_B)

    def _without(self, dropped: Sequence[bool]) -> Mapping[str, Value]:
        return {
            name: value.drop(dropped) if isinstance(value, Text) else value
            for name, value in self.values.items()
        }

    def select(self, images: Tensor | Sequence[int]) -> Condition:
        """That of some of the images, in the given order."""
        chosen = torch.as_tensor(images, device=self.present_B.device)
        values = {name: value[chosen] for name, value in self.values.items()}
        return Condition(values, self.present_B[chosen])

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Condition:
        """The condition on another device."""
        values = {name: x.to(device, non_blocking=non_blocking) for name, x in self.values.items()}
        return Condition(values, self.present_B.to(device, non_blocking=non_blocking))


for _kind in (Text, Condition):  # as arguments of what is exported
    register_dataclass(_kind, serialized_type_name=f"fitv2.{_kind.__name__}")


def _concatenate(values: Sequence[Value]) -> Value:
    if isinstance(values[0], Text):
        return Text.concatenate([value for value in values if isinstance(value, Text)])
    return torch.cat([value for value in values if isinstance(value, Tensor)])


class LabelEmbedding(nn.Embedding):
    """A row for each label, and after them one for none.

    It is an embedding itself, with another signature: its weight keeps the name that saved models hold.
    """

    def __init__(self, architecture: Architecture) -> None:
        super().__init__(architecture.num_classes + 1, architecture.width)

    def reset(self) -> None:
        """N(0, 0.02), as in DiT."""
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, label_B: Tensor | None, present_B: Tensor) -> Tensor:  # type: ignore[override]
        """Labels (B,), int64, −1 for none, or None where no image has one → (B, D)."""
        none = torch.full_like(present_B, self.num_embeddings - 1, dtype=torch.int64)
        if label_B is None:
            return super().forward(none)
        return super().forward(torch.where(present_B & (label_B >= 0), label_B, none))


class TextEmbedding(nn.Module):
    """FiTv2's text-to-image: an MLP makes a text's states tokens, and what it is as a whole is added to c."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        states, width = architecture.text_channels, architecture.width
        if not states:
            raise UserError("a model of texts needs `text_channels`, the width of its encoder's states")
        self.up = nn.Linear(states, width)
        self.down = nn.Linear(width, width)
        self.pooled = nn.Linear(architecture.pooled_channels or states, width)
        self.none = nn.Parameter(torch.empty(width))  # of an image without text

    def reset(self) -> None:
        """Zero last layers, so that a model begins as one without texts; N(0, 0.02) for no text."""
        nn.init.xavier_uniform_(self.up.weight)
        for last in (self.down, self.pooled):
            nn.init.zeros_(last.weight)
        for layer in (self.up, self.down, self.pooled):
            nn.init.zeros_(layer.bias)
        nn.init.normal_(self.none, std=0.02)

    def forward(self, text: Text | None, present_B: Tensor) -> Tensor:
        """What texts are as a whole → (B, D)."""
        none_BD = self.none.expand(present_B.shape[0], -1)
        if text is None:
            return none_BD
        pooled_BD = self.pooled(text.pooled_BE.to(self.none.dtype))
        return torch.where((present_B & text.held_B)[:, None], pooled_BD, none_BD)

    def tokens(self, text: Text) -> Tensor:
        """The states of all texts (M, E) → tokens (M, D)."""
        return self.down(gelu(self.up(text.states_ME.to(self.none.dtype)), approximate="tanh"))


EMBEDDERS: dict[str, Callable[[Architecture], nn.Module]] = {
    "label": LabelEmbedding,
    "text": TextEmbedding,
}
