"""Guidance as a function that solvers can follow: classifier-free, and internal.

Ho & Salimans, arXiv 2207.12598, and "Guiding a Diffusion Transformer with the Internal Dynamics of Itself",
arXiv 2512.24176.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fitv2.conditioning import Condition
from fitv2.config import Guidance
from fitv2.diffusion.flow import Flow, Output
from fitv2.diffusion.objective import Objective, objective_of
from fitv2.errors import UserError
from fitv2.model import FiT
from fitv2.tokens import Layout

DEFAULT_SCALE = 1.5  # the paper's, at 256 px


def guide(
    model: FiT,
    layout: Layout,
    condition: Condition,
    guidance: Guidance,
    objective: Objective | None = None,
    negative: Condition | None = None,
) -> Output:
    """What the model says of images of `layout`, float32: out∅ + w(t)·(out_condition − out∅).

    The channels that are not guided, and a predicted variance, are those with the condition. Where an
    image's time lies outside the interval (Kynkäänniemi et al., arXiv 2404.07724), and at scale 1, it
    is not computed without. `negative` is what to lead away from [default: nothing in particular].
    `objective` [default: the model's own] tells how far a time is on the way.

    Internal guidance adds (w − 1)·(out_condition − early head's), between its own times.
    Raises UserError for more channels than there are, and for internal guidance without an early head.
    """
    images, chosen = len(layout), model.architecture
    progress = (objective or objective_of(chosen)).progress
    if (guidance.guidance_channels or 0) > chosen.in_channels:
        raise UserError(
            f"`guidance_channels` is {guidance.guidance_channels}; the latent has {chosen.in_channels}"
        )
    if guidance.internal_scale != 1.0 and not chosen.early_head:
        raise UserError("`internal_scale` is for models with an early head")
    guided = (guidance.guidance_channels or chosen.in_channels) * chosen.patch_size**2
    scale = DEFAULT_SCALE if guidance.guidance_scale is None else guidance.guidance_scale
    early_flow = Flow.of(chosen) if chosen.early_head else None
    both = _Both(model, layout, condition, condition.null() if negative is None else negative)

    def output(x_TC: Tensor, t: Tensor, target: Tensor | None = None) -> Tensor:
        t_B = t.expand(images)
        led: dict[str, Any] = {}  # other models know neither targets nor early heads
        if target is not None:
            led["target_B"] = target.expand(images)
        progress_B = progress(t_B)
        inside = _find_inside(guidance.guidance_interval, progress_B)
        internal = guidance.internal_scale != 1.0 and _find_inside(guidance.internal_interval, progress_B)
        if internal:
            led["early"] = True
        if not inside or scale == 1.0:
            found = model(x_TC, layout, t_B, condition, **led)
            conditional, early = found if internal else (found, found)
            made = conditional = conditional.float()
        else:
            conditional, early, unconditional = both(x_TC, t_B, inside, **led)
            strength_T1 = layout.spread(_strength(scale, guidance.guidance_power, progress_B))[:, None]
            first, rest = conditional.split([guided, conditional.shape[1] - guided], dim=1)
            made = torch.cat([torch.lerp(unconditional[:, :guided], first, strength_T1), rest], dim=1)
        if not internal:
            return made
        start, stop = guidance.internal_interval
        within_B = ((start <= progress_B) & (progress_B <= stop)).float()
        more_T1 = layout.spread((guidance.internal_scale - 1) * within_B)[:, None]
        assert early_flow is not None
        return made + more_T1 * early_flow.beyond_early(conditional, early, x_TC, layout.spread(t_B)[:, None])

    return output


class _Both:
    """The model with the condition and, of some images, with that to be led away from, in one call."""

    def __init__(self, model: FiT, layout: Layout, condition: Condition, negative: Condition) -> None:
        self.model, self.layout, self.condition, self.negative = model, layout, condition, negative
        self.prepared: tuple[Sequence[int], Layout, Condition] | None = None

    def __call__(
        self, x_TC: Tensor, t_B: Tensor, inside: Sequence[int], **led: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(conditional, the early head's of it, unconditional).

        Without `early` the second is the first; of the images that are not `inside` so is the third.
        """
        images, tokens = len(self.layout), len(x_TC)
        layout, condition = self._prepare(inside)
        some_TC, some = x_TC, list(range(images))
        if len(inside) < images:
            pieces, some = x_TC.split(self.layout.lengths), list(inside)
            some_TC = torch.cat([pieces[i] for i in inside])
        t_B = torch.cat([t_B, t_B[some]])
        if "target_B" in led:
            led["target_B"] = torch.cat([led["target_B"], led["target_B"][some]])
        found = self.model(torch.cat([x_TC, some_TC]), layout, t_B, condition, **led)
        output, early = found if "early" in led else (found, found)
        conditional, of_some = output.float().tensor_split([tokens])
        if len(inside) == images:
            return conditional, early[:tokens], of_some
        chosen_B = torch.tensor(inside, device=t_B.device)
        is_inside = torch.zeros(images, dtype=torch.bool, device=t_B.device).index_fill_(0, chosen_B, True)
        unconditional = conditional.clone()
        unconditional[self.layout.spread(is_inside)] = of_some
        return conditional, early[:tokens], unconditional

    def _prepare(self, inside: Sequence[int]) -> tuple[Layout, Condition]:
        """Layout and condition of one call: the same until other images are inside."""
        if self.prepared is None or self.prepared[0] != inside:
            layout = Layout.concatenate([self.layout, self.layout.select(inside)])
            without = self.negative.select(inside)
            self.prepared = inside, layout, Condition.concatenate([self.condition, without])
        return self.prepared[1:]


def _find_inside(interval: tuple[float, float], progress_B: Tensor) -> Sequence[int]:
    """The images to guide at their times; without an interval no time is read back from the device."""
    start, stop = interval
    if (start, stop) == (0.0, 1.0):
        return range(len(progress_B))
    return [i for i, t in enumerate(progress_B.tolist()) if start <= t <= stop]


def _strength(scale: float, power: float | None, progress_B: Tensor) -> Tensor:
    """w(t), (B,): constant, or (w−1)·(1 − cos(π·(1−t)^s))/2 + 1 (power-cosine, MDT, arXiv 2303.14389)."""
    if power is None:
        return torch.full_like(progress_B, scale, dtype=torch.float32)
    rise = (1 - torch.cos(math.pi * (1 - progress_B) ** power)) / 2
    return (scale - 1) * rise + 1
