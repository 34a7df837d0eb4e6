"""The state of a run on disk: written by all of its processes at once, read by any other number of them.

Safetensors files through torch.distributed.checkpoint, one a process. (Its own format keeps a pickle.)
state.json, written last, names them and their SHA-256: without it nothing is read.
"""

import os
import warnings
from collections import ChainMap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.checkpoint import (
    CheckpointException,
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)

from fitv2.config import read_json
from fitv2.errors import UserError
from fitv2.files import sha256, write_json

CARD = "state.json"
# What libraries raise on files that are not whole.
DAMAGE = (OSError, RuntimeError, EOFError, KeyError, ValueError, AssertionError, SafetensorError, UserError)
State = dict[str, Tensor]
# A single process is no mistake.
warnings.filterwarnings("ignore", "torch.distributed is disabled", module="torch.distributed.checkpoint")


def state_of(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> State:
    """The parameters of a model, and what the optimizers remember of each, by name. No copies."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    state: State = {f"weights.{name}": parameter.detach() for parameter, name in names.items()}
    for optimizer in optimizers:
        for parameter, memory in optimizer.state.items():
            state |= {f"optimizer.{names[parameter]}.{key}": value for key, value in memory.items()}
    return state


def staged(state: State) -> State:
    """A copy in the memory of the host, which training does not change."""
    copied: State = HuggingFaceStorageWriter("").stage(state)
    return copied


def write_state(
    state: State, folder: Path, group: dist.ProcessGroup | None = None, beside: Sequence[Path] = ()
) -> None:
    """Write a state into a folder that is there; all processes of `group` together.

    `beside` are other files that belong to it, each in one process alone.
    """
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    writer.per_thread_copy_ahead = 0  # what is staged lies on the host; else a stream of GPU 0 is asked for
    with unwrapped():
        dcp.save(state, storage_writer=writer, process_group=group, no_dist=group is None)
    rank = 0 if group is None else dist.get_rank(group)
    written = [*folder.glob(f"shard-{rank + 1:05d}-*.safetensors"), *beside]
    own = {os.path.relpath(path, folder): sha256(path) for path in written}
    everyone: list[Any] = [own]
    if group is not None:
        everyone = [None] * dist.get_world_size(group)
        dist.all_gather_object(everyone, own, group)
    if rank == 0:
        write_json(folder / CARD, {"files": dict(ChainMap(*everyone))})


def require_whole_state(folder: Path, rank: int = 0, ranks: int = 1) -> None:
    """UserError if one of this process's share of the files is missing, cut or changed."""
    for name, expected in sorted(read_json(folder / CARD)["files"].items())[rank::ranks]:
        path = folder / name
        if not path.exists() or sha256(path) != expected:
            raise UserError(f"{path} is missing or damaged")


def read_state(folder: Path, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Put a state into a model and its optimizers; each process reads what it holds, alone.

    Raises UserError when a file is missing, and when the state is that of another model or optimizer.
    """
    for name in read_json(folder / CARD)["files"]:
        if not (folder / name).exists():
            raise UserError(f"{folder / name} is missing or damaged")
    for optimizer in optimizers:
        optimizer.state.clear()  # of a checkpoint that could only be read in part
    reader = HuggingFaceStorageReader(str(folder))
    stored = reader.read_metadata().state_dict_metadata
    _remember(stored, model, optimizers)
    state = state_of(model, optimizers)
    if state.keys() != stored.keys():
        odd = sorted(state.keys() ^ stored.keys())[0]
        raise UserError(f"{folder} is the state of another model or optimizer: {odd} is only in one of them")
    with unwrapped():
        dcp.load(state, storage_reader=reader, no_dist=True)


@contextmanager
def unwrapped() -> Iterator[None]:
    """Raise what went wrong in place of torch's own error, which is no Exception."""
    try:
        yield
    except CheckpointException as error:
        rank, (reason, _) = next(iter(error.failures.items()))
        if isinstance(reason, Exception):
            raise reason from error
        raise RuntimeError(f"process {rank}: {reason}") from error


def _remember(
    stored: Mapping[str, Any], model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]
) -> None:
    """Room in the optimizers for what is stored of each parameter; they make none before their first step."""
    parameters = dict(model.named_parameters())
    memories: dict[Any, Any] = {
        parameter: optimizer.state for optimizer in optimizers
        for group in optimizer.param_groups for parameter in group["params"]
    }  # fmt: skip
    for key, entry in stored.items():
        kind, _, rest = key.partition(".")
        name, _, quantity = rest.rpartition(".")
        if kind == "optimizer" and parameters.get(name) in memories:
            parameter = parameters[name]
            same = entry.size == parameter.shape
            room = torch.zeros_like(parameter) if same else torch.zeros(entry.size, device=parameter.device)
            memories[parameter][parameter][quantity] = room.detach()
