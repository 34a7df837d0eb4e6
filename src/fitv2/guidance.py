"""Classifier-free guidance (Ho & Salimans, arXiv 2207.12598) as a velocity that solvers can follow."""

from collections.abc import Callable

import torch
from torch import Tensor

from fitv2.flow import prediction_named
from fitv2.model import FiT
from fitv2.tokens import PackedTokens, concatenate


def velocity_of(
    model: FiT, packed: PackedTokens, label_B: Tensor, scale: float = 1.0
) -> Callable[[Tensor, Tensor], Tensor]:
    """v(x, t) of the images laid out like `packed`: v∅ + scale·(v_label − v∅).

    `x` is (T, C) float32; `t` is () or (B,). At scale 1 the unconditional half is not computed.
    """
    prediction = prediction_named(model.architecture.prediction)
    images = len(packed.sizes)
    if scale == 1.0:
        layout, labels = packed, label_B
    else:
        layout = concatenate([packed, packed])
        labels = torch.cat([label_B, torch.full_like(label_B, model.null_label)])

    def velocity(x_TC: Tensor, t: Tensor) -> Tensor:
        copies = len(layout.sizes) // images
        state = layout.with_tokens(x_TC.repeat(copies, 1))
        t_B = t.float().expand(images).repeat(copies)
        v_TC = prediction.velocity(model(state, t_B, labels), state, t_B)
        if copies == 1:
            return v_TC
        conditional, unconditional = v_TC.chunk(2)
        return torch.lerp(unconditional, conditional, scale)

    return velocity
