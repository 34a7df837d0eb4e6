"""Encoding: how busy the autoencoder is while pictures are read, resized and written beside it.

    python benchmarks/encoding.py [--pictures N] [--milliseconds COST] [--workers N]

The autoencoder is one whose cost is set: it waits so long for each picture it is given, using no
processor, as a GPU would, and returns latents of SD-VAE's shape. Pictures are JPEG photographs' sizes
(500x375 and its like), preprocessed as in FiTv2: both views, both flips, so four latents a picture.
Prints one JSON object: the share of the time from the first batch to the end in which the autoencoder was at
work, the same over the whole command, and what reading alone would manage.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import fitv2.encoding.encode
from fitv2.config import Encoding
from fitv2.encoding.encode import encode, processors
from fitv2.encoding.kinds import open_source
from fitv2.encoding.manifest import list_images
from fitv2.encoding.shard_encoder import Reader
from fitv2.runtime.workers import read_ahead

SIZES = ((500, 375), (375, 500), (500, 333), (500, 500), (640, 480))


class Timed:
    """An autoencoder that takes `cost` seconds a picture, and notes when it was at work."""

    name, channels, downsample, scale, shift = "timed", 4, 8, 1.0, 0.0

    def __init__(self, cost: float) -> None:
        self.cost, self.busy, self.first = cost, 0.0, 0.0

    def encode(self, pixels: Tensor, noise: Tensor | None = None) -> Tensor:
        started = time.perf_counter()
        self.first = self.first or started
        time.sleep(self.cost * len(pixels))
        latents = torch.zeros(len(pixels), 4, pixels.shape[2] // 8, pixels.shape[3] // 8)
        self.busy += time.perf_counter() - started
        return latents

    def decode(self, latents: Tensor) -> Tensor:
        raise AssertionError("nothing is decoded here")


def photographs(folder: Path, count: int) -> None:
    """JPEGs about as large on disk as ImageNet's: 110 kB."""
    rng = np.random.default_rng(0)
    for i in range(count):
        width, height = SIZES[i % len(SIZES)]
        coarse = rng.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        noise = rng.normal(0, 12, (height, width, 1))
        path = folder / f"label {i % 10}" / f"{i}.jpg"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray((np.asarray(image) + noise).clip(0, 255).astype(np.uint8)).save(path, quality=90)


def reading_alone(source: Path, work: Path, encoding: Encoding, workers: int) -> float:
    """Pictures a second when nothing encodes them."""
    manifest = list_images(open_source(str(source)))
    manifest.save(work / "pictures.arrow", work)
    reader = Reader(work / "pictures.arrow", encoding, 16)
    started = time.perf_counter()
    chunks = manifest.chunks(range(len(manifest.table)))
    count = sum(len(chunk) for chunk in read_ahead(reader.read, chunks, workers))
    return count / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--pictures", type=int, default=2_000)
    parser.add_argument(
        "--milliseconds", type=float, default=4.0, help="of one latent; there are four a picture"
    )
    parser.add_argument("--workers", type=int, default=processors())
    options = parser.parse_args()
    encoding = Encoding("timed", (256,), "mixed", shard_size=512)
    torch.set_num_threads(1)  # then one batch is encoded at a time, as on a GPU
    codec = Timed(options.milliseconds / 1000)
    fitv2.encoding.encode.load_autoencoder = lambda *_, **__: codec
    with tempfile.TemporaryDirectory() as temporary:
        source, work = Path(temporary) / "pictures", Path(temporary) / "work"
        source.mkdir()
        work.mkdir()
        photographs(source, options.pictures)
        size = sum(path.stat().st_size for path in source.rglob("*.jpg")) / options.pictures
        alone = reading_alone(source, work, encoding, options.workers)
        started = time.perf_counter()
        encode(source, Path(temporary) / "tokens", encoding, workers=options.workers)
        ended = time.perf_counter()
    print(json.dumps({
        "pictures": options.pictures, "kilobytes_each": round(size / 1000), "workers": options.workers,
        "milliseconds_a_latent": options.milliseconds,
        "pictures_per_second": round(options.pictures / (ended - started), 1),
        "reading_alone_per_second": round(alone, 1),
        "autoencoder_alone_per_second": round(options.pictures / codec.busy, 1),
        "busy": round(codec.busy / (ended - codec.first), 3),
        "busy_of_whole_command": round(codec.busy / (ended - started), 3),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
