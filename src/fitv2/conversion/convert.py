"""Files of the released code into folders of ours, and models back.

A released checkpoint becomes a model folder; released latents become a token dataset.
"""

import pickle
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fitv2.checkpoint import CARD, WEIGHTS, Card, find_model, write_config
from fitv2.config import Architecture, Rope
from fitv2.conversion.released import RELEASES, ours, recognised, to_released
from fitv2.data.format import About, Shard, ShardRows, finish, shard_name
from fitv2.errors import UserError
from fitv2.model import FiT
from fitv2.presets import POST_TRAINED
from fitv2.runtime.files import atomic_file, atomic_folder, write_json
from fitv2.runtime.serialization import read_json
from fitv2.tokens import Layout

READ_AHEAD = 512  # images
AUTOENCODER = "stabilityai/sd-vae-ft-ema"
LATENT_SCALE = 0.18215  # of the released latents
SHARD_BYTES = 64 << 20
ProgressBar = Callable[[Iterable[list[Path]], int], Iterable[list[Path]]]


def imagenet_labels() -> tuple[str, ...]:
    """Names of ImageNet's 1000 classes in order: WordNet's lemmas of their synsets, made unique."""
    return tuple((Path(__file__).parent / "imagenet.txt").read_text().splitlines())


# Models -----------------------------------------------------------------------------------------


def convert_checkpoint(
    source: Path,
    out: Path,
    *,
    post_trained: bool | None = None,
    heads: int | None = None,
    autoencoder: str = AUTOENCODER,
) -> str:
    """A released checkpoint, safetensors or a plain state dict in .bin, as the new model folder `out`.

    Which model it is, is seen from its shapes, except whether it was post-trained to 1024 tokens:
    unless `post_trained` says so, "hr" in the file's or its folder's name does. `heads` are needed
    for sizes that were not released. Every bit is kept. Returns what it was taken for. Raises
    UserError for files that are no such checkpoint, naming missing, extra and misshapen tensors.
    """
    released = read_checkpoint(source)
    architecture = recognised(released, heads)
    weights = ours(architecture, released)
    if post_trained is None:
        post_trained = any(re.search(r"(^|[^a-z])hr(ft)?([^a-z]|$)", name.lower())
                           for name in (source.stem, source.absolute().parent.name))  # fmt: skip
    if post_trained and architecture.objective_name != "flow":
        raise UserError(f"{source} is a FiT v1: none of them was post-trained")
    if post_trained:
        architecture = replace(architecture, rope=POST_TRAINED)
    known = [release for release in RELEASES.values() if release.architecture == architecture]
    labels = imagenet_labels()
    if architecture.num_classes != len(labels):
        labels = tuple(str(i) for i in range(architecture.num_classes))
    tokens = 1024 if post_trained else 256
    card = Card(labels, autoencoder, tokens, known[0].guidance if known else 1.5)
    with atomic_folder(out) as folder:
        with torch.device("meta"):
            write_config(FiT(**asdict(architecture)), folder)
        save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
        (folder / WEIGHTS).chmod(0o644)
        write_json(folder / CARD, asdict(card))
    return known[0].about if known else f"{_kind(architecture)} of width {architecture.width}"


def _kind(architecture: Architecture) -> str:
    kind = "FiT" if architecture.objective_name != "flow" else "FiTv2"
    return kind + (" post-trained" if architecture.rope != Rope() else "")


