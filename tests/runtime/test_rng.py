import torch

from fitv2.runtime.rng import derive_seed, generator


def test_a_seed_is_a_function_of_its_whole_key():
    assert derive_seed(1, 2, 3) == derive_seed(1, 2, 3)
    assert len({derive_seed(0), derive_seed(0, 0), derive_seed(0, 1), derive_seed(1, 0)}) == 4


def test_a_seed_means_the_same_for_ever():
    assert derive_seed(0, 1, 2) == 1419556851746930036
    assert torch.randn(2, generator=generator(0)).tolist() == [0.1666755974292755, -0.013028695248067379]
