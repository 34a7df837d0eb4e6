"""Checkpoints of a run, written while training continues: whole or not at all.

A checkpoint is a folder `step-NNNNNNN` with the EMA model in `ema/`, which samples, and in `state/`
what training resumes from. It is written as `.step-NNNNNNN`; only what is whole gets its name.
"""

import json
import os
import re
import warnings
from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
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

from fitv2.checkpoint import FILES, Card, checkpoints, save_model, step_of
from fitv2.errors import UserError
from fitv2.model import FiT
from fitv2.runtime.distributed import World
from fitv2.runtime.files import flush_tree, name_full_disk, remove_own, sha256, write_json
from fitv2.runtime.serialization import read_json
from fitv2.training.muon import Muon

MANIFEST = "state.json"
OWN = re.compile(  # files of a checkpoint
    r"ema/((config|card|files)\.json|(diffusion_pytorch_model|pytorch_lora|early_head)[\w.-]*\.(safetensors|json))"
    r"|state/(state\.json|\.metadata|shard-[\w.-]+\.safetensors|model\.safetensors\.index\.json)"
)
# What libraries raise on files that are not whole.
DAMAGE = (OSError, RuntimeError, EOFError, KeyError, ValueError, AssertionError, SafetensorError, UserError)
State = dict[str, Tensor]
# A single process is no mistake.
warnings.filterwarnings("ignore", "torch.distributed is disabled", module="torch.distributed.checkpoint")


class Saver:
    """Writes the checkpoints of a run, one at a time, all processes together."""

    def __init__(self, run: Path, card: Card, world: World, keep: int, milestone_every: int | None) -> None:
        self.run, self.card, self.world = run, card, world
        self.keep, self.milestone_every = keep, milestone_every
        self.writing: tuple[int, Future[None]] | None = None
        self.last: int | None = None  # step whose checkpoint was begun last

    def clean(self) -> None:
        """Remove what a process that was killed left half-written."""
        for partial in self.run.glob("checkpoints/.step-*"):
            remove_checkpoint(partial)

    def save(
        self, step: int, state: State, ema: FiT | None, adapter: Mapping[str, Tensor] | None = None
    ) -> None:
        """Begin to write a checkpoint, after the one before is written.

        `state`, `ema` (of the first process; in the others None) and its LoRA may not change any more.
        """
        self.finish()
        partial = self._folder(step, ".")
        self.last = step
        self.writing = step, run_in_background(lambda: self._write(partial, state, ema, adapter))

    def look(self) -> None:
        """Give a checkpoint its name if it is written by now. Raises as `finish`."""
        if self.writing is not None and self.writing[1].done():
            self.finish()

    def finish(self) -> None:
        """Wait until a checkpoint is written. Raises UserError when it cannot be."""
        if self.writing is None:
            return
        (step, written), self.writing = self.writing, None
        partial, folder = self._folder(step, "."), self._folder(step)
        try:
            written.result()
            if self.world.first:
                partial.rename(folder)
                self._prune()
        except Exception as error:
            if self.world.first and written.done():
                remove_checkpoint(partial)
            reason = " ".join(str(error).split())[-300:]
            raise UserError(f"checkpoint {folder} cannot be written: {reason}") from error

    def abandon(self, seconds: float) -> None:
        """Give a checkpoint that is being written some time more; that it fails is only a warning.

        For when there is a graver error, which may be that another process is gone.
        """
        if self.writing is None:
            return
        step, written = self.writing
        wait([written], seconds)
        if not written.done():
            self.writing = None  # the next start removes what there is
            warnings.warn(f"checkpoint of step {step} is left half-written", stacklevel=2)
            return
        try:
            self.finish()
        except UserError as error:
            warnings.warn(str(error), stacklevel=2)

    def _folder(self, step: int, prefix: str = "") -> Path:
        return self.run / "checkpoints" / f"{prefix}step-{step:07d}"

    def _write(
        self, partial: Path, state: State, ema: FiT | None, adapter: Mapping[str, Tensor] | None
    ) -> None:
        if self.world.device.index is not None:
            torch.accelerator.set_device_index(self.world.device.index)  # each thread has its own
        with name_full_disk(self.run):
            if self.world.first:
                (partial / "state").mkdir(parents=True, exist_ok=True)  # somebody else's file may be there
            if self.world.group is not None:
                dist.barrier(self.world.group)
            if ema is not None:
                save_model(ema, self.card, partial / "ema", adapter)
            beside = [partial / "ema" / FILES] if self.world.first else []
            write_state(state, partial / "state", self.world.group, beside)
            if self.world.first:
                flush_tree(partial)

    def _prune(self) -> None:
        """Remove all but the newest and the milestones."""
        for old in checkpoints(self.run)[: -self.keep]:
            if self.milestone_every is None or step_of(old) % self.milestone_every:
                remove_checkpoint(old)


