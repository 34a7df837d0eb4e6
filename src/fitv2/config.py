"""What can be chosen, as frozen values: the model, its training, its sampling.

Nothing heavy is imported here: the command line builds its help from these.
"""

import math
from dataclasses import dataclass, field
from typing import Literal

from fitv2.errors import UserError

Extrapolation = Literal["none", "pi", "ntk", "ntk-by-parts", "yarn"]
AttentionScale = Literal["none", "paper", "pro1", "pro2"]
Path = Literal["linear", "gvp", "vp", "ddpm"]
Prediction = Literal["velocity", "data", "noise", "score"]
Diffusion = Literal["constant", "sbdm", "sigma", "linear", "decreasing", "increasing-decreasing"]

MOST_TOKENS = 32_767  # of an image: the sides of a token grid are stored in 16 bits
MOST_PATCH = 128  # pixels of a latent
Solver = Literal[
    "heun", "euler", "midpoint", "heun3", "rk4",  # fixed steps
    "dopri5", "bosh3", "fehlberg2", "adaptive-heun",  # choose their steps
    "euler-maruyama", "stochastic-heun",  # stochastic
    "ddpm", "ddim",  # for models trained so: FiT v1
]  # fmt: skip


def at_least(least: float, **values: float) -> None:
    """UserError naming the option whose value is less."""
    for name, value in values.items():
        if not value >= least:  # so that NaN is refused too
            raise UserError(f"--{name.replace('_', '-')} is {value}; it must be at least {least}")


@dataclass(frozen=True)
class Rope:
    """How positions become angles, and how they are scaled on grids larger than those trained on."""

    extrapolation: Extrapolation = "none"
    """pi: positions scaled down. ntk: a larger base. ntk-by-parts and yarn: per frequency."""
    per_axis: bool = True
    """Scale rows and columns each by its own length (the paper's Vision…); else both by the longer."""
    attention_scale: AttentionScale = "none"
    """Sharper attention on larger grids: the paper's Eq. 15, or as the released code computes it."""
    train_side: int | None = None
    """Rows of the largest square trained on, in tokens: 16 for 256 tokens."""
    pixels_a_token: int = 16
    """Side of a token in pixels, for the paper's attention scale."""
    grid: tuple[int, int] | None = None
    """Scale every image as if it had these rows and columns [default: each by its own]."""
    base: float = 10000.0
    """Of the frequencies."""

    def __post_init__(self) -> None:
        """UserError when there is nothing to scale from."""
        if (self.extrapolation, self.attention_scale) != ("none", "none") and self.train_side is None:
            raise UserError(
                "extrapolation needs the size trained on: give --train-side, the rows of the largest"
                " square in tokens (16 for a model of 256 tokens)"
            )
        at_least(2, train_side=2 if self.train_side is None else self.train_side)


@dataclass(frozen=True)
class Architecture:
    """What `fitv2.model.FiT` is built from."""

    depth: int
    """Transformer blocks."""
    width: int
    """Numbers a token holds inside the transformer."""
    heads: int
    """Attention heads; width/heads must be a multiple of 4."""
    patch_size: int = 2
    """Side of a token in latent pixels."""
    in_channels: int = 4
    """Channels of the latent."""
    num_classes: int = 1000
    """Labels, not counting the null label of guidance."""
    prediction: Prediction = "velocity"
    """What the output means; see `fitv2.diffusion.flow`."""
    path: Path = "linear"
    """From noise to data; see `fitv2.diffusion.paths`. ddpm is FiT v1: noise and a variance are predicted."""
    mlp_width: int | None = None
    """Inside the SwiGLU [default: two thirds of 4·width; FiT v1 has 4·width]."""
    adaln: Literal["lora", "full"] = "lora"
    """Modulation: one matrix for all blocks and a low-rank part for each, or (FiT v1) one for each block."""
    lora_rank: int | None = None
    """Of the low-rank part [default: width/4]."""
    qk_norm: bool = True
    """LayerNorm on queries and keys; FiT v1 has none."""
    time_shift: float = 1.0
    """The model sees t' = s·t/(1 + (s−1)·t) in place of t."""
    rope: Rope = field(default_factory=Rope)

    def __post_init__(self) -> None:
        """UserError for a shape that no model can have."""
        at_least(1, depth=self.depth, width=self.width, heads=self.heads, patch_size=self.patch_size)
        at_least(1, in_channels=self.in_channels, num_classes=self.num_classes)
        at_least(1, mlp_width=self.mlp_width or 1, lora_rank=self.lora_rank or 1)
        if self.width % (4 * self.heads):
            raise UserError(f"width {self.width} over {self.heads} heads is not a multiple of 4 numbers each")
        if self.width == 4 * self.heads and self.rope.extrapolation in ("ntk", "ntk-by-parts"):
            raise UserError(f"--extrapolation {self.rope.extrapolation} needs heads of at least 8 numbers")
        if self.path == "ddpm" and (self.prediction, self.time_shift) != ("noise", 1):
            raise UserError("with --path ddpm a model predicts noise, and its times are not shifted")
        if self.prediction == "data" and self.path != "linear":
            raise UserError("--prediction data is for --path linear")
        if self.time_shift <= 0:
            raise UserError(f"--time-shift is {self.time_shift}; it must be above 0")

    @property
    def token_channels(self) -> int:
        """Numbers a token has outside the transformer."""
        return self.patch_size**2 * self.in_channels

    @property
    def output_channels(self) -> int:
        """Numbers the model predicts for a token: with ddpm a variance beside every one."""
        return self.token_channels * (2 if self.path == "ddpm" else 1)


