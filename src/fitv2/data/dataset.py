"""Reading token datasets: rows as packs, from a folder or straight from remote storage."""

import hashlib
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fitv2.conditioning import Condition
from fitv2.data.format import (
    CARD,
    FORMATS,
    INDEXED,
    SHARD,
    DatasetCard,
    File,
    added,
    facts,
    facts_of,
    index_name,
    index_schema,
    indexed,
    read_batch,
    shard_schema,
    shards_of,
)
from fitv2.data.packing import Images, Sampler, Step
from fitv2.data.storage import Store
from fitv2.data.texts import TextCache
from fitv2.errors import UserError, reading
from fitv2.runtime.serialization import from_dict, parse_json
from fitv2.runtime.workers import read_ahead
from fitv2.tokens import Layout, PackedTokens

REMEDY = ": remove the folder and encode again"
ProgressBar = Callable[[Iterable[Any], int], Iterable[Any]]


class TokenDataset:
    """One split of a token dataset, in a folder or at a URL.

    Opening reads the card and the split's index, and compares the size of every shard; tokens are read
    when they are asked for. Raises UserError when there is no such dataset or split, or a file is damaged.
    """

    def __init__(self, folder: Path | str, split: str = "train") -> None:
        self.store = Store(folder)
        self.card = open_card(self.store)
        self.shards = shards_of(self.card.shards, split)
        if not self.shards:
            raise UserError(f"{folder} has no {split} images")
        rows = read_index(self.store, self.card, split)
        column = {name: rows.column(name).to_numpy() for name in INDEXED}
        held = {name: rows.column(name) for name in added(self.card.format)}
        self._captions: Any = held.get("caption")
        self._masks: Any = held.get("mask")
        self.masked: np.ndarray = masks_of(rows) > 0  # whether each row has a mask
        self.sizes = np.stack([column["rows"], column["columns"]], axis=1)  # (rows of the dataset, 2)
        self.labels: np.ndarray = column["label"]
        self.first_rows = np.flatnonzero(column["variant"] == 0)  # of each image
        self.cropped: np.ndarray = column["crop"]
        self.lengths = self.sizes.prod(axis=1, dtype=np.int32)
        self.texts: TextCache | None = None
        self._text_lengths: np.ndarray | None = None
        self._text_numbers: np.ndarray | None = None
        shards = [self.card.shards[name] for name in self.shards]
        ends = np.cumsum([0, *(shard.rows for shard in shards)])
        self._shard_rows = ends[:-1]
        # The byte of its shard where each row begins.
        self._starts = np.cumsum(self.lengths, dtype=np.int64) - self.lengths
        at = np.array([shard.tokens_at for shard in shards]) - self._starts[self._shard_rows] * self._bytes
        self._starts *= self._bytes
        self._starts += np.repeat(at, np.diff(ends))
        after = np.append(self._starts, 0)[ends[1:] - 1] + self.lengths[ends[1:] - 1] * self._bytes
        for name, shard, end in zip(self.shards, shards, after.tolist(), strict=True):
            if not 0 <= shard.tokens_at <= end <= shard.bytes:
                raise UserError(f"{self.store.path(CARD)} is damaged: the tokens of {name} lie outside it")

    @property
    def _bytes(self) -> int:
        """Bytes of one token."""
        return 2 * self.token_channels

    @property
    def token_channels(self) -> int:
        """Channels per token."""
        return self.card.about.token_channels

    def images(self, crop_probability: float = 0.5) -> Images:
        """What planning needs to know of the images."""
        return Images(self.first_rows, self.lengths, self.cropped, crop_probability)

    def batch(self, rows: Sequence[int] | np.ndarray) -> tuple[PackedTokens, Condition]:
        """These rows as one pack in the given order, float32, and what they show."""
        rows = np.asarray(rows)
        return self.pack(rows, self.read(rows))

    def read(self, rows: np.ndarray) -> np.ndarray:
        """The tokens of these rows one after another, (T, C) float16, as they are stored."""
        lengths = self.lengths[rows]
        tokens = np.empty((int(lengths.sum()), self.token_channels), np.float16)
        sizes = (lengths * self._bytes).tolist()
        self.store.fill(tokens.view(np.uint8).reshape(-1), self.places(rows), sizes)
        return tokens

    def pack(self, rows: np.ndarray, tokens: np.ndarray) -> tuple[PackedTokens, Condition]:
        """The pack of these rows and what they show, given their tokens."""
        packed = PackedTokens(torch.from_numpy(tokens.astype(np.float32)), Layout.of(self.sizes[rows]))
        label = torch.from_numpy(self.labels[rows].astype(np.int64))
        if self.texts is None or self._text_numbers is None:
            return packed, Condition.of(label=label)
        return packed, Condition.of(label=label, text=self.texts.numbered(self._text_numbers[rows]))

    def captions(self, rows: Sequence[int] | np.ndarray) -> list[str]:
        """The captions of these rows, empty where there is none."""
        import pyarrow as pa

        if self._captions is None:
            return [""] * len(rows)
        return self._captions.take(pa.array(np.asarray(rows))).to_pylist()

    def learned(self, rows: Sequence[int] | np.ndarray) -> Tensor | None:
        """How much of each token of these rows is learned, (T,) from 0 to 1; None where all of all is."""
        import pyarrow as pa

        rows = np.asarray(rows)
        if not self.masked[rows].any():
            return None
        learned = np.full(self.lengths[rows].sum(), 255, np.uint8)
        given = self._masks.take(pa.array(rows)).flatten().to_numpy()
        learned[np.repeat(self.masked[rows], self.lengths[rows])] = given
        return torch.from_numpy(learned).float() / 255

    def shard_of(self, rows: np.ndarray) -> np.ndarray:
        """The number of the shard that holds each row."""
        return np.searchsorted(self._shard_rows, rows, side="right") - 1

    def places(self, rows: np.ndarray) -> list[tuple[str, int]]:
        """The shard of each row, and the byte of it where its tokens begin."""
        pairs = zip(self.shard_of(rows).tolist(), self._starts[rows].tolist(), strict=True)
        return [(self.shards[shard], at) for shard, at in pairs]

    def use_texts(self, texts: TextCache) -> None:
        """Give images their captions as `texts` has them."""
        self.texts = texts
        number = self._text_numbers = texts.numbers(self.captions(np.arange(len(self.lengths))))
        self._text_lengths = np.where(number >= 0, texts.lengths[number], 0).astype(np.int32)

    def by_length(self, rows: np.ndarray) -> np.ndarray:
        """The order of `rows` (positions in it) by length of image and text: the fastest to compute with."""
        texts = 0 if self._text_lengths is None else self._text_lengths[rows]
        return np.argsort(self.lengths[rows] + texts, kind="stable")

    def sources(self, rows: Sequence[int] | np.ndarray) -> list[str]:
        """Where the images of these rows came from."""
        import pyarrow as pa

        rows = np.asarray(rows)
        found = np.empty(len(rows), dtype=object)
        shards, schema = self.shard_of(rows), shard_schema(self.card.about, self.card.format)
        for shard in np.unique(shards):
            name = self.shards[shard]
            batch = read_batch(self.store.path(name), self.store.read(name), schema)
            here = np.flatnonzero(shards == shard)
            found[here] = (
                batch.column("source").take(pa.array(rows[here] - self._shard_rows[shard])).to_pylist()
            )
        return found.tolist()


