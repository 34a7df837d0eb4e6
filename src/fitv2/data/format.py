"""The format of token datasets: Arrow IPC shards, an index of each split, and a json card.

docs/guides/data.md describes it for those who read or write it by other means.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fitv2.errors import UserError, reading
from fitv2.limits import check_limits
from fitv2.runtime.files import atomic_file, sha256, write_json, write_text

CARD = "dataset.json"
SKIPPED = "skipped.jsonl"
FORMAT = 4  # of this description
FORMATS = (2, 3, FORMAT)  # that can be read: captions came with 3, masks with 4
SHARD = re.compile(r"[^/\\]+-\d{5,9}\.arrow")  # a file name
INDEXED = ("rows", "columns", "label", "variant", "crop")


@dataclass(frozen=True)
class File:
    """What a whole file is known by."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Shard(File):
    """A shard, and what is needed to read single rows of it."""

    rows: int
    tokens_at: int  # the byte where the numbers of its first row begin; those of the others follow


@dataclass(frozen=True)
class About:
    """What the tokens of a dataset are. Every shard carries it too."""

    labels: tuple[str, ...]
    autoencoder: str
    scale: float  # latents are (the autoencoder's own − shift) · scale
    shift: float
    patch_size: int
    in_channels: int
    max_tokens: int
    encoding: dict[str, Any] = field(default_factory=dict)  # the settings that made it, where it was encoded

    def __post_init__(self) -> None:
        """UserError for a number outside its range."""
        check_limits(self)

    @property
    def token_channels(self) -> int:
        """Channels per token: (channel, row in patch, column in patch)."""
        return self.patch_size**2 * self.in_channels


@dataclass(frozen=True)
class DatasetCard:
    """All that is known of a dataset without opening a shard."""

    format: int
    about: About
    pictures: dict[str, int]  # of each split
    rows: dict[str, int]
    tokens: dict[str, int]
    indexes: dict[str, File]  # by file name
    shards: dict[str, Shard]

    @property
    def files(self) -> dict[str, File]:
        """Every file that holds data."""
        return {**self.indexes, **self.shards}


def shard_name(split: str, number: int) -> str:
    """The file name of a shard."""
    return f"{split}-{number:05d}.arrow"


def shards_of(names: Iterable[str], split: str) -> list[str]:
    """The shards of a split, in order."""
    mine = (name for name in names if name.rpartition("-")[0] == split)
    return sorted(mine, key=lambda name: int(name.rpartition("-")[2].removesuffix(".arrow")))


def index_name(split: str) -> str:
    """The file name of a split's index."""
    return f"index-{split}.arrow"


class ShardRows:
    """The rows of one shard, as they are collected. A row is one variant of one image."""

    def __init__(self) -> None:
        self.bytes = 0  # of tokens collected
        self.tokens: list[np.ndarray] = []
        self.columns: dict[str, list[Any]] = {
            name: [] for name in ("rows", "columns", "label", "source", "variant", "crop", "caption", "mask")
        }

    def add(
        self, tokens: np.ndarray, label: int, source: str, variant: int, crop: bool = False,
        caption: str = "", mask: np.ndarray | None = None,
    ) -> None:  # fmt: skip
        """One variant, tokens (rows, columns, C) float16; an image's variants come in order from 0.

        `mask` (rows, columns) uint8 is how much of each token is learned, of 255 [default: all].
        """
        rows, columns, channels = tokens.shape
        self.tokens.append(tokens.reshape(-1, channels))
        self.bytes += tokens.nbytes
        learned = () if mask is None else mask.reshape(-1)
        values = (rows, columns, label, source, variant, crop, caption, learned)
        for column, value in zip(self.columns.values(), values, strict=True):
            column.append(value)

    def write(self, path: Path, about: About, scratch: Path | None = None) -> Shard:
        """Write the shard, one record batch, whole or not at all."""
        import pyarrow as pa

        schema = shard_schema(about)
        numbers = pa.array(np.concatenate(self.tokens).ravel())
        ends = np.cumsum([0, *map(len, self.tokens)], dtype=np.int32)
        pieces = pa.FixedSizeListArray.from_arrays(numbers, type=schema.field("tokens").type.value_type)
        tokens = pa.ListArray.from_arrays(ends, pieces, type=schema.field("tokens").type)
        table = pa.table({"tokens": tokens, **self.columns}, schema=schema)
        with atomic_file(path, scratch) as partial:
            with pa.OSFile(str(partial), "wb") as file, pa.ipc.new_stream(file, schema) as stream:
                stream.write_table(table)
            written = described(partial)
            rows, tokens_at, _ = facts(path.name, pa.memory_map(str(partial)).read_buffer(), about)
        return Shard(written.bytes, written.sha256, rows, tokens_at)


