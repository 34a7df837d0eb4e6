"""What the page does, without the page."""

import threading
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from conftest import picture, randomized
from fitv2.app.studio import ALL, AROUND, BETWEEN, PAINTED, Bounds, Order, Studio, edit_order, painted
from fitv2.checkpoint import Card
from fitv2.errors import UserError
from fitv2.model import FiT
from fitv2.pipeline import FiTPipeline
from fitv2.sampling.recipe import read_recipe

SHAPE = {"depth": 1, "width": 32, "heads": 2, "patch_size": 4, "in_channels": 3, "num_classes": 2}
ORDER = Order(label="red", height=8, width=12, count=2, steps=2, seed=5)


@pytest.fixture
def studio(pixel_model, tmp_path):
    return Studio(FiTPipeline.from_pretrained(pixel_model), "tiny", tmp_path / "made", Bounds(max_side=64))


def test_pictures_are_those_of_the_pipeline_and_hold_their_recipes(studio):
    *_, last = studio.make(ORDER)
    assert (last.done, last.share) == (2, 1.0)
    recipe = read_recipe(last.pictures[1])
    assert (recipe.label, recipe.height, recipe.width, recipe.seed) == ("red", 8, 12, 6)
    from fitv2.runtime.rng import generator

    (alone,) = studio.pipeline.stream(
        "red",
        8,
        12,
        [generator(6)],
        guidance=recipe.guidance,
        sampling=recipe.sampling,
        progress=lambda _: None,
    )
    assert np.array_equal(np.asarray(Image.open(last.pictures[1])), np.asarray(alone))


def test_previews_come_between(studio, monkeypatch):
    monkeypatch.setattr("fitv2.app.studio.PREVIEW_EVERY", 0.0)
    shown = list(studio.make(replace(ORDER, steps=2 * ORDER.steps)))
    previews = [each for each in shown if each.done == 0]
    assert len(previews) >= 3
    assert all(image.size == (12, 8) for each in previews for image in each.pictures)
    assert [each.done for each in shown[-2:]] == [1, 2]


def test_who_leaves_ends_the_work(studio, monkeypatch):
    monkeypatch.setattr("fitv2.app.studio.PREVIEW_EVERY", 0.0)
    making = studio.make(replace(ORDER, steps=100, count=16))
    next(making)
    making.close()
    with studio.turn:
        assert not any(studio.folder.rglob("*.png"))
    assert list(studio.make(ORDER))[-1].done == 2  # the next one has its turn


def test_who_leaves_a_ddpm_ends_the_work_too(tmp_path):
    model = randomized(FiT(**SHAPE, path="ddpm", prediction="noise")).eval()
    slow = Studio(FiTPipeline.of(model, Card(("blue", "red"), "pixels", 16)), "ddpm", tmp_path, Bounds(64))
    told, left = [], threading.Event()

    def tell(shown):
        told.append(shown)

    left.set()
    order = replace(ORDER, steps=50)
    slow._work(order, slow.recipes(order), tmp_path, tell, left.is_set)
    assert told == [None]


def test_labels_of_one_name_are_told_apart_by_their_numbers(tmp_path):
    model = randomized(FiT(**SHAPE | {"num_classes": 3})).eval()
    card = Card(("crane", "crane", "owl"), "pixels", 16)
    cranes = Studio(FiTPipeline.of(model, card), "cranes", tmp_path, Bounds(64))
    assert cranes.labels == ["crane (0)", "crane (1)", "owl"]
    (recipe,) = cranes.recipes(replace(ORDER, label="crane (1)", count=1))
    assert (recipe.label, recipe.arguments["class_labels"]) == ("crane", 1)


def test_old_pictures_are_removed_where_they_are_kept_for_a_time(studio):
    list(studio.make(ORDER))
    assert len(list(studio.folder.iterdir())) == 1
    list(studio.make(ORDER))
    assert len(list(studio.folder.iterdir())) == 2
    studio.keep = 0.0
    list(studio.make(ORDER))
    assert len(list(studio.folder.iterdir())) == 1


