import numpy as np
import pytest
import torch

from conftest import randomized
from fitv2.autoencoder import Pixels
from fitv2.checkpoint import Card
from fitv2.config import Guidance, Sampling
from fitv2.errors import UserError
from fitv2.model import FiT
from fitv2.sampling.generate import Request, file_name, generate, packs_of

SIZES = [(2, 2), (1, 4), (3, 2), (2, 2)]


@pytest.fixture(scope="module")
def pixel_model():
    shape = {"depth": 2, "width": 32, "heads": 2, "patch_size": 4, "in_channels": 3, "num_classes": 5}
    return randomized(FiT(**shape)).eval()


def pictures(model, requests, solver=None, steps=4, **options):
    made = generate(model, Pixels(), requests, sampling=Sampling(solver, steps), **options)
    return {request: np.array(image) for request, image in made}


@pytest.fixture(scope="module")
def ddpm_model():
    shape = {"depth": 2, "width": 32, "heads": 2, "patch_size": 4, "in_channels": 3, "num_classes": 5}
    return randomized(FiT(**shape, path="ddpm", prediction="noise")).eval()


@pytest.mark.parametrize(
    "solver", ["heun", "euler", "dopri5", "euler-maruyama", "stochastic-heun", "ddpm", "ddim"]
)
def test_a_seed_gives_the_same_picture_in_any_company(pixel_model, ddpm_model, solver):
    if solver in ("ddpm", "ddim"):
        pixel_model = ddpm_model
    requests = [Request(i, size, seed=i) for i, size in enumerate(SIZES)]
    together = pictures(pixel_model, requests, solver=solver)
    backwards = pictures(pixel_model, requests[::-1], solver=solver, tokens_a_pack=6)
    for request in requests:
        alone = pictures(pixel_model, [request], solver=solver)[request]
        # Equal up to the rounding of sums whose order depends on the batch: one of 256 levels.
        for other in (together[request], backwards[request]):
            assert np.abs(alone.astype(int) - other).max() <= 1
            assert (alone != other).mean() < 0.01


def test_pictures_have_the_size_asked_for_and_differ(pixel_model):
    made = pictures(pixel_model, [Request(0, (2, 5), 0), Request(0, (2, 5), 1), Request(1, (2, 5), 0)])
    images = list(made.values())
    assert [image.shape for image in images] == [(8, 20, 3)] * 3
    assert (images[0] != images[1]).any()
    assert (images[0] != images[2]).any()


def test_same_call_same_bytes(pixel_model):
    requests = [Request(i, size, seed=i) for i, size in enumerate(SIZES)]
    first, second = pictures(pixel_model, requests), pictures(pixel_model, requests)
    assert all((first[request] == second[request]).all() for request in requests)


def test_solvers_agree_when_steps_are_fine(pixel_model):
    request = Request(1, (2, 2), 3)
    fine = [pictures(pixel_model, [request], solver, 200)[request] for solver in ("heun", "euler", "dopri5")]
    for other in fine[1:]:
        assert np.abs(fine[0].astype(int) - other).mean() < 2


@pytest.mark.parametrize("solver", ["euler-maruyama", "ddpm"])
def test_a_stochastic_picture_depends_on_its_seed_alone(pixel_model, ddpm_model, solver):
    model = ddpm_model if solver == "ddpm" else pixel_model
    one, other = Request(0, (2, 2), 0), Request(0, (2, 2), 1)
    first, again = (pictures(model, [one, other], solver) for _ in range(2))
    assert (first[one] == again[one]).all()
    assert (first[one] != first[other]).any()


def test_a_solver_that_does_not_fit_is_refused(pixel_model, ddpm_model):
    request = [Request(0, (1, 1), 0)]
    with pytest.raises(UserError, match="choose ddpm or ddim"):
        pictures(ddpm_model, request, "heun")
    with pytest.raises(UserError, match="unknown solver 'ddpm'"):
        pictures(pixel_model, request, "ddpm")
    with pytest.raises(UserError, match="a divisor of 1000"):
        pictures(ddpm_model, request, "ddim", 300)


def test_guidance_settings_change_the_picture(pixel_model):
    request = Request(0, (2, 2), 0)
    settings = (
        Guidance(3.0), Guidance(3.0, channels=1), Guidance(3.0, power=2.0), Guidance(3.0, interval=(0.3, 0.7))
    )  # fmt: skip
    made = [pictures(pixel_model, [request], guidance=each)[request] for each in settings]
    assert len({image.tobytes() for image in made}) == 4
    plain = pictures(pixel_model, [request], guidance=3.0)[request]
    assert (plain == made[0]).all()


def test_packs_are_filled_in_order():
    requests = [Request(0, (1, n), 0) for n in (3, 3, 9, 1, 1)]
    assert [[r.size[1] for r in batch] for batch in packs_of(requests, 6)] == [[3, 3], [9], [1, 1]]
    assert list(packs_of([], 6)) == []


def test_progress_reaches_one(pixel_model):
    seen = []
    requests = [Request(0, (2, 2), i) for i in range(4)]
    pictures(pixel_model, requests, tokens_a_pack=8, progress=seen.append)
    assert seen == sorted(seen)
    assert seen[-1] == pytest.approx(1)
    assert 0.5 in [round(share, 6) for share in seen]


def test_file_names_hold_label_size_and_seed():
    card = Card(("road sign/1", "C#", "C+"), "pixels", 16)
    names = [file_name(card, Request(label, (3, 6), 7), 16) for label in range(3)]
    assert names == ["road-sign-1_48x96_7.png", "C--1_48x96_7.png", "C--2_48x96_7.png"]


@pytest.mark.parametrize("solver", ["heun", "euler", "dopri5"])
def test_a_perfect_prediction_of_the_data_is_reached(solver):
    """Whatever the noise, a model that always predicts one colour gives exactly that colour."""
    shape = {"depth": 1, "width": 32, "heads": 2, "patch_size": 4, "in_channels": 3, "num_classes": 5}
    model = FiT(**shape, prediction="data").eval()
    torch.nn.init.constant_(model.head.out.bias, 0.2)
    for picture in pictures(model, [Request(0, (2, 3), 1)], solver=solver).values():
        assert (picture == round(1.2 * 127.5)).all()


def test_decoding_rounds_to_the_nearest_level():
    from fitv2.sampling.generate import decode

    levels = torch.arange(256).reshape(1, 1, 256).expand(3, 1, 256) / 127.5 - 1
    tokens = levels.permute(1, 2, 0)
    assert (np.array(decode([tokens], Pixels(), 1)[0])[0, :, 0] == np.arange(256)).all()
