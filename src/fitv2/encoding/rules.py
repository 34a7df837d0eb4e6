"""What the folders and archives of a collection mean: which split, which label, or neither.

docs/guides/data.md has these rules as a table, and tests/encoding/test_collections.py every row of it.
"""

import posixpath
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from fitv2.encoding.sources import NO_LABEL, SPLITS
from fitv2.errors import UserError

WORDNET = re.compile(r"n\d{8}")  # ImageNet's names of classes, which look like numbered shards
# What the last but one part of a name such as a.mask.png says: no picture, but something about one.
ABOUT_A_PICTURE = frozenset([
    "alpha", "annotation", "annotations", "canny", "cond", "condition", "control", "depth", "edge", "edges",
    "flow", "gt", "instance", "instances", "label", "labels", "mask", "masks", "matte", "normal", "normals",
    "panoptic", "pose", "seg", "segmentation", "semantic", "target", "thumb", "thumbnail",
])  # fmt: skip
BEST_FIRST = ("jpg", "jpeg", "webp", "avif", "png")  # of a sample's pictures: a mask is seldom a JPEG


class Place(NamedTuple):
    """Where an image belongs. Split: None if its folders tell none. Label: empty if it has none."""

    split: str | None
    label: str


class Folders:
    """What the folders of a collection mean, given those of all its images.

    If every top folder is named as a split is, they are splits, and the folders in them labels; else the
    top folders are labels. An image beside the folders that are labels has none; where nothing has,
    all have the one label `image`.

    Raises UserError when folders named as splits lie beside others and it cannot be told which are meant.
    """

    def __init__(self, url: str, folders: Iterable[Sequence[str]]) -> None:
        every = set(map(tuple, folders))
        tops = {above[0] for above in every if above}
        splits = {top for top in tops if top.lower() in SPLITS}
        self.in_splits = bool(splits) and splits == tops
        holds_labels = any(len(above) > 1 and above[0] in splits for above in every)
        if splits and not self.in_splits and (holds_labels or len({SPLITS[s.lower()] for s in splits}) > 1):
            first, others = posixpath.join(url, min(splits)), ", ".join(sorted(tops - splits)[:3])
            raise UserError(
                f"{url} holds {' and '.join(sorted(splits))}, named as splits are, beside {others}: are those"
                f" labels or splits? Give one folder, such as {first}, or move {others} out"
            )
        self.labelled = any(len(above) > self.in_splits for above in every)

    def place(self, above: Sequence[str]) -> Place:
        """The place of an image, given the folders that it lies in from the top."""
        split = SPLITS[above[0].lower()] if self.in_splits and above else None
        below = above[1:] if split else above
        if below:
            return Place(split, below[0])
        stray = self.labelled or (self.in_splits and not above)
        return Place(split, "" if stray else NO_LABEL)


def labels_of_archives(names: Sequence[str]) -> list[str] | None:
    """The labels that archives are named by, if each is of a class: cats.tar, dogs.tar.

    None if they are shards: numbered, or named by their split.
    """
    stems = [posixpath.splitext(posixpath.basename(name))[0] for name in names]
    words = [[word for word in re.split(r"[-_.\s]+", stem) if word.lower() not in SPLITS] for stem in stems]
    plain = [re.sub(r"\d+", "", "".join(kept)).lower() for kept in words]
    classes = len(names) > 1 and (
        all(WORDNET.fullmatch(stem) for stem in stems)
        or ("" not in plain and len(set(plain)) == len(plain) and not {"shard", "part"} & set(plain))
    )
    return ["-".join(kept) for kept in words] if classes else None


def pictures_of_sample(names: Sequence[str]) -> tuple[list[int], dict[int, str]]:
    """Of the images of one WebDataset sample: which are pictures of it, and why the others are none.

    As places in `names`. a.jpg rather than a.mask.png or a.png; what is told apart by dots alone, such as
    a.v1.jpg and a.v2.jpg, is all used.
    """
    parts = [posixpath.basename(name).lower().split(".")[1:] for name in names]
    about = {i for i, part in enumerate(parts) if set(part[:-1]) & ABOUT_A_PICTURE}
    if len(about) == len(names):  # nothing else is there: then they are the pictures
        about = set()
    reasons = dict.fromkeys(sorted(about), "it lies beside a picture, and its name says what it is of that")
    rest = [i for i in range(len(names)) if i not in about]
    plain = [i for i in rest if len(parts[i]) < 2]
    if plain:
        best = min(plain, key=lambda i: (_rank(parts[i]), names[i]))
        reasons |= {
            i: f"{posixpath.basename(names[best])} is the picture of its sample" for i in rest if i != best
        }
        rest = [best]
    return rest, reasons


def _rank(parts: Sequence[str]) -> int:
    ending = parts[-1] if parts else ""
    return BEST_FIRST.index(ending) if ending in BEST_FIRST else len(BEST_FIRST)
