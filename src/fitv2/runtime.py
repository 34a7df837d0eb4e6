"""The machine a run is on, and the randomness that does not depend on it."""

import os

import numpy as np
import torch


def default_device() -> torch.device:
    """The accelerator where there is one, else the CPU; or what FITV2_DEVICE names."""
    if named := os.environ.get("FITV2_DEVICE"):
        return torch.device(named)
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def derive_seed(*key: int) -> int:
    """One 63-bit seed from a tuple of non-negative integers such as (seed, step, image)."""
    # The length first: to SeedSequence (1,) and (1, 0) are the same.
    return int(np.random.SeedSequence((len(key), *key)).generate_state(1, np.uint64)[0] >> 1)


def generator(*key: int) -> torch.Generator:
    """A CPU generator for `key`. Noise is always drawn on the CPU: a seed means the same everywhere."""
    return torch.Generator().manual_seed(derive_seed(*key))
