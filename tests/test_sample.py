import numpy as np
import pytest
import torch

from conftest import randomized
from fitv2.autoencoder import Pixels
from fitv2.checkpoint import Card
from fitv2.model import FiT
from fitv2.sample import Request, file_name, generate, packs_of

SIZES = [(2, 2), (1, 4), (3, 2), (2, 2)]


@pytest.fixture(scope="module")
def pixel_model():
    shape = {"depth": 2, "width": 32, "heads": 2, "patch_size": 4, "in_channels": 3, "num_classes": 5}
    return randomized(FiT(**shape)).eval()


def pictures(model, requests, **options):
    return {r: np.array(image) for r, image in generate(model, Pixels(), requests, steps=4, **options)}


@pytest.mark.parametrize("solver", ["heun", "euler", "dopri5"])
def test_a_seed_gives_the_same_picture_in_any_company(pixel_model, solver):
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
    fine = [np.array(next(generate(pixel_model, Pixels(), [request], solver=solver, steps=200))[1])
            for solver in ("heun", "euler", "dopri5")]  # fmt: skip
    for other in fine[1:]:
        assert np.abs(fine[0].astype(int) - other).mean() < 2


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
    from fitv2.sample import decode

    levels = torch.arange(256).reshape(1, 1, 256).expand(3, 1, 256) / 127.5 - 1
    tokens = levels.permute(1, 2, 0)
    assert (np.array(decode([tokens], Pixels(), 1)[0])[0, :, 0] == np.arange(256)).all()
