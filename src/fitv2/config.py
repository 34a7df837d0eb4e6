"""What can be chosen, as frozen values: the model, its training, its sampling.

Nothing heavy is imported here: the command line builds its help from these.
"""

from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from fitv2.errors import UserError
from fitv2.limits import MAX_PARAMETERS, check_limits
from fitv2.runtime.registry import keys_of, one_of

OBJECTIVE_OF_PATH = {"ddpm": "ddpm"}  # paths that are no flow's

if TYPE_CHECKING:
    Extrapolation = str
    OwnExtrapolation = str
    AttentionScale = str
    OwnAttentionScale = str
    PathName = str
    Prediction = str
    LossWeight = str
    Times = str
    Diffusion = str
    Objective = str
    Optimizer = str
    Solver = str
else:  # the one list of each is the registry itself
    Extrapolation = one_of("fitv2.rope:METHODS", first=("none",))
    OwnExtrapolation = one_of("fitv2.rope:METHODS", first=("own", "none"))
    AttentionScale = one_of("fitv2.rope:SCALES", first=("none",))
    OwnAttentionScale = one_of("fitv2.rope:SCALES", first=("own", "none"))
    PathName = one_of("fitv2.diffusion.paths:PATHS", last=tuple(OBJECTIVE_OF_PATH))
    Prediction = one_of("fitv2.diffusion.flow:PREDICTIONS")
    LossWeight = one_of("fitv2.diffusion.flow:WEIGHTS")
    Times = one_of("fitv2.diffusion.flow:TIMES")
    Diffusion = one_of("fitv2.diffusion.paths:FORMS")
    Objective = one_of("fitv2.diffusion.objective:OBJECTIVES")
    Optimizer = one_of("fitv2.training.optim:OPTIMIZERS")
    Solver = one_of(
        *(f"fitv2.diffusion.solvers:{t}" for t in ("FIXED", "MULTISTEP", "ADAPTIVE", "STOCHASTIC", "JUMPS")),
        "fitv2.diffusion.scheduled:SCHEDULERS", "fitv2.diffusion.ddpm:SCHEDULERS",
    )  # fmt: skip
NOISY_SOLVERS = (*keys_of("fitv2.diffusion.solvers:STOCHASTIC"), *keys_of("fitv2.diffusion.ddpm:SCHEDULERS"))

ANY_STEP = "any-step"  # objective and solver
# By objective, solver and steps if nothing is said: docs/results/solvers.md and any-step.md.
SOLVERS = {"flow": ("ab2", 25), "ddpm": ("ddpm", 250), ANY_STEP: (ANY_STEP, 4)}
OUTPUTS = {"ddpm": 2}  # by objective: how many a model has for each channel, where that is not one


Precision = Literal["float32", "bfloat16"]


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
        {"objective", "conditions", "text_channels", "pooled_channels", "early_head"}
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

    def __post_init__(self) -> None:
        """UserError for a shape that no model can have."""
        check_limits(self)
        if self.parameters > MAX_PARAMETERS:
            billions = f"{self.parameters / 1e9:,.0f} billion parameters"
            raise UserError(f"`depth` {self.depth} and `width` {self.width} make a model of {billions}")
        if self.early_head >= self.depth:
            raise UserError(f"`early_head` is {self.early_head}; it must be below the depth, {self.depth}")
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


