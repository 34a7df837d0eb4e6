import os

import fsspec
import pytest

from fitv2.encoding.kinds import open_source
from fitv2.encoding.sources import is_hidden, is_image_name, readable, split_of


def test_hidden_files_do_not_count_and_order_is_by_name(holding):
    source = open_source(holding("b/2.png", "b/1.png", "a/1.png", ".git/x.png", "a/.DS_Store"))
    assert [source.name(path) for path in source.files] == ["a/1.png", "b/1.png", "b/2.png"]


def test_names_may_hold_what_patterns_and_urls_are_made_of(holding):
    root = holding("a[1]::b/x.png", "a[1]::b/y.jpg")
    assert len(open_source(f"{root}/a[1]::b").files) == 2
    assert len(open_source(f"{root}/a[1]::b/*.png").files) == 1


def test_links_to_folders_are_followed_but_not_round_and_round(holding, tmp_path):
    root = holding("a/1.png")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "2.png").write_bytes(b"x")
    (tmp_path / "source" / "b").symlink_to(tmp_path / "other")
    (tmp_path / "source" / "a" / "loop").symlink_to(root)
    (tmp_path / "source" / "a" / "broken.png").symlink_to("nowhere")
    (tmp_path / "source" / "c").symlink_to(tmp_path / "source" / "b")
    os.mkfifo(tmp_path / "source" / "a" / "pipe.png")
    source = open_source(root, follow_links=True)
    assert [source.name(path) for path in source.files] == ["a/1.png", "b/2.png", "c/2.png"]
    source = open_source(root)
    assert [source.name(path) for path in source.files] == ["a/1.png"]
    assert [source.name(path) for path in source.outside] == ["b", "c"]


def test_the_fingerprint_tells_names_and_sizes(holding, tmp_path):
    before = open_source(holding("a/1.png")).fingerprint
    assert before == open_source(holding("a/1.png")).fingerprint
    assert before.startswith("1 files, 1 bytes, ")
    assert open_source(holding("a/2.png")).fingerprint != before
    system = fsspec.filesystem("memory")
    system.pipe("/elsewhere/a/1.png", b"x")
    assert open_source("memory://elsewhere").fingerprint == before  # wherever it lies


def test_names():
    assert is_hidden("a/.b/c")
    assert not is_hidden("../a/b.c")
    assert is_image_name("x/IMG.JPEG")
    assert is_image_name("no.dots/here")
    assert not is_image_name("notes.txt")
    assert readable(os.fsdecode(b"caf\xe9")) == "caf\ufffd"


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train-00000-of-00002.parquet", "train"),
        ("data/validation-0.parquet", "validation"),
        ("imagenet_val_000.tar", "validation"),
        ("default/test/0000.parquet", "test"),
        ("pictures.parquet", "train"),
        ("trainers/valley.tar", "train"),
    ],
)
def test_the_split_is_told_by_the_name(name, split):
    assert split_of(name) == split
