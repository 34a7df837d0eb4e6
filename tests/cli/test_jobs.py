"""What `fitv2 sample` and `fitv2 edit` make of their options: which pictures, from which noises and parts."""

import numpy as np
import pytest
from PIL import Image

from conftest import fitv2, picture, randomized
from fitv2.checkpoint import Card, save_model
from fitv2.model import FiT
from fitv2.sampling.recipe import read_recipe

QUICK = ("--steps", 2)


def files(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.png"))}


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_labels_of_one_name_are_made_again_by_their_numbers(here, capsys):
    cranes = randomized(FiT(1, 32, 2, patch_size=4, in_channels=3, num_classes=3))
    save_model(cranes, Card(("crane", "crane", "owl"), "pixels", 16, 2.0), here / "cranes")
    assert fitv2(capsys, "sample", "cranes", "--label", "1", "--label", "0", *QUICK)[0] == 0
    made = sorted((here / "samples").glob("crane*.png"))
    assert len(made) == 2
    for source in made:
        assert fitv2(capsys, "sample", "cranes", "--from-metadata", source, "--out", "again")[0] == 0
        again = max((here / "again").glob("*.png"), key=lambda path: path.stat().st_mtime_ns)
        assert Image.open(again).tobytes() == Image.open(source).tobytes()


def test_one_noise_is_seen_at_all_sizes_and_two_are_gone_between(pixel_model, here, capsys):
    sizes = ("--size", "8x8", "--size", "16x8", "--label", "red")
    one = ("sample", pixel_model, *sizes, "--num", 2, *QUICK)
    assert fitv2(capsys, *one, "--one-noise", "--out", "one")[0] == 0
    assert fitv2(capsys, *one, "--out", "own")[0] == 0
    shared, own = files(here / "one"), files(here / "own")
    assert shared.keys() == own.keys()
    assert read_recipe(here / "one" / "red_8x8_0.png").edited == {"one_noise": "8x8 16x8"}
    pair = [np.asarray(Image.open(here / name / "red_8x8_0.png")) for name in ("one", "own")]
    assert not np.array_equal(*pair)
    way = ("sample", pixel_model, "--size", "8x8", "--label", "red", *QUICK)
    assert fitv2(capsys, *way, "--toward-seed", 9, "--num", 3, "--out", "way")[0] == 0
    assert fitv2(capsys, *way, "--seed", 9, "--out", "last")[0] == 0
    pairs = [("way/red_8x8_0.png", "own/red_8x8_0.png"), ("way/red_8x8_2.png", "last/red_8x8_9.png")]
    for made, expected in pairs:  # the ends are the pictures of both seeds
        difference = np.asarray(Image.open(here / made), int) - np.asarray(Image.open(here / expected), int)
        assert np.abs(difference).max() <= 1
    status, _, said = fitv2(capsys, *way, "--toward-seed", 9, "--one-noise")
    assert (status, "give --toward-seed or --one-noise" in said) == (2, True)


@pytest.fixture
def photo(here):
    picture(16, 12).save(here / "photo.png")
    mask = Image.new("L", (16, 12))
    mask.paste(255, (0, 0, 16, 6))
    mask.save(here / "mask.png")
    return here / "photo.png"


def test_a_part_is_made_anew(pixel_model, photo, here, capsys):
    options = ("edit", pixel_model, photo, "--label", "red", "--mask", "mask.png", "--num", 2, *QUICK)
    assert fitv2(capsys, *options, "--grid")[0] == 0
    grid, first, second = sorted(files(here / "edited"))
    assert grid == "grid.png"
    assert first.startswith("photo-red-")
    assert second.endswith("_12x16_1.png")
    made = np.asarray(Image.open(here / "edited" / first))
    assert np.array_equal(made[6:], np.asarray(Image.open(photo))[6:])
    assert not np.array_equal(made[:6], np.asarray(Image.open(photo))[:6])
    assert read_recipe(here / "edited" / first).edited["mask"]
    status, _, said = fitv2(capsys, "sample", pixel_model, "--from-metadata", here / "edited" / first)
    assert (status, "was made from another picture or noise" in said) == (2, True)


def test_strokes_on_a_transparent_layer_are_a_mask(pixel_model, photo, here, capsys):
    strokes = Image.new("RGBA", (16, 12), (0, 0, 0, 0))
    strokes.paste((255, 255, 255, 255), (0, 0, 16, 6))
    strokes.save(here / "layer.png")
    made = []
    for mask in ("mask.png", "layer.png"):
        options = ("edit", pixel_model, photo, "--label", "red", "--mask", mask, "--num", 1, *QUICK)
        assert fitv2(capsys, *options, "--out", f"by {mask}")[0] == 0
        (name,) = files(here / f"by {mask}")
        made.append(Image.open(here / f"by {mask}" / name).tobytes())
    assert made[0] == made[1]


def test_growth_is_said_of_what_grows(pixel_model, here, capsys):
    command = ("sample", pixel_model, "--label", "red", "--size", "24x24", *QUICK)
    assert "grown from 16" in fitv2(capsys, *command)[2]
    assert "grown" not in fitv2(capsys, *command, "--one-noise", "--out", "own")[2]


def test_a_picture_on_a_larger_canvas(pixel_model, photo, here, capsys):
    options = ("--label", "red", "--canvas", "16x32", "--at", 2, 9, "--num", 1, *QUICK)
    assert fitv2(capsys, "edit", pixel_model, photo, *options)[0] == 0
    (name,) = files(here / "edited")
    made = np.asarray(Image.open(here / "edited" / name))
    assert np.array_equal(made[2:14, 9:25], np.asarray(Image.open(photo)))


def test_from_one_picture_to_another(pixel_model, photo, here, capsys):
    picture(20, 20, 1).save(here / "other.png")
    options = ("--toward", "other.png", "--num", 3, "--label", "red", "--steps", 4)
    assert fitv2(capsys, "edit", pixel_model, photo, *options)[0] == 0
    names = sorted(files(here / "edited"))
    assert [read_recipe(here / "edited" / name).edited["share"] for name in names] == [0.0, 0.5, 1.0]
    ends = [np.asarray(Image.open(here / "edited" / name), int) for name in (names[0], names[2])]
    fine = ("--solver", "rk4", "--steps", 60, "--out", "fine")
    assert fitv2(capsys, "edit", pixel_model, photo, *options[:6], *fine)[0] == 0
    first, last = (Image.open(here / "fine" / name) for name in sorted(files(here / "fine"))[::2])
    assert np.abs(np.asarray(first, int) - np.asarray(Image.open(photo), int)).max() <= 3
    assert ends[0].shape == np.asarray(last).shape


def test_a_photo_that_lies_on_its_side_is_put_upright(pixel_model, here, capsys):
    lying, exif = picture(20, 12), Image.Exif()
    exif[0x0112] = 6
    lying.save(here / "phone.jpg", exif=exif)
    assert fitv2(capsys, "edit", pixel_model, "phone.jpg", "--label", "red", "--num", 1, *QUICK)[0] == 0
    (name,) = files(here / "edited")
    assert Image.open(here / "edited" / name).size == (12, 20)


@pytest.mark.parametrize(("options", "said"), [
    (["--mask", "mask.png", "--canvas", "64x64"], "give --mask or --canvas"),
    (["--at", "1", "2"], "--at goes with --canvas"),
    (["--canvas", "8x8"], "does not lie on a canvas of 8x8"),
    (["--toward", "photo.png", "--strength", "0.5"], "--toward goes without"),
    (["--toward-prompt", "x"], "--toward-prompt goes with --toward"),
    (["--mask", "nothing.png"], "nothing.png is no picture that can be read"),
    (["--strength", "2"], "--strength is 2"),
    (["--label", "green"], "unknown label 'green'"),
])  # fmt: skip
def test_what_does_not_fit_is_one_line(pixel_model, photo, capsys, options, said):
    status, _, error = fitv2(capsys, "edit", pixel_model, photo, *options)
    assert (status, said in error) == (2, True), error