@dataclass(frozen=True)
class Encoding:
    """How images become tokens. Every part of it decides what a dataset holds."""

    autoencoder: str = "pixels"
    """"pixels"; "emoji", which is shipped; or a diffusers AutoencoderKL: a local folder or a hub name."""
    max_tokens: tuple[int, ...] = (64,)
    """Larger images are shrunk to this many tokens (the paper: 256, and 1024 in post-training). Several,
    such as 64 36 16: each image is stored at all of them, and a model learns all."""
    preprocess: Literal["flexible", "mixed", "square"] = "flexible"
    """flexible: resized, as in FiT. mixed, as in FiTv2: an image larger than the square of its tokens is
    also stored cropped to that square; training chooses by --crop-probability. square: cropped to it
    alone, as for DiT and SiT."""
    mirror: bool = True
    """Also store every image mirrored."""
    patch_size: int | None = None
    """Side of a token in latent pixels [default: so that a token covers 16x16 pixels]."""
    latents: Literal["mean", "sample"] = "mean"
    """Mean or sample of the autoencoder's distribution; samples are the same each time."""
    precision: Precision = "float32"
    """Dtype of the autoencoder."""
    batch_size: int = 8
    """Images of one size that are encoded at once, before mirroring."""
    shard_size: int = 1024
    """Images a shard, which is what an interrupted encode does again at most."""
    image_column: str | None = None
    """Column of images in Parquet files and datasets [default: the one that holds images]."""
    label_column: str | None = None
    """Column of labels in Parquet files, datasets and metadata.csv [default: the first of label, labels,
    class, …]."""
    caption_column: str | None = None
    """Column of captions there [default: the first of caption, text, prompt, …, if there is one]."""
    split: Literal["train", "validation", "test"] | None = None
    """Take all images to be of this split [default: as the names of files and folders tell]."""
    follow_links: bool = False
    """Follow links that lead out of the folder of images."""

    def __post_init__(self) -> None:
        """UserError for settings that cannot work."""
        check_limits(self)
        if not self.max_tokens:
            raise UserError("`max_tokens` names no limit")
        if len(set(self.max_tokens)) < len(self.max_tokens):
            raise UserError(f"`max_tokens` {' '.join(map(str, self.max_tokens))} names a limit twice")


def free(default: Any) -> Any:
    """A setting that may change when a run is resumed."""
    return field(default=default, metadata={"free": True})


@dataclass(frozen=True)
class Batching:
    """Which images a step takes."""

    steps: int = free(400_000)
    """Optimizer steps in all. A change moves the final decay of the learning rate with it."""
    batch_size: int = 256
    """Images per step, whatever their sizes."""
    tokens_per_step: int | None = None
    """Instead, as many images as fill so many tokens: steps of nearly equal work [default: batch-size
    images]."""
    crop_probability: float = 0.5
    """How often an image is taken cropped, if its tokens were stored both cropped and not."""
    grad_accum_steps: int = free(1)
    """Parts of a step whose gradients each process accumulates one after another, if it runs out of memory.
    But for rounding the result is the same."""
    check_data: bool = free(True)
    """Compare every shard on this disk with its SHA-256 before the first step, not its size alone."""
    workers: int = free(0)
    """Processes that read tokens and draw noise ahead; 0 does so between steps, which is enough on a CPU."""


@dataclass(frozen=True)
class Optimization:
    """How weights change."""

    trainable: Literal["all", "post-training", "early-head"] = "all"
    """post-training: as in the paper, the patch embedding, the biases, the modulations and the head alone.
    early-head: that one alone."""
    lora: int = 0
    """Rank of a low-rank change of the blocks' matrices, trained in place of them (LoRA, by PEFT); 0 is none.
    What is saved is a whole model."""
    optimizer: Optimizer = "adamw"
    """muon is for the matrices of the blocks and of texts, with AdamW for the rest."""
    learning_rate: float = 1e-4
    """After warm-up."""
    warmup_steps: int = 5_000
    """Steps over which the learning rate rises linearly from zero."""
    decay_steps: int = free(0)
    """Last steps, over which it falls linearly to zero. A run without an end in sight can be given one later:
    more `steps`, and a decay over them."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay."""
    beta2: float = 0.999
    """AdamW's second beta; the first is 0.9."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm."""
    ema_decay: float = 0.9999
    """Decay of the exponential moving average (EMA) of the weights, per step."""


@dataclass(frozen=True)
class Noising:
    """What a model learns from an image."""

    label_dropout: float = 0.1
    """Share of images trained without their label and text, for classifier-free guidance; where there are
    both, the label alone is left out as often."""
    text_encoder: str = "wordllama"
    """What encodes captions, with --conditions text: "wordllama", or a CLIP from a folder or the hub; with
    ":padded" behind its name every caption has 77 tokens."""
    times: Times = "logit-normal"
    """Distribution of the times. With --path ddpm all steps are equally likely."""
    time_mean: float = 0.0
    """Mean of the logit-normal times; below 0 is nearer to noise."""
    time_std: float = 1.0
    """Standard deviation of the logit-normal times."""
    loss_weight: LossWeight = "none"
    """Weight by time of the error of a predicted noise or score; see `fitv2.diffusion.flow`."""
    direction_weight: float = 0.0
    """Weight of 1 - cosine of the predicted and the true velocity beside the squared error."""
    early_weight: float = 0.25
    """Weight of the loss of an early head beside that of the model."""
    jump_share: float = 0.5
    """Share of images from which an any-step model learns finite steps; from the others, the flow."""
    curriculum_steps: int = 0
    """First training steps, over which the steps that an any-step model learns grow from none to their full
    length."""
    learned_guidance: float = 2.5
    """Guidance scale that an any-step model learns, so that sampling needs none; 1 is no guidance."""
    learned_guidance_interval: tuple[float, float] = (0.3, 1.0)
    """It is learned between these times; 0 is noise, 1 is data."""
    difference: float = 0.01
    """Of times, on either side, from which an any-step model takes the derivative along the flow."""
    seed: int = 0
    """All randomness of a run follows from it."""