def test_orders_take_turns_and_are_not_mixed_up(studio):
    found = {}

    def make(seed):
        *_, found[seed] = studio.make(replace(ORDER, seed=seed, count=1, width=4 + seed))

    threads = [threading.Thread(target=make, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed, shown in found.items():
        recipe = read_recipe(shown.pictures[0])
        assert (recipe.seed, recipe.width) == (seed, 4 + seed)
        assert Image.open(shown.pictures[0]).width == 4 + seed


@pytest.mark.parametrize(("changes", "said"), [
    ({"height": 65}, "the height can be 1 to 64, not 65"), ({"width": 0}, "the width can be 1 to 64"),
    ({"count": 17}, "the number of pictures can be 1 to 16"), ({"steps": 101}, "the number of steps"),
    ({"height": 64, "width": 64, "count": 16}, "have 4096 tokens together, and 100 is the most"),
    ({"extrapolation": "magic"}, "extrapolation can be automatic, none"),
    ({"label": ""}, "choose a label"), ({"label": "green"}, "unknown label 'green'"),
])  # fmt: skip
def test_what_is_out_of_bounds_is_refused_in_words(studio, changes, said):
    if "tokens" in said:
        studio.bounds = Bounds(max_side=64, max_tokens=100)
    with pytest.raises(UserError, match=said):
        list(studio.make(replace(ORDER, **changes)))


def test_what_is_painted_is_made_anew(studio):
    image, layer = picture(16, 12), Image.new("RGBA", (16, 12))
    layer.paste((255, 80, 0, 200), (0, 0, 8, 12))
    order = edit_order(studio, image, [layer], PAINTED, (0, 0), 0.6, label="red", steps=2)
    *_, last = studio.make(order)
    made = np.asarray(Image.open(last.pictures[0]))
    assert np.array_equal(made[:, 8:], np.asarray(image)[:, 8:])
    assert not np.array_equal(made[:, :8], np.asarray(image)[:, :8])
    assert read_recipe(last.pictures[0]).edited == {"how": PAINTED, "strength": 1.0}
    with pytest.raises(UserError, match="nothing is painted"):
        painted(image, [Image.new("RGBA", (16, 12))])


def test_around_and_all_of_a_picture(studio):
    image = picture(16, 12)
    around = edit_order(studio, image, [], AROUND, (16, 40), 0.6, label="red", steps=2)
    assert (around.height, around.width) == (16, 40)
    *_, last = studio.make(around)
    assert np.array_equal(np.asarray(Image.open(last.pictures[0]))[2:14, 12:28], np.asarray(image))
    varied = edit_order(studio, image, [], ALL, (0, 0), 0.25, label="red", steps=4)
    assert varied.given["strength"] == 0.25
    *_, last = studio.make(varied)
    assert Image.open(last.pictures[0]).size == (16, 12)
    put = {"label": "red", "steps": 2, "across": 1.0, "down": 0.0}
    *_, last = studio.make(edit_order(studio, image, [], AROUND, (16, 40), 0.6, **put))
    assert np.array_equal(np.asarray(Image.open(last.pictures[0]))[:12, 24:], np.asarray(image))
    for picture_, how, said in ((None, ALL, "put a picture there"), (image, "paint it", "what to do can be")):
        with pytest.raises(UserError, match=said):
            edit_order(studio, picture_, [], how, (8, 8), 0.5)


def test_a_photo_is_made_smaller_than_the_bounds_and_so_is_what_is_painted_on_it(studio):
    studio.bounds = Bounds(max_side=64, max_tokens=64)
    photo, layer = picture(300, 200), Image.new("RGBA", (300, 200))
    layer.paste((255, 80, 0, 200), (0, 0, 150, 200))
    order = edit_order(studio, photo, [layer], PAINTED, (0, 0), 0.6, label="red", steps=2, count=2)
    height, width = order.height, order.width
    assert 24 <= -(-height // 4) * -(-width // 4) <= 32  # two pictures have 64 tokens
    assert width / height == pytest.approx(1.5, abs=0.1)
    assert order.note == f"Your picture was made smaller, {height}x{width}."
    *_, last = studio.make(order)
    assert [Image.open(path).size for path in last.pictures] == [(width, height)] * 2
    made = np.asarray(Image.open(last.pictures[0]))[:, width // 2 + 1 :]
    assert np.array_equal(made, np.asarray(order.given["image"])[:, width // 2 + 1 :])
    assert edit_order(studio, picture(16, 12), [], ALL, (0, 0), 0.6, label="red").note == ""


def test_what_lies_between_two_pictures_ends_at_both(studio):
    ends = picture(16, 12, 1), picture(16, 12, 2)
    order = edit_order(
        studio,
        ends[0],
        [],
        BETWEEN,
        (0, 0),
        0.6,
        toward=ends[1].resize((40, 40)),
        label="red",
        count=3,
        steps=50,
    )
    *_, last = studio.make(order)
    first, _, third = (np.asarray(Image.open(path), float) for path in last.pictures)
    near = [np.abs(made - np.asarray(end, float)).mean() for made in (first, third) for end in ends]
    assert near[0] < near[1]
    assert near[3] < near[2]
    assert read_recipe(last.pictures[0]).edited["how"] == BETWEEN
    with pytest.raises(UserError, match="put a second picture there too"):
        edit_order(studio, ends[0], [], BETWEEN, (0, 0), 0.6, label="red")


def test_several_sizes_are_made_together_also_of_one_noise(studio):
    order = replace(ORDER, more_sizes=((16, 8), (8, 12)))
    *_, last = studio.make(order)
    sizes = [(recipe.height, recipe.width, recipe.seed) for recipe in map(read_recipe, last.pictures)]
    assert sizes == [(8, 12, 5), (8, 12, 6), (16, 8, 5), (16, 8, 6)]
    alone = list(studio.make(ORDER))[-1].pictures
    both = [np.asarray(Image.open(path)) for path in (*last.pictures[:2], *alone)]
    assert np.array_equal(both[0], both[2])
    shared = list(studio.make(replace(order, one_noise=True)))[-1].pictures
    again = list(studio.make(replace(order, one_noise=True)))[-1].pictures
    assert all(one.read_bytes() == other.read_bytes() for one, other in zip(shared, again, strict=True))
    studio.bounds = Bounds(max_side=64, max_images=3)
    with pytest.raises(UserError, match="the number of pictures can be 1 to 3, not 4"):
        studio.recipes(order)


def test_pictures_between_two_noises_begin_and_end_with_those_of_their_seeds(studio):
    *_, last = studio.make(replace(ORDER, count=3, toward_seed=9))
    ends = [list(studio.make(replace(ORDER, count=1, seed=seed)))[-1].pictures[0] for seed in (5, 9)]
    for made, end in ((last.pictures[0], ends[0]), (last.pictures[2], ends[1])):
        difference = np.asarray(Image.open(made), int) - np.asarray(Image.open(end), int)
        assert np.abs(difference).max() <= 1
