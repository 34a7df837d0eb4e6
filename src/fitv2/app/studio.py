"""What the page does, without the page: orders become pictures, one order after another."""

from __future__ import annotations

import math
import secrets
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from queue import Queue
from threading import Event, Lock, Thread
from typing import Any, NamedTuple

from PIL import Image
from torch import Tensor

from fitv2.checkpoint import weights_digest
from fitv2.config import Guidance, Positions, Sampling
from fitv2.errors import UserError
from fitv2.pipeline import FiTPipeline
from fitv2.runtime.rng import generator
from fitv2.sampling.editing import (
    eight_bits,
    on_background,
    on_the_way,
    place,
    shared_noises,
    to_mask,
)
from fitv2.sampling.recipe import Recipe, save_picture
from fitv2.sampling.saving import distinct_names, file_name

PREVIEW_EVERY = 1.0  # seconds
BY_ITSELF = "automatic"
EXTRAPOLATIONS = (BY_ITSELF, "none", "pi", "ntk", "ntk-by-parts", "yarn")


@dataclass(frozen=True)
class Bounds:
    """What a visitor may ask for at most."""

    max_side: int = 512
    max_images: int = 16
    max_steps: int = 100
    max_tokens: int = 8_192  # of all images of an order together


@dataclass(frozen=True, kw_only=True)
class Order:
    """What a visitor asks for."""

    prompt: str = ""
    label: str = ""
    negative_prompt: str = ""
    height: int
    width: int
    count: int = 1
    guidance_scale: float = 1.5
    steps: int = 25
    seed: int = 0
    extrapolation: str = BY_ITSELF
    more_sizes: tuple[tuple[int, int], ...] = ()
    """Others at which the same pictures are asked for too."""
    one_noise: bool = False
    """The pictures of a seed are of one noise, seen at all sizes."""
    toward_seed: int | None = None
    """What is made lies between the noise of `seed` and that of this one."""
    toward: Image.Image | None = None
    """A second picture: what is made lies between it and `image`."""
    given: dict[str, Any] = field(default_factory=dict)
    """Arguments of the pipeline for a picture that is edited: `image`, `mask_image`, `strength`."""
    edited: dict[str, str | float | None] | None = None
    """What the recipe says of it."""
    note: str = ""
    """What the visitor is told when it is done."""

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """Height and width of each size, none twice."""
        return tuple(dict.fromkeys([(self.height, self.width), *self.more_sizes]))


class Shown(NamedTuple):
    """How far an order is."""

    pictures: Sequence[Path | Image.Image]  # done, then previews
    done: int
    share: float


class VisitorLeftError(Exception):
    """The visitor has gone."""


