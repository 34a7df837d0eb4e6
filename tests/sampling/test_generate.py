import numpy as np
import pytest
import torch

from conftest import randomized
from fitv2.autoencoder import Pixels
from fitv2.conditioning import Condition
from fitv2.config import Guidance, Sampling
from fitv2.errors import UserError
from fitv2.model import FiT
from fitv2.runtime.rng import generator
from fitv2.sampling.generate import cut_into_packs, generate
from fitv2.sampling.outputs import to_image
from fitv2.sampling.requests import Request

UNIT = 4  # pixels a token of these models
SIZES = [(2, 2), (1, 4), (3, 2), (2, 2)]
SHAPE = {"depth": 2, "width": 32, "heads": 2, "patch_size": UNIT, "in_channels": 3, "num_classes": 5}


@pytest.fixture(scope="module")
def pixel_model():
    return randomized(FiT(**SHAPE)).eval()


@pytest.fixture(scope="module")
def ddpm_model():
    return randomized(FiT(**SHAPE, path="ddpm", prediction="noise")).eval()


def request(label, pixels, seed):
    return Request(Condition.of(label=torch.tensor([label])), pixels, generator(seed))


def tensors(model, wanted, solver=None, steps=4, guidance=1.5, **options):
    """What is made of (label, grid or pixels, seed), in order."""
    chosen = guidance if isinstance(guidance, Guidance) else Guidance(guidance)
    requests = [
        request(label, (rows * UNIT, columns * UNIT), seed) for label, (rows, columns), seed in wanted
    ]
    return list(generate(model, Pixels(), requests, chosen, Sampling(solver, steps), **options))


def pictures(model, wanted, *arguments, **options):
    """The same as images of 256 levels, by what was wanted."""
    made = tensors(model, wanted, *arguments, **options)
    return {one: np.array(to_image(pixels)) for one, pixels in zip(wanted, made, strict=True)}


@pytest.mark.parametrize(
    "solver", ["heun", "euler", "dopri5", "euler-maruyama", "stochastic-heun", "ddpm", "ddim"]
)
def test_a_seed_gives_the_same_picture_in_any_company(pixel_model, ddpm_model, solver):
    if solver in ("ddpm", "ddim"):
        pixel_model = ddpm_model
    wanted = [(i, size, i) for i, size in enumerate(SIZES)]
    together = pictures(pixel_model, wanted, solver=solver)
    backwards = pictures(pixel_model, wanted[::-1], solver=solver, tokens_per_pack=6)
    for one in wanted:
        alone = pictures(pixel_model, [one], solver=solver)[one]
        # Equal up to the rounding of sums whose order depends on the batch: one of 256 levels.
        for other in (together[one], backwards[one]):
            assert np.abs(alone.astype(int) - other).max() <= 1
            assert (alone != other).mean() < 0.01


def test_pictures_have_the_size_asked_for_and_differ(pixel_model):
    images = list(pictures(pixel_model, [(0, (2, 5), 0), (0, (2, 5), 1), (1, (2, 5), 0)]).values())
    assert [image.shape for image in images] == [(8, 20, 3)] * 3
    assert (images[0] != images[1]).any()
    assert (images[0] != images[2]).any()


def test_any_size_is_the_middle_of_the_next_larger_grid(pixel_model):
    """Exactly so many pixels, as many cut on either side, of the image that the whole grid would be."""
    sampling, guidance = Sampling(steps=4), Guidance(1.5)
    sizes = [(8, 12), (7, 11), (5, 9), (6, 10)]
    requests = [request(0, pixels, 3) for pixels in sizes]
    whole, *cropped = generate(pixel_model, Pixels(), requests, guidance, sampling)
    assert whole.shape == (3, 8, 12)
    for pixels, (height, width), cut in zip(cropped, sizes[1:], ((0, 0), (1, 1), (1, 1)), strict=True):
        assert pixels.shape == (3, height, width)
        expected = whole[:, cut[0] : cut[0] + height, cut[1] : cut[1] + width]
        torch.testing.assert_close(pixels, expected, rtol=0, atol=1e-3)
    assert [one.grid(UNIT) for one in requests] == [(2, 3)] * 4
    assert request(0, (1, 9), 0).grid(UNIT) == (1, 3)


def test_same_call_same_bytes(pixel_model):
    wanted = [(i, size, i) for i, size in enumerate(SIZES)]
    first, second = tensors(pixel_model, wanted), tensors(pixel_model, wanted)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_solvers_agree_when_steps_are_fine(pixel_model):
    one = (1, (2, 2), 3)
    fine = [pictures(pixel_model, [one], solver, 200)[one] for solver in ("heun", "euler", "dopri5")]
    for other in fine[1:]:
        assert np.abs(fine[0].astype(int) - other).mean() < 2


