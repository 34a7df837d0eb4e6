"""Images that are made together: sorted inside, in order outside."""

import pytest
import torch

from conftest import picture, randomized
from fitv2.autoencoder import Pixels
from fitv2.conditioning import Condition
from fitv2.config import Guidance, Sampling
from fitv2.errors import UserError
from fitv2.model import FiT
from fitv2.runtime.rng import generator
from fitv2.sampling.editing import Edit, to_pixels
from fitv2.sampling.growth import Growth
from fitv2.sampling.pack import Pack, start_noise
from fitv2.sampling.requests import Request
from fitv2.tokens import Layout

SHAPE = {"depth": 1, "width": 32, "heads": 2, "patch_size": 4, "in_channels": 3, "num_classes": 5}
SIZES = [(16, 16), (4, 8), (9, 13), (8, 4)]


@pytest.fixture(scope="module")
def model():
    return randomized(FiT(**SHAPE)).eval()


def pack(model, sizes=SIZES, **given):
    shown = [Condition.of(label=torch.tensor([i])) for i in range(len(sizes))]
    requests = [Request(shown[i], size, generator(i), **given) for i, size in enumerate(sizes)]
    return Pack(model, Pixels(), requests)


def test_it_is_sorted_by_length_and_gives_the_order_of_the_requests(model):
    several = pack(model)
    assert several.layout.lengths == (2, 2, 12, 16)
    images = several.make(Guidance(1.5), Sampling(steps=2), None, lambda _: None)
    assert [image.shape[1:] for image in images] == SIZES


def test_guidance_leads_away_from_nothing_unless_one_says_otherwise(model):
    assert pack(model).negative is None
    away = pack(model, negative=Condition.of(label=torch.tensor([4]))).negative
    assert away.values["label"].tolist() == [4] * 4


def test_what_is_given_is_the_picture_on_its_whole_grid(model):
    pixels = to_pixels(picture(13, 9))
    (given,) = [pack(model, [(9, 13)], edit=Edit(pixels, strength=0.25)).given(Layout.of([(3, 4)]))]
    assert (given.time, given.data_TC.shape) == (0.75, (12, 48))
    assert not given.known_TC.any()
    assert pack(model).given(Layout.of([(1, 1)])) is None


def test_growth_is_seen_at_the_full_size(model):
    seen = []
    pack(model, [(32, 32)]).make(
        Guidance(1.0), Sampling("euler", 2), Growth(16, 0.5), lambda _: None, lambda show: seen.append(show())
    )
    assert {tuple(image.shape) for (image,) in seen} == {(3, 32, 32)}


def test_noise_of_ones_own_has_the_shape_of_the_grid():
    layout, own = Layout.of([(1, 2), (2, 2)]), torch.randn(2, 2, 3)
    noise_TC = start_noise(layout, 3, [generator(0), generator(1)], [None, own])
    assert torch.equal(noise_TC[2:], own.flatten(0, 1))
    assert torch.equal(noise_TC[:2], torch.randn(2, 3, generator=generator(0)))
    with pytest.raises(UserError, match="`latents` are"):
        start_noise(layout, 3, [generator(0), generator(1)], [own, None])
