"""The FiTv2 transformer (arXiv 2410.13925, section 3) and FiT's (arXiv 2402.12376), on packed tokens.

Shape suffixes: B images, T tokens in all, D width, H heads, K channels per head, C channels per token.
"""

from collections.abc import Sequence
from copy import copy
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.nn.functional import layer_norm, silu

from fitv2.attention import attention
from fitv2.conditioning import EMBEDDERS, Condition, Text
from fitv2.config import Architecture, PathName, Prediction, Rope
from fitv2.errors import nearest
from fitv2.kernels import gated_silu, linear_parts, rotate, scaled_sum
from fitv2.presets import preset
from fitv2.rope import absolute, rotation
from fitv2.runtime.files import write_text
from fitv2.runtime.serialization import from_dict
from fitv2.tokens import LEVELS, Layout

EPS = 1e-6
README = "README.md"


ABOUT = """\
---
library_name: diffusers
tags: [fitv2, diffusers]
---

# A transformer of FiTv2

{parameters:,} parameters. `fitv2.FiT.from_pretrained("THIS FOLDER")` opens it (`pip install fitv2`), and
after `from fitv2 import FiT` diffusers' `AutoModel` too. Arguments: packed tokens, their `Layout`, times, and
a `Condition`. FiTv2: arXiv 2410.13925.
"""


class TimeEmbedding(nn.Module):
    """A sinusoid of t as it is, in [0, 1] or a DDPM step, then a two-layer MLP."""

    frequencies = 256

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(self.frequencies, width)
        self.down = nn.Linear(width, width)

    def forward(self, t_B: Tensor, dtype: torch.dtype) -> Tensor:
        """Times (B,), float32 → (B, D) in `dtype`."""
        half = torch.arange(self.frequencies // 2, device=t_B.device) / (self.frequencies // 2)
        angles = t_B.float()[:, None] * 10000.0**-half
        sinusoid = torch.cat([angles.cos(), angles.sin()], dim=1)
        return self.down(silu(self.up(sinusoid.to(self.up.weight.dtype)))).to(dtype)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) · up(x)) (Shazeer, arXiv 2002.05202); one matrix holds gate and up."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(width, 2 * hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x_TD: Tensor) -> Tensor:
        """(T, D) → (T, D)."""
        hidden = self.down.in_features
        gate, up = linear_parts(self.gate_up, x_TD, (hidden, hidden))
        return self.down(gated_silu(gate, up))


class Attention(nn.Module):
    """Multi-head self-attention with 2-D RoPE; in FiTv2 queries and keys are normed per head."""

    def __init__(self, width: int, heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.heads, self.qk_norm = heads, qk_norm
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x_TD: Tensor, layout: Layout, rotation_T1P: Tensor) -> Tensor:
        """(T, D) → (T, D)."""
        width = x_TD.shape[1]
        qk, v = linear_parts(self.qkv, x_TD, (2 * width, width))
        qk, v = qk.unflatten(1, (2 * self.heads, -1)), v.unflatten(1, (self.heads, -1))
        if self.qk_norm:
            qk = layer_norm(qk, qk.shape[-1:], eps=EPS)
        q, k = rotate(qk, rotation_T1P).chunk(2, dim=1)
        return self.out(attention(q, k, v, layout).flatten(1))


class LoRAModulation(nn.Module):
    """What a block adds to the modulation shared by all: W2·W1·SiLU(c). The paper's Eq. 11 has no SiLU."""

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Linear(width, rank)
        self.up = nn.Linear(rank, 6 * width)

    def forward(self, silu_c_BD: Tensor) -> Tensor:
        """(B, D) → (B, 6D)."""
        return self.up(self.down(silu_c_BD))


def modulate(x_TD: Tensor, shift_BD: Tensor, scale_BD: Tensor, layout: Layout) -> Tensor:
    """LayerNorm without affine, then x·(1 + scale) + shift with each image's own."""
    normed = layer_norm(x_TD, x_TD.shape[-1:], eps=EPS)
    return scaled_sum(shift_BD, normed, 1 + scale_BD, layout)