@dataclass(frozen=True)
class Encoding:
    """How pictures become tokens. Every part of it decides what a dataset holds."""

    autoencoder: str = "pixels"
    """"pixels", or a diffusers AutoencoderKL: a local folder or a hub name."""
    max_tokens: tuple[int, ...] = (64,)
    """Larger pictures are shrunk to this many tokens (the paper: 256, and 1024 in post-training). Several,
    such as 64 36 16: each picture is stored at all of them, and a model learns all."""
    preprocess: Literal["flexible", "mixed"] = "flexible"
    """flexible: resized, as in FiT. mixed, as in FiTv2: a picture larger than the square of its tokens is
    also stored cropped to that square; training chooses by --crop-probability."""
    mirror: bool = True
    """Also store every picture mirrored."""
    patch_size: int | None = None
    """Side of a token in latent pixels [default: so that a token covers 16x16 pixels]."""
    latents: Literal["mean", "sample"] = "mean"
    """Of the autoencoder's distribution; samples are the same each time."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the autoencoder."""
    batch_size: int = 8
    """Pictures of one size that are encoded at once, before mirroring."""
    shard_size: int = 1024
    """Pictures a shard, which is what an interrupted encode does again at most."""
    image_column: str | None = None
    """Of Parquet files and datasets [default: the one that holds images]."""
    label_column: str | None = None
    """Of Parquet files and datasets [default: the first of label, labels, class and their like]."""

    def __post_init__(self) -> None:
        """UserError for settings that cannot work."""
        at_least(1, max_tokens=min(self.max_tokens, default=0), batch_size=self.batch_size)
        at_least(1, shard_size=self.shard_size, patch_size=1 if self.patch_size is None else self.patch_size)
        if len(set(self.max_tokens)) < len(self.max_tokens):
            raise UserError(f"--max-tokens {' '.join(map(str, self.max_tokens))} names a limit twice")
        if max(self.max_tokens) > MOST_TOKENS:
            raise UserError(f"--max-tokens is {max(self.max_tokens)}; it can be at most {MOST_TOKENS}")
        if (self.patch_size or 1) > MOST_PATCH:
            raise UserError(f"--patch-size is {self.patch_size}; it can be at most {MOST_PATCH}")


