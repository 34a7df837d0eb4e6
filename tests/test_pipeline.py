import json
import sys
import warnings

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from conftest import randomized
from fitv2.autoencoder import DiffusersAutoencoder
from fitv2.checkpoint import Card, save_model
from fitv2.config import RESTART, Guidance, Positions, Sampling
from fitv2.errors import UserError
from fitv2.model import FiT
from fitv2.pipeline import FiTPipeline
from fitv2.runtime.rng import generator

LABELS = ("cat", "dog", "flags", "fish", "frog")
QUICK = {"sampling": Sampling(steps=2), "progress": lambda _: None}


def seeds(count):
    return [generator(i) for i in range(count)]


@pytest.fixture(scope="module")
def pipe():
    """A tiny model on pixels, four of them a token."""
    shape = {"depth": 1, "width": 32, "heads": 2, "patch_size": 4, "in_channels": 3, "num_classes": 5}
    return FiTPipeline.of(randomized(FiT(**shape)).eval(), Card(LABELS, "pixels", 16, 2.0))


def test_images_have_exactly_the_sizes_that_were_asked_for(pipe):
    images = pipe(["flags", 3], [13, 20], [9, 33], generator=seeds(2), **QUICK).images
    assert [(image.height, image.width) for image in images] == [(13, 9), (20, 33)]


def test_what_is_cropped_is_the_middle_of_the_next_larger_grid(pipe):
    whole, part = (
        np.asarray(pipe(1, height, width, generator=seeds(1), **QUICK).images[0])
        for height, width in ((16, 12), (13, 10))
    )
    assert np.array_equal(part, whole[1:14, 1:11])


def test_an_image_is_the_same_in_any_company(pipe):
    together = pipe([0, 1, 2], [8, 16, 8], 12, generator=seeds(3), **QUICK).images
    alone = pipe(1, 16, 12, generator=generator(1), **QUICK)
    again = pipe(1, 16, 12, generator=[generator(1)], tokens_per_pack=1, **QUICK).images
    assert np.abs(np.asarray(together[1], int) - np.asarray(again[0], int)).max() <= 1
    assert len(alone.images) == 1


def test_only_images_of_more_tokens_than_trained_on_grow(pipe):
    """Of 16; also where an image beyond them is made beside it."""

    def make(**options):
        made = pipe(
            1, [8, 24], [32, 24], generator=seeds(2), **QUICK, **options
        ).images  # 2 by 8 tokens, 6 by 6
        return [np.asarray(image, int) for image in made]

    by_itself, at_once = make(), make(positions=Positions(restart=0))
    asked = make(positions=Positions("none", restart=RESTART))
    assert np.abs(by_itself[0] - at_once[0]).max() <= 1
    assert np.abs(by_itself[1] - at_once[1]).max() > 1
    assert np.abs(by_itself[1] - asked[1]).max() <= 1


def test_a_model_that_scales_its_positions_grows_with_them_and_a_ddpm_does_not_grow():
    shape = {"depth": 1, "width": 32, "heads": 2, "patch_size": 4, "in_channels": 3, "num_classes": 5}
    own = {"extrapolation": "pi", "train_side": 4}
    scaling = FiTPipeline.of(randomized(FiT(**shape, rope=own)).eval(), Card(LABELS, "pixels", 16, 2.0))
    ddpm = FiT(**shape, path="ddpm", prediction="noise", objective="ddpm")
    ddpm = FiTPipeline.of(randomized(ddpm).eval(), Card(LABELS, "pixels", 16, 2.0))

    def same(pipe, one, other, **options):
        made = [
            np.asarray(pipe(1, 24, 24, generator=seeds(1), positions=positions, **options).images[0], int)
            for positions in (one, other)
        ]
        return np.abs(made[0] - made[1]).max() <= 1

    assert same(scaling, Positions(), Positions("pi", restart=RESTART), **QUICK)
    assert not same(scaling, Positions(), Positions("pi"), **QUICK)
    quick = {"sampling": Sampling("ddim", steps=2), "progress": lambda _: None}
    assert same(ddpm, Positions(), Positions("none"), **quick)
    with pytest.raises(UserError, match="not for a DDPM"):
        ddpm(1, 24, 24, generator=seeds(1), positions=Positions(restart=0.5), **quick)


def test_single_values_serve_all_and_defaults_are_the_trained_square(pipe):
    images = pipe(["cat", "dog", None], generator=torch.Generator().manual_seed(1), **QUICK).images
    assert [(image.height, image.width) for image in images] == [(16, 16)] * 3


