"""Classifier-free guidance (Ho & Salimans, arXiv 2207.12598) as a function that solvers can follow."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fitv2.ddpm import STEPS
from fitv2.flow import flow_of
from fitv2.model import FiT
from fitv2.settings import Guidance
from fitv2.tokens import PackedTokens, concatenate, select

Output = Callable[[Tensor, Tensor], Tensor]  # (x (T, C) float32, t () or (B,)) → per token


def guided(model: FiT, packed: PackedTokens, label_B: Tensor, guidance: Guidance) -> Output:
    """What the model says of images laid out like `packed`: out∅ + w(t)·(out_label − out∅).

    The channels that are not guided, and a predicted variance, are those with the label. Where an
    image's time lies outside the interval (Kynkäänniemi et al., arXiv 2404.07724), and at scale 1, it
    is not computed without its label.
    """
    images, chosen = len(packed.sizes), model.architecture
    null_B = torch.full_like(label_B, model.null_label)
    channels = (guidance.channels or chosen.in_channels) * chosen.patch_size**2
    everywhere = guidance.interval == (0.0, 1.0)
    doubled = concatenate([packed, packed])

    def output(x_TC: Tensor, t: Tensor) -> Tensor:
        t_B = t.expand(images)
        progress_B = 1 - t_B / STEPS if chosen.path == "ddpm" else t_B  # from noise to data
        inside = range(images) if everywhere else _inside(guidance, progress_B)
        state = packed.with_tokens(x_TC)
        if not inside or guidance.scale == 1.0:
            return model(state, t_B, label_B)
        if len(inside) == images:
            both, some_B = doubled.with_tokens(x_TC.repeat(2, 1)), t_B
            labels = torch.cat([label_B, null_B])
        else:
            both, some_B = concatenate([state, select(state, inside)]), t_B[inside]
            labels = torch.cat([label_B, null_B[inside]])
        out = model(both, torch.cat([t_B, some_B]), labels)
        conditional, unconditional = out[: len(x_TC)].float(), out[len(x_TC) :].float()
        if len(inside) < images:
            is_inside = torch.zeros(images, dtype=torch.bool, device=x_TC.device)
            is_inside[inside] = True
            of_some, unconditional = unconditional, conditional.clone()  # guiding these changes nothing
            unconditional[packed.spread(is_inside)] = of_some
        strength_T1 = packed.spread(_strength(guidance, progress_B))[:, None]
        first = torch.lerp(unconditional[:, :channels], conditional[:, :channels], strength_T1)
        return torch.cat([first, conditional[:, channels:]], dim=1)

    return output


def _inside(guidance: Guidance, progress_B: Tensor) -> list[int]:
    start, stop = guidance.interval
    return [i for i, t in enumerate(progress_B.tolist()) if start <= t <= stop]


def _strength(guidance: Guidance, progress_B: Tensor) -> Tensor:
    """w(t), (B,): constant, or (w−1)·(1 − cos(π·(1−t)^s))/2 + 1 (power-cosine, MDT, arXiv 2303.14389)."""
    if guidance.power is None:
        return torch.full_like(progress_B, guidance.scale, dtype=torch.float32)
    rise = (1 - torch.cos(math.pi * (1 - progress_B) ** guidance.power)) / 2
    return (guidance.scale - 1) * rise + 1


def velocity_of(model: FiT, packed: PackedTokens, label_B: Tensor, guidance: Guidance) -> Output:
    """The guided velocity v(x, t) of images laid out like `packed`, (T, C) float32.

    Velocities are affine in what the model predicts, so guiding either is the same.
    """
    flow, output = flow_of(model.architecture), guided(model, packed, label_B, guidance)

    def velocity(x_TC: Tensor, t: Tensor) -> Tensor:
        t_B = t.float().expand(len(packed.sizes))
        return flow.velocity(output(x_TC, t_B), packed.with_tokens(x_TC), t_B)

    return velocity