@dataclass(frozen=True)
class Compute:
    """How a step is computed. Results do not depend on it, but for rounding."""

    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of the matmuls; weights, optimizer, path and loss are float32 always. auto: bfloat16, unless
    the processor would have to emulate it."""
    gradient_checkpointing: bool = free(False)
    """Keep no activations inside the blocks, but compute them again in the backward pass: less memory, a
    third more work."""
    compile: bool = free(False)
    """torch.compile of the blocks: minutes before the first step, faster steps on a GPU."""
    fsdp_size: int = free(1)
    """FSDP group size: how many processes hold the model, its EMA and the optimizer's state once between
    them (FSDP2). 1: each holds all, as in DDP."""
    stall_minutes: float = free(10.0)
    """How long a process waits for the others before it gives up, and torchrun may start all again."""


@dataclass(frozen=True)
class Reporting:
    """What a run writes, and when."""

    minutes: float | None = free(None)
    """Stop after this long, even before `steps`."""
    log_every: int = free(10)
    """Steps between lines of the log."""
    validate_every: int = free(500)
    """Steps between validation losses."""
    sample_every: int = free(2_000)
    """Steps between sheets of samples."""
    save_every: int = free(1_000)
    """Steps between checkpoints."""
    keep: int = free(2)
    """Newest checkpoints that are kept."""
    evaluate_every: int = free(5_000)
    """Steps between evaluations beside a reference, if one is given."""
    evaluate_num: int = free(200)
    """Images that an evaluation makes of each size, in one process while the others wait."""
    milestone_every: int | None = free(None)
    """Steps between checkpoints that are kept for good [default: none is]."""
    track: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = free(("tensorboard",))
    """Where numbers and sheets of samples go, beside log.jsonl in the run folder. wandb sends them over the
    network."""


@dataclass(frozen=True)
class Training(Reporting, Compute, Noising, Optimization, Batching):
    """How a model is trained. The defaults are the paper's."""

    RENAMED: ClassVar[dict[str, str]] = {
        "tokens_a_step": "tokens_per_step", "micro_batches": "grad_accum_steps", "clip": "max_grad_norm",
        "recompute": "gradient_checkpointing", "shard": "fsdp_size",
    }  # fmt: skip

    def __post_init__(self) -> None:
        """UserError for a number outside its range."""
        check_limits(self)