def test_one_generator_gives_every_image_a_seed_of_its_own(pipe):
    def make():
        return pipe(
            [1, 1], 8, 8, generator=torch.Generator().manual_seed(5), output_type="np", **QUICK
        ).images

    first, second = make(), make()
    assert np.array_equal(first, second)
    assert not np.array_equal(first[0], first[1])


def test_outputs_come_as_asked(pipe):
    arrays = pipe([0, 1], 8, 12, output_type="np", generator=seeds(2), **QUICK).images
    assert arrays.shape == (2, 8, 12, 3)
    assert 0 <= arrays.min() <= arrays.max() <= 1
    (tensors,) = pipe([0, 1], 8, 12, output_type="pt", return_dict=False, generator=seeds(2), **QUICK)
    assert torch.equal(tensors, torch.from_numpy(arrays).permute(0, 3, 1, 2))
    mixed = pipe([0, 1], [8, 12], 8, output_type="np", generator=seeds(2), **QUICK).images
    assert [image.shape for image in mixed] == [(8, 8, 3), (12, 8, 3)]


def test_guidance_steps_and_positions_change_the_image(pipe):
    def make(**options):
        images = pipe("cat", 24, 24, generator=seeds(1), progress=lambda _: None, output_type="np", **options)
        return images.images

    plain = make(num_inference_steps=2)
    assert np.array_equal(plain, make(num_inference_steps=2, guidance_scale=2.0))  # the card's
    for options in (
        {"num_inference_steps": 3},
        {"num_inference_steps": 2, "guidance_scale": 5.0},
        {"num_inference_steps": 2, "guidance": Guidance(2.0, guidance_interval=(0.0, 0.3))},
        {"num_inference_steps": 2, "positions": Positions("ntk")},
        {"num_inference_steps": 2, "sampling": Sampling(solver="euler")},
    ):
        assert not np.array_equal(plain, make(**options)), options


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("flgs", 8, 8), "unknown label 'flgs': did you mean flags"),
        ((5, 8, 8), "unknown label 5: numbers go from 0 to 4"),
        ((0, 0, 8), "height is 0"),
        ((0, 8, 8.5), "width is 8.5; it must be a whole number"),
        (([0, 1], [8, 8, 8], 8), "there are 2 of class_labels, 3 of height, 1 of width: give"),
        (([], 8, 8), "there are 0 of class_labels, 1 of height, 1 of width: give"),
    ],
)
def test_wrong_requests_are_refused(pipe, arguments, said):
    with pytest.raises(UserError, match=said):
        pipe(*arguments)


def test_wrong_options_are_refused(pipe):
    with pytest.raises(UserError, match="did you mean pil"):
        pipe(0, 8, 8, output_type="pill")
    with pytest.raises(UserError, match="3 generators for 2 images"):
        pipe([0, 1], 8, 8, generator=seeds(3))
    with pytest.raises(UserError, match="without `extrapolation`"):
        pipe(0, 8, 8, positions=Positions(train_side=4))


def test_an_image_that_is_not_finite_is_an_error(pipe):
    broken = FiT(**pipe.transformer.config).eval()
    with torch.no_grad():
        broken.head.out.bias.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="not finite"):
        FiTPipeline.of(broken, pipe.card)(0, 8, 8, **QUICK)


def test_a_folder_is_opened_by_its_name(pipe, tmp_path):
    save_model(pipe.transformer, pipe.card, tmp_path / "model")
    opened = FiTPipeline.from_pretrained(tmp_path / "model")
    assert opened.card == pipe.card
    images = [p("dog", 9, 8, generator=seeds(1), output_type="np", **QUICK).images for p in (pipe, opened)]
    assert np.array_equal(*images)
    assert FiTPipeline.from_pretrained("clipart").card.labels[0] == "arrows"
    with pytest.raises(UserError, match="unknown model 'clipat': did you mean clipart"):
        FiTPipeline.from_pretrained("clipat")


