"""Between pixels and latents. An autoencoder owns its statistics: what it returns is ready to train on."""

from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

import torch
from torch import Tensor

from fitv2.errors import UserError

if TYPE_CHECKING:
    from diffusers import AutoencoderKL


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


class KLAutoencoder:
    """Any diffusers `AutoencoderKL`."""

    def __init__(self, model: "AutoencoderKL", name: str) -> None:
        self.name = name
        self.model = model.eval().requires_grad_(False)
        self.channels: int = model.config.latent_channels
        self.downsample = 2 ** (len(model.config.block_out_channels) - 1)
        self.scale: float = model.config.scaling_factor
        self.shift: float = getattr(model.config, "shift_factor", None) or 0.0

    @torch.inference_mode()
    def encode(self, pixels: Tensor, noise: Tensor | None = None) -> Tensor:
        """(posterior mean, or a sample − shift) · scale."""
        posterior = self.model.encode(pixels.to(self.model.device, self.model.dtype)).latent_dist
        latents = posterior.mean.float()
        if noise is not None:
            latents = latents + posterior.std.float() * noise.to(latents.device)
        return (latents - self.shift) * self.scale

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Tensor:
        """The decoder's output for latents / scale + shift."""
        latents = latents.to(self.model.device, self.model.dtype)
        return self.model.decode(latents / self.scale + self.shift).sample


def load_autoencoder(
    name: str, device: torch.device | str = "cpu", precision: Literal["float32", "bfloat16"] = "float32"
) -> Autoencoder:
    """`"pixels"`, the shipped `"emoji"`, or a diffusers `AutoencoderKL` from a folder or a hub name.

    Raises UserError when there is none of that name.
    """
    if name == Pixels.name:
        return Pixels()
    if name.startswith(("/", ".", "~")) and not Path(name).is_dir():  # else it would be looked for on the hub
        raise UserError(f"autoencoder {name}: there is no such folder")
    from diffusers import AutoencoderKL

    shipped = SHIPPED / name
    ours = "/" not in name and shipped.is_dir()
    try:
        model = AutoencoderKL.from_pretrained(
            shipped if ours else name, use_safetensors=True, torch_dtype=getattr(torch, precision)
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"autoencoder {name!r} cannot be loaded: {reason}") from error
    # A local folder by its full path: a run may be sampled from anywhere.
    local = Path(name).is_dir() and not ours
    return KLAutoencoder(model.to(device), str(Path(name).resolve()) if local else name)
