"""How a picture was made, told in the picture."""

import json
from dataclasses import asdict, fields, replace

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from conftest import randomized
from fitv2.checkpoint import Card
from fitv2.config import Guidance, Positions, Sampling
from fitv2.errors import UserError
from fitv2.model import FiT
from fitv2.pipeline import FiTPipeline
from fitv2.sampling.recipe import KEY, Recipe, is_made, read_recipe, save_picture

SHAPE = {"depth": 1, "width": 32, "heads": 2, "patch_size": 4, "in_channels": 3, "num_classes": 2}
RECIPE = Recipe(
    model="emoji", weights="ab", label=None, prompt="zwei Äpfel 🍎\nrot", negative_prompt=None, height=8,
    width=12, seed=3, precision="float32", guidance=Guidance(2.0, guidance_interval=(0.1, 0.9)),
    sampling=Sampling("heun", 9), positions=Positions("ntk", train_side=8),
)  # fmt: skip


def test_a_picture_tells_how_it_was_made(tmp_path):
    path = tmp_path / "x.png"
    save_picture(Image.new("RGB", (12, 8), "red"), path, RECIPE)
    assert read_recipe(path) == RECIPE
    assert Image.open(path).info["Description"] == RECIPE.prompt
    assert is_made(path, RECIPE)
    assert not is_made(path, replace(RECIPE, seed=4))
    assert not is_made(tmp_path / "y.png", RECIPE)


def test_a_picture_of_before_there_was_internal_guidance_is_still_read(tmp_path):
    said = asdict(RECIPE)
    for name in ("internal_scale", "internal_interval"):
        del said["guidance"][name]
    text = PngInfo()
    text.add_itxt(KEY, json.dumps(said))
    Image.new("RGB", (12, 8), "red").save(tmp_path / "x.png", pnginfo=text)
    assert read_recipe(tmp_path / "x.png") == RECIPE


def test_what_a_model_uses_by_itself_is_filled_in():
    def recipe(**changes):
        model = randomized(FiT(**SHAPE | changes))
        how = {"guidance": Guidance(), "sampling": Sampling(), "positions": Positions()}
        return Recipe.of(
            FiTPipeline.of(model, Card(("a", "b"), "pixels", 16, 3.5)),
            **{name: getattr(RECIPE, name) for name in (field.name for field in fields(RECIPE))} | how,
        )

    flow, ddpm = recipe(), recipe(path="ddpm", prediction="noise")
    assert (flow.guidance.guidance_scale, flow.sampling.solver, flow.sampling.steps) == (3.5, "ab2", 25)
    assert (ddpm.sampling.solver, ddpm.sampling.steps) == ("ddpm", 250)


def test_the_arguments_are_those_of_the_pipeline():
    assert RECIPE.arguments == {"prompt": RECIPE.prompt, "height": 8, "width": 12}
    labelled = replace(RECIPE, prompt=None, label="red", negative_prompt="blue")
    assert labelled.arguments == {"class_labels": "red", "negative_prompt": "blue", "height": 8, "width": 12}


@pytest.mark.parametrize(("said", "message"), [
    (None, "does not say how it was made"), ("{", "is damaged"), ('{"model": "x"}', "Recipe lacks"),
    ('{"modell": "x"}', "unknown key of Recipe 'modell'"), ("[" * 100_001, "does not say how it was made"),
])  # fmt: skip
def test_what_is_not_ours_or_damaged_is_refused(tmp_path, said, message):
    text = PngInfo()
    if said is not None:
        text.add_itxt(KEY, said)
    Image.new("RGB", (2, 2)).save(tmp_path / "x.png", pnginfo=text)
    with pytest.raises(UserError, match=message):
        read_recipe(tmp_path / "x.png")


def test_no_picture_is_refused(tmp_path):
    (tmp_path / "x.png").write_text("no")
    with pytest.raises(UserError, match="no picture that can be read"):
        read_recipe(tmp_path / "x.png")