class Block(nn.Module):
    """Attention, then SwiGLU, each behind adaLN-Zero. `modulation` is SiLU(c) (B, D) → (B, 6D)."""

    def __init__(self, attention: Attention, mlp: SwiGLU, modulation: nn.Module) -> None:
        super().__init__()
        self.attention, self.mlp, self.modulation = attention, mlp, modulation

    def forward(
        self,
        x_TD: Tensor,
        layout: Layout,
        shared_B6D: Tensor | float,
        silu_c_BD: Tensor,
        rotation_T1P: Tensor,
        levels: Layout | None = None,
    ) -> Tensor:
        """(T, D) → (T, D). With `levels` the modulation is of these runs of tokens, not of images."""
        modulation_B6D = shared_B6D + self.modulation(silu_c_BD)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation_B6D.chunk(6, dim=1)
        alike = layout if levels is None else levels
        branch = self.attention(modulate(x_TD, shift1, scale1, alike), layout, rotation_T1P)
        x_TD = scaled_sum(x_TD, branch, gate1, alike)
        branch = self.mlp(modulate(x_TD, shift2, scale2, alike))
        return scaled_sum(x_TD, branch, gate2, alike)


class Head(nn.Module):
    """LayerNorm with shift and scale from c, then a linear map to the patch."""

    def __init__(self, width: int, output_channels: int) -> None:
        super().__init__()
        self.modulation = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, output_channels)

    def forward(self, x_TD: Tensor, layout: Layout, silu_c_BD: Tensor) -> Tensor:
        """(T, D) → (T, output channels)."""
        shift, scale = self.modulation(silu_c_BD).chunk(2, dim=1)
        return self.out(modulate(x_TD, shift, scale, layout))