class Studio:
    """A model that takes orders; pictures go to a folder, each with its recipe."""

    def __init__(
        self,
        pipeline: FiTPipeline,
        model: str,
        folder: Path,
        bounds: Bounds = Bounds(),
        keep: float | None = None,
    ) -> None:
        """`folder` is the studio's own: the page gives out what lies there, for `keep` seconds."""
        self.pipeline, self.model, self.folder, self.bounds = pipeline, model, folder, bounds
        self.keep = keep
        self.weights = weights_digest(pipeline.transformer, pipeline.vae)
        self.turn = Lock()

    @property
    def takes_text(self) -> bool:
        """Whether the model takes prompts."""
        return "text" in self.pipeline.transformer.architecture.conditions

    @property
    def labels(self) -> list[str]:
        """The names of its labels; those that several have with their numbers."""
        if "label" not in self.pipeline.transformer.architecture.conditions:
            return []
        names = self.pipeline.card.labels
        often = Counter(names)
        return [f"{name} ({i})" if often[name] > 1 else name for i, name in enumerate(names)]

    def label_number(self, name: str) -> int:
        """That of one of `labels`, or of what the command line takes. Raises UserError."""
        known = self.labels
        return known.index(name) if name in known else self.pipeline.card.label_index(name)

    @property
    def side(self) -> int:
        """Of the largest square it was trained on, in pixels."""
        return self.pipeline.card.square[0] * self.pipeline.unit

    @property
    def steps(self) -> int:
        """Those that the model takes if nothing is said."""
        return Sampling().resolve(self.pipeline.transformer.architecture.objective_name)[1]

    def recipes(self, order: Order) -> list[Recipe]:
        """What is to be made. Raises UserError for what is out of bounds."""
        bounds = self.bounds
        for name, value, most in (
            *(("the height", height, bounds.max_side) for height, _ in order.sizes),
            *(("the width", width, bounds.max_side) for _, width in order.sizes),
            ("the number of pictures", order.count * len(order.sizes), bounds.max_images),
            ("the number of steps", order.steps, bounds.max_steps),
        ):  # fmt: skip
            if not 1 <= value <= most or value != int(value):
                raise UserError(f"{name} can be 1 to {most}, not {value}")
        tokens = order.count * sum(math.prod(self.pipeline.grid(size)) for size in order.sizes)
        if tokens > bounds.max_tokens:
            raise UserError(
                f"these pictures have {tokens} tokens together, and {bounds.max_tokens} is the most here:"
                " ask for fewer or smaller ones"
            )
        if order.extrapolation not in EXTRAPOLATIONS:
            raise UserError(f"extrapolation can be {', '.join(EXTRAPOLATIONS)}")
        own = order.extrapolation == BY_ITSELF
        number = self.label_number(order.label) if order.label else None
        if not self.takes_text and not order.label:
            raise UserError("choose a label")
        return [
            Recipe.of(
                self.pipeline, model=self.model, weights=self.weights, label_number=number,
                label=None if number is None else self.pipeline.card.labels[number],
                prompt=order.prompt if self.takes_text else None,
                negative_prompt=order.negative_prompt or None, height=int(height), width=int(width),
                seed=int(order.seed) + i, precision="float32",
                guidance=Guidance(float(order.guidance_scale)),
                sampling=Sampling(steps=int(order.steps)),
                positions=Positions() if own else Positions(order.extrapolation), edited=order.edited,
            )
            for height, width in order.sizes for i in range(int(order.count))
        ]  # fmt: skip

    def make(self, order: Order) -> Iterator[Shown]:
        """Pictures as they come, with previews between. Leaving the iterator ends the work.

        Raises UserError for what the model or this place does not make.
        """
        recipes = self.recipes(order)
        self.tidy()
        folder = self.folder / secrets.token_hex(8)
        told: Queue[Shown | BaseException | None] = Queue()
        left = Event()
        worker = Thread(target=self._work, args=(order, recipes, folder, told.put, left.is_set), daemon=True)
        worker.start()
        try:
            while (found := told.get()) is not None:
                if isinstance(found, BaseException):
                    raise found
                yield found
        finally:
            left.set()  # no waiting here: the next order waits for its turn

    def tidy(self) -> None:
        """Remove pictures that are older than `keep`."""
        if self.keep is not None and self.folder.exists():
            for old in self.folder.iterdir():
                if time.time() - old.stat().st_mtime > self.keep:
                    shutil.rmtree(old, ignore_errors=True)

    def _work(
        self,
        order: Order,
        recipes: Sequence[Recipe],
        folder: Path,
        tell: Callable[[Shown | BaseException | None], None],
        has_left: Callable[[], bool],
    ) -> None:
        """Make the pictures of recipes, and tell of each; in the end None, or what went wrong."""
        try:
            with self.turn:
                self._make(order, recipes, folder, tell, has_left)
        except VisitorLeftError:
            pass
        except BaseException as error:
            tell(error)
        tell(None)

    def _make(
        self,
        order: Order,
        recipes: Sequence[Recipe],
        folder: Path,
        tell: Callable[[Shown | BaseException | None], None],
        has_left: Callable[[], bool],
    ) -> None:
        done: list[Path] = []
        share, last = 0.0, time.monotonic()
        first = recipes[0]
        (name,) = distinct_names((first.prompt or first.label or "picture",))

        def progress(part: float) -> None:
            nonlocal share
            share = part
            if has_left():  # a DDPM is not watched
                raise VisitorLeftError

        def watch(_: int, show: Callable[[], list[Image.Image]]) -> None:
            nonlocal last
            if has_left():
                raise VisitorLeftError
            if time.monotonic() - last > PREVIEW_EVERY:
                tell(Shown([*done, *show()], len(done), share))
                last = time.monotonic()

        same = first.arguments | {
            name: [getattr(recipe, name) for recipe in recipes] for name in ("height", "width")
        }
        made = self.pipeline.stream(
            generator=[generator(recipe.seed) for recipe in recipes], guidance=first.guidance,
            sampling=first.sampling, positions=first.positions, progress=progress, watch=watch,
            **same, **self.given(order, recipes),
        )  # fmt: skip
        for recipe, image in zip(recipes, made, strict=True):
            path = folder / file_name(name, (recipe.height, recipe.width), recipe.seed)
            save_picture(image, path, recipe)
            done.append(path)
            tell(Shown([*done], len(done), share))

    def given(self, order: Order, recipes: Sequence[Recipe]) -> dict[str, Any]:
        """Arguments of the pipeline beside those of the recipes: pictures, or noises."""
        if order.toward is not None:
            return {"latents": self.way(order, recipes)}
        if not order.one_noise and order.toward_seed is None:
            return order.given
        grids, channels = map(self.pipeline.grid, order.sizes), self.pipeline.transformer.token_channels
        noises = shared_noises([*grids], channels, order.seed, order.count, order.toward_seed)
        return {"latents": [noise for of_size in noises for noise in of_size]}

    def way(self, order: Order, recipes: Sequence[Recipe]) -> list[Tensor]:
        """The noises between those of two pictures, one for each recipe."""
        first, asked = order.given["image"], recipes[0].arguments
        shown: dict[str, Any] = {name: asked[name] for name in ("class_labels", "prompt") if name in asked}
        other = order.toward and on_background(eight_bits(order.toward), "white").convert("RGB")
        pair = [first, other.resize(first.size)] if other else [first]
        how: dict[str, Any] = {"sampling": recipes[0].sampling, "positions": recipes[0].positions}
        ends = self.pipeline.invert(pair, **how, **shown)
        return on_the_way(ends[0], ends[1], len(recipes))


