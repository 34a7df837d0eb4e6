"""The processes of a run: which there are, where they meet, and what they share."""

import hashlib
import os
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from fitv2.errors import UserError, in_one_line
from fitv2.runtime.device import default_device, environment_number


def ranks() -> tuple[int, int]:
    """This process's number and how many there are, as torchrun tells them in the environment; else 0 of 1.

    Raises UserError for a number that is none of them.
    """
    rank, world = environment_number("RANK", 0), environment_number("WORLD_SIZE", 1)
    if not rank < world:
        raise UserError(
            f"RANK={rank} and WORLD_SIZE={world} in the environment: expected 0 ≤ RANK < WORLD_SIZE"
        )
    return rank, world


@dataclass(frozen=True)
class World:
    """The processes of a run, and which of them this is."""

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None
    """For messages beside those of training, from another thread."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    """The device that messages are sent from."""
    patience: timedelta = field(default_factory=lambda: timedelta(minutes=10))
    """How long one waits for the others."""
    patient: dist.ProcessGroup | None = None
    """For waiting longer than that."""

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and reports."""
        return self.rank == 0

    def add_up(self, tensor: Tensor) -> None:
        """Make a tensor the sum of those of all processes, in place; all get the same bits."""
        if self.size > 1:
            dist.all_reduce(tensor)

    def gather(self, tensor: Tensor) -> Tensor:
        """The tensors of all processes, stacked in order of their ranks."""
        if self.size == 1:
            return tensor[None]
        row = torch.zeros(self.size, *tensor.shape, dtype=tensor.dtype, device=tensor.device)
        row[self.rank] = tensor
        self.add_up(row)
        return row

    def any(self, here: bool) -> bool:
        """Whether it is so in any process."""
        return bool(self.gather(torch.tensor(here, device=self.device, dtype=torch.int32)).any())

    def ranks(self) -> range:
        """The ranks of all processes."""
        return range(self.size)

    def wait(self) -> None:
        """Until all processes have come as far."""
        self.any(False)

    def wait_long(self) -> None:
        """The same while one does what takes as long as it takes, such as judging samples: up to a day.

        One that ends meanwhile is seen at once, one that hangs is not.
        """
        if self.patient is not None:
            dist.barrier(self.patient)


@contextmanager
def join(stall_minutes: float = 10) -> Iterator[World]:
    """The world that torchrun started this process in; of one process, if it did not.

    Raises UserError when something else set its rank, when another process ends, and when one waits for
    another for longer than `stall_minutes`.
    """
    rank, size = ranks()
    if size == 1:
        yield World()
        return
    if not {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        raise UserError("several processes train together only under torchrun, which tells where they meet")
    device = default_device()
    if device.index is not None:
        torch.accelerator.set_device_index(device.index)
    patience = timedelta(minutes=stall_minutes)
    environment_number("MASTER_PORT", 0)
    store = meet()
    store = fresh(store, rank, size, patience.total_seconds())
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=patience)
    with name_lost_process():
        group = dist.new_group(backend="gloo", timeout=patience)
        patient = dist.new_group(backend="gloo", timeout=max(patience, timedelta(days=1)))
        yield World(rank, size, group, device, patience, patient)
    # Not after an error: NCCL would wait for the others, who may wait for this one. They see it end.
    dist.destroy_process_group()


def meet() -> dist.Store:
    """The store that all processes of a run reach. Raises UserError when it cannot be reached."""
    try:
        store: dist.Store = next(rendezvous("env://"))[0]
    except (ValueError, OSError, RuntimeError) as error:
        place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise UserError(f"the processes cannot meet at {place}: {in_one_line(error)}") from error
    return store


def fresh(store: dist.Store, rank: int, size: int, seconds: float) -> dist.Store:
    """A part of the store that only the processes living now use, once all have come.

    torchrun keeps the store when it starts processes again, and what it says is where the last ones could be
    reached. Each process writes a number of its own; the first gathers them until nobody has written another
    since, which it knows when all repeat what it gathered. Raises UserError when that takes too long.
    """
    mine, others = secrets.token_hex(8), range(1, size)
    deadline = time.monotonic() + seconds

    def said(key: str) -> str:
        return store.get(key).decode() if store.check([key]) else ""

    store.set(f"fitv2/here/{rank}", mine)
    while time.monotonic() < deadline:
        if rank == 0:
            gathered = ",".join([mine, *(said(f"fitv2/here/{other}") for other in others)])
            store.set("fitv2/gathered", gathered)
            if all(said(f"fitv2/seen/{other}") == gathered for other in others):
                store.set("fitv2/go", gathered)
                break
        elif mine in (gathered := said("fitv2/gathered")).split(","):
            store.set(f"fitv2/seen/{rank}", gathered)
            if said("fitv2/go") == gathered:
                break
        time.sleep(0.02)
    else:
        raise UserError("another process of this run did not come in time (`stall_minutes`)")
    return dist.PrefixStore(f"fitv2/{hashlib.sha256(gathered.encode()).hexdigest()[:16]}", store)


@contextmanager
def name_lost_process() -> Iterator[None]:
    """Turn an error in talking to another process into a UserError that says so."""
    try:
        yield
    except RuntimeError as error:
        said = str(error)
        if not (isinstance(error, dist.DistError) or "gloo/" in said):
            raise
        done = (
            "did not answer in time (`stall_minutes`)"
            if "imed out" in said
            else "has ended: see what it says"
        )
        raise UserError(f"another process of this run {done}") from error


def gather(tensor: Tensor) -> Tensor:
    """The whole of a tensor that processes share; all of them have to ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def divide_work(work: Callable[[Tensor], Tensor], x_N: Tensor) -> Tensor:
    """`work`, which changes no shape, on a stack of things that all processes have; each does a share of it.

    All get the whole of it, in order; all of them have to ask.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return work(x_N)
    each = -(-len(x_N) // dist.get_world_size())
    mine_N = x_N.new_zeros(each, *x_N.shape[1:])
    given_N = x_N[dist.get_rank() * each :][:each]
    if len(given_N):
        mine_N[: len(given_N)] = work(given_N)
    every = [torch.empty_like(mine_N) for _ in range(dist.get_world_size())]
    dist.all_gather(every, mine_N)
    return torch.cat(every)[: len(x_N)]


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def part(tensor: Tensor, like: Tensor) -> Tensor:
    """What this process holds of a tensor that is divided as `like`."""
    if not isinstance(like, DTensor):
        return tensor
    shape, offset = compute_local_shape_and_global_offset(like.shape, like.device_mesh, like.placements)
    for dimension, (length, first) in enumerate(zip(shape, offset, strict=True)):
        tensor = tensor.narrow(dimension, first, length)
    return tensor
