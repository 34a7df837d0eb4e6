"""From sizes, labels and seeds to pictures."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby

import torch
from PIL import Image
from torch import Tensor

from fitv2 import solvers
from fitv2.autoencoder import Autoencoder, load_autoencoder
from fitv2.checkpoint import Card
from fitv2.errors import nearest
from fitv2.flow import noise, prediction_named
from fitv2.guidance import velocity_of
from fitv2.model import FiT
from fitv2.runtime import default_device
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


@torch.inference_mode()
def generate(
    model: FiT,
    autoencoder: Autoencoder,
    requests: Sequence[Request],
    *,
    guidance: float = 1.5,
    solver: str = "heun",
    steps: int = 25,
    tokens_a_pack: int | None = None,
    progress: Callable[[float], None] = lambda _: None,
) -> Iterator[tuple[Request, Image.Image]]:
    """Make the pictures pack by pack, in order. `progress` gets the share done, 0 to 1.

    `dopri5` chooses its steps itself. Where the model predicts the data, the last of `steps` steps
    is Euler's with every solver: it ends exactly at the prediction. Raises UserError for an unknown
    solver.
    """
    batches = list(packs_of(requests, tokens_a_pack or tokens_at_once(model.device)))
    for i, batch in enumerate(batches):

        def report(part: float, before: int = i) -> None:
            progress((before + part) / len(batches))

        images = _generate_pack(model, autoencoder, batch, guidance, solver, steps, report)
        yield from zip(batch, images, strict=True)


def solver_named(name: str, packed: PackedTokens) -> Callable[..., Tensor]:
    """The solver of that name; dopri5 with a step size of its own for each image of `packed`."""
    if name == "dopri5":
        return partial(
            solvers.dopri5,
            spread=lambda value_B: packed.spread(value_B)[:, None],
            mean=lambda value_TC: packed.mean_per_image(value_TC.mean(1)),
        )
    known = {"heun": solvers.heun, "euler": solvers.euler}
    if name not in known:
        raise nearest("solver", name, [*known, "dopri5"])
    return known[name]


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
    guidance: float,
    solver: str,
    steps: int,
    progress: Callable[[float], None],
) -> list[Image.Image]:
    # Sorted by length, images of equal length are neighbours and are computed together.
    order = sorted(range(len(requests)), key=lambda i: requests[i].size[0] * requests[i].size[1])
    chosen = [requests[i] for i in order]
    packed = layout([request.size for request in chosen])
    start = noise(packed.lengths, model.token_channels, [(request.seed,) for request in chosen])
    packed = packed.to(model.device)
    labels = torch.tensor([request.label for request in chosen], device=model.device)
    solve = solver_named(solver, packed)
    velocity = velocity_of(model, packed, labels, guidance)
    times = torch.linspace(0, 1, steps + 1, device=model.device)
    x_TC = start.to(model.device)
    if prediction_named(model.architecture.prediction).ends_early:
        x_TC = solve(velocity, x_TC, times[:-1], progress) if steps > 1 else x_TC
        x_TC = solvers.euler(velocity, x_TC, times[-2:], progress)
    else:
        x_TC = solve(velocity, x_TC, times, progress)
    images = decode(unpack(packed.with_tokens(x_TC)), autoencoder, model.architecture.patch_size)
    return [image for _, image in sorted(zip(order, images, strict=True), key=lambda pair: pair[0])]


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