class FiT(ModelMixin, ConfigMixin):
    """FiTv2 or FiT. What its output means is not its business: see `fitv2.diffusion`.

    Arguments are those of `fitv2.config.Architecture`; `rope` are the fields of `fitv2.config.Rope`.
    Raises UserError for a shape that no model can have. `enable_gradient_checkpointing()` keeps a block's
    input alone and computes the rest again.
    """

    # What diffusers asks of a model: whole blocks go to one device, and are compiled by themselves.
    _supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["Block"]
    _repeated_blocks: ClassVar[list[str]] = ["Block"]
    _keep_in_fp32_modules: ClassVar[list[str]] = ["time_embed"]  # times differ by less than bfloat16 tells

    @register_to_config
    def __init__(
        self,
        depth: int = 15,
        width: int = 768,
        heads: int = 12,
        patch_size: int = 2,
        in_channels: int = 4,
        num_classes: int = 1000,
        prediction: Prediction = "velocity",
        path: PathName = "linear",
        mlp_width: int | None = None,
        adaln: Literal["lora", "full"] = "lora",
        lora_rank: int | None = None,
        qk_norm: bool = True,
        time_shift: float = 1.0,
        rope: dict[str, Any] | None = None,
        objective: str | None = None,
        conditions: Sequence[str] = ("label",),
        text_channels: int = 0,
        pooled_channels: int = 0,
        early_head: int = 0,
        early_prediction: Prediction | None = None,
    ) -> None:
        super().__init__()
        self.gradient_checkpointing = False
        self.architecture = Architecture(
            depth, width, heads, prediction, path, objective, tuple(conditions), mlp_width, adaln, lora_rank,
            qk_norm, time_shift, from_dict(Rope, rope or {}), early_head, early_prediction,
            patch_size, in_channels, num_classes, text_channels, pooled_channels,
        )  # fmt: skip
        self.token_channels = self.architecture.token_channels
        self.patch_embed = nn.Linear(self.token_channels, width)
        self.time_embed = TimeEmbedding(width)
        for name in conditions:
            if name not in EMBEDDERS:
                raise nearest("condition", name, EMBEDDERS)
            self.add_module(f"{name}_embed", EMBEDDERS[name](self.architecture))
        self.modulation = nn.Linear(width, 6 * width) if adaln == "lora" else None  # of all blocks
        self.blocks = nn.ModuleList([self._block() for _ in range(depth)])
        self.head = Head(width, self.architecture.output_channels)
        self.early = Head(width, self.architecture.output_channels) if early_head else None
        self.reset_parameters()

    def _block(self) -> Block:
        chosen, width = self.architecture, self.architecture.width
        mlp = SwiGLU(width, chosen.mlp_width or 2 * 4 * width // 3)
        own: nn.Module = nn.Linear(width, 6 * width)
        if self.modulation is not None:
            own = LoRAModulation(width, chosen.lora_rank or width // 4)
        return Block(Attention(width, chosen.heads, chosen.qk_norm), mlp, own)

    @classmethod
    def from_preset(cls, name: str, **changes: Any) -> "FiT":
        """The architecture of a preset, with fields of `fitv2.config.Architecture` changed."""
        return cls(**asdict(replace(preset(name).model, **changes)))

    def cast(self, dtype: torch.dtype) -> None:
        """All weights to another dtype, but those that diffusers keeps in float32 when it loads."""
        nn.Module.to(self, dtype)
        self.time_embed.float()

    def with_rope(self, rope: Rope) -> "FiT":
        """A model that shares these weights and has other positions: for sizes that were not trained on."""
        other = self._like(replace(self.architecture, rope=rope), rope=asdict(rope))
        if "forward" in self.__dict__:  # replaced, as offloading does: it calls this model, not the other
            other.__dict__["forward"] = partial(self.forward, rope=rope)
        return other

    def with_objective(self, objective: str) -> "FiT":
        """A model that shares these weights and is trained for something else."""
        return self._like(replace(self.architecture, objective=objective), objective=objective)

    def _like(self, architecture: Architecture, **config: Any) -> "FiT":
        other = copy(self)
        other.architecture = architecture
        defaults = [name for name in self.config.get("_use_default_values", []) if name not in config]
        other.register_to_config(**config, _use_default_values=defaults)
        return other

    def save_pretrained(self, save_directory: str | Path, *arguments: Any, **options: Any) -> None:
        """Save as diffusers does, with a README unless there is one."""
        super().save_pretrained(save_directory, *arguments, **options)
        if not (Path(save_directory) / README).exists():
            write_text(Path(save_directory) / README, ABOUT.format(parameters=self.num_parameters()))

    def reset_parameters(self) -> None:
        """Xavier-uniform linear layers, N(0, 0.02) embeddings; zero modulations and output (adaLN-Zero)."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for embedder in self.embedders.values():
            embedder.reset()
        nn.init.normal_(self.time_embed.up.weight, std=0.02)
        nn.init.normal_(self.time_embed.down.weight, std=0.02)
        own = [block.modulation for block in cast(list[Block], self.blocks)]
        last = [module.up if isinstance(module, LoRAModulation) else module for module in own]
        shared = [] if self.modulation is None else [self.modulation]
        heads = [self.head] if self.early is None else [self.head, self.early]
        ends = [layer for head in heads for layer in (head.modulation, head.out)]
        for zero in (*last, *shared, *ends):
            nn.init.zeros_(cast(nn.Linear, zero).weight)

    @property
    def embedders(self) -> dict[str, Any]:
        """The module of each kind of condition."""
        return {name: self.get_submodule(f"{name}_embed") for name in self.architecture.conditions}

    def embed(self, t_B: Tensor, condition: Condition, dtype: torch.dtype, times: int = 1) -> Tensor:
        """c: times (B,) and what the images are to show → (B, D) in `dtype`.

        With several `times` of each image there are as many rows for it.
        """
        shift = self.architecture.time_shift
        c_BD = self.time_embed(shift * t_B / (1 + (shift - 1) * t_B), dtype)
        for name, embedder in self.embedders.items():
            embedded_BD = embedder(condition.values.get(name), condition.present_B)
            c_BD = c_BD + (embedded_BD if times == 1 else embedded_BD.repeat_interleave(times, 0))
        return c_BD

    def forward(
        self,
        x_TC: Tensor,
        layout: Layout,
        t_B: Tensor,
        condition: Condition,
        return_dict: bool | None = None,
        target_B: Tensor | None = None,
        early: bool = False,
        rope: Rope | None = None,
        levels: Layout | None = None,
    ) -> Any:
        """Noisy tokens of the images of `layout` at times `t_B` → prediction.

        `t_B` (B,) is float32 in [0, 1], or a DDPM step. (T, C) in; (T, C) out, or (T, 2C) where a
        variance is predicted too. As diffusers has it, `return_dict` wraps it: True in a
        `Transformer2DModelOutput`, False in a tuple; by itself it is the tensor.

        `target_B` (B,) are the times to which any-step models are asked to lead [default: `t_B` itself]. The
        first two thirds of the blocks see `t_B`, the others and the head see `target_B` (Decoupled MeanFlow,
        arXiv 2510.24474, section 3). With `early` what the early head predicts comes too, as a second tensor.
        `rope` are other positions than the model's own. With `levels`, as `Layout.divide` makes them, every
        image has two runs of tokens, and `t_B` (2B,) the time of each, as `target_B` if there is one.
        """
        output_TC, early_TC = self._predict(x_TC, layout, t_B, condition, target_B, rope, levels)
        if early:
            return output_TC, early_TC
        if return_dict is None:
            return output_TC
        return Transformer2DModelOutput(sample=output_TC) if return_dict else (output_TC,)

    def _predict(
        self,
        x_TC: Tensor,
        layout: Layout,
        t_B: Tensor,
        condition: Condition,
        target_B: Tensor | None,
        rope: Rope | None,
        levels: Layout | None,
    ) -> tuple[Tensor, Tensor | None]:
        rope, dtype = rope or self.architecture.rope, self.dtype  # diffusers looks through all modules for it
        times = 1 if levels is None else LEVELS
        silu_c_BD = silu(self.embed(t_B, condition, dtype, times))
        head_dim = self.architecture.width // self.architecture.heads
        x_TD = self.patch_embed(x_TC.to(dtype))
        if rope.kind == "absolute":
            x_TD = x_TD + absolute(layout, self.architecture.width, rope).to(x_TD.dtype)
        of_images, joint = layout if levels is None else levels, None
        text = condition.values.get("text") if "text" in self.architecture.conditions else None
        if isinstance(text, Text):
            joint = layout.behind(text.length_B, text.states_ME.shape[0])
            x_TD, layout = joint.join(self.embedders["text"].tokens(text), x_TD), joint.layout
            if levels is not None:  # a text has the time of the first run
                lengths = torch.stack([text.length_B, torch.zeros_like(text.length_B)], dim=1).flatten()
                levels = levels.behind(lengths, text.states_ME.shape[0]).layout
        rotation_T1P = rotation(layout, head_dim, rope)
        early_TC = None
        switch = None if target_B is None else round(2 * len(self.blocks) / 3)
        shared_B6D = self._shared(silu_c_BD)
        for number, block in enumerate(self.blocks):
            if number == switch and target_B is not None:
                silu_c_BD = silu(self.embed(target_B, condition, dtype, times))
                shared_B6D = self._shared(silu_c_BD)
            inputs = x_TD, layout, shared_B6D, silu_c_BD, rotation_T1P, levels
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x_TD = self._gradient_checkpointing_func(block, *inputs)
            else:
                x_TD = block(*inputs)
            if self.early is not None and number + 1 == self.architecture.early_head:
                early_TC = self.early(x_TD if joint is None else joint.images(x_TD), of_images, silu_c_BD)
        return self.head(x_TD if joint is None else joint.images(x_TD), of_images, silu_c_BD), early_TC

    def _shared(self, silu_c_BD: Tensor) -> Tensor | float:
        """What all blocks have in common of their modulation, (B, 6D)."""
        return 0.0 if self.modulation is None else self.modulation(silu_c_BD)