def open_card(store: Store) -> DatasetCard:
    """The card of a dataset whose files are all there. Raises UserError naming one that is not whole."""
    held = store.sizes()
    if CARD not in held:
        raise UserError(f"{store.path(CARD)} is missing: a dataset is made by fitv2 encode")
    values = parse_json(store.path(CARD), store.read(CARD).to_pybytes())
    if values.get("format") not in FORMATS:
        known = "format" in values or "shards" in values
        what = "was written by another version of fitv2" if known else "is not that of a dataset"
        raise UserError(f"{store.path(CARD)} {what}{REMEDY}")
    card = from_dict(DatasetCard, values)
    if not names_fit(card):
        said = "it names other files than those of its splits"
        raise UserError(f"{store.path(CARD)} is damaged: {said}{REMEDY}")
    for name, file in card.files.items():
        there = held.get(name)
        if there is None:
            raise UserError(f"{store.path(name)} is missing{REMEDY}")
        if there != file.bytes:
            raise UserError(f"{store.path(name)} is damaged: it has {there} of {file.bytes} bytes{REMEDY}")
    return card


def names_fit(card: DatasetCard) -> bool:
    """Whether the files of a card are an index and shards of each of its splits, and no others."""
    indexes = {index_name(split) for split in card.pictures}
    owners = [index_name(name.rpartition("-")[0]) for name in card.shards if SHARD.fullmatch(name)]
    return len(owners) == len(card.shards) and card.indexes.keys() == indexes == set(owners)


