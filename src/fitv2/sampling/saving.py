"""Images into files named by what they show."""

import hashlib
import re
import unicodedata
from collections import Counter
from functools import lru_cache
from pathlib import Path
from typing import Any

from fitv2.runtime.files import atomic_file

LONGEST = 150  # bytes of a name before size and seed; file systems take 255 in all


def file_name(name: str, pixels: tuple[int, int], seed: int) -> str:
    """NAME_HEIGHTxWIDTH_SEED.png; the name is one of `distinct_names`."""
    return f"{name}_{pixels[0]}x{pixels[1]}_{seed}.png"


@lru_cache(4)
def distinct_names(labels: tuple[str, ...]) -> list[str]:
    """A name for each label that a file can have, no two alike, also where case makes no difference.

    Characters that file names cannot hold become dashes. What is too long for a name, or would be named as
    another label is, gets a hash of the label behind it; a label that is there twice its number.
    """
    plain = [re.sub(r"[^\w.-]+", "-", unicodedata.normalize("NFC", label)) or "-" for label in labels]
    alike = Counter(map(str.casefold, plain))
    often = Counter(labels)
    names = []
    for number, (label, name) in enumerate(zip(labels, plain, strict=True)):
        if alike[name.casefold()] > 1 or len(name.encode()) > LONGEST or HASHED.search(name):
            digest = hashlib.sha256(label.encode(errors="surrogatepass")).hexdigest()
            name = f"{cut(name, LONGEST)}-{digest[:12]}"
        names.append(f"{name}-{number}" if often[label] > 1 else name)
    return names


HASHED = re.compile(r"-[0-9a-f]{12}(-\d+)?$")  # what looks so is given one too, so that it meets no other


def cut(text: str, most: int) -> str:
    """The start of a text, of at most so many bytes in UTF-8."""
    return text.encode(errors="replace")[:most].decode(errors="ignore")


def save_image(image: Any, path: Path) -> None:
    """Write an image, whole or not at all."""
    with atomic_file(path) as partial:
        image.save(partial)