def painted(picture: Image.Image, layers: Sequence[Image.Image]) -> Image.Image:
    """The mask of what was painted over a picture, in any colour. Raises UserError if that is nothing."""
    mask = Image.new("L", picture.size)
    for layer in layers:
        drawn = layer.convert("RGBA").getchannel("A").point(lambda alpha: 255 if alpha > 16 else 0)
        mask.paste(255, (0, 0), drawn.resize(picture.size))
    if not to_mask(mask).any():
        raise UserError("nothing is painted: draw over what is to be made anew")
    return mask


def within(picture: Image.Image, side: int, tokens: float, unit: int) -> Image.Image:
    """A picture, made smaller if it has a longer side or more tokens."""
    height, width = picture.height, picture.width
    scale = min(1.0, side / max(height, width))
    while -(-int(height * scale) // unit) * -(-int(width * scale) // unit) > tokens:
        scale *= 0.98
    return picture if scale == 1 else picture.resize(
        (max(1, int(width * scale)), max(1, int(height * scale)))
    )  # fmt: skip


def edit_order(
    studio: Studio,
    picture: Image.Image | None,
    layers: Sequence[Image.Image],
    how: str,
    canvas: tuple[int, int],
    strength: float,
    *,
    across: float = 0.5,
    down: float = 0.5,
    toward: Image.Image | None = None,
    **order: Any,
) -> Order:
    """An order for a picture of one's own, which is made smaller if it is beyond the bounds.

    `how` is one of `HOW`. `across` and `down` are where it lies on a canvas, from 0, left and top, to 1;
    `toward` is the second picture. Raises UserError for what does not fit.
    """
    if picture is None:
        raise UserError("put a picture there first")
    picture = picture.convert("RGBA") if picture.mode in ("RGBA", "LA", "P") else picture.convert("RGB")
    bounds, count = studio.bounds, max(1, order.get("count", 1))
    most = min(bounds.max_tokens / count, MOST_OF_ONE)
    large, unit = picture.size, studio.pipeline.unit
    picture = within(picture, bounds.max_side, most, unit)
    note = (
        f"Your picture was made smaller, {picture.height}x{picture.width}." if picture.size != large else ""
    )
    given: dict[str, Any] = {"image": picture}
    if how == PAINTED:
        given["mask_image"] = painted(picture, layers)
    elif how == AROUND:
        room = canvas[0] - picture.height, canvas[1] - picture.width
        at = round(max(0, room[0]) * down), round(max(0, room[1]) * across)
        given["image"], given["mask_image"] = place(picture, canvas, at)
    elif how == BETWEEN:
        if toward is None:
            raise UserError("put a second picture there too")
        order |= {"toward": toward, "guidance_scale": 1.0}  # the flow that leads to noise and back has none
    elif how == ALL:
        given["strength"] = float(strength)
    else:
        raise UserError(f"what to do can be {', '.join(HOW)}")
    image = given["image"]
    said = {"how": how, "strength": given.get("strength", 1.0)}
    return Order(height=image.height, width=image.width, given=given, edited=said, note=note, **order)


MOST_OF_ONE = 4_096  # tokens of a picture that is put in: more take minutes
PAINTED, AROUND, ALL = "make anew what is painted", "paint around it", "vary all of it"
BETWEEN = "go to another picture"
HOW = (PAINTED, AROUND, ALL, BETWEEN)