def verify_files(
    store: Store,
    card: DatasetCard,
    progress: ProgressBar = lambda names, _: names,
    rank: int = 0,
    ranks: int = 1,
) -> None:
    """Read every file of a dataset, or every `ranks`-th, by several threads.

    Raises UserError naming those that are damaged.
    """

    indexes = {split: read_index(store, card, split) for split in card.pictures}

    def check(name: str) -> str | None:
        content = store.read(name)
        wrong = difference(store, name, card.files[name], content)
        if wrong or name not in card.shards:
            return wrong
        try:
            with reading(store.path(name)):
                return shard_difference(store, card, name, content, indexes[name.rpartition("-")[0]])
        except UserError as error:
            return f"{error}{REMEDY}"

    with ThreadPoolExecutor(4) as pool:
        names = list(card.files)[rank::ranks]
        found = list(progress(pool.map(check, names), len(names)))
    if wrong := [text for text in found if text]:
        raise UserError("; ".join(wrong[:5]) + (f"; and {len(wrong) - 5} more" if len(wrong) > 5 else ""))


def read_index(store: Store, card: DatasetCard, split: str) -> Any:
    """The index of a split, as an Arrow record batch. Raises UserError when it is not what was written.

    Also when its bytes are: whoever made it may have made a mistake, and wrong labels train without a word.
    """
    name = index_name(split)
    content = store.read(name)
    if wrong := difference(store, name, card.indexes[name], content):
        raise UserError(wrong)
    path, about = store.path(name), card.about
    index = read_batch(path, content, index_schema(card.format))
    rows, columns, label, variant, _ = (index.column(column).to_numpy() for column in INDEXED)
    lengths = rows.astype(np.int64) * columns
    shards = [card.shards[shard].rows for shard in shards_of(card.shards, split)]
    odd = {
        "sizes that none can have": ((rows < 1) | (columns < 1) | (lengths > about.max_tokens)).any(),
        f"labels outside 0 to {len(about.labels) - 1}": ((label < 0) | (label >= len(about.labels))).any(),
        "variants out of order": (np.diff(variant.astype(int), prepend=-1)[variant > 0] != 1).any(),
        "other numbers of rows, images or tokens than the card says": min(shards, default=0) < 1
        or (sum(shards), card.rows.get(split)) != (len(rows), len(rows))
        or card.pictures[split] != (variant == 0).sum() or card.tokens.get(split) != lengths.sum(),
        "masks of other lengths than their images": (masks_of(index) * (masks_of(index) != lengths)).any(),
    }  # fmt: skip
    for what, is_so in odd.items():
        if is_so:
            raise UserError(f"{path} is damaged: it has {what}{REMEDY}")
    return index


def masks_of(index: Any) -> np.ndarray:
    """The length of each row's mask; 0 where it has none."""
    import pyarrow.compute as pc

    if "mask" not in index.schema.names:
        return np.zeros(index.num_rows, np.int64)
    return pc.list_value_length(index.column("mask")).to_numpy().astype(np.int64)


