"""Randomness that does not depend on the machine: a function of a key.

A key begins with the seed of the run, or where there is none with the purpose; these are all purposes:

    (seed, WEIGHTS)            initial weights
    (seed, ORDER)              which images a step takes
    (seed, NOISING, image)     time, dropout and noise of an image in training; each image has its own number
    (seed, NOISING, image, 1 or 2)      dropout of its label alone, order of its tokens
    (VALIDATION,), (VALIDATION, row)    order and noise of held-out images
    (LATENTS, row, view, mirrored)      samples of an autoencoder's distribution
    (seed, SUBJECTS)           what the images of an evaluation are to show
    (seed,)                    an image that is made
"""

import numpy as np
import torch

WEIGHTS, ORDER, NOISING, VALIDATION, LATENTS, SUBJECTS = 0, 1, 2, 3, 7, 8


def derive_seed(*key: int) -> int:
    """One 63-bit seed from a tuple of non-negative integers such as (seed, step, image)."""
    # The length first: to SeedSequence (1,) and (1, 0) are the same.
    return int(np.random.SeedSequence((len(key), *key)).generate_state(1, np.uint64)[0] >> 1)


def generator(*key: int) -> torch.Generator:
    """A CPU generator for `key`. Noise is always drawn on the CPU: a seed means the same everywhere."""
    return torch.Generator().manual_seed(derive_seed(*key))
