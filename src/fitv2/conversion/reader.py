"""Checkpoints from elsewhere: what file it is, what training wrapped it in, and whether it fits for weights.

Code in a pickle is never run.
"""

import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fitv2.encoding.sources import HEAD_BYTES, what_it_is
from fitv2.errors import UserError, in_one_line, reading

PICKLE = re.compile(r"[^/]+/data\.pkl")  # in a file of torch.save
Weights = Mapping[str, Tensor]


@contextmanager
def naming(path: object) -> Iterator[None]:
    """Put the file before what is wrong with it."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def refuse(what: str, wrong: list[str]) -> None:
    """Raise UserError naming what is wrong, if anything is."""
    if wrong:
        more = f"; and {len(wrong) - NAMED} more" if len(wrong) > NAMED else ""
        raise UserError(f"{what}: {'; '.join(wrong[:NAMED])}{more}")


def shown(name: object) -> str:
    """What somebody's file says, as part of one line."""
    text = str(name)[:200]
    return text if text.isprintable() else ascii(text)


# Files ------------------------------------------------------------------------------------------


def read_checkpoint(path: Path) -> "Unwrapped":
    """A state dict from a file, by its content: some released .safetensors were written by torch.save.

    What training wrapped it in is taken off. Code in a pickle is never run. Raises UserError for anything
    but floating tensors by name.
    """
    if not path.is_file():
        raise UserError(f"{path} is no file")
    with reading(path):
        with path.open("rb") as file:
            header = file.read(9)
        held = read_safetensors(path) if header[8:9] == b"{" else _read_pickle(path)
        with naming(path):
            return unwrapped(held)


def _read_pickle(path: Path) -> object:
    try:
        if said := _other_kind(path):
            raise UserError(f"{path} is {said}")
        by_name = zipfile.is_zipfile(path) and path.suffix != ".safetensors"  # torch.load goes by suffix
        with path.open("rb") as file:
            source = path if by_name else file
            return torch.load(source, map_location="cpu", weights_only=True, mmap=by_name)
    except pickle.UnpicklingError as error:
        if asked := re.search(r"GLOBAL ([\w.]+)", str(error)):
            said = f"it asks to run code, which was not done: {asked[1]}"
            raise UserError(f"{path} is no plain state dict: {said}") from error
        raise UserError(f"{path} is damaged, or was not written by torch.save") from error
    except (UserError, MemoryError):
        raise
    except Exception as error:  # such as an IndexError of the pickle's stack
        said = f"damaged, or was not written by torch.save: {shown(in_one_line(error))}"
        raise UserError(f"{path} is {said}") from error


def _other_kind(path: Path) -> str | None:
    """What a file is that holds no tensors; None if it may hold some."""
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
    if not head:
        return "empty"
    if head[257:262] == b"ustar":
        return "a tar archive: unpack it and give the checkpoint in it"
    if zipfile.is_zipfile(path):
        return _other_zip(path)
    return "damaged: it is a zip archive cut off" if head.startswith(b"PK") else what_it_is(head)