def read_batch(name: str, content: Any, schema: Any) -> Any:
    """The record batch of a file of ours, given as an Arrow buffer, every offset of it checked.

    Arrow itself trusts what it reads: one wrong offset would end the process. Raises UserError naming the
    file when it is no such batch, has other columns, or nulls.
    """
    import pyarrow as pa

    with reading(name):
        batch = pa.ipc.open_stream(content).read_next_batch()
        if not batch.schema.equals(schema):
            raise UserError(f"{name} is damaged: it has other columns than dataset.json says")
        batch.validate(full=True)
    if any(column.null_count for column in batch.columns):
        raise UserError(f"{name} is damaged: values are missing")
    return batch


Facts = tuple[int, int, str]  # rows of a shard, where its tokens begin, and what they are


def facts(name: str, content: Any, about: About, form: int = FORMAT) -> Facts:
    """What a shard, as an Arrow buffer, says of itself. Raises UserError when it is damaged."""
    batch = read_batch(name, content, shard_schema(about, form))
    tokens = batch.column("tokens")
    lengths = np.diff(tokens.offsets.to_numpy())
    sides = (batch.column(side).to_numpy().astype(np.int64) for side in ("rows", "columns"))
    if tokens.offset or tokens.offsets[0].as_py() or not np.array_equal(lengths, np.multiply(*sides)):
        raise UserError(f"{name} is damaged: its images have other numbers of tokens than their sizes")
    numbers = tokens.values.values.buffers()[1]
    return batch.num_rows, numbers.address - content.address, batch.schema.metadata[b"fitv2"].decode()


def facts_of(card: "DatasetCard", name: str) -> Facts:
    """What a card says of a shard."""
    shard = card.shards[name]
    return shard.rows, shard.tokens_at, json.dumps(asdict(card.about))


def shard_schema(about: About, form: int = FORMAT) -> Any:
    """The Arrow schema of a shard, with the features that `datasets` reads and what `about` says."""
    import pyarrow as pa

    channels = about.token_channels
    number = {"dtype": "float16", "_type": "Value"}
    features: dict[str, Any] = {
        "tokens": {"feature": {"feature": number, "length": channels, "_type": "List"}, "_type": "List"}
    }
    for name, kind in (("rows", "int16"), ("columns", "int16")):
        features[name] = {"dtype": kind, "_type": "Value"}
    features["label"] = {"names": list(about.labels), "_type": "ClassLabel"}
    texts = ("source", "caption") if form >= 3 else ("source",)
    for name, kind in (*((text, "string") for text in texts), ("variant", "uint8"), ("crop", "bool")):
        features[name] = {"dtype": kind, "_type": "Value"}
    if form >= 4:
        features["mask"] = {"feature": {"dtype": "uint8", "_type": "Value"}, "_type": "List"}
    fields = {
        "tokens": pa.list_(pa.list_(pa.float16(), channels)),
        "rows": pa.int16(), "columns": pa.int16(), "label": pa.int64(),
        "source": pa.string(), "variant": pa.uint8(), "crop": pa.bool_(),
        **added(form),
    }  # fmt: skip
    metadata = {"huggingface": {"info": {"features": features}}, "fitv2": asdict(about)}
    return pa.schema(list(fields.items()), {key: json.dumps(value) for key, value in metadata.items()})


def added(form: int) -> dict[str, Any]:
    """The columns that formats after the first have more, with their Arrow types."""
    import pyarrow as pa

    since = {"caption": (3, pa.string()), "mask": (4, pa.list_(pa.uint8()))}
    return {name: kind for name, (first, kind) in since.items() if form >= first}


def described(path: Path) -> File:
    """Size and SHA-256 of a file."""
    return File(path.stat().st_size, sha256(path))


def finish(
    folder: Path,
    about: About,
    shards: dict[str, Shard],
    skipped: Iterable[dict[str, Any]],
    scratch: Path | None = None,
) -> DatasetCard:
    """Make a dataset of shards that are written: indexes, skipped.jsonl, README.md, and last the card."""
    pictures, rows, tokens, indexes = {}, {}, {}, {}
    for split in sorted({name.rpartition("-")[0] for name in shards}):
        index = gathered([folder / name for name in shards_of(shards, split)])
        pictures[split] = int((index["variant"].to_numpy() == 0).sum())
        rows[split] = index.num_rows
        sides = (index[name].to_numpy().astype(np.int64) for name in ("rows", "columns"))
        tokens[split] = int(np.multiply(*sides).sum())
        indexes[index_name(split)] = write_index(folder / index_name(split), index, scratch)
    lines = [json.dumps(entry, ensure_ascii=False) + "\n" for entry in skipped]
    write_text(folder / SKIPPED, "".join(lines), scratch)
    card = DatasetCard(FORMAT, about, pictures, rows, tokens, indexes, dict(sorted(shards.items())))
    text = folder / "README.md"
    if not text.exists() or text.read_text(encoding="utf-8", errors="replace").startswith(HEAD):  # ours
        write_text(text, readme(card), scratch)
    write_json(folder / CARD, asdict(card), scratch)
    return card