def remove_checkpoint(folder: Path) -> None:
    """Remove a checkpoint, whole or not; what somebody else put there stays."""
    remove_own(folder, lambda name: OWN.fullmatch(name) is not None)


def run_in_background(work: Callable[[], None]) -> Future[None]:
    """The result of `work` in a thread that does not keep the process alive."""
    future: Future[None] = Future()

    def run() -> None:
        try:
            work()
            future.set_result(None)
        except BaseException as error:
            future.set_exception(error)

    Thread(target=run, daemon=True).start()
    return future


def state_of(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> State:
    """The parameters of a model, and what the optimizers remember of each, by name. No copies."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    state: State = {f"weights.{name}": parameter.detach() for parameter, name in names.items()}
    for optimizer in optimizers:
        for parameter, memory in optimizer.state.items():
            state |= {f"optimizer.{names[parameter]}.{key}": value for key, value in memory.items()}
    return state


def stage(state: State) -> State:
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
    with unwrap_errors():
        dcp.save(state, storage_writer=writer, process_group=group, no_dist=group is None)
    rank = 0 if group is None else dist.get_rank(group)
    shards = sorted(folder.glob(f"shard-{rank + 1:05d}-*.safetensors"))
    for shard in shards:
        order_metadata(shard)
    written = [*shards, *beside]
    own = {os.path.relpath(path, folder): sha256(path) for path in written}
    everyone: list[Any] = [own]
    if group is not None:
        everyone = [None] * dist.get_world_size(group)
        dist.all_gather_object(everyone, own, group)
    if rank == 0:
        files = dict(sorted(ChainMap(*everyone).items()))
        write_json(folder / MANIFEST, {"files": files})


def order_metadata(path: Path) -> None:
    """Sort what a safetensors file says of itself by its keys: safetensors writes them in any order.

    So the same state is the same bytes. Nothing changes in length.
    """
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        told = {key: in_order(value) for key, value in header.get("__metadata__", {}).items()}
        header["__metadata__"] = dict(sorted(told.items()))
        ordered = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(ordered) <= length:
            file.seek(8)
            file.write(ordered.ljust(length))


def in_order(value: str) -> str:
    """A text that is json, with its keys sorted; any other as it is."""
    try:
        ordered = json.dumps(json.loads(value), sort_keys=True)
    except ValueError:
        return value
    return ordered if len(ordered) == len(value) else value


def files_of(folder: Path) -> dict[str, str]:
    """The SHA-256 of each file of a state, as state.json says. Raises UserError when that is damaged."""
    files = read_json(folder / MANIFEST).get("files")
    if not isinstance(files, dict) or not any(name.endswith(".safetensors") for name in files):
        raise UserError(f"{folder / MANIFEST} is damaged: it names no files")
    return files


def verify_state(folder: Path, rank: int = 0, ranks: int = 1) -> None:
    """UserError if one of this process's share of the files is missing, cut or changed."""
    for name, expected in sorted(files_of(folder).items())[rank::ranks]:
        path = folder / name
        if not path.is_file() or sha256(path) != expected:
            raise UserError(f"{path} is missing or damaged")


# What optimizers keep of a parameter: one that has come to another of them since cannot go on.
KEPT = {Muon: {"momentum_buffer", "step"}, torch.optim.AdamW: {"step", "exp_avg", "exp_avg_sq"}}


def read_state(folder: Path, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Put a state into a model and its optimizers; each process reads what it holds, alone.

    Raises UserError when a file is missing, and when the state is that of another model or optimizer.
    """
    for name in files_of(folder):
        if not (folder / name).exists():
            raise UserError(f"{folder / name} is missing or damaged")
    for optimizer in optimizers:
        optimizer.state.clear()  # of a checkpoint that could only be read in part
    reader = HuggingFaceStorageReader(str(folder))
    stored = reader.read_metadata().state_dict_metadata
    _remember(stored, model, optimizers)
    for optimizer in optimizers:
        found = set().union(*optimizer.state.values())
        if strange := found - KEPT.get(type(optimizer), found):
            kind, first = type(optimizer).__name__, min(strange)
            raise UserError(f"{folder} is the state of another optimizer: {kind} keeps no {first}")
    state = state_of(model, optimizers)
    if state.keys() != stored.keys():
        odd = sorted(state.keys() ^ stored.keys())[0]
        raise UserError(f"{folder} is the state of another model or optimizer: {odd} is only in one of them")
    with unwrap_errors():
        dcp.load(state, storage_reader=reader, no_dist=True)


@contextmanager
def unwrap_errors() -> Iterator[None]:
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
