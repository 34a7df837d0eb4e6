"""Between pixels and latents. An autoencoder owns its statistics: what it returns is ready to train on."""

import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from fitv2.errors import UserError, nearest
from fitv2.runtime.device import execution_device
from fitv2.runtime.serialization import read_json

# Of diffusers: those of single images.
CLASSES = ("AutoencoderKL", "AutoencoderDC", "AutoencoderTiny")
SHIPPED = Path(__file__).parent / "autoencoders"


class Autoencoder(Protocol):
    """Pixels (B, 3, H, W) in [−1, 1] to latents (B, channels, H/downsample, W/downsample), and back."""

    name: str  # what `load_autoencoder` rebuilds it from
    channels: int
    downsample: int
    scale: float  # latents are (the autoencoder's own − shift) · scale
    shift: float

    def encode(self, pixels: Tensor, noise: Tensor | None = None) -> Tensor:
        """Latents with about zero mean and unit variance: the mean of their distribution.

        With `noise`, standard normal of the latents' shape, that sample of it.
        """

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels, not clipped."""


class Pixels:
    """The identity: an image is its own latent."""

    name = "pixels"
    channels = 3
    downsample = 1
    scale, shift = 1.0, 0.0

    def encode(self, pixels: Tensor, noise: Tensor | None = None) -> Tensor:
        """The pixels themselves; their distribution has no width."""
        return pixels

    def decode(self, latents: Tensor) -> Tensor:
        """The latents themselves."""
        return latents


class DiffusersAutoencoder:
    """An autoencoder of diffusers, of `CLASSES`. One with 3·p² input channels takes patches of p² pixels."""

    def __init__(self, model: Any, name: str) -> None:
        self.name = name
        self.model = model.eval().requires_grad_(False)
        self.channels: int = model.config.latent_channels
        self.patch, self.downsample = shrinking(model.config)
        self.scale: float = getattr(model.config, "scaling_factor", None) or 1.0
        self.shift: float = getattr(model.config, "shift_factor", None) or 0.0

    @torch.inference_mode()
    def encode(self, pixels: Tensor, noise: Tensor | None = None) -> Tensor:
        """(posterior mean, or a sample − shift) · scale. Noise is left out where there is no posterior."""
        patches = pixel_unshuffle(pixels.to(execution_device(self.model), self.model.dtype), self.patch)
        encoded = self.model.encode(patches)
        posterior = getattr(encoded, "latent_dist", None)
        latents = (encoded[0] if posterior is None else posterior.mean).float()
        if noise is not None and posterior is not None:
            latents = latents + posterior.std.float() * noise.to(latents.device)
        return (latents - self.shift) * self.scale

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Tensor:
        """The decoder's output for latents / scale + shift."""
        latents = latents.to(execution_device(self.model), self.model.dtype)
        return pixel_shuffle(self.model.decode(latents / self.scale + self.shift).sample, self.patch)


def shrinking(config: Mapping[str, Any]) -> tuple[int, int]:
    """Sides of a patch and of a latent's cell in pixels, as an autoencoder's config tells.

    Raises UserError for input channels that are no patches of RGB.
    """
    channels = config.get("in_channels", 3)
    patch = math.isqrt(channels // 3)
    if patch < 1 or channels != 3 * patch**2:
        raise UserError(f"an autoencoder of {channels} input channels takes no patches of RGB")
    blocks = config.get("block_out_channels") or config["encoder_block_out_channels"]
    return patch, patch * 2 ** (len(blocks) - 1)


def load_autoencoder(
    name: str,
    device: torch.device | str = "cpu",
    precision: Literal["float32", "bfloat16"] = "float32",
    *,
    allow_download: bool = False,
) -> Autoencoder:
    """`"pixels"`, the shipped `"emoji"`, or one of diffusers (`CLASSES`) from a folder or a hub name.

    One of the hub that was not fetched before is fetched with `allow_download` alone: a name that stands in
    a file is no wish to use the network. Raises UserError when there is none of that name, and when its
    tensors are not those of its config.
    """
    if name == Pixels.name:
        return Pixels()
    if name.startswith(("/", ".", "~")) and not Path(name).is_dir():  # else it would be looked for on the hub
        raise UserError(f"autoencoder {name}: there is no such folder")
    source = SHIPPED / name if is_shipped(name) else name
    model = load_diffusers(source, getattr(torch, precision), allow_download)
    # A local folder by its full path: a run may be sampled from anywhere.
    return DiffusersAutoencoder(model.to(device), str(Path(name).resolve()) if is_folder(name) else name)


def is_shipped(name: str) -> bool:
    """Whether the package holds an autoencoder of that name."""
    return bool(name) and "/" not in name and (SHIPPED / name).is_dir()


def is_folder(name: str) -> bool:
    """Whether an autoencoder is one of a folder of this machine, and none that others have by its name."""
    ours = name == Pixels.name or is_shipped(name)
    return bool(name) and not ours and Path(name).is_dir()


def load_diffusers(name: str | Path, dtype: torch.dtype, allow_download: bool) -> Any:
    """An autoencoder of diffusers of the class that its config names, strictly."""
    import diffusers

    local = Path(name).is_dir()
    if local and (Path(name) / "config.json").exists():
        read_json(Path(name) / "config.json")  # diffusers takes one that is a string for a name of the hub
    here = local or not allow_download
    try:
        with offline(here):
            with warnings.catch_warnings(action="ignore"):  # diffusers' own argument is out of date
                config = diffusers.AutoencoderKL.load_config(name, local_files_only=here)
            kind = str(config.get("_class_name", CLASSES[0]))
            if kind not in CLASSES:
                raise nearest("autoencoder class", kind, CLASSES)
            model, report = getattr(diffusers, kind).from_pretrained(
                name, use_safetensors=True, torch_dtype=dtype, output_loading_info=True, local_files_only=here
            )
    except Exception as error:  # a file from elsewhere can be anything at all
        if isinstance(error, MemoryError):
            raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if not (local or allow_download):
            reason = f"it is not on this machine; to fetch it from the hub, `allow_download` ({reason[:100]})"
        raise UserError(f"autoencoder {str(name)!r} cannot be loaded: {reason[:300]}") from error
    wrong = [f"{kind.replace('_', ' ')}: {', '.join(map(str, names))}"
             for kind, names in report.items() if names]  # fmt: skip
    if wrong:
        raise UserError(f"autoencoder {str(name)!r} holds another model's weights: {'; '.join(wrong)[:300]}")
    return model


@contextmanager
def offline(wanted: bool) -> Iterator[None]:
    """Keep libraries from the hub meanwhile, whatever they make of what they find."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or wanted
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
