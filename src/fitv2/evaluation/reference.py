"""What pictures are compared with: real ones brought to a size, their features computed once and kept.

A kept reference is a folder of one folder a size, HEIGHTxWIDTH, with pieces of features and reference.json:
the rule, how many pictures were left out, a hash of all pixels. Two people who bring the same collection to
the same size have the same hash.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from fitv2.encoding.kinds import open_source
from fitv2.encoding.manifest import Manifest, list_images
from fitv2.errors import UserError, reading
from fitv2.evaluation.extract import Features, Progress, collect, extract, wait_for
from fitv2.evaluation.features import Extractor
from fitv2.evaluation.identity import settle
from fitv2.evaluation.metrics import Moments, RealFeatures
from fitv2.evaluation.pictures import Batch, Fitted
from fitv2.runtime.files import atomic_file, sha256, write_json
from fitv2.runtime.serialization import from_dict, read_json
from fitv2.tokens import Size

ABOUT, MOMENTS = "reference.json", "moments.safetensors"
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
    networks: str  # a digest of their weights
    pillow: str = PIL.__version__
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
    """Real pictures of one size: what they show, and their features, which are read when asked for."""

    about: About
    folder: Path
    picture: Callable[[int], Image.Image | None] = lambda _: None  # that of a row, if it can be had

    def features(self) -> dict[str, RealFeatures]:
        """By their names. Raises UserError when the files are not those that were written."""
        about, known = self.about, self._moments()
        if not about.pictures:
            return {
                name: RealFeatures(torch.zeros(0), known[name]) for name in about.features if name in known
            }
        found = collect(self.folder, about.pictures + about.left_out)
        if found.digest != about.sha256:
            raise UserError(f"{self.folder} holds other pictures than its {ABOUT} says: remove it")
        return {name: RealFeatures(found.values[name], known.get(name)) for name in about.features}

    def _moments(self) -> dict[str, Moments]:
        path = self.folder / MOMENTS
        if not path.exists():
            return {}
        with reading(path):
            held = load_file(path)
        names = {key.rpartition("/")[0] for key in held}
        return {name: Moments(held[f"{name}/mean"], held[f"{name}/covariance"]) for name in names}


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
    def identity(self) -> dict[str, Any]:
        """What makes it the same, told without the path."""
        return {"files": self.fingerprint, "split": self.split, "pictures": len(self.rows)}

    @property
    def rows(self) -> list[int]:
        """The rows of the split, or of them as many as there may be, evenly spread."""
        spans = self.manifest.splits.values() if self.split == "all" else [self.manifest.splits[self.split]]
        rows = [row for start, stop in spans for row in range(start, stop)]
        if len(rows) <= self.most:
            return rows
        return [rows[i * len(rows) // self.most] for i in range(self.most)]

    def pictures(self, pixels: Size, crop_at_most: float, exact: bool = False) -> Fitted:
        """Its pictures at a size."""
        return Fitted(self.manifest, self.rows, pixels, crop_at_most, exact)

    def captions_and_labels(self, numbers: Sequence[int]) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Those of some of its pictures."""
        rows = self.rows
        shown = [self.manifest.picture(rows[number]) for number in numbers]
        return tuple(picture.caption for picture in shown), tuple(picture.label for picture in shown)

    def reference(
        self,
        pixels: Size,
        crop_at_most: float,
        extractors: Sequence[Extractor],
        folder: Path,
        place: tuple[int, int] = (0, 1),
        progress: Progress = lambda done, total: None,
    ) -> Reference:
        """The reference of a size, made in `folder` or taken from there.

        Each process does its share, and waits for the others. Raises UserError when another one is there.
        """
        here, pictures = folder / size_name(pixels), self.pictures(pixels, crop_at_most)
        about = About(
            self.manifest.url, f"{self.fingerprint}, {len(pictures)}", self.split, RULE, crop_at_most,
            *named(extractors),
        )  # fmt: skip
        found = extracted(pictures, about, extractors, here, place, progress)
        captions, labels = self.captions_and_labels(found.numbers)
        left_out = len(pictures) - len(found.numbers)
        about = replace(
            about, pictures=len(found.numbers), left_out=left_out, sha256=found.digest, captions=captions,
            labels=labels,
        )  # fmt: skip
        if place[0] == 0:
            write_json(here / ABOUT, asdict(about))

        def read(row: int) -> Image.Image | None:
            number = found.numbers[row]
            return pictures.read(range(number, number + 1))[0]

        return Reference(about, here, read)