def convert_to_released(name: str | Path, out: Path) -> None:
    """The model `name` as a released checkpoint, the new file `out` (.safetensors). Every bit is kept.

    Raises UserError when there is no such model, or one that the released code has no names for.
    """
    if out.suffix != ".safetensors":
        raise UserError(f"{out} should end in .safetensors, which the released code reads too")
    if out.exists():
        raise UserError(f"{out} already exists: remove it or choose another")
    weights = read_weights(find_model(name))
    with atomic_file(out) as partial:
        save_file(to_released(weights), partial, metadata={"format": "pt"})
        partial.chmod(0o644)


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of a model folder as they lie there, in one file or in the parts of a large model."""
    index = folder / f"{WEIGHTS}.index.json"
    parts = set(read_json(index)["weight_map"].values()) if index.exists() else {WEIGHTS}
    weights: dict[str, Tensor] = {}
    for part in sorted(parts):
        weights |= _read_safetensors(folder / part)
    return weights


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """A state dict from a file, by its content: some released .safetensors were written by torch.save.

    Code in a pickle is never run. Raises UserError for anything but tensors by name.
    """
    if not path.is_file():
        raise UserError(f"{path} is no file")
    with path.open("rb") as file:
        header = file.read(9)
    if header[8:9] == b"{":
        return _read_safetensors(path)
    try:
        by_name = zipfile.is_zipfile(path) and path.suffix != ".safetensors"  # torch.load goes by suffix
        with path.open("rb") as file:
            source = path if by_name else file
            weights = torch.load(source, map_location="cpu", weights_only=True, mmap=by_name)
    except pickle.UnpicklingError as error:
        raise UserError(f"{path} is no plain state dict: it asks to run code, which was not done") from error
    except (RuntimeError, EOFError, ValueError, KeyError) as error:
        raise UserError(f"{path} is damaged: {error}") from error
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise UserError(f"{path} is no plain state dict: it holds other things than tensors")
    return weights


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged or missing: {error}") from error


# Latents ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Latents:
    """Released latents: for each image its files, resized and where there is one cropped."""

    max_tokens: int
    pictures: list[list[Path]]


def find_latents(source: Path) -> Latents | None:
    """The released latents in a folder: `from_16_to_L`, `greater_than_L_resize`, `greater_than_L_crop`.

    An image that is in both of the latter is one image with two ways to see it, as in the
    released code. None when there are no such folders. Raises UserError when they disagree on L.
    """
    found = [re.fullmatch(r"from_16_to_(\d+)|greater_than_(\d+)_(resize|crop)", p.name)
             for p in sorted(source.iterdir()) if p.is_dir()]  # fmt: skip
    limits = {int(match[1] or match[2]) for match in found if match}
    if not limits:
        return None
    if len(limits) > 1:
        raise UserError(f"{source} holds latents of several limits: {', '.join(map(str, sorted(limits)))}")
    (limit,) = limits
    small, resized, cropped = (
        {path.name: path for path in sorted((source / name).glob("*.safetensors"))}
        for name in (f"from_16_to_{limit}", f"greater_than_{limit}_resize", f"greater_than_{limit}_crop")
    )
    both = [[large[name] for large in (resized, cropped) if name in large] for name in {**resized, **cropped}]
    return Latents(limit, [[path] for path in small.values()] + both)


def convert_latents(
    latents: Latents,
    out: Path,
    *,
    autoencoder: str = AUTOENCODER,
    progress: ProgressBar = lambda pictures, _: pictures,
) -> tuple[int, int]:
    """Released latents as the new token dataset `out`: how many images, and how many were left out.

    An image's variants are its files in order, each with both flips. Files that cannot be used are
    listed in out/skipped.jsonl. Raises UserError when none can.
    """
    skipped, kept = [], 0
    labels = imagenet_labels()
    with atomic_folder(out) as folder:
        about = About(labels, autoencoder, LATENT_SCALE, 0.0, 2, 4, latents.max_tokens)
        shards: dict[str, Shard] = {}
        collected = ShardRows()
        for picture, files in zip(
            progress(latents.pictures, len(latents.pictures)), _read_ahead(latents.pictures), strict=True
        ):
            try:
                rows = [row for path, file in zip(picture, files, strict=True)
                        for row in _rows(path, file, latents.max_tokens, len(labels))]  # fmt: skip
            except UserError as error:
                skipped.append({"source": str(picture[0].name), "reason": str(error)})
                continue
            for i, (tokens, label) in enumerate(rows):
                crop = picture[i // 2].parent.name.endswith("_crop")  # a file holds both flips
                collected.add(tokens.half().numpy(), label, picture[0].stem, i, crop)
            kept += 1
            if collected.bytes >= SHARD_BYTES:
                collected = _written(folder, about, shards, collected)
        if not kept:
            raise UserError(f"none of the {len(latents.pictures)} latents can be used: {skipped[:1]}")
        _written(folder, about, shards, collected)
        finish(folder, about, shards, skipped)
    return kept, len(skipped)


def _written(folder: Path, about: About, shards: dict[str, Shard], rows: ShardRows) -> ShardRows:
    """Write what was collected, if anything, and begin anew."""
    if rows.tokens:
        name = shard_name("train", len(shards))
        shards[name] = rows.write(folder / name, about)
    return ShardRows()


def _read_ahead(pictures: list[list[Path]]) -> Iterator[list[dict[str, Tensor] | UserError]]:
    """The files of each image, read by several threads: there is one small file an image."""

    def read(picture: list[Path]) -> list[dict[str, Tensor] | UserError]:
        return [_or_error(path) for path in picture]

    with ThreadPoolExecutor(8) as pool:
        for start in range(0, len(pictures), READ_AHEAD):
            yield from pool.map(read, pictures[start : start + READ_AHEAD])


def _or_error(path: Path) -> dict[str, Tensor] | UserError:
    try:
        return _read_safetensors(path)
    except UserError as error:
        return error


def _rows(
    path: Path, file: dict[str, Tensor] | UserError, max_tokens: int, num_classes: int
) -> Iterator[tuple[Tensor, int]]:
    """Both flips of a released file as tokens (rows, columns, 16), and its label. Raises UserError."""
    if isinstance(file, UserError):
        raise file
    if not {"feature", "grid", "size", "label"} <= set(file):
        raise UserError(f"{path.name} has not feature, grid, size and label")
    feature, label = file["feature"].float(), int(file["label"])
    if feature.ndim != 4 or len(feature) != 2 or feature.shape[3] != 16:
        raise UserError(f"{path.name}: feature is {tuple(feature.shape)}, expected (2, rows, columns, 16)")
    size = (feature.shape[1], feature.shape[2])
    if file["size"].flatten().tolist() != list(size):
        raise UserError(f"{path.name}: size is {file['size'].flatten().tolist()}, its feature {list(size)}")
    if not 1 <= size[0] * size[1] <= max_tokens:
        raise UserError(f"{path.name}: {size[0]}x{size[1]} are more than {max_tokens} tokens, or none")
    if not torch.equal(file["grid"].long().T.flip(1), Layout.of([size]).pos_T2):
        raise UserError(f"{path.name}: its grid is not row by row")
    if not 0 <= label < num_classes:
        raise UserError(f"{path.name}: label {label} is none of {num_classes}")
    if not feature.half().isfinite().all():
        raise UserError(f"{path.name}: not all of its numbers are finite in float16")
    for flip in feature:
        yield flip, label
