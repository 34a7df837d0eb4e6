"""What pictures are compared with: real ones brought to a size, their features computed once and kept.

A kept reference is a folder of one folder a size, HEIGHTxWIDTH, with pieces of features and reference.json:
the rule, how many pictures were left out, a hash of all pixels. Two people who bring the same collection to
the same size have the same hash.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from fitv2.encoding.kinds import open_source
from fitv2.encoding.manifest import Manifest, list_images
from fitv2.errors import UserError, reading
from fitv2.evaluation.extract import Progress, collect, extract, wait_for
from fitv2.evaluation.features import Extractor
from fitv2.evaluation.metrics import Moments, Real
from fitv2.evaluation.pictures import Batch
from fitv2.evaluation.pictures import Real as RealPictures
from fitv2.runtime.files import write_json
from fitv2.runtime.serialization import from_dict, read_json
from fitv2.tokens import Size

ABOUT = "reference.json"
RULE = "whole where proportions differ by less than 1.1, else the largest part in the middle; bicubic"
ADM = {"inception": ("mu", "sigma"), "inception_spatial": ("mu_s", "sigma_s")}  # names in its npz


@dataclass(frozen=True)
class About:
    """What reference.json says of one size."""

    source: str
    fingerprint: str
    split: str
    rule: str
    crop_at_most: float
    features: tuple[str, ...]
    pictures: int = 0
    left_out: int = 0
    sha256: str = ""  # of all pixels
    captions: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()

    @property
    def brief(self) -> dict[str, Any]:
        """All but the lists."""
        return {name: value for name, value in asdict(self).items() if name not in ("captions", "labels")}


@dataclass(frozen=True, eq=False)
class Reference:
    """Real pictures of one size: their features, and what they show."""

    real: dict[str, Real]
    about: About
    picture: Callable[[int], Image.Image | None] = lambda _: None  # that of a row, if it can be had


@dataclass(frozen=True)
class Collection:
    """A collection of real pictures, listed, of which references of any size are made."""

    manifest: Manifest
    fingerprint: str
    split: str
    most: int

    @classmethod
    def open(
        cls, source: str, split: str | None, *columns: str | None, most: int = 10_000_000
    ) -> "Collection":
        """A collection by the names `fitv2 encode` takes; with `split` None all of it, at most `most`.

        `columns` are those of images, labels and captions. Raises UserError as `encode` does, and for a split
        that there is not.
        """
        opened = open_source(source, *columns)
        manifest = list_images(opened)
        if split is None or len(manifest.splits) == 1:
            split = next(iter(manifest.splits)) if len(manifest.splits) == 1 else "all"
        elif split not in manifest.splits:
            raise UserError(f"{source} has no split {split}, only {', '.join(manifest.splits)}")
        return cls(manifest, opened.fingerprint, split, most)

    @property
    def rows(self) -> range:
        """The rows of the split, or of them as many as there may be, evenly spread."""
        spans = self.manifest.splits
        if self.split == "all":
            rows = range(min(start for start, _ in spans.values()), max(stop for _, stop in spans.values()))
        else:
            rows = range(*spans[self.split])
        return rows[:: -(-len(rows) // self.most)]

    def pictures(self, pixels: Size, crop_at_most: float, exact: bool = False) -> RealPictures:
        """Its pictures at a size."""
        return RealPictures(self.manifest, self.rows, pixels, crop_at_most, exact)

    def reference(
        self,
        pixels: Size,
        crop_at_most: float,
        extractors: Sequence[Extractor],
        folder: Path,
        place: tuple[int, int],
        progress: Progress,
    ) -> Reference:
        """The reference of a size, made in `folder` or taken from there.

        Each process does its share, and waits for the others.
        """
        names = tuple(name for extractor in extractors for name in extractor.names)
        pictures = self.pictures(pixels, crop_at_most)
        about = About(self.manifest.url, self.fingerprint, self.split, RULE, crop_at_most, names)
        here = folder / size_name(pixels)
        extract(pictures, extractors, here, place, progress)
        found = wait_for(here, len(pictures))

        def read(row: int) -> Image.Image | None:
            number = found.numbers[row]
            return pictures.read(range(number, number + 1))[0]

        shown = [self.manifest.picture(self.rows[number]) for number in found.numbers]
        about = About(
            **asdict(about) | {
                "pictures": len(found.numbers), "left_out": len(pictures) - len(found.numbers),
                "sha256": found.digest, "captions": tuple(p.caption for p in shown),
                "labels": tuple(p.label for p in shown),
            }
        )  # fmt: skip
        if place[0] == 0:
            write_json(here / ABOUT, asdict(about))
        return Reference({name: Real(found.values[name]) for name in names}, about, read)


def kept_reference(folder: Path, pixels: Size, names: Sequence[str]) -> Reference:
    """A reference that an evaluation kept. Raises UserError for a size or features that it has not."""
    here = folder / size_name(pixels)
    if not (here / ABOUT).exists():
        raise UserError(f"{folder} has no reference of {size_name(pixels)}")
    about = from_dict(About, read_json(here / ABOUT))
    if missing := set(names) - set(about.features):
        raise UserError(f"{here} has no features of {', '.join(sorted(missing))}")
    found = collect(here, about.pictures + about.left_out)
    if found is None:
        raise UserError(f"{here} lacks some of its files")
    return Reference({name: Real(found.values[name]) for name in names}, about)


def batch_reference(
    path: Path, extractors: Sequence[Extractor], folder: Path, place: tuple[int, int], progress: Progress
) -> Reference:
    """ADM's npz: its pictures `arr_0`, and its statistics `mu`, `sigma`, `mu_s`, `sigma_s` where it has them.

    Fréchet distances are to the statistics, which are of more pictures than the npz holds.
    """
    batch = Batch(path)
    names = tuple(name for extractor in extractors for name in extractor.names)
    here = folder / size_name(batch.pixels)
    extract(batch, extractors, here, place, progress)
    found = wait_for(here, len(batch))
    about = About(path.name, "", "", "as they are", 1.0, names, len(batch), 0, found.digest)
    known = statistics(path)
    return Reference({name: Real(found.values[name], known.get(name)) for name in names}, about)


def statistics(path: Path) -> dict[str, Moments]:
    """The moments in an npz of ADM's, by the names of features."""
    with reading(path), np.load(path, allow_pickle=False) as file:
        return {
            name: Moments(*(torch.from_numpy(file[key].astype(np.float64)) for key in keys))
            for name, keys in ADM.items()
            if set(keys) <= set(file.files)
        }


def size_name(pixels: Size) -> str:
    """HEIGHTxWIDTH."""
    return f"{pixels[0]}x{pixels[1]}"