FREE = frozenset(f.name for f in fields(Training) if f.metadata.get("free"))


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance; see `fitv2.diffusion.guidance`."""

    guidance_scale: float | None = None
    """How far to go beyond the conditional prediction; 1 is no guidance [default: the model's own]."""
    guidance_channels: int | None = None
    """Guide only so many of the latent's channels [default: all; the released code: 3]."""
    guidance_power: float | None = None
    """Exponent s of the power-cosine schedule, from full strength at noise to none at data [default: constant
    strength]."""
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    """Guide only between these times; 0 is noise, 1 is data. Outside, half the cost is saved."""
    internal_scale: float = 1.0
    """How far to go beyond the early head's prediction, for a model with one; 1 is no internal guidance, 1.5
    to 2.3 are usual. It costs no evaluation."""
    internal_interval: tuple[float, float] = (0.0, 0.7)
    """Guide so only between these times."""

    def __post_init__(self) -> None:
        """UserError for an interval that is none."""
        check_limits(self)
        for name in ("guidance_interval", "internal_interval"):
            start, stop = getattr(self, name)
            if not 0 <= start < stop <= 1:
                said = f"`{name}` is {start} {stop}"
                raise UserError(f"{said}; it must be two rising times, 0 (noise) to 1 (data)")


RESTART = 0.7  # distances are alike from here on: docs/results/extrapolation.md


@dataclass(frozen=True)
class Positions:
    """How images beyond the trained sizes are made; what is left out is the model's own.

    By itself an image of more tokens than trained on grows: see `restart`.
    """

    extrapolation: OwnExtrapolation = "own"
    """pi: positions scaled down. ntk: a larger base. ntk-by-parts and yarn: per frequency. none: as they are.
    own: as the model has them."""
    attention_scale: OwnAttentionScale = "own"
    """Sharper attention on larger grids: the paper's Eq. 15, the released code's pro1 and pro2, or by the
    tokens alone. own: as the model has it, and none with --extrapolation."""
    per_axis: bool = True
    """Scale rows and columns each by its own length (the paper's Vision…); else both by the longer."""
    train_side: int | None = None
    """Rows of the largest square trained on, in tokens [default: the model's own]."""
    restart: float | None = None
    """Make images of more tokens than trained on at the trained size first, enlarge them, and make them on
    from this time, 0 noise to 1 data. 0: at their own size at once [default: 0.7; 0 with another
    extrapolation or attention scale, and without a flow]."""

    def __post_init__(self) -> None:
        """UserError for a number outside its range."""
        check_limits(self)

    @property
    def are_own(self) -> bool:
        """Whether positions are scaled as the model has them."""
        return (self.extrapolation, self.attention_scale) == ("own", "own")

    def restart_time(self, is_flow: bool) -> float:
        """See `restart`. Raises UserError for one that is asked of a model without a flow."""
        if self.restart and not is_flow:
            raise UserError("`restart` is for models with a flow, not for a DDPM")
        if self.restart is not None:
            return self.restart
        return RESTART if is_flow and self.are_own else 0.0

    def apply(self, own: Rope, trained: int, unit: int) -> Rope:
        """A model's positions, scaled so.

        `trained` is the side of the largest square trained on, in tokens of `unit` pixels. Raises UserError
        where nothing is scaled.
        """
        if self.are_own:
            if self.train_side is not None or not self.per_axis:
                raise UserError("`train_side` and `per_axis` do nothing without `extrapolation`")
            return own
        return replace(
            own,
            extrapolation=own.extrapolation if self.extrapolation == "own" else self.extrapolation,
            attention_scale="none" if self.attention_scale == "own" else self.attention_scale,
            per_axis=own.per_axis if self.extrapolation == "own" else self.per_axis,
            train_side=next(s for s in (self.train_side, own.train_side, trained) if s is not None),
            pixels_per_token=unit,
            grid=None,
        )


@dataclass(frozen=True)
class Sampling:
    """How a trained model's flow is followed."""

    solver: Solver | None = None
    """ab2 takes one evaluation a step, heun two; dopri5 to adaptive-heun choose their steps; euler-maruyama
    and stochastic-heun add noise along the way; unipc and dpm++ are those of diffusers; any-step is for
    any-step models, ddpm and ddim are for FiT v1 [default: ab2; any-step or ddpm for such models]."""
    steps: int | None = None
    """Steps of the solver [default: 25; 4 of any-step; 250 of a stochastic one, ddpm and ddim]."""
    shift: float = 1.0
    """Above 1 steps are shorter near the noise and longer near the data, below 1 the other way round."""
    rtol: float = 1e-3
    """Relative error per step that a solver which chooses its steps allows; added to the absolute one."""
    atol: float = 1e-4
    """Absolute error per step that it allows."""
    diffusion: Diffusion = "sigma"
    """Strength of the noise along the way of a stochastic solver."""
    diffusion_norm: float = 1.0
    """Factor on the strength of that noise."""
    last_step: Literal["mean", "tweedie", "euler", "none"] = "mean"
    """A stochastic solver's last step, which adds no noise."""
    last_step_size: float = 0.04
    """Length of the last step, of the time from 0 to 1."""
    eta: float = 0.0
    """Noise of ddim: 0 is none, 1 that of ddpm."""

    def __post_init__(self) -> None:
        """UserError for a number outside its range."""
        check_limits(self)

    def resolve(self, objective: str = "flow") -> tuple[str, int]:
        """Solver and steps; where they were not chosen, those that models with this objective use."""
        solver, steps = SOLVERS.get(objective, SOLVERS["flow"])
        if self.solver not in (None, solver):
            solver, steps = self.solver, 250 if self.solver in NOISY_SOLVERS else 25
        return solver, self.steps or steps
