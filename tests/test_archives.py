import io
import json
import tarfile

import pytest

from conftest import encoded_picture
from fitv2.archives import in_tars, tar_member
from fitv2.sources import BROKEN, open_source


def archive(path, members):
    """A tar of these members: name → content."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


@pytest.fixture
def listed(tmp_path):
    def listed(members, name="train-000.tar"):
        path = archive(tmp_path / name, members)
        source = open_source(str(path))
        return source, list(in_tars(source))

    return listed


def test_labels_as_webdataset_states_them(listed):
    png = encoded_picture()
    source, pictures = listed({
        "a.png": png, "a.cls": b"7\n",
        "b.json": json.dumps({"label": "dog", "width": 3}).encode(), "b.jpg": png, "b.txt": b"a dog",
        "c.webp": png, "c.json": b"not json",
        "d.cls": b"3",
        "f/1.seg.png": png,
    })  # fmt: skip
    assert [(p.label, p.source, p.split) for p in pictures] == [
        ("7", "train-000.tar/a.png", "train"),
        ("dog", "train-000.tar/b.jpg", "train"),
        ("image", "train-000.tar/c.webp", "train"),
        ("f", "train-000.tar/f/1.seg.png", "train"),
    ]
    assert all(tar_member(source.url, p) == png for p in pictures)


def test_folders_are_labels_where_nothing_else_is_said(listed):
    _, pictures = listed(
        {"./cats/1.png": b"1", "./dogs/2.png": b"2", "./dogs/.hidden.png": b"3"}, "val/x.tar"
    )
    assert [(p.label, p.split) for p in pictures] == [("cats", "train"), ("dogs", "train")]


def test_a_truncated_archive_gives_what_it_holds_and_says_so(tmp_path):
    path = archive(tmp_path / "whole" / "a.tar", {f"{i}.png": encoded_picture(64, 64, i) for i in range(5)})
    offsets = [p.at for p in in_tars(open_source(str(path)))]
    (tmp_path / "a.tar").write_bytes(path.read_bytes()[: offsets[3] + 10])
    pictures = list(in_tars(open_source(str(tmp_path / "a.tar"))))
    assert [p.at for p in pictures[:4]] == offsets[:4]
    assert [p.at for p in pictures[4:]] == [BROKEN]
    assert "unexpected end of data" in pictures[4].source


def test_what_is_no_archive_is_said(tmp_path):
    (tmp_path / "x.tar").write_bytes(b"no tar at all" * 100)
    (picture,) = in_tars(open_source(str(tmp_path / "x.tar")))
    assert picture.at == BROKEN
