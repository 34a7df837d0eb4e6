"""Token datasets: Arrow IPC shards with a json card, read through `datasets` by memory map.

A row is one variant of one picture: `tokens` (length × C float16, row by row), `rows`, `columns`,
`label`, `source`, `variant`. A picture's variants (as it is, mirrored, smaller, cropped) are
neighbouring rows, counted from 0; pictures may have different numbers of them.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fitv2.config import from_dict, read_json
from fitv2.errors import UserError
from fitv2.files import write_json
from fitv2.packing import Images
from fitv2.tokens import PackedTokens, layout

CARD = "dataset.json"
SHARD_BYTES = 64 << 20


@dataclass(frozen=True)
class Shard:
    """What a whole shard is known by."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class DatasetCard:
    """What the tokens of a dataset are."""

    labels: tuple[str, ...]
    autoencoder: str
    patch_size: int
    in_channels: int
    max_tokens: int
    pictures: dict[str, int]  # of each split
    shards: dict[str, Shard]  # by file name


class ShardWriter:
    """Collects rows of one split and writes them as shards of about `SHARD_BYTES`."""

    def __init__(self, folder: Path, split: str) -> None:
        self.folder, self.split = folder, split
        self.shards: dict[str, Shard] = {}
        self._clear()

    def _clear(self) -> None:
        self.bytes = 0
        self.tokens: list[np.ndarray] = []
        self.columns: dict[str, list[Any]] = {
            k: [] for k in ("rows", "columns", "label", "source", "variant")
        }

    def add(self, tokens: Tensor, label: int, source: str, variant: int) -> None:
        """One variant of a picture, tokens (rows, columns, C); its variants come in order from 0."""
        self.tokens.append(tokens.flatten(0, 1).half().cpu().numpy())
        self.bytes += self.tokens[-1].nbytes
        row = (tokens.shape[0], tokens.shape[1], label, source, variant)
        for column, value in zip(self.columns.values(), row, strict=True):
            column.append(value)
        if self.bytes >= SHARD_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write what was collected."""
        if not self.tokens:
            return
        import pyarrow as pa

        channels = self.tokens[0].shape[1]
        numbers = pa.array(np.concatenate(self.tokens).ravel())
        ends = np.cumsum([0, *(len(array) for array in self.tokens)], dtype=np.int32)
        tokens = pa.ListArray.from_arrays(ends, pa.FixedSizeListArray.from_arrays(numbers, channels))
        table = pa.table({"tokens": tokens, **self.columns})
        path = self.folder / f"{self.split}-{len(self.shards):05d}.arrow"
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table)
        self.shards[path.name] = Shard(path.stat().st_size, digest(path))
        self._clear()


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_card(folder: Path, card: DatasetCard) -> None:
    """Write the card, last: a folder without one is no dataset."""
    write_json(folder / CARD, asdict(card))


def write_skipped(folder: Path, skipped: list[dict[str, str]]) -> None:
    """Write skipped.jsonl: what could not be used, and why."""
    lines = [json.dumps(entry, ensure_ascii=False) + "\n" for entry in skipped]
    (folder / "skipped.jsonl").write_text("".join(lines), encoding="utf-8")


class TokenDataset:
    """One split of a token dataset. Raises UserError when the folder holds none."""

    def __init__(self, folder: Path | str, split: str = "train") -> None:
        from datasets import Dataset, concatenate_datasets

        folder = Path(folder)
        self.card = from_dict(DatasetCard, read_json(folder / CARD))
        names = sorted(name for name in self.card.shards if name.startswith(f"{split}-"))
        shards = [folder / name for name in names]
        for shard in shards:
            held = shard.stat().st_size if shard.exists() else 0
            if held != self.card.shards[shard.name].bytes:
                raise UserError(
                    f"{shard} is damaged: it has {held} of {self.card.shards[shard.name].bytes} bytes;"
                    " encode again"
                )
        try:
            parts = [Dataset.from_file(str(shard)) for shard in shards]
        except (OSError, ValueError) as error:
            raise UserError(f"a shard of {folder} is damaged: {error}") from error
        if not parts:
            raise UserError(f"{folder} has no {split} pictures")
        self.rows = concatenate_datasets(parts).with_format("arrow")
        self.first_rows = np.flatnonzero(self.rows.data.column("variant").to_numpy() == 0)
        if len(self.first_rows) != self.card.pictures.get(split, 0):
            raise UserError(f"{folder} is incomplete: it has {len(self.first_rows)} pictures of {split}")
        size = [self.rows.data.column(name).to_numpy() for name in ("rows", "columns")]
        self.sizes = np.stack(size, axis=1)  # (rows, 2)
        self.labels = self.rows.data.column("label").to_numpy()

    @property
    def images(self) -> Images:
        """What planning needs to know of the pictures."""
        return Images(self.first_rows, self.sizes.prod(axis=1))

    @property
    def token_channels(self) -> int:
        """Numbers a token."""
        return self.card.patch_size**2 * self.card.in_channels

    def batch(self, rows: Sequence[int] | np.ndarray) -> tuple[PackedTokens, Tensor]:
        """These rows as one pack in the given order, float32, and their labels (B,)."""
        tokens = self.rows[rows]["tokens"].combine_chunks().flatten().flatten().to_numpy()
        content = torch.from_numpy(tokens.astype(np.float32).reshape(-1, self.token_channels))
        packed = layout([tuple(size) for size in self.sizes[rows].tolist()])
        return packed.with_tokens(content), torch.from_numpy(self.labels[rows])

    def by_length(self, rows: Iterable[int]) -> np.ndarray:
        """The order of `rows` (positions in it) by image length: the fastest to compute with."""
        return np.argsort(self.sizes[np.fromiter(rows, int)].prod(axis=1), kind="stable")
