"""Rebuild the emoji set from npm packages.

    npm pack @iconify-json/twemoji@1.2.5 @iconify-json/noto@1.2.9 @iconify-json/noto-v1@1.2.5 \\
        @iconify-json/fluent-emoji-flat@1.2.6 @iconify-json/fluent-emoji@1.2.7 @iconify-json/fxemoji@1.2.2 \\
        @iconify-json/flag@1.2.12 emojibase-data@17.0.0 --pack-destination packages
    pip install resvg_py==0.5.0
    python tools/build_emoji.py packages data/emoji

Writes data/emoji/{train,validation}.parquet, the same bytes each time: WebP images at an area of at
most 160² pixels, with caption, artist, group, subgroup, width, height and source.
"""

import hashlib
import io
import json
import re
import sys
import tarfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from multiprocessing import Pool
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from PIL import Image
from tqdm import tqdm

SIDE = 160  # of the square whose area no picture exceeds
DRAWN = 448  # the longer side that drawings are rendered at
MARGIN = 0.04  # of white around what is drawn, beside the square root of its area
QUALITY = 90  # of WebP
HELD_OUT = 0.05  # share of the drawings

ARTISTS = {  # artist → package file
    "twemoji": "iconify-json-twemoji-1.2.5",
    "noto": "iconify-json-noto-1.2.9",
    "noto-v1": "iconify-json-noto-v1-1.2.5",
    "fluent-flat": "iconify-json-fluent-emoji-flat-1.2.6",
    "fluent": "iconify-json-fluent-emoji-1.2.7",
    "fxemoji": "iconify-json-fxemoji-1.2.2",
}
FLAGS = "iconify-json-flag-1.2.12"
NAMES = "emojibase-data-17.0.0"
SHORTCODES = ("github", "iamcal", "emojibase", "joypixels", "cldr")
SKIN_TONES = {f"1F3F{last}" for last in "BCDEF"}


@dataclass(frozen=True)
class Concept:
    """What Unicode says of an emoji."""

    caption: str
    group: str
    subgroup: str


@dataclass(frozen=True)
class Drawing:
    """One artist's drawing of a concept."""

    artist: str
    name: str
    concept: Concept
    svg: str

    @property
    def source(self) -> str:
        """Artist and name, unique in the set."""
        return f"{self.artist}/{self.name}"


def read(packages: Path, package: str, name: str) -> Any:
    """A json file of an npm package; None if the package has no such file."""
    with tarfile.open(packages / f"{package}.tgz") as archive:
        try:
            file = archive.extractfile(f"package/{name}")
        except KeyError:
            return None
        return json.load(file) if file else None


def plain(code: str) -> str:
    """A sequence of code points without variation selectors."""
    return "-".join(part for part in code.upper().split("-") if part != "FE0F")


def concepts_of(packages: Path) -> dict[str, Concept]:
    """All concepts by their code points."""
    titles = read(packages, NAMES, "meta/groups.json")
    return {
        plain(entry["hexcode"]): Concept(
            entry["label"], titles["groups"][str(entry["group"])], titles["subgroups"][str(entry["subgroup"])]
        )
        for entry in read(packages, NAMES, "en/data.json")
        if "subgroup" in entry
    }


def letters(name: str) -> str:
    """A name without anything but letters and digits."""
    return re.sub(r"[^a-z0-9]", "", name.lower().replace("’", ""))


def codes_by_name(packages: Path, concepts: dict[str, Concept]) -> dict[str, str]:
    """Code points by the names that packages give them, reduced to letters and digits."""
    named = {letters(concept.caption): code for code, concept in concepts.items()}
    for package in ARTISTS.values():
        for code, name in read(packages, package, "chars.json").items():
            if plain(code) in concepts:
                named.setdefault(letters(name), plain(code))
        for alias, icon in read(packages, package, "icons.json").get("aliases", {}).items():
            if letters(icon["parent"]) in named:
                named.setdefault(letters(alias), named[letters(icon["parent"])])
            elif letters(alias) in named and "hFlip" not in icon:
                named.setdefault(letters(icon["parent"]), named[letters(alias)])
    for collection in SHORTCODES:
        for code, names in (read(packages, NAMES, f"en/shortcodes/{collection}.json") or {}).items():
            if plain(code) in concepts:
                for name in [names] if isinstance(names, str) else names:
                    named.setdefault(letters(name), plain(code))
    return named


def svg_of(icons: dict[str, Any], icon: dict[str, Any]) -> str:
    """An icon of an Iconify package as a file of its own."""
    left, top = icon.get("left", 0), icon.get("top", 0)
    width, height = (icon.get(side, icons.get(side, 16)) for side in ("width", "height"))
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
        f' viewBox="{left} {top} {width} {height}" width="{width}" height="{height}">{icon["body"]}</svg>'
    )


