"""What a pipeline is called with, as requests."""

import numpy as np
import pytest
import torch
from PIL import Image

from fitv2.conditioning import Condition
from fitv2.errors import UserError
from fitv2.runtime.rng import generator
from fitv2.sampling.requests import STRENGTH, Wanted, broadcast, listed


def conditions(labels, prompts):
    return [Condition.of(label=torch.tensor([label or 0])) for label in labels]


def requests(count=None, **wanted):
    rngs = None if count is None else [generator(i) for i in range(count)]
    return Wanted(**wanted).requests(rngs, conditions, side=32, unit=8)


def test_single_values_serve_all_images():
    found = requests(3, class_labels=[0, 1, 2], height=16)
    assert [request.pixels for request in found] == [(16, 32)] * 3
    assert [int(request.condition.values["label"]) for request in found] == [0, 1, 2]


def test_a_picture_gives_the_size_and_a_size_scales_it():
    image, mask = Image.new("RGB", (24, 16), "red"), Image.new("L", (24, 16), "white")
    alone, larger = requests(2, image=image, mask_image=[None, mask], height=[None, 32], width=[None, 8])
    assert (alone.pixels, alone.edit.strength, alone.edit.mask) == ((16, 24), STRENGTH, None)
    assert (larger.pixels, larger.edit.strength) == ((32, 8), 1.0)
    assert larger.edit.pixels.shape == (3, 32, 8)
    assert larger.edit.mask.all()


def test_one_generator_gives_each_image_its_own_seed():
    first, second = Wanted(class_labels=[0, 0]).requests(generator(1), conditions, 32, 8)
    assert first.generator.initial_seed() != second.generator.initial_seed()


def test_generators_alone_say_how_many_images_there_are():
    found = requests(3, class_labels=1, height=8, width=8)
    seeds = [generator(i).initial_seed() for i in range(3)]
    assert [request.generator.initial_seed() for request in found] == seeds
    with pytest.raises(UserError, match="2 generators for 3 images"):
        requests(2, class_labels=[0, 1, 2])


@pytest.mark.parametrize(("given", "said"), [
    (42, "`generator` is a torch.Generator or a list of them, not a int"),
    ([1, 2], "2 generators for 2 images"),
])  # fmt: skip
def test_what_is_no_generator_is_refused(given, said):
    with pytest.raises(UserError, match=said):
        Wanted(class_labels=[0, 0]).requests(given, conditions, 32, 8)


def test_latents_of_one_image_are_one_value():
    assert len(listed(torch.zeros(2, 3, 4))) == 1
    assert len(listed(torch.zeros(3))) == 3
    assert broadcast(1, a=[1, 2], b="x") == [[1, 2], ["x", "x"]]


@pytest.mark.parametrize(("wanted", "said"), [
    ({"class_labels": [0, 1], "height": [8, 8, 8]}, "there are 2 of class_labels, 3 of height: give one"),
    ({"height": 100_000}, "`size` is 100000"),
    ({"height": True}, "height is True"),
    ({"height": "64"}, "height is 64; it must be a whole number"),
    ({"image": torch.zeros(3, 8, 8)}, "a picture is a PIL image, not a Tensor"),
    ({"image": Image.new("RGB", (8, 8)), "mask_image": np.zeros((8, 8))}, "a PIL image, not a ndarray"),
    ({"prompt": 5}, "a prompt is a text, not a int"),
    ({"height": 16_000, "width": 16_000}, "an image of 16000x16000 pixels has 4000000 tokens"),
])  # fmt: skip
def test_what_does_not_fit_is_refused(wanted, said):
    with pytest.raises(UserError, match=said):
        requests(**wanted)
