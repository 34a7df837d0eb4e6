import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from conftest import encoded_picture
from fitv2.encoding.images import UnusableImage
from fitv2.encoding.kinds import open_source
from fitv2.encoding.parquet import in_tables, parquet_tables
from fitv2.encoding.rows import image_bytes, parquet_row

PICTURES = [encoded_picture(16 + 16 * i, 16, i) for i in range(7)]


def test_rows_are_found_in_their_row_group(tmp_path):
    table = pa.table({"jpg": PICTURES, "cls": [f"l{i}" for i in range(7)], "source": list("abcdefg")})
    pq.write_table(table, tmp_path / "x.parquet", row_group_size=3)
    source = open_source(str(tmp_path))
    _, pictures = in_tables(parquet_tables(source))
    pictures = list(pictures)
    assert [(p.label, p.source, p.group, p.at) for p in pictures][2:4] == [
        ("l2", "c", 0, 2),
        ("l3", "d", 1, 0),
    ]
    order = np.random.default_rng(0).permutation(7)
    assert [parquet_row(source.url, pictures[i]) for i in order] == [PICTURES[i] for i in order]


def test_pictures_that_a_dataset_holds_by_path(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    for place in (folder, tmp_path):
        (place / "p.png").write_bytes(PICTURES[0])
    for path in ("p.png", str(folder / "p.png"), "./../set/p.png"):
        assert image_bytes({"bytes": None, "path": path}, str(folder)) == PICTURES[0]
    (folder / "link.png").symlink_to(tmp_path / "p.png")
    for path in (
        "../p.png",
        str(tmp_path / "p.png"),
        "link.png",
        "/etc/passwd",
        "/dev/zero",
        "/proc/self/environ",
    ):
        with pytest.raises(UnusableImage, match="outside the folder of the collection"):
            image_bytes({"bytes": None, "path": path}, str(folder))
    os.mkfifo(folder / "pipe.png")
    with pytest.raises(UnusableImage, match="a pipe, a device or a folder"):
        image_bytes({"bytes": None, "path": "pipe.png"}, str(folder))
    with pytest.raises(UnusableImage, match="cannot be read: No such file"):
        image_bytes({"bytes": None, "path": "gone.png"}, str(folder))
    with pytest.raises(UnusableImage, match="not looked for elsewhere"):
        image_bytes({"bytes": None, "path": "p.png"}, None)
    for nothing in (None, {"bytes": None, "path": None}):
        with pytest.raises(UnusableImage, match="empty"):
            image_bytes(nothing, None)
    with pytest.raises(UnusableImage, match="holds int"):
        image_bytes(3, None)
