"""What an image is to show: a label, or nothing; and how that becomes numbers for the transformer.

`EMBEDDERS` names the kinds of conditions. A new one is a module there: from values (B, …) and which
images have one, to (B, D). Its values go into a `Condition` under its name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fitv2.config import Architecture


@dataclass(frozen=True, eq=False)
class Condition:
    """What each of B images is to show. Where `present_B` is false it is nothing."""

    values: Mapping[str, Tensor]  # by kind, (B, …) each
    present_B: Tensor  # bool

    @classmethod
    def of(cls, **values: Tensor) -> Condition:
        """The condition of images that all have these values: `Condition.of(label=label_B)`.

        Raises ValueError without values: see `nothing`.
        """
        if not values:
            raise ValueError("a condition needs values; Condition.nothing(images) has none")
        first = next(iter(values.values()))
        return cls(values, torch.ones(len(first), dtype=torch.bool, device=first.device))

    @classmethod
    def nothing(cls, images: int) -> Condition:
        """The condition of so many images of which nothing is said."""
        return cls({}, torch.zeros(images, dtype=torch.bool))

    @classmethod
    def concatenate(cls, conditions: Sequence[Condition]) -> Condition:
        """All images of several conditions of the same kinds, in order."""
        names = conditions[0].values
        values = {name: torch.cat([one.values[name] for one in conditions]) for name in names}
        return cls(values, torch.cat([one.present_B for one in conditions]))

    def __len__(self) -> int:
        """Images."""
        return len(self.present_B)

    def null(self) -> Condition:
        """A condition that says nothing of these images: the unconditional branch of guidance."""
        return replace(self, present_B=torch.zeros_like(self.present_B))

    def drop(self, dropped_B: Tensor) -> Condition:
        """The condition without that of some images."""
        return replace(self, present_B=self.present_B & ~dropped_B)

    def select(self, images: Tensor | Sequence[int]) -> Condition:
        """That of some of the images, in the given order."""
        chosen = torch.as_tensor(images, device=self.present_B.device)
        values = {name: value[chosen] for name, value in self.values.items()}
        return Condition(values, self.present_B[chosen])

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Condition:
        """The condition on another device."""
        values = {name: x.to(device, non_blocking=non_blocking) for name, x in self.values.items()}
        return Condition(values, self.present_B.to(device, non_blocking=non_blocking))


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
        """Labels (B,), int64, or None where no image has one → (B, D)."""
        none = torch.full_like(present_B, self.num_embeddings - 1, dtype=torch.int64)
        return super().forward(none if label_B is None else torch.where(present_B, label_B, none))


EMBEDDERS: dict[str, Callable[[Architecture], nn.Module]] = {
    "label": LabelEmbedding,
}
