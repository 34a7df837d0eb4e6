"""How images become tokens.

Nothing heavy is imported here: the command line builds its help from these.
"""

from dataclasses import dataclass
from typing import Literal

from fitv2.config.names import Precision
from fitv2.errors import UserError
from fitv2.limits import check_limits


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
    mask_column: str | None = None
    """Column of masks there, white where a picture is learned; or how their files end, such as "mask" of
    a.mask.png beside a.png [default: all of a picture is learned]."""
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
