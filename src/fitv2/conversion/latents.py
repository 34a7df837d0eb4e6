"""The released latents into a token dataset."""

import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fitv2.conversion.reader import naming, read_safetensors
from fitv2.conversion.released import AUTOENCODER, imagenet_labels
from fitv2.data.format import About, Shard, ShardRows, finish, shard_name
from fitv2.encoding.sources import readable
from fitv2.errors import UserError, reading
from fitv2.runtime.files import atomic_folder
from fitv2.tokens import Layout

READ_AHEAD = 512  # images
LATENT_SCALE = 0.18215  # of the released latents
SHARD_BYTES = 64 << 20
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
WHOLE = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
ProgressBar = Callable[[Iterable[list[Path]], int], Iterable[list[Path]]]


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
    if not latents.pictures:
        raise UserError("there are no latents: its folders hold no .safetensors")
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
                rows = _rows_of(picture, files, latents.max_tokens, len(labels))
            except UserError as error:
                skipped.append({"source": readable(picture[0].name), "reason": readable(str(error))})
                continue
            for i, (tokens, label) in enumerate(rows):
                crop = picture[i // 2].parent.name.endswith("_crop")  # a file holds both flips
                collected.add(tokens.half().numpy(), label, readable(picture[0].stem), i, crop)
            kept += 1
            if collected.bytes >= SHARD_BYTES:
                collected = _written(folder, about, shards, collected)
        if not kept:
            raise UserError(f"no latent of {len(latents.pictures)} can be used: {skipped[0]['reason']}")
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
    """What a file holds, or why it cannot be read, for the thread that goes through the images."""
    try:
        return read_safetensors(path)
    except UserError as error:
        return error


def _rows_of(
    picture: list[Path], files: list[dict[str, Tensor] | UserError], max_tokens: int, num_classes: int
) -> list[tuple[Tensor, int]]:
    """All variants of an image as tokens (rows, columns, 16), and its label. Raises UserError."""
    rows = []
    for path, file in zip(picture, files, strict=True):
        if isinstance(file, UserError):
            raise file
        with reading(path.name), naming(path.name):
            rows += _rows(file, max_tokens, num_classes)
    if len({label for _, label in rows}) > 1:
        raise UserError(f"{picture[0].name}: it has another label where it is cropped")
    return rows


def _rows(file: dict[str, Tensor], max_tokens: int, num_classes: int) -> list[tuple[Tensor, int]]:
    """Both flips of a released file as tokens (rows, columns, 16), and its label. Raises UserError."""
    if not {"feature", "grid", "size", "label"} <= set(file):
        raise UserError("it has not feature, grid, size and label")
    feature, label = file["feature"], _label(file["label"], num_classes)
    if feature.dtype not in FLOATS:
        raise UserError(f"feature is of {feature.dtype}, expected floating numbers")
    if feature.ndim != 4 or len(feature) != 2 or feature.shape[3] != 16:
        raise UserError(f"feature is {tuple(feature.shape)}, expected (2, rows, columns, 16)")
    size = (feature.shape[1], feature.shape[2])
    if _whole(file["size"], "size").flatten().tolist() != list(size):
        raise UserError(f"size is {file['size'].flatten()[:4].tolist()}, its feature {list(size)}")
    if not 1 <= size[0] * size[1] <= max_tokens:
        raise UserError(f"{size[0]}x{size[1]} are more than {max_tokens} tokens, or none")
    grid = file["grid"]
    if grid.dtype not in FLOATS + WHOLE or grid.ndim != 2:
        raise UserError(f"grid is {tuple(grid.shape)} of {grid.dtype}, expected (2, tokens) of numbers")
    if not torch.equal(grid.double().T.flip(1), Layout.of([size]).pos_T2.double()):
        raise UserError("its grid is not row by row")
    feature = feature.float()
    if not feature.half().isfinite().all():
        raise UserError("not all of its numbers are finite in float16")
    return [(flip, label) for flip in feature]


def _label(label: Tensor, num_classes: int) -> int:
    if label.numel() != 1:
        raise UserError(f"label has {label.numel()} numbers, expected one")
    number = int(_whole(label, "label"))
    if not 0 <= number < num_classes:
        raise UserError(f"label {number} is none of {num_classes}")
    return number


def _whole(tensor: Tensor, name: str) -> Tensor:
    if tensor.dtype not in WHOLE or tensor.ndim > 2:
        raise UserError(f"{name} is {tuple(tensor.shape)} of {tensor.dtype}, expected whole numbers")
    return tensor
