"""What an evaluation takes. Imports nothing heavy: `--help` is built from it."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from fitv2.config import Precision
from fitv2.limits import check_limits
from fitv2.runtime.registry import one_of

if TYPE_CHECKING:
    FeaturesName = str
else:
    FeaturesName = one_of("fitv2.evaluation.features:EXTRACTORS")


@dataclass(frozen=True)
class Evaluation:
    """What pictures are compared with, and how."""

    num: int = 1000
    """Images that a model makes of each size; the paper's tables have 50000."""
    seed: int = 0
    """Seed of the first image; the others have SEED+1, SEED+2, …"""
    features: tuple[FeaturesName, ...] = ("efficientnet",)
    """Networks whose features are compared. efficientnet: EfficientNet-Lite0, whose weights a package holds;
    inception: that of FID, sFID, IS and KID; dinov2: ViT-L/14."""
    inception_weights: Path | None = None
    """File of torch-fidelity's Inception [default: where torch keeps what it fetched]."""
    dinov2_weights: Path | None = None
    """Folder of DINOv2 in transformers' format [default: the hub's on this machine]."""
    precision: Precision = "float32"
    """As of `fitv2 sample`."""
    balanced: bool = False
    """Make as many of every label as of any other, in place of labels by chance: FID falls by about 0.1."""
    split: Literal["train", "validation", "test"] = "train"
    """Split of the reference."""
    image_column: str | None = None
    """As of `fitv2 encode`."""
    label_column: str | None = None
    """As of `fitv2 encode`."""
    caption_column: str | None = None
    """As of `fitv2 encode`. A model of texts gets the captions of the reference as prompts."""
    most_real: int = 50_000
    """Real pictures that are compared with, evenly spread over the reference."""
    crop_at_most: float = 1.0
    """Leave out real pictures of which more than this share would be cropped away."""
    fit_samples: bool = False
    """Bring JUDGED to the size as the reference is [default: take those of exactly that size]."""
    samples_split: Literal["train", "validation", "test"] | None = None
    """Split of JUDGED, if they are a collection with splits."""
    npz: bool = False
    """Write the pictures as OUT/HEIGHTxWIDTH.npz too, for ADM's evaluator."""

    def __post_init__(self) -> None:
        """UserError for a number outside its range."""
        check_limits(self)


@dataclass(frozen=True)
class Scale:
    """The size of all models, and how long they are trained."""

    width: int = 192
    """Channels per token inside the transformers."""
    heads: int = 6
    """Attention heads."""
    depth: int = 4
    """Blocks of the variants that the paper gives 12; those that it gives 15 have a quarter more."""
    steps: int = 2_000
    """Steps of each run."""
    batch_size: int = 48
    """Images of a step."""
    learning_rate: float = 1e-3
    """Of AdamW, the same for all; `fast` has its own."""
    every: int = 250
    """Steps between evaluations."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of the matmuls in training; float32 lets machines be compared."""

    def __post_init__(self) -> None:
        """UserError for a number outside its range."""
        check_limits(self)
