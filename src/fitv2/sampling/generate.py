"""From sizes, conditions and noise to images, pack by pack."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby

import torch
from torch import Generator, Tensor

from fitv2.autoencoder import Autoencoder
from fitv2.conditioning import Condition, Text
from fitv2.config import Guidance, Sampling
from fitv2.diffusion.flow import Flow
from fitv2.diffusion.guidance import guide
from fitv2.diffusion.noise import draw_noise
from fitv2.diffusion.objective import objective_of
from fitv2.errors import UserError
from fitv2.model import FiT
from fitv2.sampling.growth import Growth, enlarge
from fitv2.tokens import Layout, PackedTokens, Size, unpack, unpatchify

DECODED_TOGETHER = 8  # an autoencoder's activations take far more memory than the transformer's


@dataclass(frozen=True, eq=False)
class Request:
    """One image to make. The same request gives the same image, whatever is made beside it."""

    condition: Condition  # of one image
    pixels: tuple[int, int]  # height, width
    generator: Generator
    negative: Condition | None = None  # what guidance leads away from [default: nothing in particular]

    def grid(self, unit: int) -> Size:
        """The smallest grid of tokens of `unit` pixels that covers the image."""
        height, width = self.pixels
        return -(-height // unit), -(-width // unit)

    def length(self, unit: int) -> int:
        """Tokens of its text and of the image."""
        rows, columns = self.grid(unit)
        text = self.condition.values.get("text")
        return rows * columns + (sum(text.lengths) if isinstance(text, Text) else 0)


@torch.no_grad()  # not inference mode: FSDP keeps its buffers for later passes
def generate(
    model: FiT,
    autoencoder: Autoencoder,
    requests: Sequence[Request],
    guidance: Guidance,
    sampling: Sampling,
    *,
    tokens_per_pack: int | None = None,
    growth: Growth | None = None,
    progress: Callable[[float], None] = lambda _: None,
) -> Iterator[Tensor]:
    """Make images pack by pack, in order: pixels (3, height, width) in [−1, 1], not clipped.

    Those to which `growth` applies are packed by themselves: put them side by side.

    `progress` gets the share done, 0 to 1. Where the model predicts the data, the last of the steps is
    Euler's with every ODE solver: it ends exactly at the prediction. Raises UserError for a solver that
    does not exist or does not fit, and FloatingPointError for an image that is not finite.
    """
    unit = autoencoder.downsample * model.architecture.patch_size
    tokens = tokens_per_pack or default_tokens_per_pack(model.device)
    packs = [
        (batch, growth if grown else None)
        for grown, run in groupby(requests, lambda one: bool(growth and growth.applies(one.grid(unit))))
        for batch in cut_into_packs(list(run), unit, tokens)
    ]
    for i, (batch, its_growth) in enumerate(packs):

        def report(part: float, before: int = i) -> None:
            progress((before + part) / len(packs))

        yield from _generate_pack(model, autoencoder, batch, guidance, sampling, its_growth, report)


def default_tokens_per_pack(device: torch.device) -> int:
    """How many tokens to compute together, before guidance doubles them.

    On a CPU buffers above 32 MB are mapped anew and cleared by the system at every use (glibc's
    largest mmap threshold): smaller packs were a sixth faster (docs/lab-notes/log.md). An accelerator
    wants many.
    """
    return 2_048 if device.type == "cpu" else 16_384


def cut_into_packs(requests: Sequence[Request], unit: int, tokens: int) -> Iterator[list[Request]]:
    """Packs of at most `tokens` tokens, of at least one image each."""
    batch: list[Request] = []
    filled = 0
    for request in requests:
        rows, columns = request.grid(unit)
        if batch and filled + rows * columns > tokens:
            yield batch
            batch, filled = [], 0
        batch.append(request)
        filled += rows * columns
    if batch:
        yield batch


def _generate_pack(
    model: FiT,
    autoencoder: Autoencoder,
    requests: Sequence[Request],
    guidance: Guidance,
    sampling: Sampling,
    growth: Growth | None,
    progress: Callable[[float], None],
) -> list[Tensor]:
    unit = autoencoder.downsample * model.architecture.patch_size
    sizes = [request.grid(unit) for request in requests]
    # Sorted by length, images of equal length are neighbours and are computed together; and decoded, if
    # they are of equal size too.
    order = sorted(range(len(requests)), key=lambda i: (requests[i].length(unit), sizes[i]))
    chosen = [requests[i] for i in order]
    layout = Layout.of([sizes[i] for i in order]).to(model.device)
    condition = Condition.concatenate([request.condition for request in chosen]).to(model.device)
    generators = [request.generator for request in chosen]
    negative = None
    if any(request.negative is not None for request in chosen):
        away = [r.condition.null() if r.negative is None else r.negative for r in chosen]
        negative = Condition.concatenate(away).to(model.device)
    patch = model.architecture.patch_size
    make = partial(
        generate_tokens, model, condition=condition, generators=generators, guidance=guidance,
        sampling=sampling, negative=negative,
    )  # fmt: skip
    if growth is None:
        x_TC = make(layout, progress=progress)
    else:
        small = growth.small(layout)
        tokens = unpack(PackedTokens(make(small, progress=lambda part: progress(part / 2)), small))
        data_TC = enlarge(decode(tokens, autoencoder, patch), layout, autoencoder, patch)
        restart = data_TC, growth.time
        x_TC = make(layout, progress=lambda part: progress((1 + part) / 2), restart=restart)
    made = decode(unpack(PackedTokens(x_TC, layout)), autoencoder, patch)
    images: list[Tensor] = [made[order.index(i)] for i in range(len(requests))]
    for image in images:
        if not image.isfinite().all():
            raise FloatingPointError("an image came out with numbers that are not finite")
    return [crop_evenly(image, r.pixels) for image, r in zip(images, requests, strict=True)]


def generate_tokens(
    model: FiT,
    layout: Layout,
    condition: Condition,
    generators: Sequence[Generator],
    guidance: Guidance,
    sampling: Sampling,
    progress: Callable[[float], None] = lambda _: None,
    *,
    negative: Condition | None = None,
    restart: tuple[Tensor, float] | None = None,
) -> Tensor:
    """Clean tokens (T, C) of images of `layout`; each draws from its own generator.

    From noise, or with `restart` from data (T, C) with noise as at a time. Raises UserError for the latter
    where the model has no flow.
    """
    x_TC = draw_noise(layout.lengths, model.token_channels, generators).to(layout.image_T.device)
    objective = objective_of(model.architecture)
    output = guide(model, layout, condition, guidance, objective, negative)
    if restart is None:
        return objective.generate(output, layout, x_TC, generators, sampling, progress)
    if not isinstance(objective, Flow):
        raise UserError("`restart` is for models with a flow")
    data_TC, time = restart
    t_B = torch.full((len(layout),), time, device=x_TC.device)
    x_TC = objective.add_noise(data_TC, layout, x_TC, t_B).x_TC
    return objective.generate(output, layout, x_TC, generators, sampling, progress, start=time)


def decode(tokens: Sequence[Tensor], autoencoder: Autoencoder, patch: int) -> list[Tensor]:
    """Tokens (rows, columns, C) of images → pixels (3, H, W), float32, on the host.

    Neighbours of equal size are decoded together.
    """
    images: list[Tensor] = []
    for _, group in groupby(tokens, key=lambda image: image.shape):
        same = unpatchify(torch.stack(list(group)), patch)
        for few in same.split(DECODED_TOGETHER):
            images.extend(autoencoder.decode(few).float().cpu())
    return images


def crop_evenly(image: Tensor, pixels: tuple[int, int]) -> Tensor:
    """The middle (3, height, width) of an image: as much is cut on either side."""
    top, left = ((have - want) // 2 for have, want in zip(image.shape[1:], pixels, strict=True))
    return image[:, top : top + pixels[0], left : left + pixels[1]]
