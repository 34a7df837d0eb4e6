"""Sets of pictures of one size, read piece by piece by any process: made, real ones, and ADM's batches."""

import struct
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from PIL import Image

from fitv2.config import Guidance, Positions, Sampling
from fitv2.encoding.images import UnusableImage
from fitv2.encoding.manifest import Manifest, read_image
from fitv2.errors import UserError, reading
from fitv2.pipeline import FiTPipeline
from fitv2.runtime.rng import SUBJECTS, derive_seed, generator
from fitv2.tokens import Size

NEAR = 1.1  # proportions that differ by less are taken for the same


class Pictures(Protocol):
    """Pictures that a number is the name of."""

    def __len__(self) -> int: ...

    def read(self, numbers: range) -> list[Image.Image | None]:
        """Some of them, all of one size; None for one that is left out."""
        ...


def fit(image: Image.Image, pixels: Size) -> tuple[Image.Image, float]:
    """A real picture at a size (height, width), and the share of it that was cropped away.

    The rule of a reference, a proposal of this project. Where the proportions differ by a factor below 1.1,
    the whole picture is resized. Else the largest part in the middle that has the proportions is. Bicubic,
    with the filter that shrinking needs.
    """
    height, width = pixels
    wider = image.width * height / (image.height * width)  # than wanted, by this factor
    box = (0.0, 0.0, float(image.width), float(image.height))
    if wider >= NEAR:
        margin = image.width * (1 - 1 / wider) / 2
        box = (margin, 0.0, image.width - margin, float(image.height))
    elif 1 / wider >= NEAR:
        margin = image.height * (1 - wider) / 2
        box = (0.0, margin, float(image.width), image.height - margin)
    kept = (box[2] - box[0]) * (box[3] - box[1]) / (image.width * image.height)
    if image.size == (width, height):
        return image, 0.0
    return image.resize((width, height), Image.Resampling.BICUBIC, box=box), 1 - kept


@dataclass(frozen=True)
class Fitted:
    """Pictures of a collection, by the rule of `fit`; with `exact` those alone that have the size."""

    manifest: Manifest
    rows: Sequence[int]
    pixels: Size
    crop_at_most: float = 1.0
    exact: bool = False

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, numbers: range) -> list[Image.Image | None]:
        """See `Pictures`. Those that cannot be used are left out."""
        return [self._one(self.rows[number]) for number in numbers]

    def _one(self, row: int) -> Image.Image | None:
        try:
            image = read_image(self.manifest, self.manifest.picture(row))
        except UnusableImage:
            return None
        if self.exact:
            return image if image.size == self.pixels[::-1] else None
        fitted, cropped = fit(image, self.pixels)
        return fitted if cropped <= self.crop_at_most else None


class Subject(NamedTuple):
    """What a picture is to show."""

    label: int | None = None
    prompt: str | None = None


@dataclass(frozen=True)
class Made:
    """Pictures that a model makes: number i shows the i-th subject and has the seed `seed` + i."""

    pipeline: FiTPipeline
    subjects: Sequence[Subject]
    pixels: Size
    seed: int
    guidance: Guidance
    sampling: Sampling
    positions: Positions

    def __len__(self) -> int:
        return len(self.subjects)

    def read(self, numbers: range) -> list[Image.Image | None]:
        """See `Pictures`."""
        subjects = [self.subjects[number] for number in numbers]
        prompts = [subject.prompt for subject in subjects if subject.prompt is not None]
        return list(
            self.pipeline.stream(
                [subject.label for subject in subjects], self.pixels[0], self.pixels[1],
                [generator(self.seed + number) for number in numbers],
                prompt=prompts or None, guidance=self.guidance,
                sampling=self.sampling, positions=self.positions, progress=lambda _: None,
            )
        )  # fmt: skip


class Batch:
    """The pictures in an npz as ADM's evaluator takes it: `arr_0`, uint8 (N, H, W, 3)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with reading(path), zipfile.ZipFile(path) as archive:
            info = archive.getinfo("arr_0.npy")
            with archive.open(info) as member:
                version = np.lib.format.read_magic(member)
                read_header = getattr(np.lib.format, f"read_array_header_{version[0]}_0")
                self.shape, in_columns, dtype = read_header(member)
                header = member.tell()
        if in_columns or dtype != np.uint8 or len(self.shape) != 4 or self.shape[3] != 3:
            raise UserError(f"{path}: arr_0 is {dtype} {self.shape}, not uint8 (N, H, W, 3)")
        self.start = start_of(path, info) + header if info.compress_type == zipfile.ZIP_STORED else None

    @property
    def pixels(self) -> Size:
        """Height and width."""
        return self.shape[1], self.shape[2]

    def __len__(self) -> int:
        return self.shape[0]

    @cached_property
    def unpacked(self) -> np.ndarray:
        """All of them, where they are compressed: what lies in the middle cannot be read alone."""
        with reading(self.path), np.load(self.path, allow_pickle=False) as file:
            return file["arr_0"]

    def read(self, numbers: range) -> list[Image.Image | None]:
        """See `Pictures`: only these are read, since a batch of 50,000 has 10 GB."""
        if self.start is None:
            return [Image.fromarray(image) for image in self.unpacked[numbers.start : numbers.stop]]
        each = int(np.prod(self.shape[1:]))
        with reading(self.path), self.path.open("rb") as file:
            file.seek(self.start + numbers.start * each)
            content = file.read(len(numbers) * each)
            levels = np.frombuffer(content, np.uint8).reshape(len(numbers), *self.shape[1:])
        return [Image.fromarray(image) for image in levels]


def start_of(path: Path, info: zipfile.ZipInfo) -> int:
    """Where the content of a member of a zip begins: after a header, its name and an extra field."""
    with path.open("rb") as file:
        file.seek(info.header_offset + 26)
        name, extra = struct.unpack("<HH", file.read(4))
    return info.header_offset + 30 + name + extra


def draw_labels(count: int, classes: int, seed: int, balanced: bool) -> list[Subject]:
    """Labels by chance, as ADM draws them, or as many of each. The first ones are the same for any count."""
    if balanced:
        return [Subject(number % classes) for number in range(count)]
    draws = np.random.default_rng(derive_seed(seed, SUBJECTS)).random(count)
    return [Subject(int(draw * classes)) for draw in draws]
