import pytest

from fitv2.encoding.rules import (
    Folders,
    Place,
    about_others,
    labels_of_archives,
    labels_of_folders,
    pictures_of_sample,
)
from fitv2.errors import UserError


def test_folders_are_splits_if_all_are_and_else_labels():
    splits = Folders("x", [("train", "cat"), ("Val", "dog", "deep"), ()])
    assert splits.place(("Val", "dog", "deep")) == Place("validation", "dog")
    assert splits.place(("train",)) == Place("train", "")
    assert splits.place(()) == Place(None, "")
    labels = Folders("x", [("cat",), ("dog", "deep")])
    assert labels.place(("dog", "deep")) == Place(None, "dog")
    assert labels.place(()) == Place(None, "")
    assert Folders("x", [()]).place(()) == Place(None, "image")


@pytest.mark.parametrize("folders", [
    [("train", "cat"), ("extra",)], [("train",), ("val",), ("cat",)], [("test", "cat"), ("dog",)],
    [("train",), ("cat",)],
])  # fmt: skip
def test_folders_that_can_mean_two_things_are_refused(folders):
    with pytest.raises(UserError, match="are those labels or splits"):
        Folders("x", folders)


def test_a_folder_around_all_others_and_one_of_all_pictures_mean_nothing():
    around = Folders("x", [("a", "b", "train", "cat"), ("a", "b", "val")])
    assert around.place(("a", "b", "train", "cat")) == Place("train", "cat")
    assert around.place(("a", "b", "val")) == Place("validation", "")
    assert Folders("x", [("cat", "deep")]).place(("cat", "deep")) == Place(None, "cat")
    held = Folders("x", [("images",), ("masks",)])
    assert held.place(("images",)) == Place(None, "image")
    assert held.place(("masks",)).unused
    labels = Folders("x", [("mask",), ("no_mask",), ("images",)])
    assert labels.place(("mask",)) == Place(None, "mask")


def test_images_about_others_are_told_by_their_names():
    names = ["a.jpg", "a_mask.png", "a.depth.png", "b_mask.png", "c/a_mask.png", "a_label.png"]
    assert set(about_others(names)) == {"a_mask.png", "a.depth.png"}


def test_archives_in_class_folders():
    assert labels_of_folders("x", ["cat/0.tar", "dog/0.tar", "z.tar"]) == ["cat", "dog", ""]
    assert labels_of_folders("x", ["train/0.tar", "val/0.tar"]) is None
    assert labels_of_folders("x", ["shards/0.tar", "shards/1.tar"]) is None


@pytest.mark.parametrize(
    ("names", "labels"),
    [
        (["cats.tar", "dogs.tar"], ["cats", "dogs"]),
        (["train-cats.tar", "train-dogs.tar"], ["cats", "dogs"]),
        (["n01440764.tar", "n01443537.tar"], ["n01440764", "n01443537"]),
        (["000.tar", "001.tar"], None),
        (["data-000.tar", "data-017.tar"], None),
        (["train.tar", "val.tar"], None),
        (["train-0.tar", "val-0.tar"], None),
        (["cats.tar"], None),
        (["cats-0.tar", "cats-1.tar", "dogs-0.tar"], ["cats", "cats", "dogs"]),
        (["class1.tar", "class2.tar"], None),
        (["shard_a.tar", "shard_b.tar"], ["shard-a", "shard-b"]),
    ],
)
def test_archives_are_of_a_class_each_or_shards(names, labels):
    assert labels_of_archives(names) == labels


@pytest.mark.parametrize(
    ("names", "used"),
    [
        (["a.png"], [0]),
        (["a.png", "a.jpg"], [1]),
        (["a.mask.png", "a.jpg"], [1]),
        (["a.mask.png", "a.image.png"], [1]),
        (["a.v1.png", "a.v2.png"], [0, 1]),
        (["a.mask.png"], [0]),
        (["a.webp", "a.left.jpg"], [0]),
    ],
)
def test_every_image_of_a_sample_is_used_or_has_a_reason(names, used):
    found, reasons = pictures_of_sample(names)
    assert found == used
    assert sorted([*found, *reasons]) == list(range(len(names)))
    assert all(reasons.values())
