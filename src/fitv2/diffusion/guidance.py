"""Classifier-free guidance (Ho & Salimans, arXiv 2207.12598) as a function that solvers can follow."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fitv2.config import Guidance
from fitv2.diffusion.ddpm import STEPS
from fitv2.diffusion.flow import flow_of
from fitv2.errors import UserError
from fitv2.model import FiT
from fitv2.tokens import PackedTokens, concatenate, select

Output = Callable[[Tensor, Tensor], Tensor]  # (x (T, C) float32, t () or (B,)) → per token


def guided(model: FiT, packed: PackedTokens, label_B: Tensor, guidance: Guidance) -> Output:
    """What the model says of images laid out like `packed`, float32: out∅ + w(t)·(out_label − out∅).

    The channels that are not guided, and a predicted variance, are those with the label. Where an
    image's time lies outside the interval (Kynkäänniemi et al., arXiv 2404.07724), and at scale 1, it
    is not computed without its label. Raises UserError for more channels than there are.
    """
    images, chosen = len(packed.sizes), model.architecture
    if (guidance.channels or 0) > chosen.in_channels:
        raise UserError(f"--guidance-channels is {guidance.channels}; the latent has {chosen.in_channels}")
    guided_numbers = (guidance.channels or chosen.in_channels) * chosen.patch_size**2

    def output(x_TC: Tensor, t: Tensor) -> Tensor:
        t_B, state = t.expand(images), packed.with_tokens(x_TC)
        progress_B = 1 - t_B / STEPS if chosen.path == "ddpm" else t_B  # from noise to data
        inside = _inside(guidance, progress_B)
        if not inside or guidance.scale == 1.0:
            return model(state, t_B, label_B).float()
        conditional, unconditional = _both(model, state, t_B, label_B, inside)
        strength_T1 = packed.spread(_strength(guidance, progress_B))[:, None]
        first, rest = conditional.split([guided_numbers, conditional.shape[1] - guided_numbers], dim=1)
        return torch.cat([torch.lerp(unconditional[:, :guided_numbers], first, strength_T1), rest], dim=1)

    return output


def _both(
    model: FiT, state: PackedTokens, t_B: Tensor, label_B: Tensor, inside: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """The model with the labels and, of the images `inside`, without; the others' are the same twice."""
    images, tokens = len(state.sizes), len(state.x_TC)
    everyone = len(inside) == images
    some = state if everyone else select(state, inside)
    chosen_B = torch.tensor(inside, device=t_B.device)
    null_B = torch.full_like(label_B[chosen_B], model.null_label)
    times, labels = torch.cat([t_B, t_B[chosen_B]]), torch.cat([label_B, null_B])
    conditional, of_some = model(concatenate([state, some]), times, labels).float().tensor_split([tokens])
    if everyone:
        return conditional, of_some
    is_inside = torch.zeros(images, dtype=torch.bool, device=t_B.device).index_fill_(0, chosen_B, True)
    unconditional = conditional.clone()
    unconditional[state.spread(is_inside)] = of_some
    return conditional, unconditional


def _inside(guidance: Guidance, progress_B: Tensor) -> Sequence[int]:
    """The images to guide at their times; without an interval no time is read back from the device."""
    start, stop = guidance.interval
    if (start, stop) == (0.0, 1.0):
        return range(len(progress_B))
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
