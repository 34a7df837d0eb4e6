"""What the folders and archives of a collection mean: which split, which label, or neither.

docs/guides/data.md has these rules as a table, and tests/encoding/test_collections.py every row of it.
"""

import posixpath
import re
from collections.abc import Iterable, Sequence
from itertools import takewhile
from typing import NamedTuple

from fitv2.encoding.sources import DIGITS, NO_LABEL, SPLITS, WORDS, split_of_folder
from fitv2.errors import UserError

WORDNET = re.compile(r"n\d{8}")  # ImageNet's names of classes, which look like numbered shards
# What the last but one part of a name such as a.mask.png says: no picture, but something about one.
ABOUT_A_PICTURE = frozenset([
    "alpha", "annotation", "annotations", "canny", "cond", "condition", "control", "depth", "edge", "edges",
    "flow", "gt", "instance", "instances", "label", "labels", "mask", "masks", "matte", "normal", "normals",
    "panoptic", "pose", "seg", "segmentation", "semantic", "target", "thumb", "thumbnail",
])  # fmt: skip
# The same of a name such as a_mask.png, where more words could be a picture's own.
ABOUT_ANOTHER = re.compile(
    r"(.+)(?:\.(?:" + "|".join(sorted(ABOUT_A_PICTURE)) + r")|"
    r"[_-](?:annotation|depth|gt|masks?|matte|seg|segm|segmentation|thumb|thumbnail|trimap))",
    re.IGNORECASE | re.DOTALL,
)
# Folders that hold what is said about pictures, and such as hold all pictures: beside each other no labels.
FOLDERS_ABOUT = ABOUT_A_PICTURE | {
    "depths", "groundtruth", "ground_truth", "segmentationclass", "segmentationobject", "segmentations",
    "thumbnails", "thumbs", "trimaps",
}  # fmt: skip
HOLDERS = frozenset([
    "data", "image", "images", "img", "imgs", "input", "inputs", "jpegimages", "jpg", "photos", "pictures",
    "png", "rgb",
])  # fmt: skip
SHARDS = frozenset(["", "archive", "batch", "chunk", "data", "dataset", "images", "part", "shard", "shards"])
BEST_FIRST = ("jpg", "jpeg", "webp", "avif", "png")  # of a sample's pictures: a mask is seldom a JPEG

Above = tuple[str, ...]  # the folders that an image lies in, from the top


class Place(NamedTuple):
    """Where an image belongs. Split: None if its folders tell none. Label: empty if it has none."""

    split: str | None
    label: str
    unused: str = ""  # why it is no picture of the collection


class Folders:
    """What the folders of a collection mean, given those of all its images.

    A folder that holds all others means nothing. If every top folder is named as a split is, they are
    splits, and the folders in them labels; else the top folders are labels; a folder `images` alone, or
    beside `masks` and its like, is none. An image beside the folders that are labels has none; where nothing
    has, all have the one label `image`.

    Raises UserError when folders named as splits lie beside others and it cannot be told which are meant.
    """

    def __init__(self, url: str, folders: Iterable[Sequence[str]]) -> None:
        every = {tuple(above) for above in folders}
        self.around = around(every)
        every = {above[self.around :] for above in every}
        self.splits = splits_of(url, every)
        tops = {above[0] for above in every if above}
        self.in_splits = bool(self.splits) and tops == set(self.splits)
        below = {above[above[:1] != () and above[0] in self.splits :] for above in every}
        labels = {above[0] for above in below if above}
        pictures = {label for label in labels if label.lower() not in FOLDERS_ABOUT}
        self.held = len(pictures) == 1 and pictures <= {label for label in labels if label.lower() in HOLDERS}
        if self.held:
            below = {above[1:] for above in below if above[:1] != () and above[0] in pictures}
        self.labelled = any(below)

    def place(self, above: Sequence[str]) -> Place:
        """The place of an image, given the folders that it lies in from the top."""
        below = tuple(above)[self.around :]
        split = self.splits.get(below[0]) if below else None
        stray = bool(self.splits) and self.in_splits and not below
        below = below[1:] if split else below
        if self.held and below:
            if below[0].lower() in FOLDERS_ABOUT:
                return Place(split, "", f"it lies in {below[0]}, beside the folder of the pictures")
            below = below[1:]
        if below:
            return Place(split, below[0])
        return Place(split, "" if self.labelled or stray else NO_LABEL)


def around(every: set[Above]) -> int:
    """How many folders there are that hold all others and mean nothing, such as an archive's own.

    One that holds images itself, or a single folder, is a label.
    """
    pairs = zip(min(every, default=()), max(every, default=()), strict=False)
    common = [one for one, _ in takewhile(lambda pair: pair[0] == pair[1], pairs)]
    for depth, name in enumerate(common):
        if split_of_folder(name):
            return depth
    branches = {above[len(common) : len(common) + 1] for above in every}
    return 0 if () in branches else len(common)


def splits_of(url: str, every: set[Above]) -> dict[str, str]:
    """The top folders that are splits, and which; none if one named so is a label like others beside it.

    Raises UserError when it can be either.
    """
    tops = {above[0] for above in every if above}
    named = {top: split for top in tops if (split := split_of_folder(top))}
    if len(named) == len(tops):
        return named
    named = {top: SPLITS[top.lower()] for top in tops if top.lower() in SPLITS}
    others = sorted(tops - set(named))
    flat = not any(len(above) > 1 and above[0] in named for above in every)
    if flat and len(set(named.values())) == 1 and "train" not in named.values():
        return named  # images to be tested on lie beside the classes, without labels
    if not named or (flat and len(named) == 1 and len(others) > 1):
        return {}
    first, said = posixpath.join(url, min(named)), ", ".join(others[:3])
    raise UserError(
        f"{url} holds {' and '.join(sorted(named))}, named as splits are, beside {said}: are those"
        f" labels or splits? Give one folder, such as {first}, or move {said} out"
    )


def about_others(names: Iterable[str]) -> dict[str, str]:
    """Images that are about another by their names, a_mask.png beside a.jpg; and how to say so."""
    stems = {posixpath.splitext(name)[0]: name for name in names}
    told = ((name, ABOUT_ANOTHER.fullmatch(stem)) for stem, name in stems.items())
    return {
        name: f"it lies beside {posixpath.basename(stems[match[1]])}, and its name says what it is of that"
        for name, match in told
        if match and match[1] in stems
    }


def labels_of_archives(names: Sequence[str]) -> list[str] | None:
    """The labels that archives are named by, if each is of a class: cats.tar, dogs-0.tar, dogs-1.tar.

    None if they are shards: numbered, or named by their split.
    """
    stems = [posixpath.splitext(posixpath.basename(name))[0] for name in names]
    if len(set(stems)) > 1 and all(WORDNET.fullmatch(stem) for stem in stems):
        return stems
    kept = [[word for word in WORDS.split(stem) if word.lower() not in SPLITS] for stem in stems]
    labels = ["-".join(word for word in words if not word.isdecimal()) for words in kept]
    plain = [re.sub(r"\d+", "", label).lower() for label in labels]
    if len(set(plain)) < 2 or SHARDS & set(plain):
        return None
    return labels if len(set(labels)) == len(set(plain)) else [label.rstrip(DIGITS) for label in labels]


def labels_of_folders(url: str, names: Sequence[str]) -> list[str] | None:
    """The labels of archives that lie in class folders; None if they do not."""
    above = [name.split("/")[:-1] for name in names]
    folders = Folders(url, above)
    labels = [folders.place(each).label for each in above]
    return labels if folders.labelled and len(set(labels) - {""}) > 1 else None


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
