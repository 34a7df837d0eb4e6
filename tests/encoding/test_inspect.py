import shutil
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from fitv2.cli.commands import run
from fitv2.encoding.inspect import MOST_LABELS, label_lines, sheet, survey, table
from fitv2.errors import UserError


@pytest.fixture
def copied(tokens, tmp_path):
    return shutil.copytree(tokens, tmp_path / "set")


def test_the_table_counts_what_is_there(tokens):
    card, (split,) = survey(tokens)
    assert (split.name, len(split.labels), len(split.sizes)) == ("train", 12, 24)
    lines = table(card, [split]).splitlines()
    assert "at most 16 tokens" in lines[0]
    assert lines[1].startswith("1 shards, ")
    lengths = split.sizes.prod(axis=1)
    spread = [lengths.min(), int(np.median(lengths)), lengths.max()]
    assert lines[4].split()[:7] == ["train", "12", "24", "0", *map(str, spread)]
    assert [line.split() for line in lines[-2:]] == [["blue", "6"], ["red", "6"]]


def test_of_many_labels_the_commonest_and_the_rarest_are_shown(tokens):
    _, (split,) = survey(tokens)
    counts = np.arange(100)
    many = replace(split, labels=np.repeat(counts, counts))
    lines = [line.split() for line in label_lines(tuple(f"l{i}" for i in range(100)), [many])]
    assert lines[1] == ["l99", "99"]
    assert lines[MOST_LABELS // 2 + 1] == ["…", "60", "more", "…"]
    assert lines[-1] == ["l0", "0"]
    assert len(lines) == MOST_LABELS + 2


def test_pictures_are_drawn(tokens, tmp_path, capsys):
    assert run(["inspect", str(tokens), "--out", str(tmp_path / "out"), "--samples", "10"]) == 0
    assert "every shard is whole" in capsys.readouterr().out
    assert Image.open(tmp_path / "out" / "plots.png").size == (1500, 450)
    assert Image.open(tmp_path / "out" / "samples.png").width > 200


def test_samples_are_the_pictures(tokens, tmp_path):
    card, _ = survey(tokens)
    sheet(tokens, card, 4, 0, tmp_path / "a.png")
    sheet(tokens, card, 4, 0, tmp_path / "b.png")
    sheet(tokens, card, 4, 1, tmp_path / "c.png")
    one, same, other = ((tmp_path / f"{name}.png").read_bytes() for name in "abc")
    assert one == same != other


def test_a_changed_byte_is_found_and_its_shard_named(copied):
    shard = copied / "train-00000.arrow"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(UserError, match=r"train-00000\.arrow is damaged"):
        run(["inspect", str(copied), "--samples", "0"])


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_bytes(b"x" * 100)])
def test_a_missing_or_cut_shard_is_named_at_once(copied, damage):
    damage(copied / "train-00000.arrow")
    with pytest.raises(UserError, match=r"train-00000\.arrow is (missing|damaged: it has 100 of \d+ bytes)"):
        survey(copied)
