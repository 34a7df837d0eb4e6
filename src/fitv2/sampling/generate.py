"""From sizes, labels and seeds to pictures."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from PIL import Image
from torch import Generator, Tensor

from fitv2.autoencoder import Autoencoder, load_autoencoder
from fitv2.checkpoint import Card
from fitv2.config import Guidance, Sampling
from fitv2.diffusion.ddpm import denoise
from fitv2.diffusion.flow import flow_of, noise
from fitv2.diffusion.guidance import guided, velocity_of
from fitv2.diffusion.transport import transport
from fitv2.errors import UserError
from fitv2.model import FiT
from fitv2.runtime.device import default_device
from fitv2.runtime.rng import generator
from fitv2.tokens import PackedTokens, Size, layout, unpack, unpatchify

DECODED_TOGETHER = 8  # an autoencoder's activations take far more memory than the transformer's


@dataclass(frozen=True)
class Request:
    """One picture to make. The same request gives the same picture, whatever is made beside it."""

    label: int
    size: Size  # (rows, columns) of tokens
    seed: int


def load_codec(model: FiT, card: Card) -> tuple[Autoencoder, int]:
    """The model's autoencoder, and the side of a token in pixels."""
    codec = load_autoencoder(card.autoencoder, default_device())
    return codec, codec.downsample * model.architecture.patch_size


def file_name(card: Card, request: Request, unit: int) -> str:
    """LABEL_HEIGHTxWIDTH_SEED.png; characters that file names cannot hold become dashes."""
    plain = [re.sub(r"[^\w.-]+", "-", label) for label in card.labels]
    label = plain[request.label]
    if plain.count(label) > 1:  # two labels that differ in such characters alone
        label += f"-{request.label}"
    return f"{label}_{request.size[0] * unit}x{request.size[1] * unit}_{request.seed}.png"


@torch.no_grad()  # not inference mode: FSDP keeps its buffers for later passes
def generate(
    model: FiT,
    autoencoder: Autoencoder,
    requests: Sequence[Request],
    *,
    guidance: Guidance | float = 1.5,
    sampling: Sampling = Sampling(),  # noqa: B008  frozen
    tokens_a_pack: int | None = None,
    progress: Callable[[float], None] = lambda _: None,
) -> Iterator[tuple[Request, Image.Image]]:
    """Make the pictures pack by pack, in order. `progress` gets the share done, 0 to 1.

    Where the model predicts the data, the last of the steps is Euler's with every ODE solver: it ends
    exactly at the prediction. Raises UserError for a solver that does not exist or does not fit.
    """
    guidance = guidance if isinstance(guidance, Guidance) else Guidance(guidance)
    batches = list(packs_of(requests, tokens_a_pack or tokens_at_once(model.device)))
    for i, batch in enumerate(batches):

        def report(part: float, before: int = i) -> None:
            progress((before + part) / len(batches))

        images = _generate_pack(model, autoencoder, batch, guidance, sampling, report)
        yield from zip(batch, images, strict=True)


def tokens_at_once(device: torch.device) -> int:
    """How many tokens to compute together, before guidance doubles them.

    On a CPU buffers above 32 MB are mapped anew and cleared by the system at every use (glibc's
    largest mmap threshold): smaller packs were a sixth faster (docs/log.md). An accelerator
    wants many.
    """
    return 2_048 if device.type == "cpu" else 16_384


def packs_of(requests: Sequence[Request], tokens: int) -> Iterator[list[Request]]:
    """Cut requests into packs of at most `tokens` tokens, of at least one picture each."""
    batch: list[Request] = []
    filled = 0
    for request in requests:
        length = request.size[0] * request.size[1]
        if batch and filled + length > tokens:
            yield batch
            batch, filled = [], 0
        batch.append(request)
        filled += length
    if batch:
        yield batch


def _generate_pack(
    model: FiT,
    autoencoder: Autoencoder,
    requests: Sequence[Request],
    guidance: Guidance,
    sampling: Sampling,
    progress: Callable[[float], None],
) -> list[Image.Image]:
    # Sorted by length, images of equal length are neighbours and are computed together.
    order = sorted(range(len(requests)), key=lambda i: requests[i].size[0] * requests[i].size[1])
    chosen = [requests[i] for i in order]
    packed = layout([request.size for request in chosen]).to(model.device)
    labels = torch.tensor([request.label for request in chosen], device=model.device)
    generators = [generator(request.seed) for request in chosen]
    x_TC = tokens_of(model, packed, labels, generators, guidance, sampling, progress)
    images = decode(unpack(packed.with_tokens(x_TC)), autoencoder, model.architecture.patch_size)
    return [image for _, image in sorted(zip(order, images, strict=True), key=lambda pair: pair[0])]


def tokens_of(
    model: FiT,
    packed: PackedTokens,
    label_B: Tensor,
    generators: Sequence[Generator],
    guidance: Guidance,
    sampling: Sampling,
    progress: Callable[[float], None] = lambda _: None,
) -> Tensor:
    """Clean tokens (T, C) of images laid out like `packed`; each draws from its own generator."""
    x_TC = noise(packed.lengths, model.token_channels, generators).to(model.device)
    if model.architecture.path != "ddpm":
        flow, velocity = flow_of(model.architecture), velocity_of(model, packed, label_B, guidance)
        return transport(flow, velocity, packed, x_TC, generators, sampling, progress=progress)
    solver = sampling.solver or "ddpm"
    if solver not in ("ddpm", "ddim"):
        raise UserError(f"{solver} follows a flow; this model is a DDPM: choose ddpm or ddim")
    return denoise(
        guided(model, packed, label_B, guidance), packed, x_TC, generators, solver=solver,
        steps=sampling.steps or 250, eta=sampling.eta, progress=progress,
    )  # fmt: skip


def decode(tokens: Sequence[Tensor], autoencoder: Autoencoder, patch: int) -> list[Image.Image]:
    """Images of tokens (rows, columns, C) as pictures; neighbours of equal size are decoded together."""
    pictures: list[Image.Image] = []
    for _, group in groupby(tokens, key=lambda image: image.shape):
        same = unpatchify(torch.stack(list(group)), patch)
        pixels = torch.cat([autoencoder.decode(few).float() for few in same.split(DECODED_TOGETHER)])
        # Rounded to the nearest of 256 levels: truncation would darken by half a level.
        levels = ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        pictures.extend(Image.fromarray(image) for image in levels)
    return pictures
