"""What a token dataset holds, and whether it is whole."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from fitv2.autoencoder import load_autoencoder
from fitv2.config import from_dict, read_json
from fitv2.data import CARD, DatasetCard, TokenDataset, digest
from fitv2.figures import contact_sheet, dataset_plots
from fitv2.files import whole_file
from fitv2.runtime import default_device
from fitv2.sample import decode
from fitv2.tokens import unpack


@dataclass(frozen=True, eq=False)
class Split:
    """The pictures of one split, without their tokens."""

    name: str
    sizes: np.ndarray  # (rows, 2) of the dataset: rows and columns of tokens
    labels: np.ndarray  # of each dataset row
    pictures: int


def survey(folder: Path) -> tuple[DatasetCard, list[Split]]:
    """The dataset's card and splits. Raises UserError when it is damaged at first sight."""
    card = from_dict(DatasetCard, read_json(folder / CARD))
    splits = []
    for name, count in card.pictures.items():
        if count:
            dataset = TokenDataset(folder, name)
            splits.append(Split(name, dataset.sizes, dataset.labels, count))
    return card, splits


def table(card: DatasetCard, splits: list[Split]) -> str:
    """Counts, sizes and aspect ratios of each split, as lines of text."""
    lines = [
        f"autoencoder {card.autoencoder}, patch {card.patch_size}, {card.in_channels} channels,"
        f" at most {card.max_tokens} tokens, {len(card.labels)} labels, {len(card.shards)} shards,"
        f" {sum(shard.bytes for shard in card.shards.values()) / 1e6:.1f} MB",
        f"{'split':12}{'pictures':>10}{'variants':>10}{'tokens':>8}{'median':>8}{'most':>6}"
        f"{'sizes':>7}{'aspect ratios':>17}",
    ]
    for split in splits:
        lengths, aspects = split.sizes.prod(axis=1), aspect_ratios(split)
        lines.append(
            f"{split.name:12}{split.pictures:>10,}{len(lengths):>10,}{lengths.min():>8}"
            f"{int(np.median(lengths)):>8}{lengths.max():>6}{len(np.unique(split.sizes, axis=0)):>7}"
            f"{f'{aspects.min():.2f} to {aspects.max():.2f}':>17}"
        )
    return "\n".join(lines)


def aspect_ratios(split: Split) -> np.ndarray:
    """Columns over rows of each variant."""
    return split.sizes[:, 1] / split.sizes[:, 0]


def wrong_shards(
    folder: Path, card: DatasetCard, progress: Callable[[Iterable[str]], Iterable[str]] = lambda names: names
) -> Iterator[str]:
    """What is wrong with each shard whose bytes are not those that were written."""
    for name in progress(sorted(card.shards)):
        if digest(folder / name) != card.shards[name].sha256:
            yield f"{folder / name} is damaged: its bytes are not those that were written"


def draw(card: DatasetCard, splits: list[Split], out: Path, title: str) -> None:
    """Plot lengths, aspect ratios and labels of all splits."""
    lengths = np.concatenate([split.sizes.prod(axis=1) for split in splits])
    aspects = np.concatenate([aspect_ratios(split) for split in splits])
    counts = Counter(np.concatenate([split.labels for split in splits]).tolist())
    labels = {name: counts[i] for i, name in enumerate(card.labels)}
    dataset_plots(lengths, aspects, labels, out, title)


@torch.inference_mode()
def sheet(folder: Path, card: DatasetCard, count: int, seed: int, out: Path) -> None:
    """A sheet of decoded pictures chosen at random. Raises UserError without the autoencoder."""
    codec = load_autoencoder(card.autoencoder, default_device())
    split = next(name for name, pictures in card.pictures.items() if pictures)
    dataset = TokenDataset(folder, split)
    chosen = np.random.default_rng(seed).permutation(len(dataset.sizes))[:count]
    packed, labels = dataset.batch(chosen)
    pictures = decode(unpack(packed.to(default_device())), codec, card.patch_size)
    captions = [card.labels[label][:18] for label in labels.tolist()]
    made = list(zip(captions, pictures, strict=True))
    with whole_file(out) as partial:
        contact_sheet([made[i : i + 8] for i in range(0, len(made), 8)], f"{folder}: {split}").save(partial)
