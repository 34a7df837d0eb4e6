import pytest
import torch
from torch.nn.functional import interpolate

from conftest import randomized
from fitv2.autoencoder import Pixels
from fitv2.conditioning import Condition
from fitv2.config import Guidance, Sampling
from fitv2.errors import UserError
from fitv2.model import FiT
from fitv2.runtime.rng import generator
from fitv2.sampling.generate import generate
from fitv2.sampling.growth import Growth, enlarge, within
from fitv2.sampling.requests import Request

SHAPE = {"depth": 1, "width": 32, "heads": 2, "patch_size": 2, "in_channels": 3, "num_classes": 2}


@pytest.mark.parametrize(
    ("grid", "expected"),
    [((10, 10), (8, 8)), ((16, 16), (8, 8)), ((7, 14), (5, 10)), ((30, 10), (12, 4)), ((1, 200), (1, 64))],
)
def test_the_first_size_has_the_proportions_and_no_more_tokens_than_trained_on(grid, expected):
    rows, columns = within(grid, 64)
    assert (rows, columns) == expected
    assert rows * columns <= 64


def test_enlarging_is_bicubic_and_keeps_what_is_even():
    torch.testing.assert_close(enlarge(torch.full((3, 4, 6), 0.5), (8, 12)), torch.full((3, 8, 12), 0.5))
    made = enlarge(torch.linspace(0, 1, 8).expand(3, 8, 8), (16, 16))
    wide = torch.linspace(-1 / 28, 29 / 28, 16).expand(3, 16, 16)
    torch.testing.assert_close(made[..., 4:-4], wide[..., 4:-4], atol=0.01, rtol=0)


def requests(count):
    """Images of 3 by 8 and 6 by 6 tokens."""
    sizes = [(6, 16), (12, 12)][:count]
    return [
        Request(Condition.of(label=torch.tensor([i])), size, generator(i)) for i, size in enumerate(sizes)
    ]


@pytest.mark.parametrize("solver", ["heun", "dopri5", "euler-maruyama"])
def test_a_late_restart_stays_near_the_enlarged_image_and_an_early_one_does_not(solver):
    model, sampling = randomized(FiT(**SHAPE)).eval(), Sampling(solver, steps=8)

    def made(growth, wanted):
        return list(generate(model, Pixels(), wanted, Guidance(2.0), sampling, growth=growth))

    small = [Request(one.condition, (8, 8), one.generator) for one in requests(2)[1:]]
    (first,) = made(None, small)
    enlarged = interpolate(first[None], (12, 12), mode="bicubic", align_corners=False)[0].clamp(-1, 1)
    near, far = (
        float((made(Growth(16, time), requests(2))[1] - enlarged).norm() / enlarged.norm())
        for time in (0.95, 0.3)
    )
    assert near < far / 2


def test_only_images_beyond_are_grown_and_each_is_as_alone():
    model = randomized(FiT(**SHAPE)).eval()
    few = [Request(Condition.of(label=torch.tensor([1])), (4, 4), generator(7))]

    def made(growth, wanted):
        return list(generate(model, Pixels(), wanted, Guidance(2.0), Sampling(steps=3), growth=growth))

    growth = Growth(16, 0.5)
    together = made(growth, [*requests(1), *few, *requests(2)[1:]])
    few = [Request(few[0].condition, (4, 4), generator(7))]
    torch.testing.assert_close(together[1], made(None, few)[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(together[0], made(growth, requests(1))[0], atol=1e-5, rtol=0)
    assert not torch.allclose(together[0], made(None, requests(1))[0], atol=1e-2)


@pytest.mark.parametrize(("solver", "last"), [("heun", 1.0), ("euler-maruyama", 0.5)])
def test_a_restart_behind_the_solver_s_last_time_is_refused(solver, last):
    own = {"last_step_size": 0.5} if solver == "euler-maruyama" else {}
    model, sampling = randomized(FiT(**SHAPE)).eval(), Sampling(solver, steps=4, **own)
    with pytest.raises(UserError, match=f"with this solver it must be below {last:g}"):
        list(generate(model, Pixels(), requests(1), Guidance(1.0), sampling, growth=Growth(16, last)))


def test_a_ddpm_is_not_grown():
    model = randomized(FiT(**SHAPE, path="ddpm", prediction="noise", objective="ddpm")).eval()
    with pytest.raises(UserError, match="only models with a flow"):
        list(generate(model, Pixels(), requests(1), Guidance(1.0), Sampling(steps=2), growth=Growth(16, 0.5)))
