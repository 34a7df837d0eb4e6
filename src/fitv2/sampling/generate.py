"""From sizes, conditions and noise to images, pack by pack."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from fitv2.autoencoder import Autoencoder
from fitv2.conditioning import Condition, Text
from fitv2.config import Guidance, Sampling
from fitv2.diffusion.flow import Flow
from fitv2.diffusion.guidance import guide
from fitv2.diffusion.noise import Known, draw_noise
from fitv2.diffusion.objective import objective_of
from fitv2.errors import UserError
from fitv2.model import FiT
from fitv2.sampling.editing import Edit
from fitv2.sampling.growth import Growth, enlarge
from fitv2.tokens import Layout, PackedTokens, Size, patchify, unpack, unpatchify

DECODED_TOGETHER = 8  # an autoencoder's activations take far more memory than the transformer's


@dataclass(frozen=True, eq=False)
class Request:
    """One image to make. The same request gives the same image, whatever is made beside it."""

    condition: Condition  # of one image
    pixels: tuple[int, int]  # height, width
    generator: Generator
    negative: Condition | None = None  # what guidance leads away from [default: nothing in particular]
    edit: Edit | None = None  # the picture, of these pixels, that it is made from
    noise: Tensor | None = None  # (rows, columns, C) [default: drawn by the generator]

    def grid(self, unit: int) -> Size:
        """The smallest grid of tokens of `unit` pixels that covers the image."""
        height, width = self.pixels
        return -(-height // unit), -(-width // unit)

    def length(self, unit: int) -> int:
        """Tokens of its text and of the image."""
        rows, columns = self.grid(unit)
        text = self.condition.values.get("text")
        return rows * columns + (sum(text.lengths) if isinstance(text, Text) else 0)

    def covering(self, unit: int) -> Edit | None:
        """The picture that it is made from, on its whole grid."""
        rows, columns = self.grid(unit)
        return self.edit and self.edit.covering((rows * unit, columns * unit))

    def way(self, growth: Growth | None, unit: int) -> tuple[bool, float]:
        """Whether it grows, and the time from which it is made: what has to be alike in a pack.

        A picture that is there from a later time on than growth's has its size already.
        """
        start = self.edit.start if self.edit else 0.0
        grows = bool(
            growth and growth.applies(self.grid(unit)) and start < growth.time and self.noise is None
        )
        return grows, start


class Given(NamedTuple):
    """What images are made from, where that is more than noise."""

    time: float  # from which on they are made
    data_TC: Tensor
    known_TC: Tensor  # bool: what stays as it is in the data


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

    Those to which `growth` applies are packed by themselves, and so are edits of another strength: put them
    side by side.

    `progress` gets the share done, 0 to 1. Where the model predicts the data, the last of the steps is
    Euler's with every ODE solver: it ends exactly at the prediction. Raises UserError for a solver that
    does not exist or does not fit, and FloatingPointError for an image that is not finite.
    """
    unit = autoencoder.downsample * model.architecture.patch_size
    tokens = tokens_per_pack or default_tokens_per_pack(model.device)
    packs = [
        (batch, growth if grows else None)
        for (grows, _), run in groupby(requests, lambda one: one.way(growth, unit))
        for batch in cut_into_packs(list(run), unit, tokens)
    ]
    for i, (batch, its_growth) in enumerate(packs):

        def report(part: float, before: int = i) -> None:
            progress((before + part) / len(packs))

        yield from _generate_pack(model, autoencoder, batch, guidance, sampling, its_growth, report)


@torch.no_grad()
def invert(
    model: FiT, autoencoder: Autoencoder, requests: Sequence[Request], sampling: Sampling
) -> list[Tensor]:
    """The noise (rows, columns, C) of the pictures of requests, whose flow leads to them without guidance.

    Raises UserError for a model without a flow.
    """
    objective, patch = objective_of(model.architecture), model.architecture.patch_size
    if not isinstance(objective, Flow):
        raise UserError("only models with a flow lead from pictures to noise: no DDPM")
    unit, noises = autoencoder.downsample * patch, []
    for batch in cut_into_packs(requests, unit, default_tokens_per_pack(model.device)):
        layout = Layout.of([request.grid(unit) for request in batch]).to(model.device)
        given = given_by([request.covering(unit) for request in batch], layout, autoencoder, patch)
        if given is None:
            raise UserError("there is no picture to lead to noise")
        condition = Condition.concatenate([request.condition for request in batch]).to(model.device)
        output = guide(model, layout, condition, Guidance(1.0), objective)
        generators = [request.generator for request in batch]
        noise_TC = objective.invert(output, layout, given.data_TC.to(model.device), generators, sampling)
        noises += [noise.cpu() for noise in unpack(PackedTokens(noise_TC, layout))]
    return noises


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
    edits = [request.covering(unit) for request in chosen]
    make = partial(
        generate_tokens, model, condition=condition, generators=generators, guidance=guidance,
        sampling=sampling, negative=negative, noises=[request.noise for request in chosen],
    )  # fmt: skip
    if growth is None:
        x_TC = make(layout, progress=progress, given=given_by(edits, layout, autoencoder, patch))
    else:
        small = growth.small(layout)
        given = given_by(edits, small, autoencoder, patch)
        x_TC = make(small, progress=lambda part: progress(part / 2), given=given)
        grown = decode(unpack(PackedTokens(x_TC, small)), autoencoder, patch)
        sizes = [(rows * unit, columns * unit) for rows, columns in layout.sizes]
        grown = [enlarge(image, size) for image, size in zip(grown, sizes, strict=True)]
        if any(edits):
            grown = [edit.around(image) if edit else image for edit, image in zip(edits, grown, strict=True)]
        given = Given(
            growth.time, encode(grown, autoencoder, patch), known_of(edits, layout, autoencoder, patch)
        )
        x_TC = make(layout, progress=lambda part: progress((1 + part) / 2), given=given)
    made = decode(unpack(PackedTokens(x_TC, layout)), autoencoder, patch)
    images: list[Tensor] = [made[order.index(i)] for i in range(len(requests))]
    for image in images:
        if not image.isfinite().all():
            raise FloatingPointError("an image came out with numbers that are not finite")
    images = [crop_evenly(image, r.pixels) for image, r in zip(images, requests, strict=True)]
    return [r.edit.around(image) if r.edit else image for image, r in zip(images, requests, strict=True)]


