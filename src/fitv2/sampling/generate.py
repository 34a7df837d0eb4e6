"""From sizes, conditions and noise to images, pack by pack."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby

import torch
from torch import Tensor

from fitv2.autoencoder import Autoencoder
from fitv2.config import Guidance, Sampling
from fitv2.diffusion.flow import Flow
from fitv2.diffusion.guidance import guide
from fitv2.diffusion.objective import objective_of
from fitv2.errors import UserError
from fitv2.model import FiT
from fitv2.runtime.device import execution_device
from fitv2.sampling.growth import Growth
from fitv2.sampling.pack import Change, Pack
from fitv2.sampling.requests import Request
from fitv2.tokens import PackedTokens, unpack

Watch = Callable[[int, Callable[[], list[Tensor]]], None]


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
    watch: Watch | None = None,
    change: Change | None = None,
) -> Iterator[Tensor]:
    """Make images pack by pack, in order: pixels (3, height, width) in [−1, 1], not clipped.

    Those to which `growth` applies are packed by themselves, and so are edits of another strength: put them
    side by side.

    `progress` gets the share done, 0 to 1. `watch` gets, at every evaluation of a flow, the number of a
    pack's first image, and a function that shows the pack as the model expects it to become. `change` gets,
    after every step and `progress`, the tokens (rows, columns, C) of a pack's images; it may give others.

    Where the model predicts the data, the last of the steps is Euler's with every ODE solver: it ends
    exactly at the prediction. Raises UserError for a solver that does not exist or does not fit, and
    FloatingPointError for an image that is not finite.
    """
    unit = autoencoder.downsample * model.architecture.patch_size
    tokens = tokens_per_pack or default_tokens_per_pack(execution_device(model))
    packs = [
        (batch, growth if grows else None)
        for (grows, _), run in groupby(requests, lambda one: one.way(growth, unit))
        for batch in cut_into_packs(list(run), unit, tokens)
    ]
    first = 0
    for i, (batch, its_growth) in enumerate(packs):

        def report(part: float, before: int = i) -> None:
            progress((before + part) / len(packs))

        def see(images: Callable[[], list[Tensor]], first: int = first) -> None:
            if watch:
                watch(first, images)

        pack = Pack(model, autoencoder, batch)
        images = pack.make(guidance, sampling, its_growth, report, watch and see, change)
        for image in images:
            if not image.isfinite().all():
                raise FloatingPointError("an image came out with numbers that are not finite")
        first += len(images)
        yield from images


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
    if any(request.edit is None for request in requests):
        raise UserError("there is no picture to lead to noise")
    for batch in cut_into_packs(requests, unit, default_tokens_per_pack(execution_device(model))):
        pack = Pack(model, autoencoder, batch)
        given = pack.given(pack.layout)
        assert given is not None  # each has a picture
        output = guide(model, pack.layout, pack.condition, Guidance(1.0), objective)
        generators = [request.generator for request in pack.requests]
        noise_TC = objective.invert(output, pack.layout, given.data_TC, generators, sampling)
        noises += pack.as_requested([noise.cpu() for noise in unpack(PackedTokens(noise_TC, pack.layout))])
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