@dataclass(frozen=True)
class Training:
    """How a model is trained. The defaults are the paper's."""

    steps: int = 400_000
    """Optimizer steps in all."""
    batch_size: int = 256
    """Images a step, whatever their sizes."""
    tokens_a_step: int | None = None
    """Instead, as many images as fill so many tokens: steps of nearly equal work [default: batch-size
    images]."""
    crop_probability: float = 0.5
    """How often a picture is taken cropped, if its tokens were stored both cropped and not."""
    micro_batches: int = 1
    """Parts of a step that each process computes one after another, for want of memory; but for rounding the
    result is the same."""
    check_data: bool = True
    """Compare every shard on this disk with its SHA-256 before the first step, not its size alone."""
    workers: int = 0
    """Processes that read tokens ahead; 0 reads them between steps, which is enough on a local disk."""
    trainable: Literal["all", "post-training"] = "all"
    """post-training: as in the paper, the patch embedding, the biases, the modulations and the head alone."""
    shard: int = 1
    """Of several processes, how many hold the model, its average and the optimizer's state once between them
    (FSDP2); 1: each holds all. Results are the same."""
    recompute: bool = False
    """Keep no activations inside the blocks, but compute them again in the backward pass (activation
    checkpointing): less memory, a third more work."""
    compile: bool = False
    """torch.compile of the blocks: minutes before the first step, faster steps on a GPU."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """Muon is for the matrices of the blocks; the rest is AdamW's always."""
    learning_rate: float = 1e-4
    """After warm-up."""
    warmup_steps: int = 5_000
    """Steps over which the learning rate rises linearly from zero."""
    decay_steps: int = 0
    """Last steps, over which it falls linearly to zero."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay."""
    beta2: float = 0.999
    """AdamW's second beta; the first is 0.9."""
    clip: float = 1.0
    """Largest gradient norm."""
    ema_decay: float = 0.9999
    """How much of the averaged weights is kept each step."""
    label_dropout: float = 0.1
    """Share of images trained without their label, for guidance."""
    times: Literal["logit-normal", "uniform"] = "logit-normal"
    """Distribution of the times. With --path ddpm all steps are equally likely."""
    time_mean: float = 0.0
    """Mean of the logit-normal times; below 0 is nearer to noise."""
    time_std: float = 1.0
    """Its standard deviation."""
    loss_weight: Literal["none", "velocity", "likelihood"] = "none"
    """Of the error of a predicted noise or score, by time; see `fitv2.diffusion.flow`."""
    direction_weight: float = 0.0
    """How much 1 - cosine of the predicted and the true velocity counts beside the squared error."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the matrix products; weights, optimizer, path and loss are float32 always. auto: bfloat16, unless
    the processor would have to emulate it."""
    seed: int = 0
    """All randomness of a run follows from it."""
    minutes: float | None = None
    """Stop after this long, even before `steps`."""
    log_every: int = 10
    """Steps between lines of the log."""
    validate_every: int = 500
    """Steps between validation losses."""
    sample_every: int = 2_000
    """Steps between sheets of samples."""
    save_every: int = 1_000
    """Steps between checkpoints."""
    keep: int = 2
    """Newest checkpoints that are kept."""
    milestone_every: int | None = None
    """Steps between checkpoints that are kept for good [default: none is]."""
    track: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ("tensorboard",)
    """Where numbers and sheets of samples go, beside log.jsonl in the run folder. wandb sends them over the
    network."""
    stall_minutes: float = 10.0
    """How long a process waits for the others before it gives up, and torchrun may start all again."""

    def __post_init__(self) -> None:
        """UserError for settings that cannot work."""
        at_least(1, steps=self.steps, batch_size=self.batch_size, keep=self.keep)
        at_least(1, log_every=self.log_every, validate_every=self.validate_every)
        at_least(1, sample_every=self.sample_every, save_every=self.save_every)
        at_least(0, seed=self.seed, minutes=self.minutes or 0, learning_rate=self.learning_rate)
        at_least(1, micro_batches=self.micro_batches, shard=self.shard)
        at_least(1, milestone_every=1 if self.milestone_every is None else self.milestone_every)
        if not 0 < self.stall_minutes < 1e6:
            raise UserError(f"--stall-minutes is {self.stall_minutes}; it must be above 0")
        at_least(0, direction_weight=self.direction_weight)
        at_least(1, tokens_a_step=1 if self.tokens_a_step is None else self.tokens_a_step)
        at_least(0, warmup_steps=self.warmup_steps, decay_steps=self.decay_steps, workers=self.workers)
        if not 0 <= self.crop_probability <= 1:
            raise UserError(f"--crop-probability is {self.crop_probability}; it must lie between 0 and 1")


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance; see `fitv2.diffusion.guidance`."""

    scale: float = 1.5
    """How far beyond the conditional prediction to go; 1 is none."""
    channels: int | None = None
    """Guide only so many of the latent's channels [default: all; the released code: 3]."""
    power: float | None = None
    """s of the power-cosine schedule: from the full strength at noise to none at data."""
    interval: tuple[float, float] = (0.0, 1.0)
    """Guide between these times alone; 0 is noise, 1 is data."""

    def __post_init__(self) -> None:
        """UserError for an interval that is none."""
        start, stop = self.interval
        if not 0 <= start < stop <= 1:
            raise UserError(
                f"--guidance-interval is {start} {stop}; it must be two rising times, 0 (noise) to 1 (data)"
            )
        if not math.isfinite(self.scale):
            raise UserError(f"--guidance is {self.scale}; it must be a finite number")
        at_least(1, guidance_channels=1 if self.channels is None else self.channels)


@dataclass(frozen=True)
class Sampling:
    """How a trained model's flow is followed."""

    solver: Solver | None = None
    """dopri5 to adaptive-heun choose their steps; euler-maruyama and stochastic-heun add noise along the
    way; ddpm and ddim are for FiT v1 [default: heun; ddpm for FiT v1]."""
    steps: int | None = None
    """Steps of the solver [default: 25; 250 for a stochastic one, ddpm and ddim]."""
    rtol: float = 1e-3
    """Relative error that a solver which chooses its steps allows in each of them."""
    atol: float = 1e-4
    """The same in absolute numbers; the larger of both counts."""
    diffusion: Diffusion = "sigma"
    """Strength of the noise along the way of a stochastic solver."""
    diffusion_norm: float = 1.0
    """Its factor."""
    last_step: Literal["mean", "tweedie", "euler", "none"] = "mean"
    """A stochastic solver's last step, which adds no noise."""
    last_step_size: float = 0.04
    """Its length."""
    eta: float = 0.0
    """Noise of ddim: 0 is none, 1 that of ddpm."""

    def __post_init__(self) -> None:
        """UserError for settings that cannot work."""
        at_least(1, steps=1 if self.steps is None else self.steps)
        at_least(0, rtol=self.rtol, atol=self.atol, diffusion_norm=self.diffusion_norm, eta=self.eta)
        if not 0 <= self.last_step_size < 1:
            raise UserError(f"--last-step-size is {self.last_step_size}; it must lie between 0 and 1")
