"""Pictures as a start: what is kept is kept to the last bit, and noise stays noise."""

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import picture, randomized
from fitv2.autoencoder import load_autoencoder
from fitv2.checkpoint import Card
from fitv2.config import Guidance, Positions, Sampling
from fitv2.errors import UserError
from fitv2.model import FiT
from fitv2.pipeline import FiTPipeline
from fitv2.runtime.rng import generator
from fitv2.sampling.editing import Edit, between, noise_at_sizes, place, to_mask, to_pixels
from fitv2.tokens import patchify

SHAPE = {"depth": 2, "width": 32, "heads": 2, "patch_size": 4, "in_channels": 3, "num_classes": 2}
CARD = Card(("blue", "red"), "pixels", 16, 1.5)
QUIETLY = {"progress": lambda _: None}


def pipeline(**changes):
    return FiTPipeline.of(randomized(FiT(**SHAPE | changes)).eval(), CARD)


@pytest.fixture(scope="module")
def pipe():
    return pipeline()


def masked(width, height, box):
    mask = Image.new("L", (width, height))
    mask.paste(255, box)
    return mask


def array(image):
    return np.asarray(image).astype(int)


@pytest.mark.parametrize("solver", ["euler", "heun", "dopri5", "euler-maruyama"])
@pytest.mark.parametrize("changes", [{}, {"path": "gvp"}, {"prediction": "data"}], ids=str)
def test_what_is_not_masked_stays_bit_for_bit(solver, changes):
    image, mask = picture(18, 14), masked(18, 14, (3, 2, 11, 9))
    (made,) = pipeline(**changes).stream(
        1, generator=generator(0), image=image, mask_image=mask, sampling=Sampling(solver, steps=6), **QUIETLY
    )
    assert made.size == (18, 14)
    anew = array(mask) > 0
    assert np.array_equal(array(made)[~anew], array(image)[~anew])
    assert not np.array_equal(array(made)[anew], array(image)[anew])


def test_what_is_made_anew_depends_on_what_stays(pipe):
    mask = masked(16, 16, (0, 0, 16, 8))
    images = [picture(16, 16, seed) for seed in (0, 1)]
    made = [
        array(next(pipe.stream(1, generator=generator(0), image=image, mask_image=mask, **QUIETLY)))[:8]
        for image in images
    ]
    assert np.abs(made[0] - made[1]).max() > 2


def test_a_perfect_model_fills_in_what_was_there():
    """One that predicts this picture, whatever it sees."""
    image = picture(16, 16)
    pipe = pipeline(prediction="data")
    data_TC = patchify(to_pixels(image)[None], 4)[0].flatten(0, 1)
    pipe.transformer.forward = lambda x_TC, layout, t_B, condition: data_TC.repeat(len(layout), 1)
    (made,) = pipe.stream(
        0, generator=generator(3), image=image, mask_image=masked(16, 16, (0, 0, 9, 9)), **QUIETLY
    )
    assert np.array_equal(array(made), array(image))


def test_the_weaker_a_variation_the_nearer_it_stays(pipe):
    image = picture(16, 16)
    strengths = [0.05, 0.4, 1.0]
    made = list(pipe.stream(1, image=image, strength=strengths, generator=[generator(0)] * 3, **QUIETLY))
    far = [np.abs(array(each) - array(image)).mean() for each in made]
    assert far[0] < far[1] < far[2]
    (from_noise,) = pipe.stream(1, 16, 16, generator(1), **QUIETLY)
    (all_anew,) = pipe.stream(1, image=image, strength=1, generator=generator(1), **QUIETLY)
    assert np.array_equal(array(from_noise), array(all_anew))


def test_edits_and_others_together_are_as_alone(pipe):
    image, mask = picture(16, 12), masked(16, 12, (4, 0, 16, 12))
    wanted = {
        "image": [image, None, image, image], "mask_image": [mask, None, None, mask],
        "strength": [1.0, None, 0.5, 0.5], "height": 12, "width": 16,
    }  # fmt: skip
    together = list(pipe.stream(1, generator=[generator(i) for i in range(4)], **wanted, **QUIETLY))
    for i, made in enumerate(together):
        alone = {key: [value[i]] if isinstance(value, list) else value for key, value in wanted.items()}
        (again,) = pipe.stream(1, generator=[generator(i)], **alone, **QUIETLY)
        assert np.abs(array(made) - array(again)).max() <= 1


def test_a_masked_picture_beyond_the_trained_size_grows_around_what_stays(pipe):
    image, mask = picture(40, 24), masked(40, 24, (16, 0, 40, 24))
    grown, at_once = (
        next(
            pipe.stream(
                1, image=image, mask_image=mask, generator=generator(0), positions=positions, **QUIETLY
            )
        )
        for positions in (Positions(), Positions(restart=0))
    )
    for made in (grown, at_once):
        assert np.array_equal(array(made)[:, :16], array(image)[:, :16])
    assert not np.array_equal(array(grown), array(at_once))


def test_a_cell_of_the_latent_stays_if_all_its_pixels_do(tiny_vae):
    autoencoder = load_autoencoder(str(tiny_vae))
    cell = autoencoder.downsample
    mask = torch.zeros(4 * cell, 4 * cell, dtype=torch.bool)
    mask[cell, 0] = True  # one pixel of the second row's first cell
    known = Edit(torch.zeros(3, 4 * cell, 4 * cell), mask).known((2, 2), autoencoder, 2)
    assert known.shape == (4, 4 * autoencoder.channels)
    assert (~known).sum() == autoencoder.channels
    assert not known[0].all() and known[1:].all()


