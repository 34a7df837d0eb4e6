import io
import json
import tarfile

import pytest

from conftest import encoded_picture
from fitv2.encoding.kinds import open_source
from fitv2.encoding.sources import BROKEN, UNUSED
from fitv2.encoding.webdataset import in_tars, tar_member


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
        "d.cls": b"3", "e.json": b'{"label": ["x", "y"]}', "e.png": png,
        "f/1.seg.png": png, "g.png": png, "h.png": png, "g.cls": b"late", "h.cls": b"3",
    })  # fmt: skip
    assert [(p.label, p.source, p.split) for p in pictures] == [
        ("7", "train-000.tar/a.png", "train"),
        ("dog", "train-000.tar/b.jpg", "train"),
        ("", "train-000.tar/c.webp", "train"),
        ("", "train-000.tar/e.png", "train"),
        ("", "train-000.tar/f/1.seg.png", "train"),
        ("late", "train-000.tar/g.png", "train"),
        ("3", "train-000.tar/h.png", "train"),
    ]
    assert all(tar_member(source.url, p) == png for p in pictures)


def test_folders_are_labels_where_nothing_else_is_said(listed):
    _, pictures = listed(
        {"./cats/1.png": b"1", "./dogs/2.png": b"2", "./dogs/.hidden.png": b"3"}, "val/x.tar"
    )
    assert [(p.label, p.split) for p in pictures] == [("cats", "train"), ("dogs", "train")]


@pytest.fixture
def whole(tmp_path):
    """An archive of five images, its content, and where they lie."""
    path = archive(tmp_path / "whole" / "a.tar", {f"{i}.png": encoded_picture(64, 64, i) for i in range(5)})
    return path.read_bytes(), [p.at for p in in_tars(open_source(str(path)))]


@pytest.mark.parametrize(
    ("damage", "left"),
    [
        (lambda content, at: content[: at[3] + 10], 4),  # inside an image
        (lambda content, at: content[: at[3] - 100], 3),  # inside a header
        (lambda content, at: content[: at[3] - 512], 3),  # where a header should begin
        (lambda content, at: content[: at[3] - 500] + b"?" + content[at[3] - 499 :], 3),  # a changed header
        (lambda content, at: b"no tar at all" * 100, 0),
        (lambda content, at: b"", 0),
    ],
)
def test_an_archive_that_breaks_off_gives_what_it_holds_and_says_so(whole, tmp_path, damage, left):
    content, at = whole
    (tmp_path / "a.tar").write_bytes(damage(content, at))
    pictures = list(in_tars(open_source(str(tmp_path / "a.tar"))))
    assert [p.at for p in pictures] == [*at[:left], BROKEN]
    assert pictures[-1].source == "a.tar"
    assert pictures[-1].detail


def long_header(kind):
    info = tarfile.TarInfo("x")
    info.size, info.type = 2 << 20, kind
    return info.tobuf(tarfile.GNU_FORMAT) + bytes((2 << 20) + 1024)


def negative(size):
    """A header that says that its file has less than no bytes."""
    header = bytearray(tarfile.TarInfo("a.png").tobuf(tarfile.GNU_FORMAT))
    header[124:136] = size.to_bytes(12, "big", signed=True)
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (long_header(tarfile.GNUTYPE_LONGNAME), "a header in it is too long"),
        (long_header(tarfile.XHDTYPE), "a header in it is too long"),
        (
            tarfile.TarInfo("x").tobuf(tarfile.GNU_FORMAT).replace(b"0000000 0", b"0000000 L") * 2000,
            "damaged",
        ),
        (negative(-512) * 3 + bytes(1024), "has no size"),
        (negative(-1) * 3 + bytes(1024), "has no size"),
    ],
)
def test_an_archive_that_means_harm_is_one_line(tmp_path, content, said):
    (tmp_path / "a.tar").write_bytes(content)
    (broken,) = in_tars(open_source(str(tmp_path / "a.tar")))
    assert broken.at == BROKEN
    assert said in broken.detail


def test_hard_links_are_the_pictures_they_link_to(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded_picture())
    (tmp_path / "b.png").hardlink_to(tmp_path / "a.png")
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name in ("a.png", "b.png"):
            tar.add(tmp_path / name, name)
    source = open_source(str(tmp_path / "x.tar"))
    assert [tar_member(source.url, p) for p in in_tars(source)] == [encoded_picture()] * 2


def test_splits_in_an_archive_and_pictures_beside_a_picture(listed):
    png = encoded_picture()
    _, pictures = listed(
        {"val/cat/1.png": png, "train/cat/2.png": png, "train/cat/2.mask.png": png}, "all.tar"
    )
    assert [(p.split, p.label, p.source) for p in pictures] == [
        ("validation", "cat", "all.tar/val/cat/1.png"),
        ("train", "cat", "all.tar/train/cat/2.png"),
        ("train", "cat", "all.tar/train/cat/2.mask.png"),
    ]
    assert [p.at == UNUSED for p in pictures] == [False, False, True]
