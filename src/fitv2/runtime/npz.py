"""Arrays larger than memory in a numpy archive."""

import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from fitv2.runtime.files import atomic_file


def write_npz(
    path: Path, shape: tuple[int, ...], pieces: Iterable[bytes], also: Mapping[str, np.ndarray] | None = None
) -> None:
    """Write `arr_0`, uint8 of a shape, piece by piece: 50,000 images have 10 GB. Whole or not at all.

    `also` are further arrays. It is what ADM's evaluator reads.
    """
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    with atomic_file(path) as scratch, zipfile.ZipFile(scratch, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as member:
            np.lib.format.write_array_header_1_0(member, header)
            for piece in pieces:
                member.write(piece)
        for name, array in (also or {}).items():
            with archive.open(f"{name}.npy", "w") as member:
                np.lib.format.write_array(member, array, allow_pickle=False)
