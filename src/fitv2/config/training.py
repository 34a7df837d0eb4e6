"""How a model is trained.

Nothing heavy is imported here: the command line builds its help from these.
"""

from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal

from fitv2.config.names import LossWeight, Optimizer, Times
from fitv2.errors import UserError
from fitv2.limits import check_limits


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
    batch_rampup_steps: int = 0
    """First steps, over which the images of a step grow from an eighth of batch-size to all of it; at least
    as many as there are processes."""
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
    What is saved is a whole model, and the change alone beside it."""
    optimizer: Optimizer = "adamw"
    """muon is for the matrices of the blocks and of texts, with AdamW for the rest."""
    muon_iterations: int = 5
    """Newton-Schulz iterations, by which Muon makes a change orthogonal."""
    muon_every: int = 1
    """Steps between Muon's changes, each so many times as large; gradients are averaged at every step."""
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
    clean_share: float = 0.0
    """Share of the tokens of each image, one at least, that are trained at the later of two times, and the
    others at the earlier one (Self-Flow's dual timesteps); 0 gives all of them one time."""
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
        """UserError for a number outside its range, and for settings of Muon without it."""
        check_limits(self)
        if self.optimizer != "muon" and (self.muon_iterations, self.muon_every) != (5, 1):
            raise UserError("`muon_iterations` and `muon_every` are for `optimizer` muon")


FREE = frozenset(f.name for f in fields(Training) if f.metadata.get("free"))