def gathered(shards: list[Path]) -> Any:
    """What is known of every row of a split, as one table: all but its tokens and source."""
    import pyarrow as pa

    batches = [pa.ipc.open_stream(pa.memory_map(str(path))).read_next_batch() for path in shards]
    return pa.Table.from_batches([indexed(batch) for batch in batches]).combine_chunks()


def indexed(batch: Any) -> Any:
    """What an index says of the rows of a shard."""
    import pyarrow as pa
    import pyarrow.compute as pc

    form = max(form for form in FORMATS if added(form).keys() <= {*batch.schema.names})
    schema = index_schema(form)
    return pa.record_batch([pc.cast(batch.column(f.name), f.type) for f in schema], schema=schema)


def index_schema(form: int = FORMAT) -> Any:
    """The Arrow schema of an index."""
    import pyarrow as pa

    kinds = (
        pa.int16(),
        pa.int16(),
        pa.int32(),
        pa.uint8(),
        pa.uint8(),
    )  # crop as a byte: numpy reads no bits
    more = added(form)
    if "mask" in more:
        more["mask"] = pa.large_list(pa.uint8())  # of a whole split
    return pa.schema([*zip(INDEXED, kinds, strict=True), *more.items()])


def write_index(path: Path, index: Any, scratch: Path | None) -> File:
    """Write a split's index, one record batch."""
    import pyarrow as pa

    with atomic_file(path, scratch) as partial:
        with pa.OSFile(str(partial), "wb") as file, pa.ipc.new_stream(file, index.schema) as stream:
            stream.write_table(index)
        return described(partial)


def readme(card: DatasetCard) -> str:
    """The dataset card as the hub shows it; `datasets` finds the splits by its head."""
    about = card.about
    latents = f"Autoencoder: `{about.autoencoder}`."
    if about.autoencoder != "pixels":
        latents += f" Latents are (the autoencoder's − {about.shift:g}) · {about.scale:g}."
    some = ", ".join(about.labels[:12]) + (", …" if len(about.labels) > 12 else "")
    made = "".join(f"- `{key}`: {json.dumps(value)}\n" for key, value in about.encoding.items())
    splits = list(card.pictures)
    counts = (card.pictures, card.rows, card.tokens)
    return README.format(
        configs="\n".join(f"  - split: {split}\n    path: {split}-*.arrow" for split in splits),
        latents=latents,
        counts="\n".join(f"| {s} |" + "".join(f" {count[s]:,} |" for count in counts) for s in splits),
        labels=f"{len(about.labels)} labels: {some}.",
        patch=about.patch_size, channels=about.in_channels, numbers=about.token_channels,
        limit=about.max_tokens, split=splits[0], skipped=SKIPPED, card=CARD,
        made=f"\nMade with:\n{made}" if made else "",
    )  # fmt: skip


HEAD = "---\nconfigs:\n"
README = """---
configs:
- config_name: default
  data_files:
{configs}
tags:
- fitv2
- latents
---
# Image tokens for fitv2

Images of many sizes as tokens, to train a diffusion transformer on. {latents}
A token is a patch of {patch}×{patch} latent pixels of {channels} channels: {numbers} numbers, ordered
(channel, row, column). An image has at most {limit} tokens.

| split | images | rows | tokens |
|---|---|---|---|
{counts}

{labels}

A row is one variant of an image (as it is, mirrored, smaller, cropped): `tokens` (rows · columns
lists of {numbers} float16, row by row), `rows`, `columns`, `label`, `source`, `variant` (counted from 0
for each image), `crop`, `caption` (empty for none), `mask` (how much of each token is learned, of 255; empty
for all).

```python
from datasets import load_dataset  # or pyarrow.ipc.open_stream on any shard

rows = load_dataset("PATH OF THIS FOLDER", split="{split}")

from fitv2.data.dataset import TokenDataset  # single rows, in constant memory, also from s3:// or hf://

pack, labels = TokenDataset("PATH OF THIS FOLDER", "{split}").batch([0, 1, 2])
```

Images that could not be used are listed with the reason in `{skipped}`; `{card}` holds the
SHA-256 of every file.
{made}"""
