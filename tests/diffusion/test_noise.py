import pytest
import torch

from conftest import noise_of
from fitv2.diffusion.flow import Flow
from fitv2.diffusion.noise import draw_noise
from fitv2.runtime.rng import generator
from fitv2.tokens import Layout


def test_an_image_has_the_same_noise_in_any_company():
    together = draw_noise([4, 6], 3, [generator(7), generator(8)])
    assert torch.equal(together[4:], draw_noise([6], 3, [generator(8)]))


def test_noise_is_standard_normal_in_float32():
    noise = draw_noise([20_000, 5_000], 4, [generator(0), generator(1)])
    assert noise.shape == (25_000, 4)
    assert noise.dtype == torch.float32
    torch.testing.assert_close(noise.mean(0), torch.zeros(4), rtol=0, atol=0.03)
    torch.testing.assert_close(noise.T.cov(), torch.eye(4), rtol=0, atol=0.03)


def test_every_image_has_a_generator_of_its_own():
    with pytest.raises(ValueError, match="shorter"):
        draw_noise([4, 6], 3, [generator(7)])


def test_a_sample_moves_with_all_it_holds():
    layout = Layout.of([(2, 2), (1, 3)])
    data, noise = noise_of(layout, 5), noise_of(layout, 5, first=2)
    sample = Flow().add_noise(data, layout, noise, torch.tensor([0.2, 0.7]))
    moved = sample.to(torch.device("meta"))
    for name in ("x_TC", "t_B", "data_TC", "noise_TC"):
        before, after = getattr(sample, name), getattr(moved, name)
        assert after.device.type == "meta"
        assert (after.shape, after.dtype) == (before.shape, before.dtype)
        assert torch.equal(getattr(sample.to(torch.device("cpu")), name), before)
    assert moved.layout.sizes == layout.sizes
    for name in ("size_B2", "pos_T2", "image_T", "cu_seqlens"):
        assert getattr(moved.layout, name).device.type == "meta"
        assert getattr(layout, name).device.type == "cpu"