def test_it_is_saved_and_opened_as_diffusers_does(tiny_vae, tmp_path):
    shape = {"depth": 1, "width": 32, "heads": 2, "patch_size": 2, "in_channels": 4, "num_classes": 5}
    vae = AutoencoderKL.from_pretrained(tiny_vae)
    before = FiTPipeline.of(
        randomized(FiT(**shape)).eval(), Card(LABELS, "vae", 4, 3.0), DiffusersAutoencoder(vae, "vae")
    )
    before.save_pretrained(tmp_path / "pipe")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        after = FiTPipeline.from_pretrained(tmp_path / "pipe")
    assert (after.card.labels, after.card.guidance, after.unit) == (LABELS, 3.0, 16)
    images = [
        p("fish", 20, 33, generator=seeds(1), output_type="np", **QUICK).images for p in (before, after)
    ]
    assert np.array_equal(*images)
    assert images[0].shape == (1, 20, 33, 3)


@pytest.mark.parametrize(
    "change",
    [
        {"transformer": ["antigravity", "FiT"]},
        {"vae": ["os", "system"]},
        {"scheduler": ["diffusers", "DDIMScheduler"]},
        {"_class_name": "StableDiffusionPipeline"},
        {"_class_name": ["evil", "Pipeline"]},
    ],
)
def test_a_folder_has_nothing_imported_but_our_parts(tmp_path, change):
    FiTPipeline.from_pretrained("clipart").save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps(index | change))
    with pytest.raises(UserError, match=r"which is none of this pipeline|is that of another pipeline"):
        FiTPipeline.from_pretrained(tmp_path)
    assert "antigravity" not in sys.modules


def test_arguments_by_the_names_of_diffusers(pipe, caplog):
    def made(**options):
        options = QUICK | {"generator": [generator(0)]} | options
        return np.asarray(pipe(1, 16, 24, **options).images[0], int)

    guided = made(guidance_interval=(0.0, 0.4))
    assert np.array_equal(guided, made(guidance=Guidance(2.0, guidance_interval=(0.0, 0.4))))
    assert not np.array_equal(guided, made())
    scaled = made(extrapolation="ntk")
    assert np.array_equal(scaled, made(positions=Positions("ntk")))
    made()
    assert "16x24: more than the 16 tokens trained on; positions are left as they are; grown" in caplog.text
    caplog.clear()
    noise = torch.randn(4, 6, 48, generator=generator(1))
    made(latents=noise)  # is made at once
    assert caplog.text.endswith("positions are left as they are\n")
    with pytest.raises(UserError, match="`restart` is for images that grow"):
        made(latents=noise, positions=Positions(restart=0.5))
    with pytest.raises(UserError, match=r"`num_inference_steps` is 2\.5"):
        made(num_inference_steps=2.5)


def test_no_guidance_may_be_zero_as_with_diffusers(pipe):
    plain, none = (
        pipe(1, 16, 16, generator=seeds(1), guidance_scale=scale, **QUICK).images[0].tobytes()
        for scale in (1.0, 0.0)
    )
    assert plain == none


def test_a_name_that_neither_disk_nor_hub_knows_is_one_line(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="there is no folder runs/missing here, and the hub does not give it"):
        FiTPipeline.from_pretrained("runs/missing")


def test_what_was_allowed_stays_allowed(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    assert FiTPipeline.from_pretrained(tmp_path, allow_download=True).allow_download
    assert not FiTPipeline.from_pretrained(tmp_path).allow_download


def test_a_shipped_model_opens_in_another_dtype_as_a_saved_one_does(tmp_path):
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler()
    shipped = FiTPipeline.from_pretrained("emoji", dtype=torch.bfloat16, scheduler=scheduler)
    assert shipped.scheduler is scheduler
    shipped.save_pretrained(tmp_path)
    saved = FiTPipeline.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    for part in ("transformer", "vae"):
        pairs = zip(*(getattr(pipe, part).parameters() for pipe in (shipped, saved)), strict=True)
        assert all(one.dtype == other.dtype for one, other in pairs)
    assert shipped.transformer.time_embed.up.weight.dtype == torch.float32
    assert shipped.transformer.patch_embed.weight.dtype == shipped.vae.dtype == torch.bfloat16
    with pytest.raises(UserError, match="clipart is opened without device_map"):
        FiTPipeline.from_pretrained("clipart", device_map="auto")


def test_what_has_no_effect_is_said(caplog):
    pipe = FiTPipeline.from_pretrained("emoji-any-step")
    quick = {"height": 32, "width": 32, "num_inference_steps": 1, "progress": lambda _: None}
    pipe(prompt="fox", negative_prompt="red", guidance_scale=2.0, **quick)
    assert not caplog.text
    pipe(prompt="fox", negative_prompt="red", **quick)
    assert "`negative_prompt` has no effect without guidance" in caplog.text