def shard_difference(store: Store, card: DatasetCard, name: str, content: Any, index: Any) -> str | None:
    """What a shard says otherwise than the card or the index. Raises UserError when it is damaged."""
    path = store.path(name)
    if facts(path, content, card.about, card.format) != facts_of(card, name):
        return f"{store.path(CARD)} is damaged: it says other things than {name}{REMEDY}"
    split = name.rpartition("-")[0]
    shards = shards_of(card.shards, split)
    before = sum(card.shards[shard].rows for shard in shards[: shards.index(name)])
    rows = indexed(read_batch(path, content, shard_schema(card.about, card.format)))
    if not rows.equals(index.slice(before, rows.num_rows)):
        return f"{store.path(index_name(split))} is damaged: it says other things than {name}{REMEDY}"
    return None


def difference(store: Store, name: str, file: File, content: Any) -> str | None:
    """What is wrong with a file's content."""
    if hashlib.sha256(content).hexdigest() == file.sha256:
        return None
    return f"{store.path(name)} is damaged: its bytes are not those that were written{REMEDY}"


@dataclass(frozen=True, eq=False)
class Batch:
    """The tokens of this process's share of a step, shortest image first, and the keys of its images."""

    packed: PackedTokens
    condition: Condition
    keys: np.ndarray
    rows: np.ndarray  # of the dataset
    images: int  # of the step in all processes
    fewest: int  # of the process that has fewest of them
    learned_T: Tensor | None = None  # how much of each token is learned [default: all]

    def split(self, count: int) -> list["Batch"]:
        """This batch in so many parts of nearly equal tokens, or as many as every process has images.

        All processes have as many parts: they may hold the model between them.
        """
        count = min(count, self.fewest)
        if count == 1:
            return [self]
        places = Step(np.arange(len(self.keys)), self.keys)
        return [self._select(part) for part in places.split(np.array(self.packed.layout.lengths), count)]

    def _select(self, part: Step) -> "Batch":
        packed, condition = self.packed.select(part.rows.tolist()), self.condition.select(part.rows.tolist())
        learned_T = self.learned_T
        if learned_T is not None:
            pieces = learned_T.split(self.packed.layout.lengths)
            learned_T = torch.cat([pieces[i] for i in part.rows])
        return Batch(packed, condition, part.keys, self.rows[part.rows], self.images, self.fewest, learned_T)


# A share of a step, images of the step and of the smallest share, and tokens as they are stored.
Read = tuple[Step, int, int, np.ndarray]


class Steps:
    """The batches of a run by the number of their step; with several ranks, this rank's share of them."""

    def __init__(self, dataset: TokenDataset, sampler: Sampler, rank: int = 0, ranks: int = 1) -> None:
        self.dataset, self.sampler, self.rank, self.ranks = dataset, sampler, rank, ranks

    def read(self, number: int) -> Read:
        """This rank's share of a step. Raises UserError when it has too few images for all ranks."""
        step = self.sampler.step(number)
        images = len(step.rows)
        if images < self.ranks:
            few = f"step {number} has {images} images for {self.ranks} processes"
            raise UserError(f"{few}: raise `batch_size` or `tokens_per_step`")
        shares = step.split(self.dataset.lengths[step.rows], self.ranks) if self.ranks > 1 else [step]
        fewest, step = min(len(share.rows) for share in shares), shares[self.rank]
        order = self.dataset.by_length(step.rows)
        step = Step(step.rows[order], step.keys[order])
        return step, images, fewest, self.dataset.read(step.rows)

    def pack(self, read: Read) -> Batch:
        """The batch of a step that was read."""
        step, images, fewest, tokens = read
        packed, condition = self.dataset.pack(step.rows, tokens)
        learned_T = self.dataset.learned(step.rows)
        return Batch(packed, condition, step.keys, step.rows, images, fewest, learned_T)

    def batch(self, number: int) -> Batch:
        """The batch of a step."""
        return self.pack(self.read(number))


def batches(steps: Steps, first: int, workers: int) -> Generator[Batch, None, None]:
    """The batches from step `first` on, without end, read ahead by so many processes until it is closed."""
    with closing(read_ahead(steps.read, range(first, 1 << 40), workers)) as read:
        yield from map(steps.pack, read)
