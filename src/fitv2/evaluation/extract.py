"""Features of many pictures, piece by piece: resumable, and shared by any number of processes.

A piece is always the same pictures, so the features are the same bytes whoever computes them, and a piece
that is there needs no doing again.
"""

import hashlib
import time
import zipfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from fitv2.errors import UserError, reading
from fitv2.evaluation.features import Extractor
from fitv2.evaluation.pictures import Pictures
from fitv2.runtime.files import atomic_file

PIECE = 64
WAIT = 0.5  # seconds between looks for the pieces of other processes
NUMBERS, DIGESTS, SHOWN = "numbers", "digests", "shown"
PICTURES_SHOWN, PIECES_SHOWN = 8, 5  # the first of each of the first pieces are kept, to be looked at

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


def extract(
    pictures: Pictures,
    extractors: Sequence[Extractor],
    folder: Path,
    place: tuple[int, int] = (0, 1),
    progress: Progress = lambda done, total: None,
    pixels: bool = False,
) -> None:
    """Do this process's share of the pieces that are not yet in `folder`; `place` is which, of how many.

    With `pixels` all pictures are kept, for `write_npz`.
    """
    rank, world = place
    folder.mkdir(parents=True, exist_ok=True)
    mine = list(enumerate(pieces(len(pictures))))[rank::world]
    done, total = 0, sum(len(piece) for _, piece in mine)
    progress(0, total)
    for number, piece in mine:
        path = piece_path(folder, number)
        if not path.exists():
            found = features_of(pictures.read(piece), piece, extractors)
            if not pixels:
                found[SHOWN] = found[SHOWN][: PICTURES_SHOWN if number < PIECES_SHOWN else 0].clone()
            with atomic_file(path) as partial:
                save_file(found, partial)
        done += len(piece)
        progress(done, total)


def piece_path(folder: Path, number: int) -> Path:
    """Where a piece lies."""
    return folder / f"{number:05}.safetensors"


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
        SHOWN: torch.zeros(0),
    }
    if kept:
        found[SHOWN] = torch.from_numpy(np.stack(arrays))
        pixels = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)
        for extractor in extractors:
            found |= {name: value.contiguous() for name, value in extractor(pixels).items()}
    return found


def collect(folder: Path, count: int) -> Features | None:
    """The features of all `count` pictures; None while pieces are missing. Raises UserError for none left."""
    paths = [piece_path(folder, number) for number in range(len(pieces(count)))]
    if not all(path.exists() for path in paths):
        return None
    found = []
    for path in paths:
        with reading(path):
            found.append(load_file(path))
    full = [piece for piece in found if len(piece[NUMBERS])]
    if not full:
        raise UserError(f"none of the {count} pictures for {folder.name} can be used")
    shown: dict[int, Image.Image] = {}
    row = 0
    for number, piece in enumerate(full):
        few = piece.pop(SHOWN, torch.zeros(0))[: PICTURES_SHOWN if number < PIECES_SHOWN else 0]
        shown |= {row + i: Image.fromarray(one.numpy()) for i, one in enumerate(few)}
        row += len(piece[NUMBERS])
    joined = {name: torch.cat([piece[name] for piece in full]) for name in full[0]}
    digest = hashlib.sha256(joined.pop(DIGESTS).numpy().tobytes()).hexdigest()
    return Features(joined, joined.pop(NUMBERS).tolist(), digest, shown)


def wait_for(folder: Path, count: int, waiting: Callable[[], None] = lambda: None) -> Features:
    """`collect`, once the other processes have done their pieces."""
    while (found := collect(folder, count)) is None:
        waiting()
        time.sleep(WAIT)
    return found


def write_npz(folder: Path, count: int, out: Path) -> None:
    """Write all pictures as `arr_0` of an npz, uint8 (N, H, W, 3), piece by piece: 50,000 have 10 GB."""
    paths = [piece_path(folder, number) for number in range(len(pieces(count)))]
    with ExitStack() as stack:
        opened = [stack.enter_context(safe_open(path, "numpy")) for path in paths]
        shapes = [each for file in opened if (each := file.get_slice(SHOWN).get_shape())[0]]
        header = {
            "descr": "|u1",
            "fortran_order": False,
            "shape": (sum(n for n, *_ in shapes), *shapes[0][1:]),
        }
        scratch = stack.enter_context(atomic_file(out))
        archive = stack.enter_context(zipfile.ZipFile(scratch, "w"))
        with archive.open("arr_0.npy", "w", force_zip64=True) as member:
            np.lib.format.write_array_header_1_0(member, header)
            for file in opened:
                member.write(file.get_tensor(SHOWN).tobytes())