@pytest.mark.parametrize("solver", ["euler-maruyama", "ddpm"])
def test_a_stochastic_picture_depends_on_its_seed_alone(pixel_model, ddpm_model, solver):
    model = ddpm_model if solver == "ddpm" else pixel_model
    one, other = (0, (2, 2), 0), (0, (2, 2), 1)
    first, again = (pictures(model, [one, other], solver) for _ in range(2))
    assert (first[one] == again[one]).all()
    assert (first[one] != first[other]).any()


def test_a_solver_that_does_not_fit_is_refused(pixel_model, ddpm_model):
    one = [(0, (1, 1), 0)]
    with pytest.raises(UserError, match="choose ddpm or ddim"):
        tensors(ddpm_model, one, "heun")
    with pytest.raises(UserError, match="unknown solver 'ddpm'"):
        tensors(pixel_model, one, "ddpm")
    with pytest.raises(UserError, match="a divisor of 1000"):
        tensors(ddpm_model, one, "ddim", 300)


def test_guidance_settings_change_the_picture(pixel_model):
    one = (0, (2, 2), 0)
    settings = (
        Guidance(3.0), Guidance(3.0, guidance_channels=1), Guidance(3.0, guidance_power=2.0),
        Guidance(3.0, guidance_interval=(0.3, 0.7)),
    )  # fmt: skip
    made = [pictures(pixel_model, [one], guidance=each)[one] for each in settings]
    assert len({image.tobytes() for image in made}) == 4
    plain = pictures(pixel_model, [one], guidance=3.0)[one]
    assert (plain == made[0]).all()


def test_packs_are_filled_in_order():
    requests = [request(0, (UNIT, n * UNIT), 0) for n in (3, 3, 9, 1, 1)]
    packs = [[one.grid(UNIT)[1] for one in batch] for batch in cut_into_packs(requests, UNIT, 6)]
    assert packs == [[3, 3], [9], [1, 1]]
    assert list(cut_into_packs([], UNIT, 6)) == []


def test_a_size_that_is_no_multiple_fills_a_pack_as_its_grid_does():
    requests = [request(0, (UNIT, n), 0) for n in (9, 12, 33, 1, 4)]
    packs = [[one.pixels[1] for one in batch] for batch in cut_into_packs(requests, UNIT, 6)]
    assert packs == [[9, 12], [33], [1, 4]]


def test_progress_reaches_one(pixel_model):
    seen = []
    tensors(pixel_model, [(0, (2, 2), i) for i in range(4)], tokens_per_pack=8, progress=seen.append)
    assert seen == sorted(seen)
    assert seen[-1] == pytest.approx(1)
    assert 0.5 in [round(share, 6) for share in seen]


@pytest.mark.parametrize("solver", ["heun", "euler", "dopri5"])
def test_a_perfect_prediction_of_the_data_is_reached(solver):
    """Whatever the noise, a model that always predicts one colour gives exactly that colour."""
    model = FiT(**SHAPE | {"depth": 1}, prediction="data").eval()
    torch.nn.init.constant_(model.head.out.bias, 0.2)
    for picture in pictures(model, [(0, (2, 3), 1)], solver=solver).values():
        assert (picture == round(1.2 * 127.5)).all()


def test_what_the_images_become_is_seen_on_the_way(pixel_model, ddpm_model):
    """At the last evaluation of Euler's method it is the image."""
    wanted, seen = [(i, size, i) for i, size in enumerate(SIZES)], []

    def watch(first, show):
        seen.append((first, show()))

    made = tensors(pixel_model, wanted, solver="euler", tokens_per_pack=8, watch=watch)
    assert [first for first, _ in seen] == [0] * 4 + [2] * 4 + [3] * 4
    for first, last in seen[3::4]:
        for one, other in zip(last, made[first:], strict=False):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=0)
    seen.clear()
    tensors(ddpm_model, wanted[:1], solver="ddim", watch=watch)
    assert not seen


def test_what_watches_can_end_it(pixel_model):
    def watch(first, show):
        raise InterruptedError

    with pytest.raises(InterruptedError):
        tensors(pixel_model, [(0, (2, 2), 0)], watch=watch)


def test_an_image_that_is_not_finite_is_an_error():
    model = FiT(**SHAPE).eval()
    torch.nn.init.constant_(model.head.out.bias, torch.nan)
    with pytest.raises(FloatingPointError, match="not finite"):
        tensors(model, [(0, (1, 1), 0)])
