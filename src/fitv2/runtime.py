"""The machine a run is on, and the randomness that does not depend on it."""

import os
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from fitv2.errors import UserError


def default_device() -> torch.device:
    """The accelerator where there is one, else the CPU; or what FITV2_DEVICE names.

    Under torchrun each process of a machine has an accelerator of its own.
    """
    if named := os.environ.get("FITV2_DEVICE"):
        return torch.device(named)
    found = torch.accelerator.current_accelerator(check_available=True)
    if found is None:
        return torch.device("cpu")
    return torch.device(found.type, int(os.environ["LOCAL_RANK"])) if "LOCAL_RANK" in os.environ else found


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether the device has products in bfloat16: a CPU that emulates them takes 20 times as long."""
    if device.type != "cpu":
        return True
    if platform.machine().lower() in ("x86_64", "amd64"):
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def ranks() -> tuple[int, int]:
    """This process's number and how many there are, as torchrun tells them in the environment; else 0 of 1.

    Raises UserError for a number that is none of them.
    """
    rank, world = (os.environ.get(name, default) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
    if not (rank.isdecimal() and world.isdecimal() and int(rank) < int(world)):
        raise UserError(
            f"RANK={rank} and WORLD_SIZE={world} in the environment: expected 0 ≤ RANK < WORLD_SIZE"
        )
    return int(rank), int(world)


@dataclass(frozen=True)
class World:
    """The processes of a run, and which of them this is."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and reports."""
        return self.rank == 0

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Make each tensor the sum of those of all processes, in place; all get the same bits.

        Raises UserError when one of them has ended.
        """
        if self.size == 1:
            return
        try:
            for sending in [dist.all_reduce(tensor, async_op=True) for tensor in tensors]:
                sending.wait()
        except RuntimeError as error:
            raise UserError("another process of this run has ended: see what it says") from error

    def any(self, here: bool) -> bool:
        """Whether it is so in any process."""
        if self.size == 1:
            return here
        flag = torch.tensor(float(here), device=default_device())
        self.add_up([flag])
        return bool(flag.item())

    def wait(self) -> None:
        """Until all processes have come as far."""
        self.any(False)


@contextmanager
def joined() -> Iterator[World]:
    """The world that torchrun started this process in; of one process, if it did not.

    One that waits for another for longer than half an hour ends with an error. Raises UserError when
    something else set its rank.
    """
    rank, size = ranks()
    if size == 1:
        yield World()
        return
    if not {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        raise UserError("several processes train together only under torchrun, which tells where they meet")
    device = default_device()
    if device.index is not None:
        torch.cuda.set_device(device)
    store, _, _ = next(rendezvous("env://"))
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        # torchrun keeps the store when it starts its processes again, and what it says is where the last ones
        # could be reached. (Of several machines each has a count of its own.)
        store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timedelta(minutes=30))
    try:
        yield World(rank, size)
    finally:
        dist.destroy_process_group()


@contextmanager
def single_threaded() -> Iterator[int]:
    """Operations of one thread each, so that results depend on no number of threads; gives that before.

    A thread that was started inside has to set its own: OpenMP counts for each thread.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield before
    finally:
        torch.set_num_threads(before)


def derive_seed(*key: int) -> int:
    """One 63-bit seed from a tuple of non-negative integers such as (seed, step, image)."""
    # The length first: to SeedSequence (1,) and (1, 0) are the same.
    return int(np.random.SeedSequence((len(key), *key)).generate_state(1, np.uint64)[0] >> 1)


def generator(*key: int) -> torch.Generator:
    """A CPU generator for `key`. Noise is always drawn on the CPU: a seed means the same everywhere."""
    return torch.Generator().manual_seed(derive_seed(*key))
