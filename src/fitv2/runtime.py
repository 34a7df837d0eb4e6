"""The machine a run is on, and the randomness that does not depend on it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

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
