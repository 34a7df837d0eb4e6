import pytest
from PIL import Image

from fitv2.sampling.saving import distinct_names, file_name, save_image


def names_of(*labels):
    return [file_name(name, (48, 96), 7) for name in distinct_names(labels)]


def test_file_names_hold_label_size_and_seed():
    assert names_of("road sign/1", "flags") == ["road-sign-1_48x96_7.png", "flags_48x96_7.png"]


@pytest.mark.parametrize(("label", "name"), [
    ("café", "café"), ("a.b-c_d", "a.b-c_d"), ("a / b", "a-b"), ("x:*?\"<>|\\y", "x-y"),
    ("tab\tor\nline", "tab-or-line"),
])  # fmt: skip
def test_odd_characters_become_one_dash(label, name):
    assert file_name(distinct_names((label,))[0], (50, 97), 0) == f"{name}_50x97_0.png"


COLLIDING = {
    "characters": ("a b", "a/b", "a-b", "a-b-0", "c"),
    "twice": ("crane", "crane", "crane-0", "Crane"),
    "case": ("Cat", "cat", "CAT"),
    "long": ("x" * 240, "x" * 241, "x" * 240 + "/", "\u00e9" * 120, "\u00e9" * 121),
    "captions": tuple(f"a photograph of {i} red apples, " * 20 for i in range(50)),
    "nothing left": ("/", "?", "", "-", "//"),
    "as if hashed": ("a b", "a/b", *(name.removesuffix("_48x96_7.png") for name in names_of("a b", "a/b"))),
    "composed": ("caf\u00e9", "cafe\u0301"),
    "no text": ("\ud800", "\udfff"),
}


@pytest.mark.parametrize("labels", COLLIDING.values(), ids=COLLIDING)
def test_labels_that_differ_have_files_that_differ(labels, tmp_path):
    names = names_of(*labels)
    assert len({name.casefold() for name in names}) == len(names)
    for name in names:
        save_image(Image.new("RGB", (1, 1)), tmp_path / name)
    assert len(list(tmp_path.iterdir())) == len(labels)


def test_labels_of_plain_names_keep_them():
    assert names_of("a b", "a/b", "c")[2] == "c_48x96_7.png"


def test_an_image_is_saved_whole_or_not_at_all(tmp_path):
    save_image(Image.new("RGB", (5, 3), "red"), tmp_path / "new" / "a.png")
    assert Image.open(tmp_path / "new" / "a.png").size == (5, 3)

    class Failing:
        def save(self, path):
            path.write_bytes(b"half")
            raise OSError("disk gone")

    with pytest.raises(OSError, match="disk gone"):
        save_image(Failing(), tmp_path / "new" / "b.png")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.png"]
