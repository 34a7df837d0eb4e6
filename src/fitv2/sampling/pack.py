"""Images that are made together, in one sequence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from fitv2.autoencoder import Autoencoder
from fitv2.conditioning import Condition
from fitv2.config import Guidance, Sampling
from fitv2.diffusion.flow import Flow, Output
from fitv2.diffusion.guidance import guide
from fitv2.diffusion.noise import Known, draw_noise
from fitv2.diffusion.objective import objective_of
from fitv2.diffusion.solvers import OnStep, no_change
from fitv2.errors import UserError
from fitv2.model import FiT
from fitv2.runtime.device import execution_device
from fitv2.sampling.decoding import crop_evenly, decode, encode
from fitv2.sampling.editing import Edit
from fitv2.sampling.growth import Growth, enlarge
from fitv2.sampling.requests import Request
from fitv2.tokens import Layout, PackedTokens, unpack

Progress = Callable[[float], None]
Watch = Callable[[Callable[[], list[Tensor]]], None]  # gets what shows the images as far as they are
Change = Callable[[list[Tensor]], Sequence[Tensor] | None]  # tokens (rows, columns, C) to those that go on


class Pack:
    """Requests that are made in the same way; see `Request.way`.

    Sorted by length inside: images of equal length are neighbours and are computed together; and decoded, if
    they are of equal size too.
    """

    def __init__(self, model: FiT, autoencoder: Autoencoder, requests: Sequence[Request]) -> None:
        self.model, self.autoencoder, self.device = model, autoencoder, execution_device(model)
        self.patch = model.architecture.patch_size
        self.unit = autoencoder.downsample * self.patch
        grids = [request.grid(self.unit) for request in requests]
        self.order = sorted(range(len(requests)), key=lambda i: (requests[i].length(self.unit), grids[i]))
        self.requests = [requests[i] for i in self.order]
        self.layout = Layout.of([grids[i] for i in self.order]).to(self.device)
        self.edits = [request.covering(self.unit) for request in self.requests]

    @cached_property
    def condition(self) -> Condition:
        """What the images are to show."""
        return Condition.concatenate([request.condition for request in self.requests]).to(self.device)

    @cached_property
    def negative(self) -> Condition | None:
        """What guidance leads away from; None if it is nothing in particular for all."""
        if all(request.negative is None for request in self.requests):
            return None
        away = [r.condition.null() if r.negative is None else r.negative for r in self.requests]
        return Condition.concatenate(away).to(self.device)

    def make(
        self,
        guidance: Guidance,
        sampling: Sampling,
        growth: Growth | None,
        progress: Progress,
        watch: Watch | None = None,
        change: Change | None = None,
    ) -> list[Tensor]:
        """The images in the order of the requests; see `generate`."""
        make = partial(
            generate_tokens, self.model, condition=self.condition, guidance=guidance, sampling=sampling,
            generators=[request.generator for request in self.requests], negative=self.negative,
            noises=[request.noise for request in self.requests],
        )  # fmt: skip
        if growth is None:
            see = watch and self.seer(watch, self.layout)
            on_step = self.on_step(self.layout, progress, change)
            x_TC = make(self.layout, on_step=on_step, given=self.given(self.layout), watch=see)
            return self.finish(x_TC)
        small = growth.small(self.layout)
        see = watch and self.seer(watch, small)
        on_step = self.on_step(small, lambda part: progress(part / 2), change)
        x_TC = make(small, on_step=on_step, given=self.given(small), watch=see)
        given = Given(growth.time, self.tokens(self.grown(x_TC, small)), self.known(self.layout))
        see = watch and self.seer(watch, self.layout)
        on_step = self.on_step(self.layout, lambda part: progress((1 + part) / 2), change)
        x_TC = make(self.layout, on_step=on_step, given=given, watch=see)
        return self.finish(x_TC)

    def finish(self, x_TC: Tensor) -> list[Tensor]:
        """Tokens as images, in the order of the requests, each of its size and around what stayed of it."""
        images = decode(unpack(PackedTokens(x_TC, self.layout)), self.autoencoder, self.patch)
        done = []
        for image, request in zip(images, self.requests, strict=True):
            image = crop_evenly(image, request.pixels)
            done.append(request.edit.around(image) if request.edit else image)
        return self.as_requested(done)

    def as_requested(self, images: list[Tensor]) -> list[Tensor]:
        """The pack's images in the order of the requests."""
        return [images[self.order.index(i)] for i in range(len(images))]

    def on_step(self, layout: Layout, progress: Progress, change: Change | None) -> OnStep:
        """What a solver calls after a step with tokens of `layout`."""

        def told(share: float, x_TC: Tensor) -> Tensor:
            progress(share)
            if change is None:
                return x_TC
            # A copy: they may be changed in place.
            own = self.as_requested(unpack(PackedTokens(x_TC.clone(), layout)))
            given = change(own)
            images = own if given is None else given
            if len(images) != len(self.order):
                raise UserError(f"there are {len(images)} `latents` for {len(self.order)} images")
            changed_TC = pack_latents([images[i] for i in self.order], layout, x_TC.shape[1])
            return x_TC if torch.equal(changed_TC, x_TC) else changed_TC

        return told

    def seer(self, watch: Watch, layout: Layout) -> Callable[[Tensor], None]:
        """What is shown tokens of `layout` on the way, and tells `watch`."""

        def images(x_TC: Tensor) -> list[Tensor]:
            return self.finish(x_TC if layout is self.layout else self.tokens(self.grown(x_TC, layout)))

        return lambda x_TC: watch(lambda: images(x_TC))

    def sizes(self, layout: Layout) -> list[tuple[int, int]]:
        """Height and width of the images of a layout, in pixels."""
        return [(rows * self.unit, columns * self.unit) for rows, columns in layout.sizes]

    def grown(self, x_TC: Tensor, small: Layout) -> list[Tensor]:
        """Images that were made at smaller sizes, enlarged, in the order of `layout`."""
        images = decode(unpack(PackedTokens(x_TC, small)), self.autoencoder, self.patch)
        large = [enlarge(image, size) for image, size in zip(images, self.sizes(self.layout), strict=True)]
        return [edit.around(image) if edit else image for edit, image in zip(self.edits, large, strict=True)]

    def tokens(self, images: Sequence[Tensor]) -> Tensor:
        """Images as tokens (T, C)."""
        return encode(images, self.autoencoder, self.patch).to(self.device)

    def given(self, layout: Layout) -> Given | None:
        """What the pictures of edits give, at the sizes of `layout`; all of them start at one time."""
        if not any(self.edits):
            return None
        pixels = [
            edit.scaled(size).pixels if edit else torch.zeros(3, *size)
            for edit, size in zip(self.edits, self.sizes(layout), strict=True)
        ]
        (start,) = {edit.start if edit else 0.0 for edit in self.edits}
        return Given(start, self.tokens(pixels), self.known(layout))

    def known(self, layout: Layout) -> Tensor:
        """Which numbers of the tokens of `layout` stay as they are, (T, C), bool."""
        known = [
            self.known_of(edit, grid, size)
            for edit, grid, size in zip(self.edits, layout.sizes, self.sizes(layout), strict=True)
        ]
        return torch.cat(known).to(self.device)

    def known_of(self, edit: Edit | None, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
        """Those of one image."""
        if edit is not None:
            return edit.scaled(size).known(grid, self.autoencoder, self.patch)
        return torch.zeros(grid[0] * grid[1], self.model.token_channels, dtype=torch.bool)


class Given(NamedTuple):
    """What images are made from, where that is more than noise."""

    time: float  # from which on they are made
    data_TC: Tensor
    known_TC: Tensor  # bool: what stays as it is in the data


def generate_tokens(
    model: FiT,
    layout: Layout,
    condition: Condition,
    generators: Sequence[Generator],
    guidance: Guidance,
    sampling: Sampling,
    on_step: OnStep = no_change,
    *,
    negative: Condition | None = None,
    noises: Sequence[Tensor | None] | None = None,
    given: Given | None = None,
    watch: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """Clean tokens (T, C) of images of `layout`; each draws from its own generator.

    `watch` gets at every evaluation what the model expects the tokens to become; with a DDPM it gets nothing.

    From noise, which `noises` may hold for some, or from what is `given`. Raises UserError for the latter
    where the model has no flow.
    """
    x_TC = start_noise(layout, model.token_channels, generators, noises or [None] * len(layout))
    objective = objective_of(model.architecture)
    output = guide(model, layout, condition, guidance, objective, negative)
    if watch and isinstance(objective, Flow):
        output = watched(objective, output, layout, watch)
    if given is None:
        return objective.generate(output, layout, x_TC, generators, sampling, on_step)
    if not isinstance(objective, Flow):
        raise UserError("only models with a flow make images from pictures, or let them grow: no DDPM")
    time, data_TC, known_TC = given
    data_TC, known_TC = data_TC.to(x_TC.device), known_TC.to(x_TC.device)
    known = Known(known_TC, data_TC, x_TC) if known_TC.any() else None
    if time > 0:
        t_B = torch.full((len(layout),), time, device=x_TC.device)
        x_TC = objective.add_noise(data_TC, layout, x_TC, t_B).x_TC
    return objective.generate(output, layout, x_TC, generators, sampling, on_step, start=time, known=known)


def start_noise(
    layout: Layout, channels: int, generators: Sequence[Generator], noises: Sequence[Tensor | None]
) -> Tensor:
    """The noise (T, C) of images: their own, or drawn. Raises UserError for one of another shape."""
    drawn = [
        draw_noise([rows * columns], channels, [generator]).reshape(rows, columns, channels)
        if own is None else own
        for (rows, columns), generator, own in zip(layout.sizes, generators, noises, strict=True)
    ]  # fmt: skip
    return pack_latents(drawn, layout, channels)


def pack_latents(latents: Sequence[Tensor], layout: Layout, channels: int) -> Tensor:
    """Tokens (rows, columns, C) of each image of `layout` as (T, C). Raises UserError for other shapes."""
    for own, grid in zip(latents, layout.sizes, strict=True):
        if own.shape != (*grid, channels):
            raise UserError(f"`latents` are {tuple(own.shape)}; this image takes {(*grid, channels)}")
    flat = [own.reshape(-1, channels) for own in latents]
    return torch.cat([own.to(layout.image_T.device, torch.float32) for own in flat])


def watched(flow: Flow, output: Output, layout: Layout, watch: Callable[[Tensor], None]) -> Output:
    """`output`, of which `watch` gets the data that it leads to."""

    def seen(x_TC: Tensor, t: Tensor, *target: Tensor) -> Tensor:
        found = output(x_TC, t, *target)
        t_T1 = layout.spread(t.float().expand(len(layout)))[:, None]
        watch(flow.expected_data(flow.velocity(found, x_TC, t_T1), x_TC, t_T1))
        return found

    return seen
