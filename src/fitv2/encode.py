"""Pictures into a token dataset: read, resize under the token budget, autoencode, patchify, write."""

import io
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fitv2.autoencoder import Autoencoder, load_autoencoder
from fitv2.data import DatasetCard, ShardWriter, write_card, write_skipped
from fitv2.errors import UserError
from fitv2.files import whole_folder
from fitv2.images import UnusableImage, flexible_resize, load_rgb
from fitv2.runtime import default_device
from fitv2.tokens import patchify

SUFFIXES = frozenset([".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".avif"])
PIXELS_A_TOKEN = 16  # side; the paper's: downsampling 8, patch 2


@dataclass(frozen=True)
class Picture:
    """One picture of a source, not yet read."""

    split: str
    label: str
    source: str
    load: Callable[[], Image.Image]


@dataclass(frozen=True)
class Report:
    """What became of the pictures."""

    encoded: dict[str, int]  # of each split
    skipped: int


def encode(
    source: Path,
    out: Path,
    *,
    autoencoder: str = "pixels",
    patch_size: int | None = None,
    max_tokens: tuple[int, ...] = (256,),
    mirror: bool = True,
    progress: Callable[[Iterable[Picture], int], Iterable[Picture]] = lambda pictures, _: pictures,
) -> Report:
    """Encode a folder of pictures, or of Parquet files, into the new folder `out`.

    `patch_size` is in latent pixels; by default a token covers 16×16 pixels. A picture is stored once
    for each of the limits `max_tokens`, and with `mirror` flipped as well: its variants. Pictures
    that cannot be used are listed in out/skipped.jsonl. Raises UserError when nothing can be
    encoded; then `out` is not made.
    """
    pictures = find_pictures(source)
    codec = load_autoencoder(autoencoder, default_device())
    patch = patch_size or max(1, PIXELS_A_TOKEN // codec.downsample)
    labels = {name: i for i, name in enumerate(sorted({picture.label for picture in pictures}))}
    counts = dict.fromkeys(sorted({picture.split for picture in pictures}), 0)
    skipped = []
    with whole_folder(out) as folder:
        writers = {split: ShardWriter(folder, split) for split in counts}
        for picture in progress(pictures, len(pictures)):
            try:
                image = picture.load()
                fitted = [flexible_resize(image, limit, patch * codec.downsample) for limit in max_tokens]
            except UnusableImage as error:
                skipped.append({"source": picture.source, "reason": str(error)})
                continue
            variants = (tokens for size in fitted for tokens in tokens_of(size, codec, patch, mirror))
            for i, tokens in enumerate(variants):
                writers[picture.split].add(tokens, labels[picture.label], picture.source, i)
            counts[picture.split] += 1
        if not sum(counts.values()):
            raise UserError(f"none of the {len(pictures)} pictures in {source} can be used: {skipped[0]}")
        for writer in writers.values():
            writer.flush()
        write_skipped(folder, skipped)
        card = DatasetCard(
            labels=tuple(labels),
            autoencoder=codec.name,
            patch_size=patch,
            in_channels=codec.channels,
            max_tokens=max(max_tokens),
            pictures=counts,
            shards={name: shard for writer in writers.values() for name, shard in writer.shards.items()},
        )
        write_card(folder, card)
    return Report(counts, len(skipped))


@torch.inference_mode()
def tokens_of(image: Image.Image, codec: Autoencoder, patch: int, mirror: bool) -> Iterator[Tensor]:
    """A picture, and with `mirror` its mirror image, as tokens (rows, columns, C)."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 127.5 - 1
    for variant in [pixels, pixels.flip(3)] if mirror else [pixels]:
        yield patchify(codec.encode(variant), patch)[0]


def find_pictures(source: Path) -> list[Picture]:
    """The pictures of a folder: Parquet files named by split, or images in folders named by label.

    Raises UserError when there are none.
    """
    if not source.is_dir():
        raise UserError(f"{source} is not a folder")
    tables = sorted(source.glob("*.parquet"))
    pictures = list(_in_tables(tables)) if tables else list(_in_folders(source))
    if not pictures:
        raise UserError(f"{source} has no pictures: expected folders of images, named by label")
    return pictures


def _in_folders(source: Path) -> Iterator[Picture]:
    for path in sorted(source.rglob("*")):
        if path.suffix.lower() in SUFFIXES and path.is_file():
            # A name that is not UTF-8 would fail only when it is written, at the very end.
            relative = os.fsencode(path.relative_to(source)).decode("utf-8", "replace")
            label = Path(relative).parts[0] if os.sep in relative else "image"
            yield Picture("train", label, relative, partial(load_rgb, path))


def _in_tables(tables: list[Path]) -> Iterator[Picture]:
    import pyarrow.parquet as pq

    for table in tables:
        try:
            rows: list[dict[str, Any]] = pq.read_table(table).to_pylist()
        except (OSError, ValueError) as error:
            raise UserError(f"{table} is not a Parquet file that can be read: {error}") from error
        if rows and not {"image", "label"} <= set(rows[0]):
            raise UserError(f"{table} has no columns image and label, but {', '.join(rows[0])}")
        split = table.stem.split("-")[0]
        for i, row in enumerate(rows):
            content = row["image"]["bytes"]
            source = row.get("source", f"{table.name}:{i}")
            yield Picture(split, str(row["label"]), source, partial(_load_bytes, content))


def _load_bytes(content: bytes) -> Image.Image:
    return load_rgb(io.BytesIO(content))