def given_by(
    edits: Sequence[Edit | None], layout: Layout, autoencoder: Autoencoder, patch: int
) -> Given | None:
    """What the pictures of edits give, at the sizes of `layout`; all of them start at one time."""
    if not any(edits):
        return None
    sides = autoencoder.downsample * patch
    sizes = [(rows * sides, columns * sides) for rows, columns in layout.sizes]
    pixels = [
        edit.scaled(size).pixels if edit else torch.zeros(3, *size)
        for edit, size in zip(edits, sizes, strict=True)
    ]
    (start,) = {edit.start if edit else 0.0 for edit in edits}
    return Given(start, encode(pixels, autoencoder, patch), known_of(edits, layout, autoencoder, patch))


def known_of(edits: Sequence[Edit | None], layout: Layout, autoencoder: Autoencoder, patch: int) -> Tensor:
    """Which numbers of the tokens of `layout` stay as they are, (T, C), bool."""
    sides, device = autoencoder.downsample * patch, layout.image_T.device
    known = []
    for edit, (rows, columns) in zip(edits, layout.sizes, strict=True):
        if edit is None:
            known.append(torch.zeros(rows * columns, patch**2 * autoencoder.channels, dtype=torch.bool))
        else:
            known.append(
                edit.scaled((rows * sides, columns * sides)).known((rows, columns), autoencoder, patch)
            )
    return torch.cat(known).to(device)


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
    noises: Sequence[Tensor | None] | None = None,
    given: Given | None = None,
) -> Tensor:
    """Clean tokens (T, C) of images of `layout`; each draws from its own generator.

    From noise, which `noises` may hold for some, or from what is `given`. Raises UserError for the latter
    where the model has no flow.
    """
    x_TC = start_noise(layout, model.token_channels, generators, noises or [None] * len(layout))
    objective = objective_of(model.architecture)
    output = guide(model, layout, condition, guidance, objective, negative)
    if given is None:
        return objective.generate(output, layout, x_TC, generators, sampling, progress)
    if not isinstance(objective, Flow):
        raise UserError("only models with a flow make images from pictures, or let them grow: no DDPM")
    time, data_TC, known_TC = given
    data_TC, known_TC = data_TC.to(x_TC.device), known_TC.to(x_TC.device)
    known = Known(known_TC, data_TC, x_TC) if known_TC.any() else None
    if time > 0:
        t_B = torch.full((len(layout),), time, device=x_TC.device)
        x_TC = objective.add_noise(data_TC, layout, x_TC, t_B).x_TC
    return objective.generate(output, layout, x_TC, generators, sampling, progress, start=time, known=known)


def start_noise(
    layout: Layout, channels: int, generators: Sequence[Generator], noises: Sequence[Tensor | None]
) -> Tensor:
    """The noise (T, C) of images: their own, or drawn. Raises UserError for one of another shape."""
    found = []
    for grid, generator, own in zip(layout.sizes, generators, noises, strict=True):
        if own is None:
            own = draw_noise([grid[0] * grid[1]], channels, [generator])
        elif own.shape != (*grid, channels):
            raise UserError(f"`latents` are {tuple(own.shape)}; this image takes {(*grid, channels)}")
        found.append(own.reshape(-1, channels).float())
    return torch.cat(found).to(layout.image_T.device)


def encode(images: Sequence[Tensor], autoencoder: Autoencoder, patch: int) -> Tensor:
    """Pixels (3, H, W) of images of any sizes, in multiples of a token → tokens (T, C), float32."""
    return torch.cat([
        patchify(autoencoder.encode(image[None]), patch).flatten(0, 2).float() for image in images
    ])  # fmt: skip


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
