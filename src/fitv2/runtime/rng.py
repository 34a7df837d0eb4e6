"""Randomness that does not depend on the machine: a function of a key."""

import numpy as np
import torch


def derive_seed(*key: int) -> int:
    """One 63-bit seed from a tuple of non-negative integers such as (seed, step, image)."""
    # The length first: to SeedSequence (1,) and (1, 0) are the same.
    return int(np.random.SeedSequence((len(key), *key)).generate_state(1, np.uint64)[0] >> 1)


def generator(*key: int) -> torch.Generator:
    """A CPU generator for `key`. Noise is always drawn on the CPU: a seed means the same everywhere."""
    return torch.Generator().manual_seed(derive_seed(*key))