def drawings_of(packages: Path) -> Iterator[Drawing]:
    """Every drawing whose concept is known, each concept once an artist, without skin tones."""
    concepts = concepts_of(packages)
    named = codes_by_name(packages, concepts)
    for artist, package in ARTISTS.items():
        icons = read(packages, package, "icons.json")
        by_icon = {name: plain(code) for code, name in read(packages, package, "chars.json").items()}
        seen: set[str] = set()
        for name, icon in icons["icons"].items():
            code = by_icon.get(name)
            if code not in concepts and "skin" not in name:
                code = named.get(letters(name))
            if code not in concepts or code in seen or SKIN_TONES & set(code.split("-")):
                continue
            seen.add(code)
            yield Drawing(artist, name, concepts[code], svg_of(icons, icon))
    icons = read(packages, FLAGS, "icons.json")
    for name, icon in icons["icons"].items():
        if match := re.fullmatch(r"([a-z])([a-z])-4x3", name):
            code = "-".join(f"{0x1F1E6 + ord(letter) - ord('a'):X}" for letter in match.groups())
            if code in concepts:
                yield Drawing("flag", name, concepts[code], svg_of(icons, icon))


def render(drawing: Drawing) -> Image.Image | None:
    """A drawing on white, trimmed to its natural proportions; None where nothing shows."""
    import resvg_py

    width, height = map(float, re.findall(r' (?:width|height)="([\d.]+)"', drawing.svg)[:2])
    wide = width >= height
    content = resvg_py.svg_to_bytes(
        svg_string=drawing.svg, skip_system_fonts=True,
        width=DRAWN if wide else None, height=None if wide else DRAWN,
    )  # fmt: skip
    image = Image.open(io.BytesIO(bytes(content))).convert("RGBA")
    shown = np.asarray(image)[..., 3] > 24
    if shown.sum() < 100:
        return None
    rows, columns = np.flatnonzero(shown.any(1)), np.flatnonzero(shown.any(0))
    trimmed = image.crop((columns[0], rows[0], columns[-1] + 1, rows[-1] + 1))
    margin = 0 if drawing.artist == "flag" else round(MARGIN * (trimmed.width * trimmed.height) ** 0.5)
    canvas = Image.new("RGBA", (trimmed.width + 2 * margin, trimmed.height + 2 * margin), "white")
    canvas.alpha_composite(trimmed, (margin, margin))
    scale = min(1.0, SIDE / (canvas.width * canvas.height) ** 0.5)
    size = max(16, round(canvas.width * scale)), max(16, round(canvas.height * scale))
    return canvas.convert("RGB").resize(size, Image.Resampling.LANCZOS)


def row(drawing: Drawing) -> dict[str, Any] | str:
    """One drawing as a row of the table, or why it is left out."""
    try:
        image = render(drawing)
    except ValueError as error:
        return f"{drawing.source}: {error}"
    if image is None:
        return f"{drawing.source}: blank"
    file = io.BytesIO()
    image.save(file, "WEBP", quality=QUALITY, method=6)
    return {
        "image": {"bytes": file.getvalue(), "path": None},
        "caption": drawing.concept.caption,
        "artist": drawing.artist,
        "group": drawing.concept.group,
        "subgroup": drawing.concept.subgroup,
        "width": image.width,
        "height": image.height,
        "source": drawing.source,
        "digest": hashlib.sha256(image.tobytes()).hexdigest(),
    }


def held_out(rows: list[dict[str, Any]]) -> set[str]:
    """Sources of the validation split: one in twenty by hash, never the last drawing of a concept."""
    by_caption = defaultdict(list)
    for entry in rows:
        by_caption[entry["caption"]].append(entry["source"])

    def share(source: str) -> float:
        return int.from_bytes(hashlib.sha256(source.encode()).digest()[:4], "big") / 2**32

    chosen: set[str] = set()
    for sources in by_caption.values():
        lowest_first = sorted(sources, key=share)
        chosen |= {source for source in lowest_first[:-1] if share(source) < HELD_OUT}
    return chosen


FEATURES = datasets.Features(
    image=datasets.Image(),
    **{name: datasets.Value("string") for name in ("caption", "artist", "group", "subgroup")},
    width=datasets.Value("int32"),
    height=datasets.Value("int32"),
    source=datasets.Value("string"),
)


def main(packages: Path, out: Path) -> None:
    """Build both splits."""
    drawings = list(drawings_of(packages))
    rows: list[dict[str, Any]] = []
    seen: set[tuple[str, str]] = set()
    with Pool() as pool:
        for new in tqdm(pool.imap(partial(row), drawings, 16), total=len(drawings), unit="image"):
            # Two artists may share a drawing; under two captions it is no duplicate (flags of islands).
            if isinstance(new, str) or (new["digest"], new["caption"]) in seen:
                print(f"left out {new if isinstance(new, str) else new['source']}", file=sys.stderr)
                continue
            seen.add((new.pop("digest"), new["caption"]))
            rows.append(new)
    validation = held_out(rows)
    out.mkdir(parents=True, exist_ok=True)
    for split in ("train", "validation"):
        content = [entry for entry in rows if (entry["source"] in validation) == (split == "validation")]
        datasets.Dataset.from_list(content, features=FEATURES).to_parquet(out / f"{split}.parquet")
        print(f"{split}: {len(content)} drawings of {len({entry['caption'] for entry in content})} concepts")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
