"""The images of a shard: read and resized by several processes, encoded in batches of equal shape."""

from collections import defaultdict
from concurrent.futures import Executor, Future
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fitv2.autoencoder import Autoencoder
from fitv2.config import Encoding
from fitv2.data.format import About, ShardRows
from fitv2.encoding.images import UnusableImage, tokens_of_mask, views
from fitv2.encoding.manifest import Manifest, load_manifest, read_image, read_mask
from fitv2.encoding.sources import ImageRef
from fitv2.runtime.device import default_device
from fitv2.runtime.files import wait_for_turn
from fitv2.runtime.rng import LATENTS, generator
from fitv2.tokens import patchify

NOTHING = np.empty(0, np.uint8)


class View(NamedTuple):
    """A picture at a size under the limit of tokens."""

    pixels: np.ndarray
    crop: bool
    mask: np.ndarray | None = None  # how much of each token is learned, (rows, columns) uint8 [default: all]


@dataclass(frozen=True)
class Fitted:
    """An image as it was read: its views, or why it cannot be used."""

    row: int
    picture: ImageRef
    views: list[View]
    reason: str | None = None


class Reader:
    """Images of a manifest, resized; sent to the processes that read."""

    def __init__(self, manifest: Path, encoding: Encoding, unit: int) -> None:
        self.path, self.encoding, self.unit = manifest, encoding, unit

    @cached_property
    def manifest(self) -> Manifest:
        """Opened in each process."""
        return load_manifest(self.path)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "manifest"}

    def read(self, rows: range) -> list[Fitted]:
        """The images of these rows of the manifest."""
        return [self.fitted(row) for row in rows]

    def fitted(self, row: int) -> Fitted:
        """One image."""
        picture, chosen = self.manifest.picture(row), self.encoding
        with ExitStack() as stack:

            def hold() -> None:  # of all large images one at a time is in memory, whoever reads it
                if not waited:  # an image and its mask take one turn
                    waited.append(stack.enter_context(wait_for_turn(self.path)))

            waited: list[None] = []

            try:
                image = read_image(self.manifest, picture, hold)
                mask = read_mask(self.manifest, picture, image.size, hold)
                found = views(image, chosen.max_tokens, self.unit, chosen.preprocess)
                masks = self.learned(mask) if mask else [None] * len(found)
            except UnusableImage as error:
                return Fitted(row, picture, [], " ".join(str(error).split()))
        every = zip(found, masks, strict=True)
        made = [View(np.asarray(view), crop, learned) for (view, crop), learned in every]
        return Fitted(row, picture, [view for view in made if view.mask is None or view.mask.any()])

    def learned(self, mask: Image.Image) -> list[np.ndarray | None]:
        """The mask of each view. Raises UnusableImage for one that leaves nothing to learn."""
        found = views(mask, self.encoding.max_tokens, self.unit, self.encoding.preprocess)
        learned: list[np.ndarray | None] = [tokens_of_mask(view, self.unit) for view, _ in found]
        if not any(one is not None and one.any() for one in learned):
            raise UnusableImage("its mask is black where it is stored: nothing of it is learned")
        return learned


@dataclass(frozen=True)
class Place:
    """Where a view belongs: an image of the shard, and which of its views."""

    picture: int
    view: int


class ShardEncoder:
    """The images of one shard, encoded in batches of equal shape by the threads of `pool`."""

    def __init__(
        self, about: About, encoding: Encoding, codec: Autoencoder, pool: Executor, ahead: int
    ) -> None:
        self.about, self.encoding, self.codec, self.pool = about, encoding, codec, pool
        self.ahead = ahead  # batches that may be with the autoencoder at once
        self.pictures: list[Fitted] = []  # without their pixels
        self.skipped: list[dict[str, str]] = []
        self.views: dict[Place, View] = {}  # without their pixels
        self._waiting: dict[tuple[int, ...], list[tuple[Place, np.ndarray]]] = defaultdict(list)
        self._made: list[tuple[list[Place], Future[Tensor]]] = []

    def add(self, fitted: Fitted) -> None:
        """One image more; encodes a batch if there are enough of its shape."""
        if fitted.reason is not None:
            self.skipped.append({"source": fitted.picture.source, "reason": fitted.reason})
            return
        number = len(self.pictures)
        self.pictures.append(Fitted(fitted.row, fitted.picture, []))
        for i, view in enumerate(fitted.views):
            place = Place(number, i)
            self.views[place] = view._replace(pixels=NOTHING)
            same = self._waiting[view.pixels.shape]
            same.append((place, view.pixels))
            if len(same) == self.encoding.batch_size:
                self._encode(self._waiting.pop(view.pixels.shape))

    def encode_rest(self) -> None:
        """Encode what is left, a batch of each shape."""
        for same in self._waiting.values():
            self._encode(same)
        self._waiting.clear()

    def _encode(self, same: list[tuple[Place, np.ndarray]]) -> None:
        """Prepare a batch here, while those before it are encoded there."""
        places = [place for place, _ in same]
        pixels = torch.from_numpy(np.stack([array for _, array in same])).to(default_device())
        pixels = pixels.permute(0, 3, 1, 2).float().div_(127.5).sub_(1)
        both = torch.cat([pixels, pixels.flip(3)]) if self.encoding.mirror else pixels
        if len(self._made) >= self.ahead:
            self._made[-self.ahead][1].result()
        made = self.pool.submit(self._tokens, both, self._noise(places, both.shape))
        self._made.append((places, made))

    @torch.inference_mode()
    def _tokens(self, pixels: Tensor, noise: Tensor | None) -> Tensor:
        """(B, rows, columns, C) float16, on the device."""
        return patchify(self.codec.encode(pixels, noise), self.about.patch_size).half()

    def _noise(self, places: list[Place], shape: tuple[int, ...]) -> Tensor | None:
        """Noise for sampled latents, each view's from a key of its own."""
        if self.encoding.latents == "mean":
            return None
        images, _, height, width = shape
        side = self.codec.downsample
        size = (self.codec.channels, height // side, width // side)
        keys = [(self.pictures[p.picture].row, p.view, mirrored) for mirrored in (0, 1) for p in places][
            :images
        ]
        return torch.stack([torch.randn(size, generator=generator(LATENTS, *key)) for key in keys])

    def rows(self) -> ShardRows:
        """The rows of the shard: images in order, of each its views in order, as they are and mirrored.

        Notes those whose latents float16 cannot hold as skipped.
        """
        tokens: dict[Place, np.ndarray] = {}
        for places, made in self._made:
            flips = made.result().cpu().unflatten(0, (-1, len(places))).transpose(0, 1)
            tokens |= dict(zip(places, flips.numpy(), strict=True))
        odd = {place.picture for place, made in tokens.items() if not np.isfinite(made).all()}
        for n in sorted(odd):
            reason = "the autoencoder gives numbers that float16 cannot hold"
            self.skipped.append({"source": self.pictures[n].picture.source, "reason": reason})
        number = {label: i for i, label in enumerate(self.about.labels)}
        rows, variant = ShardRows(), 0
        for place in sorted(tokens, key=lambda place: (place.picture, place.view)):
            if place.picture in odd:
                continue
            variant = 0 if place.view == 0 else variant
            picture = self.pictures[place.picture].picture
            view = self.views[place]
            for mirrored, made in enumerate(tokens[place]):
                mask = view.mask[:, ::-1] if mirrored and view.mask is not None else view.mask
                rows.add(
                    made, number[picture.label], picture.source, variant, view.crop, picture.caption, mask
                )  # fmt: skip
                variant += 1
        return rows
