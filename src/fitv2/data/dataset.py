"""Reading token datasets: rows as packs, from a folder or straight from remote storage."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fitv2.conditioning import Condition
from fitv2.data.format import CARD, FORMAT, DatasetCard, File, facts, facts_of, index_name, shards_of
from fitv2.data.packing import Images, Sampler, Step
from fitv2.data.storage import Store
from fitv2.errors import UserError
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
        import pyarrow as pa

        self.store = Store(folder)
        self.card = open_card(self.store)
        self.shards = shards_of(self.card.shards, split)
        if not self.shards:
            raise UserError(f"{folder} has no {split} images")
        index = self.store.read(index_name(split))
        if wrong := difference(self.store, index_name(split), self.card.indexes[index_name(split)], index):
            raise UserError(wrong)
        rows = pa.ipc.open_stream(index).read_next_batch()
        column = {name: rows.column(name).to_numpy() for name in rows.schema.names}
        self.sizes = np.stack([column["rows"], column["columns"]], axis=1)  # (rows of the dataset, 2)
        self.labels: np.ndarray = column["label"]
        self.first_rows = np.flatnonzero(column["variant"] == 0)  # of each image
        self.cropped: np.ndarray = column["crop"]
        self.lengths = self.sizes.prod(axis=1, dtype=np.int32)
        shards = [self.card.shards[name] for name in self.shards]
        ends = np.cumsum([0, *(shard.rows for shard in shards)])
        if ends[-1] != len(self.sizes):
            raise UserError(
                f"{folder} is damaged: its index has {len(self.sizes)} rows, its shards {ends[-1]}"
            )
        self._shard_rows = ends[:-1]
        # The byte of its shard where each row begins.
        self._starts = np.cumsum(self.lengths, dtype=np.int64) - self.lengths
        at = np.array([shard.tokens_at for shard in shards]) - self._starts[self._shard_rows] * self._bytes
        self._starts *= self._bytes
        self._starts += np.repeat(at, np.diff(ends))

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
        return packed, Condition.of(label=torch.from_numpy(self.labels[rows].astype(np.int64)))

    def shard_of(self, rows: np.ndarray) -> np.ndarray:
        """The number of the shard that holds each row."""
        return np.searchsorted(self._shard_rows, rows, side="right") - 1

    def places(self, rows: np.ndarray) -> list[tuple[str, int]]:
        """The shard of each row, and the byte of it where its tokens begin."""
        pairs = zip(self.shard_of(rows).tolist(), self._starts[rows].tolist(), strict=True)
        return [(self.shards[shard], at) for shard, at in pairs]

    def by_length(self, rows: np.ndarray) -> np.ndarray:
        """The order of `rows` (positions in it) by image length: the fastest to compute with."""
        return np.argsort(self.lengths[rows], kind="stable")

    def sources(self, rows: Sequence[int] | np.ndarray) -> list[str]:
        """Where the images of these rows came from."""
        import pyarrow as pa

        rows = np.asarray(rows)
        found = np.empty(len(rows), dtype=object)
        shards = self.shard_of(rows)
        for shard in np.unique(shards):
            batch = pa.ipc.open_stream(self.store.read(self.shards[shard])).read_next_batch()
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
    if values.get("format") != FORMAT:
        known = "format" in values or "shards" in values
        what = "was written by another version of fitv2" if known else "is not that of a dataset"
        raise UserError(f"{store.path(CARD)} {what}{REMEDY}")
    card = from_dict(DatasetCard, values)
    for name, file in card.files.items():
        there = held.get(name)
        if there is None:
            raise UserError(f"{store.path(name)} is missing{REMEDY}")
        if there != file.bytes:
            raise UserError(f"{store.path(name)} is damaged: it has {there} of {file.bytes} bytes{REMEDY}")
    return card


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

    def check(name: str) -> str | None:
        content = store.read(name)
        wrong = difference(store, name, card.files[name], content)
        if wrong is None and name in card.shards and facts(content) != facts_of(card, name):
            return f"{store.path(CARD)} is damaged: it says other things than {name}{REMEDY}"
        return wrong

    with ThreadPoolExecutor(4) as pool:
        names = list(card.files)[rank::ranks]
        found = list(progress(pool.map(check, names), len(names)))
    if wrong := [text for text in found if text]:
        raise UserError("; ".join(wrong[:5]) + (f"; and {len(wrong) - 5} more" if len(wrong) > 5 else ""))


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
        return Batch(packed, condition, part.keys, self.rows[part.rows], self.images, self.fewest)


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
        return Batch(*self.dataset.pack(step.rows, tokens), step.keys, step.rows, images, fewest)

    def batch(self, number: int) -> Batch:
        """The batch of a step."""
        return self.pack(self.read(number))


def batches(steps: Steps, first: int, workers: int) -> Iterator[Batch]:
    """The batches from step `first` on, without end, read ahead by so many processes."""
    return map(steps.pack, read_ahead(steps.read, range(first, 1 << 40), workers))
