import hashlib
import importlib.util
from pathlib import Path

import pytest
from PIL import Image

SOURCE = Path(__file__).parents[1] / "tools" / "emoji_rows.py"
spec = importlib.util.spec_from_file_location("emoji_rows", SOURCE)
rows = importlib.util.module_from_spec(spec)
spec.loader.exec_module(rows)


@pytest.mark.parametrize(
    ("name", "several"),
    [
        ("owl", "owls"), ("red apple", "red apples"), ("fox", "foxes"), ("cherry", "cherries"),
        ("monkey", "monkeys"), ("cat with tears of joy", "cats with tears of joy"), ("woman", "women"),
        ("flag: Canada", None), ("keycap: 1", None),
    ],
)  # fmt: skip
def test_several_of_a_thing(name, several):
    assert rows.plural(name) == several


def test_captions_say_what_stands_how():
    side, column = rows.ARRANGEMENTS[0], rows.ARRANGEMENTS[3]
    assert rows.caption(["owl"] * 2, side) == "two owls side by side"
    assert rows.caption(["flag: Canada"] * 3, column) == "flag: Canada, three in a column"
    assert rows.caption(["owl", "fox", "cat"], column) == "owl, fox and cat in a column"


def test_a_part_of_the_set_is_named_by_groups_and_concepts():
    def drawn(name, group, artists):
        return [
            {"caption": name, "group": group, "subgroup": f"{group}-x", "artist": str(i)}
            for i in range(artists)
        ]

    drawings = [*drawn("owl", "animals", 4), *drawn("emu", "animals", 3), *drawn("flag: Japan", "flags", 2)]
    assert rows.concepts_of(drawings, ["animals"]) & {"owl", "emu", "flag: Japan"} == {"owl"}
    assert {"owl", "flag: Japan"} <= rows.concepts_of(drawings, ["animals-x", "flag: Japan"])


def test_drawings_stand_in_cells_as_large_as_the_largest():
    red, blue = Image.new("RGB", (4, 8), "red"), Image.new("RGB", (6, 2), "blue")
    row = rows.arranged([red, blue], upright=False)
    assert (row.size, row.getpixel((3, 0)), row.getpixel((9, 4))) == ((12, 8), (255, 0, 0), (0, 0, 255))
    assert rows.arranged([red, blue, red], upright=True).size == (6, 24)


@pytest.mark.parametrize(
    ("size", "upright", "canvas"),
    [((4, 8), False, (16, 8)), ((4, 8), True, (4, 8)), ((30, 10), False, (30, 15))],
)
def test_a_drawing_alone_on_white(size, upright, canvas):
    sheet = rows.alone(Image.new("RGB", size, "red"), upright)
    assert sheet.size == canvas
    assert sheet.getpixel((canvas[0] // 2, canvas[1] // 2)) == (255, 0, 0)
    white = canvas[0] * canvas[1] - size[0] * size[1]
    assert sheet.histogram()[256 + 255] == white  # where green is full


def test_the_shipped_set_gives_the_same_rows_each_time():
    import pyarrow.parquet as pq

    table = pq.read_table(SOURCE.parents[1] / "data" / "emoji" / "validation.parquet").to_pylist()[:60]
    made = [list(rows.with_rows(table)) for _ in range(2)]
    assert made[0] == made[1]
    assert len(made[0]) == 180
    shapes = {row["caption"].rsplit(" ", 2)[-2:][-1] for row in made[0]}
    assert {"side", "other", "row", "column"} <= shapes
    assert len({hashlib.sha256(row["source"].encode()).digest() for row in made[0]}) == 180