def test_a_picture_lies_on_a_canvas_and_the_mask_is_the_rest():
    image = picture(6, 4)
    canvas, mask = place(image, (10, 12), (3, 5))
    assert canvas.size == mask.size == (12, 10)
    anew = array(mask) > 0
    assert np.array_equal(array(canvas)[3:7, 5:11], array(image))
    assert not anew[3:7, 5:11].any() and anew.sum() == 120 - 24
    assert np.array_equal(array(canvas)[0, 5:11], array(image)[0])  # its border is repeated
    middle, _ = place(image, (10, 12))
    assert np.array_equal(array(middle)[3:7, 3:9], array(image))
    with pytest.raises(UserError, match="4x6 at 7,0 does not lie on a canvas of 10x12"):
        place(image, (10, 12), (7, 0))


def test_between_two_noises_the_variance_is_that_of_noise():
    first, second = (torch.randn(64, 64, 4, generator=generator(i)) for i in range(2))
    assert torch.allclose(between(first, second, 0.0), first, atol=1e-6)
    assert torch.allclose(between(first, second, 1.0), second, atol=1e-5)
    for share in (0.25, 0.5):
        assert abs(float(between(first, second, share).var()) - 1) < 0.03
    assert torch.equal(between(first, first, 0.3), first)


def test_one_noise_at_several_sizes_is_the_middle_of_one_field():
    square, wide, high = noise_at_sizes([(4, 4), (2, 6), (6, 2)], 5, generator(0))
    assert (square.shape, wide.shape, high.shape) == ((4, 4, 5), (2, 6, 5), (6, 2, 5))
    assert torch.equal(square[1:3], wide[:, 1:5])
    assert torch.equal(square[:, 1:3], high[1:5])


def test_latents_replace_what_the_generator_draws(pipe):
    noise = torch.randn(16, 48, generator=generator(5)).unflatten(0, (4, 4))
    (drawn,) = pipe.stream(1, 16, 16, [generator(5)], **QUIETLY)
    (given,) = pipe.stream(1, 16, 16, generator(6), latents=[noise], **QUIETLY)
    assert np.array_equal(array(drawn), array(given))
    with pytest.raises(UserError, match=r"`latents` are \(4, 4, 48\); this image takes \(2, 4, 48\)"):
        next(pipe.stream(1, 8, 16, latents=noise, **QUIETLY))


def test_a_picture_led_to_noise_comes_back(pipe):
    images = [picture(16, 16), picture(12, 8, 1)]
    fine = Sampling("rk4", steps=200)
    latents = pipe.invert(images, [0, 1], sampling=fine)
    assert [noise.shape for noise in latents] == [(4, 4, 48), (2, 3, 48)]
    back = pipe.stream(
        [0, 1], [16, 8], [16, 12], latents=latents, guidance=Guidance(1.0), sampling=fine, **QUIETLY
    )
    for image, made in zip(images, back, strict=True):
        assert np.abs(array(made) - array(image)).max() <= 2


def test_a_ddpm_edits_nothing():
    ddpm = pipeline(path="ddpm", prediction="noise")
    with pytest.raises(UserError, match="only models with a flow"):
        next(ddpm.stream(1, image=picture(16, 16), **QUIETLY))
    with pytest.raises(UserError, match="only models with a flow"):
        ddpm.invert(picture(16, 16), 1)


@pytest.mark.parametrize(("wanted", "said"), [
    ({"image": picture(8, 8), "strength": 0}, "`strength` is 0; it must be"),
    ({"image": picture(8, 8), "strength": 1.5}, "`strength` is 1.5; it must be"),
    ({"image": picture(8, 8), "mask_image": masked(8, 8, (0, 0, 0, 0))}, "`mask_image` is black"),
    ({"image": picture(8, 8), "mask_image": masked(8, 9, (0, 0, 8, 8))}, "`mask_image` is 9x8, `image` 8x8"),
    ({"strength": 0.5}, "`mask_image` and `strength` go with `image`"),
])  # fmt: skip
def test_what_does_not_fit_is_refused(pipe, wanted, said):
    with pytest.raises(UserError, match=said):
        next(pipe.stream(1, **wanted, **QUIETLY))


def test_what_is_transparent_becomes_white():
    clear = Image.new("RGBA", (2, 2), (255, 0, 0, 0))
    assert torch.equal(to_pixels(clear), torch.ones(3, 2, 2))
    assert to_mask(Image.new("L", (2, 2), 127)).any().item() is False


def test_a_mask_is_black_where_it_is_transparent_and_may_be_of_zeros_and_ones():
    strokes = Image.new("RGBA", (4, 2), (255, 255, 255, 0))
    strokes.paste((255, 255, 255, 255), (0, 0, 1, 2))
    expected = torch.tensor([[True, False, False, False]] * 2)
    assert torch.equal(to_mask(strokes), expected)
    assert torch.equal(to_mask(Image.fromarray(expected.numpy().astype("uint8"))), expected)


@pytest.mark.parametrize("mode", ["F", "I"])
def test_pixels_of_32_bits_are_refused(mode):
    with pytest.raises(UserError, match="32 bits a pixel has no known range"):
        to_pixels(Image.new(mode, (2, 2), 200))
