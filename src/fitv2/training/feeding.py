"""Which images a step takes, and whether they will do."""

import warnings

from fitv2.config import Training
from fitv2.data.dataset import TokenDataset
from fitv2.data.packing import FixedCount, Sampler, TokenBudget, images_before
from fitv2.errors import UserError
from fitv2.runtime.distributed import World
from fitv2.runtime.rng import ORDER, derive_seed
from fitv2.tokens import LEVELS


def check_images(config: Training, dataset: TokenDataset, world: World) -> None:
    """UserError where images are too small, or a step has too few, for what was chosen."""
    if config.clean_share and dataset.lengths.min() < LEVELS:
        raise UserError("`clean_share` is for images of two tokens at least")
    first = images_before(1, config.batch_size, config.batch_rampup_steps)
    if config.batch_rampup_steps and first < world.size:
        few = f"{first} images for {world.size} processes"
        raise UserError(f"the first step has {few}: raise `batch_size` or leave out `batch_rampup_steps`")
    if config.batch_rampup_steps > config.steps and world.first:
        last = images_before(config.steps + 1, config.batch_size, config.batch_rampup_steps)
        last -= images_before(config.steps, config.batch_size, config.batch_rampup_steps)
        said = f"steps grow to {last} of {config.batch_size} images: give fewer `batch_rampup_steps`"
        warnings.warn(said, stacklevel=3)


def build_sampler(dataset: TokenDataset, config: Training) -> Sampler:
    """Which images a step takes."""
    images, seed = dataset.images(config.crop_probability), derive_seed(config.seed, ORDER)
    if config.tokens_per_step is not None:
        if config.batch_rampup_steps:
            raise UserError("`batch_rampup_steps` is for `batch_size`, not for `tokens_per_step`")
        return TokenBudget(images, config.tokens_per_step, seed)
    return FixedCount(images, config.batch_size, seed, config.batch_rampup_steps)