def _other_zip(path: Path) -> str | None:
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        if not any(PICKLE.fullmatch(member.filename) for member in members):
            return "a zip archive without a checkpoint of torch.save: unpack it if the checkpoint is in it"
        if any(member.compress_type != zipfile.ZIP_STORED for member in members):  # a few bytes of any size
            return "a compressed zip archive, which torch.save never writes"
        wrong = archive.testzip()  # torch compares no checksums: one wrong bit can exchange two tensors
    return f"damaged: the checksum of {shown(wrong)} is another" if wrong else None


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises UserError saying what it is instead."""
    with reading(path):
        if path.exists() and not path.is_file():  # a pipe would wait for its writer
            raise UserError(f"{path} is no file")
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            said = _other_kind(path) if path.exists() else None
            raise UserError(
                f"{path} is {said}" if said else f"{path} is damaged or missing: {shown(in_one_line(error))}"
            ) from error


# What checkpoints are wrapped in ----------------------------------------------------------------

OUTER = ("ema", "model", "state_dict")  # the first of them is taken
PREFIXES = ("module.", "_orig_mod.", "model.", "ema.")  # of wrappers for training; no tensor's own name
WRAPPERS = 3  # one inside the other, at most
NAMED = 8  # tensors in an error


class Unwrapped(NamedTuple):
    """A state dict, and in words what was taken off it: "taken from 'ema'"."""

    weights: dict[str, Tensor]
    removed: tuple[str, ...]


def unwrapped(held: object) -> Unwrapped:
    """The state dict in what a checkpoint holds, without what training wrapped it in.

    That is an outer dictionary with one of `ema`, `model`, `state_dict` (of `ema` and `model` it is
    `ema`), and prefixes that all names share. Raises UserError when it is not clear which tensors are
    meant, and for anything but tensors of floating numbers by name.
    """
    weights, removed = _inner(held)
    if not weights or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in weights.items()
    ):
        raise UserError("it is no plain state dict: it holds other things than tensors, or nothing")
    refuse_unfit(weights)
    weights, prefix = _without_prefix(weights)
    if prefix:
        removed = (*removed, f"prefix {prefix!r} removed")
    return Unwrapped({name: tensor.detach() for name, tensor in weights.items()}, removed)


def _inner(held: object) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    if not isinstance(held, dict):
        raise UserError(f"it is no plain state dict: it holds a {type(held).__name__}")
    inside = {key: held[key] for key in OUTER if isinstance(held.get(key), dict) and held[key]}
    if not inside:
        return held, ()
    beside = [name for name, value in held.items() if isinstance(value, Tensor) and "." in str(name)]
    if beside or ("state_dict" in inside and len(inside) > 1):
        several = " and ".join([*map(repr, inside), *map(shown, beside[:1])])
        raise UserError(f"it holds {several}, and which is the model is not said: save that alone")
    key = next(iter(inside))
    return inside[key], (f"taken from {key!r}",)


def _without_prefix(weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    removed = ""
    for _ in range(WRAPPERS):
        shared = [prefix for prefix in PREFIXES if all(name.startswith(prefix) for name in weights)]
        if not shared:
            break
        weights = {name.removeprefix(shared[0]): tensor for name, tensor in weights.items()}
        removed += shared[0]
    wrapped = [name for name in weights if name.startswith(PREFIXES)]
    if wrapped:
        other = next((name for name in weights if name not in wrapped), wrapped[-1])
        raise UserError(f"its names do not agree on a prefix: {shown(wrapped[0])} and {shown(other)}")
    return weights, removed


# Fit for weights --------------------------------------------------------------------------------


def refuse_unfit(weights: Weights) -> None:
    """Raise UserError naming tensors that are no plain arrays of floating numbers."""
    odd = {name: _oddity(tensor) for name, tensor in weights.items()}
    refuse("no weights", [f"{shown(name)} is {said}" for name, said in odd.items() if said])


def refuse_infinite(weights: Weights) -> None:
    """Raise UserError naming tensors in which not every number is finite."""
    refuse(
        "damaged", [f"{shown(name)} is not finite" for name, tensor in weights.items() if not _finite(tensor)]
    )


def _oddity(tensor: Tensor) -> str | None:
    if tensor.is_quantized:
        return "quantized"
    if tensor.layout is not torch.strided or tensor.is_nested:
        return "sparse or nested"
    if not tensor.is_floating_point() or tensor.dtype is torch.float4_e2m1fn_x2:
        return f"of {str(tensor.dtype).removeprefix('torch.')}, not of floating numbers"
    if tensor.device.type != "cpu" or tensor.is_neg():
        return "no array of its own"
    if tensor.untyped_storage().nbytes() < tensor.nbytes:  # a few bytes could say any size
        return "larger than its numbers"
    return None


def _finite(tensor: Tensor) -> bool:
    comparable = tensor.float() if tensor.itemsize == 1 else tensor
    return all(bool(end.isfinite()) for end in comparable.aminmax())  # NaN is both least and largest
