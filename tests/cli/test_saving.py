import pytest
from PIL import Image

from fitv2.checkpoint import Card
from fitv2.cli.saving import file_name, save_image


def test_file_names_hold_label_size_and_seed():
    card = Card(("road sign/1", "C#", "C+"), "pixels", 16)
    names = [file_name(card, label, (48, 96), 7) for label in range(3)]
    assert names == ["road-sign-1_48x96_7.png", "C--1_48x96_7.png", "C--2_48x96_7.png"]


@pytest.mark.parametrize(("label", "name"), [
    ("café", "café"), ("a.b-c_d", "a.b-c_d"), ("a / b", "a-b"), ("x:*?\"<>|\\y", "x-y"),
    ("tab\tor\nline", "tab-or-line"),
])  # fmt: skip
def test_odd_characters_become_one_dash(label, name):
    assert file_name(Card((label,), "pixels", 16), 0, (50, 97), 0) == f"{name}_50x97_0.png"


def test_labels_that_collide_are_told_apart_by_their_number():
    """Each, so that no file is named as one of a run with other labels; the rest keep their plain names."""
    card = Card(("a b", "a/b", "a-b", "c"), "pixels", 16)
    names = [file_name(card, label, (16, 16), 0) for label in range(4)]
    assert names == [*(f"a-b-{label}_16x16_0.png" for label in range(3)), "c_16x16_0.png"]


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
