"""What a token dataset holds, and whether it is whole."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from fitv2.autoencoder import load_autoencoder
from fitv2.data.dataset import TokenDataset, open_card
from fitv2.data.format import DatasetCard
from fitv2.data.storage import Store
from fitv2.errors import printable
from fitv2.figures import contact_sheet, dataset_plots
from fitv2.runtime.device import default_device
from fitv2.runtime.files import atomic_file
from fitv2.sampling.decoding import decode
from fitv2.sampling.outputs import to_image
from fitv2.tokens import unpack

MOST_LABELS = 40  # lines of a table
THUMBNAIL = 288  # pixels, the longest side on the sheet


@dataclass(frozen=True, eq=False)
class Split:
    """The images of one split, without their tokens."""

    name: str
    sizes: np.ndarray  # (rows, 2) of the dataset: rows and columns of tokens
    labels: np.ndarray  # of each image
    cropped: np.ndarray  # of each row
    captions: list[str]  # of each image, empty for none
    masks: int = 0  # images that are learned in part

    @property
    def aspects(self) -> np.ndarray:
        """Columns over rows of each variant."""
        return self.sizes[:, 1] / self.sizes[:, 0]

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each variant."""
        return self.sizes.prod(axis=1, dtype=np.int64)


def survey(folder: Path | str) -> tuple[DatasetCard, list[Split]]:
    """The dataset's card and splits. Raises UserError when it is damaged at first sight."""
    card = open_card(Store(folder))
    splits = []
    for name in card.pictures:
        held = TokenDataset(folder, name)
        captions = held.captions(held.first_rows)
        masks = int(held.masked[held.first_rows].sum())
        splits.append(Split(name, held.sizes, held.labels[held.first_rows], held.cropped, captions, masks))
    return card, splits


def table(card: DatasetCard, splits: list[Split]) -> str:
    """Counts, sizes, aspect ratios and labels of each split, as lines of text."""
    about, files = card.about, card.files.values()
    lines = [
        f"autoencoder {about.autoencoder}, scale {about.scale:g}, shift {about.shift:g},"
        f" patch {about.patch_size}, {about.in_channels} channels, at most {about.max_tokens} tokens",
        f"{len(card.shards)} shards, {sum(file.bytes for file in files) / 1e6:.1f} MB",
        "",
        f"{'split':12}{'pictures':>10}{'variants':>10}{'crops':>10}{'tokens':>8}{'median':>8}{'most':>6}"
        f"{'sizes':>7}{'aspect ratios':>17}",
    ]
    for split in splits:
        lengths, aspects = split.lengths, split.aspects
        lines.append(
            f"{split.name:12}{len(split.labels):>10,}{len(lengths):>10,}{split.cropped.sum():>10,}"
            f"{lengths.min():>8}{int(np.median(lengths)):>8}{lengths.max():>6}"
            f"{len(np.unique(split.sizes, axis=0)):>7}{f'{aspects.min():.2f} to {aspects.max():.2f}':>17}"
        )
    lines += ["", *caption_lines(splits)] if any(map(any, (split.captions for split in splits))) else []
    lines += [f"{split.name}: {split.masks:,} images have a mask" for split in splits if split.masks]
    return "\n".join([*lines, "", *label_lines(about.labels, splits)])


def caption_lines(splits: list[Split]) -> Iterator[str]:
    """How many images have captions, how long they are, and the commonest."""
    for split in splits:
        held = [caption for caption in split.captions if caption]
        none = len(split.captions) - len(held)
        words = int(np.median([len(caption.split()) for caption in held])) if held else 0
        told = f"{len(held):,} captions, {len(set(held)):,} different, a median of {words} words"
        yield f"{split.name}: {told}; {none:,} images have none"
        for caption, count in Counter(held).most_common(3):
            yield f"  {count:>6,} × {printable(caption[:70])}"


def label_lines(labels: tuple[str, ...], splits: list[Split]) -> Iterator[str]:
    """Images of each label in each split; of many labels the commonest and the rarest."""
    counts = {split.name: np.bincount(split.labels, minlength=len(labels)) for split in splits}
    order = np.argsort(-sum(counts.values()), kind="stable").tolist()  # the commonest first
    width = 2 + max(len(name[:40]) for name in labels)
    yield f"{'label':{width}}" + "".join(f"{name:>12}" for name in counts)
    for place, number in enumerate(order):
        if place == MOST_LABELS // 2 and len(order) > MOST_LABELS:
            yield f"… {len(order) - MOST_LABELS} more …"
        if min(place, len(order) - 1 - place) < MOST_LABELS // 2:
            figures = "".join(f"{count[number]:>12,}" for count in counts.values())
            yield f"{printable(labels[number][:40]):{width}}{figures}"


def draw(card: DatasetCard, splits: list[Split], out: Path, title: str) -> None:
    """Plot lengths, aspect ratios and labels of all splits."""
    lengths = np.concatenate([split.lengths for split in splits])
    aspects = np.concatenate([split.aspects for split in splits])
    counts = Counter(np.concatenate([split.labels for split in splits]).tolist())
    labels = {printable(name): counts[i] for i, name in enumerate(card.about.labels)}
    dataset_plots(lengths, aspects, labels, out, title)


@torch.inference_mode()
def sheet(
    folder: Path | str, card: DatasetCard, count: int, seed: int, out: Path, *, allow_download: bool = False
) -> None:
    """A sheet of decoded images chosen at random. Raises UserError without the autoencoder."""
    codec = load_autoencoder(card.about.autoencoder, default_device(), allow_download=allow_download)
    split = next(name for name, pictures in card.pictures.items() if pictures)
    dataset = TokenDataset(folder, split)
    rng = np.random.default_rng(seed)
    chosen = rng.permutation(dataset.images().draw(rng))[:count]  # one variant of each
    packed, _ = dataset.batch(chosen)
    decoded = decode(unpack(packed.to(default_device())), codec, card.about.patch_size)
    pictures = [to_image(pixels) for pixels in decoded]
    labels = [card.about.labels[label] for label in dataset.labels[chosen].tolist()]
    said = [caption or label for caption, label in zip(dataset.captions(chosen), labels, strict=True)]
    captions = [printable(text[:18]) for text in said]
    for picture in pictures:
        picture.thumbnail((THUMBNAIL, THUMBNAIL))
    made = list(zip(captions, pictures, strict=True))
    with atomic_file(out) as partial:
        contact_sheet([made[i : i + 8] for i in range(0, len(made), 8)], f"{folder}: {split}").save(partial)
