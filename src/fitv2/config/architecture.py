"""What a model is: the transformer, its positions, and the tokens that it takes.

Nothing heavy is imported here: the command line builds its help from these.
"""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from fitv2.config.names import (
    OBJECTIVE_OF_PATH,
    OUTPUTS,
    AttentionScale,
    Extrapolation,
    Objective,
    PathName,
    Prediction,
)
from fitv2.errors import UserError
from fitv2.limits import MAX_PARAMETERS, check_limits


@dataclass(frozen=True)
class Rope:
    """How positions become angles, and how they are scaled on grids larger than those trained on."""

    RENAMED: ClassVar[dict[str, str]] = {"pixels_a_token": "pixels_per_token"}
    ADDED: ClassVar[frozenset[str]] = frozenset({"kind"})

    extrapolation: Extrapolation = "none"
    """pi: positions scaled down. ntk: a larger base. ntk-by-parts and yarn: per frequency."""
    per_axis: bool = True
    """Scale rows and columns each by its own length (the paper's Vision…); else both by the longer."""
    attention_scale: AttentionScale = "none"
    """Sharper attention on larger grids: the paper's Eq. 15, as the released code has it, or by tokens."""
    train_side: int | None = None
    """Rows of the largest square trained on, in tokens: 16 for 256 tokens."""
    pixels_per_token: int = 16
    """Side of a token in pixels, for the paper's attention scale."""
    grid: tuple[int, int] | None = None
    """Scale every image as if it had these rows and columns [default: each by its own]."""
    base: float = 10000.0
    """Base of the frequencies."""
    kind: Literal["rotary", "absolute"] = "rotary"
    """rotary: queries and keys turn. absolute: sines and cosines are added to the tokens once, as in DiT and
    SiT, for comparisons."""

    def __post_init__(self) -> None:
        """UserError when there is nothing to scale from, and for a scaling of what does not turn."""
        check_limits(self)
        if self.kind == "absolute" and (self.extrapolation, self.attention_scale) != ("none", "none"):
            raise UserError("`extrapolation` and `attention_scale` are for `kind` rotary")
        if (self.extrapolation, self.attention_scale) != ("none", "none") and self.train_side is None:
            raise UserError(
                "extrapolation needs the size trained on: give `train_side`, the rows of the largest"
                " square in tokens (16 for a model of 256 tokens)"
            )


@dataclass(frozen=True)
class Network:
    """The transformer, its conditions, and what it is trained to predict."""

    ADDED: ClassVar[frozenset[str]] = frozenset(
        {"objective", "conditions", "text_channels", "pooled_channels", "early_head", "early_prediction"}
    )

    depth: int
    """Transformer blocks."""
    width: int
    """Channels per token inside the transformer."""
    heads: int
    """Attention heads; width/heads must be a multiple of 4."""
    prediction: Prediction = "velocity"
    """What the output means; see `fitv2.diffusion.flow`."""
    path: PathName = "linear"
    """From noise to data; see `fitv2.diffusion.paths`. ddpm is FiT v1: noise and a variance are predicted."""
    objective: Objective | None = None
    """What is trained [default: flow, or ddpm with --path ddpm]; any-step makes a trained flow (--init) one
    of few steps; see `fitv2.diffusion.objective`."""
    conditions: tuple[str, ...] = ("label",)
    """What an image may be conditioned on; see `fitv2.conditioning`."""
    mlp_width: int | None = None
    """Channels inside the SwiGLU [default: two thirds of 4·width; FiT v1 has 4·width]."""
    adaln: Literal["lora", "full"] = "lora"
    """Modulation: one matrix for all blocks and a low-rank part for each, or (FiT v1) one for each block."""
    lora_rank: int | None = None
    """Rank of the low-rank part [default: width/4]."""
    qk_norm: bool = True
    """LayerNorm on queries and keys; FiT v1 has none."""
    time_shift: float = 1.0
    """The model sees t' = s·t/(1 + (s−1)·t) in place of t."""
    rope: Rope = field(default_factory=Rope)
    """How positions become angles."""
    early_head: int = 0
    """Blocks after which a second head predicts too, for internal guidance: a third of the depth, or fewer; 0
    is none."""
    early_prediction: Prediction | None = None
    """What the early head predicts [default: what the model does]; data, for models of a velocity, aligns the
    blocks before it with the latents themselves."""

    def __post_init__(self) -> None:
        """UserError for a shape that no model can have."""
        check_limits(self)
        if self.parameters > MAX_PARAMETERS:
            billions = f"{self.parameters / 1e9:,.0f} billion parameters"
            raise UserError(f"`depth` {self.depth} and `width` {self.width} make a model of {billions}")
        if self.early_head >= self.depth:
            raise UserError(f"`early_head` is {self.early_head}; it must be below the depth, {self.depth}")
        if self.early_prediction and not self.early_head:
            raise UserError("`early_prediction` is for models with an `early_head`")
        if self.width % (4 * self.heads):
            raise UserError(
                f"width {self.width} over {self.heads} heads is not a multiple of 4 channels each"
            )
        if self.width == 4 * self.heads and self.rope.extrapolation in ("ntk", "ntk-by-parts"):
            raise UserError(f"`extrapolation` {self.rope.extrapolation} needs heads of at least 8 channels")

    @property
    def parameters(self) -> float:
        """About how many there are: those of attention, SwiGLU and modulation."""
        mlp = self.mlp_width or 2 * 4 * self.width // 3
        modulation = 6 * self.width if self.adaln == "full" else 7 * (self.lora_rank or self.width // 4)
        return float(self.depth * self.width * (4 * self.width + 3 * mlp + modulation))


@dataclass(frozen=True)
class Architecture(Network):
    """What `fitv2.model.FiT` is built from: a network, and the tokens and labels that the data have."""

    patch_size: int = 2
    """Side of a token in latent pixels."""
    in_channels: int = 4
    """Channels of the latent."""
    num_classes: int = 1000
    """Labels, not counting the one for none."""
    text_channels: int = 0
    """Width of the states of the text encoder; 0 for a model without texts."""
    pooled_channels: int = 0
    """Width of what the encoder says of a text as a whole, where that is another."""

    @property
    def objective_name(self) -> str:
        """The objective that was chosen, or that of the path."""
        return self.objective or OBJECTIVE_OF_PATH.get(self.path, "flow")

    @property
    def token_channels(self) -> int:
        """Channels per token outside the transformer."""
        return self.patch_size**2 * self.in_channels

    @property
    def output_channels(self) -> int:
        """What the model predicts for a token: with ddpm a variance beside every channel."""
        return self.token_channels * OUTPUTS.get(self.objective_name, 1)