def named(extractors: Sequence[Extractor]) -> tuple[tuple[str, ...], str]:
    """The names of all features, and a digest of the networks' weights."""
    names = tuple(name for extractor in extractors for name in extractor.names)
    return names, " ".join(extractor.digest[:16] for extractor in extractors)


def extracted(
    pictures: Fitted | Batch,
    about: About,
    extractors: Sequence[Extractor],
    here: Path,
    place: tuple[int, int],
    progress: Progress,
) -> Features:
    """The features of real pictures, once all processes have done their pieces."""
    settle(here, about.brief, place[0] == 0)
    extract(pictures, extractors, here, place, progress)
    return wait_for(here, len(pictures))


def kept_reference(folder: Path, pixels: Size, extractors: Sequence[Extractor]) -> Reference:
    """A reference that an evaluation kept. Raises UserError for a size or features that it has not."""
    here = folder / size_name(pixels)
    if not (here / ABOUT).exists():
        raise UserError(f"{folder} has no reference of {size_name(pixels)}")
    about = from_dict(About, read_json(here / ABOUT))
    names, digests = named(extractors)
    if missing := set(names) - set(about.features):
        raise UserError(f"{here} has no features of {', '.join(sorted(missing))}")
    if about.networks and not set(digests.split()) <= set(about.networks.split()):
        raise UserError(f"{here} has features of other weights of {', '.join(names)}")
    return Reference(replace(about, features=names), here)


def batch_reference(
    path: Path,
    pixels: Size,
    extractors: Sequence[Extractor],
    folder: Path,
    place: tuple[int, int] = (0, 1),
    progress: Progress = lambda done, total: None,
) -> Reference:
    """ADM's npz: its pictures `arr_0`, and its statistics `mu`, `sigma`, `mu_s`, `sigma_s`; either alone too.

    Fréchet distances are to the statistics, which are of more pictures than the npz holds. Raises UserError
    for pictures of another size.
    """
    here, known = folder / size_name(pixels), statistics(path)
    about = About(path.name, sha256(path), "", "as they are", 1.0, *named(extractors))
    if has_pictures(path):
        batch = Batch(path)
        if batch.pixels != pixels:
            raise UserError(f"{path} has pictures of {size_name(batch.pixels)}, not {size_name(pixels)}")
        found = extracted(batch, about, extractors, here, place, progress)
        about = replace(about, pictures=len(batch), sha256=found.digest)
    elif known:
        settle(here, about.brief, place[0] == 0)
    else:
        raise UserError(f"{path} has neither pictures, `arr_0`, nor statistics, `mu` and `sigma`")
    tensors = {f"{name}/mean": moments.mean for name, moments in known.items()}
    tensors |= {f"{name}/covariance": moments.covariance for name, moments in known.items()}
    if tensors:  # the same from every process
        with atomic_file(here / MOMENTS) as scratch:
            save_file(tensors, scratch)
    write_json(here / ABOUT, asdict(about))
    return Reference(about, here)


def has_pictures(path: Path) -> bool:
    """Whether an npz holds pictures."""
    with reading(path), np.load(path, allow_pickle=False) as file:
        return "arr_0" in file.files


def statistics(path: Path) -> dict[str, Moments]:
    """The moments in an npz of ADM's, by the names of features."""
    with reading(path), np.load(path, allow_pickle=False) as file:
        return {
            name: Moments(*(torch.from_numpy(file[key].astype(np.float64)) for key in keys))
            for name, keys in ADM.items()
            if set(keys) <= set(file.files)
        }


def as_statistics(features: dict[str, RealFeatures]) -> dict[str, np.ndarray]:
    """Moments under ADM's names."""
    found: dict[str, np.ndarray] = {}
    for name, keys in ADM.items():
        if name in features:
            moments = features[name].moments
            found |= {keys[0]: moments.mean.numpy(), keys[1]: moments.covariance.numpy()}
    return found


def size_name(pixels: Size) -> str:
    """HEIGHTxWIDTH."""
    return f"{pixels[0]}x{pixels[1]}"
