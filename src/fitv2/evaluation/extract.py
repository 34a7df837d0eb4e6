"""Features of many pictures, piece by piece: resumable, and shared by any number of processes.

A piece is always the same pictures, so the features are the same bytes whoever computes them, and a piece
that is there needs no doing again.
"""

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from fitv2.errors import UserError, reading
from fitv2.evaluation.features import Extractor
from fitv2.evaluation.pictures import Pictures
from fitv2.runtime.files import atomic_file
from fitv2.runtime.npz import write_npz

PIECE = 64
WAIT = 0.5  # seconds between looks for the pieces of other processes
NUMBERS, DIGESTS, PIXELS = "numbers", "digests", "pixels"
FIRST_PIECES, FROM_EACH = 5, 8  # of the first pieces so many pictures are kept to be looked at, of others one
SHOWN = FIRST_PIECES * FROM_EACH

Progress = Callable[[int, int], None]  # how many pictures are done, of how many


@dataclass(frozen=True)
class Features:
    """Of the pictures that were not left out, in order."""

    values: dict[str, Tensor]  # (N, D)
    numbers: list[int]  # of the pictures
    digest: str  # SHA-256 of all their pixels
    shown: dict[int, Image.Image]  # some of them, by their rows here


def pieces(count: int) -> list[range]:
    """The numbers of `count` pictures in pieces."""
    return [range(first, min(first + PIECE, count)) for first in range(0, count, PIECE)]


def piece_paths(folder: Path, count: int) -> list[Path]:
    """Where the pieces of `count` pictures lie."""
    return [folder / f"{number:05}.safetensors" for number in range(len(pieces(count)))]


def extract(
    pictures: Pictures,
    extractors: Sequence[Extractor],
    folder: Path,
    place: tuple[int, int] = (0, 1),
    progress: Progress = lambda done, total: None,
    pixels: bool = False,
) -> None:
    """Do this process's share of the pieces that are not yet in `folder`; `place` is which, of how many.

    With `pixels` all pictures are kept, for `write_pictures`.
    """
    rank, world = place
    folder.mkdir(parents=True, exist_ok=True)
    numbered = enumerate(zip(pieces(len(pictures)), piece_paths(folder, len(pictures)), strict=True))
    mine = list(numbered)[rank::world]
    done, total = 0, sum(len(piece) for _, (piece, _) in mine)
    progress(0, total)
    for number, (piece, path) in mine:
        if not path.exists():
            found = features_of(pictures.read(piece), piece, extractors)
            if not pixels:
                found[PIXELS] = found[PIXELS][: FROM_EACH if number < FIRST_PIECES else 1].clone()
            with atomic_file(path) as scratch:
                save_file(found, scratch)
        done += len(piece)
        progress(done, total)


def features_of(
    images: Sequence[Image.Image | None], numbers: range, extractors: Sequence[Extractor]
) -> dict[str, Tensor]:
    """What is stored of a piece."""
    kept = [i for i, image in enumerate(images) if image is not None]
    arrays = [np.asarray(images[i]) for i in kept]
    digests = [np.frombuffer(hashlib.sha256(array.tobytes()).digest(), np.uint8) for array in arrays]
    found = {
        NUMBERS: torch.tensor([numbers[i] for i in kept], dtype=torch.int64),
        DIGESTS: torch.from_numpy(np.array(digests, np.uint8).reshape(-1, 32)),
        PIXELS: torch.zeros(0, dtype=torch.uint8),
    }
    if kept:
        found[PIXELS] = torch.from_numpy(np.stack(arrays))
        for extractor in extractors:
            of_images = extractor(found[PIXELS].permute(0, 3, 1, 2))
            found |= {name: value.contiguous() for name, value in of_images.items()}
    return found


def is_whole(folder: Path, count: int) -> bool:
    """Whether all pieces are there."""
    return all(path.exists() for path in piece_paths(folder, count))


def collect(folder: Path, count: int) -> Features:
    """The features of all `count` pictures. Raises UserError for a missing piece, or when none has any."""
    found: list[dict[str, Tensor]] = []
    shown: dict[int, Image.Image] = {}
    row = 0
    for path in piece_paths(folder, count):
        with reading(path), safe_open(path, "pt") as file:
            piece = {name: file.get_tensor(name) for name in file.keys() if name != PIXELS}  # noqa: SIM118
            if not len(piece[NUMBERS]):
                continue
            few = file.get_slice(PIXELS)[: min(FROM_EACH, SHOWN - len(shown))]
        shown |= {row + i: Image.fromarray(one.numpy()) for i, one in enumerate(few)}
        row += len(piece[NUMBERS])
        found.append(piece)
    if not found:
        raise UserError(f"none of the {count} pictures for {folder.name} can be used")
    joined = {name: torch.cat([piece[name] for piece in found]) for name in found[0]}
    digest = hashlib.sha256(joined.pop(DIGESTS).numpy().tobytes()).hexdigest()
    return Features(joined, joined.pop(NUMBERS).tolist(), digest, shown)


def wait_for(folder: Path, count: int) -> Features:
    """`collect`, once the other processes have done their pieces."""
    while not is_whole(folder, count):
        time.sleep(WAIT)
    return collect(folder, count)


def write_pictures(folder: Path, count: int, out: Path, also: dict[str, np.ndarray]) -> None:
    """Write all pictures as `arr_0` of an npz, uint8 (N, H, W, 3); `also` are further arrays."""
    paths, shapes = piece_paths(folder, count), []
    for path in paths:
        with safe_open(path, "numpy") as file:
            shapes.append(file.get_slice(PIXELS).get_shape())
    full = [shape for shape in shapes if shape[0]]
    write_npz(out, (sum(n for n, *_ in full), *full[0][1:]), map(pixels_of, paths), also)


def pixels_of(path: Path) -> bytes:
    """The pixels of a piece."""
    with safe_open(path, "numpy") as file:
        return file.get_tensor(PIXELS).tobytes()
