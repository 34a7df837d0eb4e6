"""Add rows and columns of two or three to the emoji set, for the shapes that single drawings lack.

    python tools/emoji_rows.py data/emoji tokens/emoji-pictures
    fitv2 encode tokens/emoji-pictures tokens/emoji --autoencoder emoji --no-mirror --label-column artist

Every drawing is kept. It appears once more in a row or a column: of copies of itself ("two owls side by
side"), or, one in three, with others of its artist and group ("owl and fox side by side"). And once more
alone ("owl"), in the middle of a white sheet twice as wide as high, or twice as high as wide. Which it gets
follows from the hash of its `source`, so the same set gives the same files.

    python tools/emoji_rows.py data/emoji tokens/few-pictures animals-nature food-drink "flag: Japan"

leaves out what is in none of the groups and subgroups named, and concepts of fewer than four artists;
concepts named themselves stay.
"""

import hashlib
import io
import re
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from tqdm import tqdm

SPLITS = ("train", "validation")
FEWEST_ARTISTS = 4
MIXED = 1 / 3  # share of arrangements of different drawings
COLUMNS = ("image", "caption", "concept", "artist", "source")
IRREGULAR = {
    "man": "men", "woman": "women", "person": "people", "child": "children", "mouse": "mice",
    "goose": "geese", "foot": "feet", "tooth": "teeth", "leaf": "leaves", "wolf": "wolves", "knife": "knives",
    "loaf": "loaves", "fish": "fish", "sheep": "sheep", "deer": "deer", "ox": "oxen",
}  # fmt: skip
BEHIND = re.compile(r" (with|without|in|on|of|at|behind|holding|wearing|feeding|over|and|for|from|facing) ")


class Arrangement(NamedTuple):
    """How many drawings, in which direction, and how a caption says so."""

    copies: int
    upright: bool
    words: str


ARRANGEMENTS = (
    Arrangement(2, upright=False, words="side by side"),
    Arrangement(2, upright=True, words="on top of each other"),
    Arrangement(3, upright=False, words="in a row"),
    Arrangement(3, upright=True, words="in a column"),
)


def plural(name: str) -> str | None:
    """A name for several of a thing, where English makes one simply: "cats with tears of joy"."""
    found = BEHIND.search(name)
    head, rest = (name[: found.start()], name[found.start() :]) if found else (name, "")
    words = head.split(" ")
    last = words[-1]
    if not re.fullmatch(r"[a-z]+", last) or ":" in name:
        return None
    if last in IRREGULAR:
        ending = IRREGULAR[last]
    elif re.search(r"(s|x|z|ch|sh)$", last):
        ending = f"{last}es"
    elif re.search(r"[^aeiou]y$", last):
        ending = f"{last[:-1]}ies"
    else:
        ending = f"{last}s"
    return " ".join([*words[:-1], ending]) + rest


def caption(names: Sequence[str], arrangement: Arrangement) -> str:
    """What an arrangement shows, in words."""
    if len(set(names)) > 1:
        return f"{', '.join(names[:-1])} and {names[-1]} {arrangement.words}"
    number, several = {2: "two", 3: "three"}[len(names)], plural(names[0])
    return (
        f"{number} {several} {arrangement.words}" if several else f"{names[0]}, {number} {arrangement.words}"
    )


def arranged(images: Sequence[Image.Image], upright: bool) -> Image.Image:
    """Drawings in a row or a column, each in the middle of a cell as large as the largest."""
    width, height = (max(sides) for sides in zip(*(image.size for image in images), strict=True))
    count = len(images)
    sheet = Image.new("RGB", (width, height * count) if upright else (width * count, height), "white")
    for number, image in enumerate(images):
        left, top = (width - image.width) // 2, (height - image.height) // 2
        sheet.paste(image, (left, top + number * height) if upright else (left + number * width, top))
    return sheet


def alone(image: Image.Image, upright: bool) -> Image.Image:
    """A drawing in the middle of white of 2:1 or 1:2."""
    side = max(image.height / 2, image.width) if upright else max(image.height, image.width / 2)
    width, height = (round(side), round(2 * side)) if upright else (round(2 * side), round(side))
    sheet = Image.new("RGB", (width, height), "white")
    sheet.paste(image, ((width - image.width) // 2, (height - image.height) // 2))
    return sheet


def with_rows(drawings: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Each drawing, then its arrangement, then it alone on white."""
    alike = defaultdict(list)
    for drawing in drawings:
        alike[drawing["artist"], drawing["group"]].append(drawing)
    for drawing in tqdm(drawings, "rows"):
        concept, source, artist = drawing["caption"], drawing["source"], drawing["artist"]
        said = {"concept": concept, "artist": artist}
        yield {"image": drawing["image"]["bytes"], "caption": concept, "source": source, **said}
        numbers = hashlib.sha256(source.encode()).digest()
        arrangement = ARRANGEMENTS[numbers[0] % len(ARRANGEMENTS)]
        shown = [drawing] * arrangement.copies
        if numbers[1] < 256 * MIXED:
            others = alike[artist, drawing["group"]]
            chosen = [others[int.from_bytes(numbers[2 * i : 2 * i + 2], "big") % len(others)] for i in (1, 2)]
            shown = [drawing, *chosen][: arrangement.copies]
        images = [Image.open(io.BytesIO(each["image"]["bytes"])) for each in shown]
        words = caption([each["caption"] for each in shown], arrangement)
        sheet = arranged(images, arrangement.upright)
        yield {"image": png(sheet), "caption": words, "source": f"{source}+{words}", **said}
        upright = numbers[-1] % 2 == 1
        source += " on high white" if upright else " on wide white"
        yield {"image": png(alone(images[0], upright)), "caption": concept, "source": source, **said}


def png(image: Image.Image) -> bytes:
    """An image as the bytes of a PNG file."""
    held = io.BytesIO()
    image.save(held, "PNG")
    return held.getvalue()


def concepts_of(drawings: Sequence[Mapping[str, Any]], names: Sequence[str]) -> set[str]:
    """The concepts that `names` keep."""
    artists = defaultdict(set)
    for drawing in drawings:
        artists[drawing["caption"]].add(drawing["artist"])
    named = {d["caption"] for d in drawings if {d["group"], d["subgroup"]} & set(names)}
    return {name for name in named if len(artists[name]) >= FEWEST_ARTISTS} | set(names)


def main(emoji: Path, out: Path, names: Sequence[str]) -> None:
    """Write train.parquet and validation.parquet."""
    out.mkdir(parents=True, exist_ok=True)
    splits = {split: pq.read_table(emoji / f"{split}.parquet").to_pylist() for split in SPLITS}
    kept = concepts_of([drawing for drawings in splits.values() for drawing in drawings], names)
    for split, drawings in splits.items():
        rows = list(with_rows([each for each in drawings if not names or each["caption"] in kept]))
        table = pa.table({column: [row[column] for row in rows] for column in COLUMNS})
        pq.write_table(table, out / f"{split}.parquet", row_group_size=512)


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
