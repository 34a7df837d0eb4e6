import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image

from conftest import encoded_picture
from fitv2.encoding.kinds import open_source
from fitv2.encoding.parquet import (
    columns_of,
    datasets_tables,
    in_tables,
    label_texts,
    parquet_tables,
)
from fitv2.encoding.rows import datasets_row, parquet_row
from fitv2.errors import UserError

PICTURES = [encoded_picture(16 + 16 * i, 16, i) for i in range(7)]


def classes():
    """Seven images of three classes, as `datasets` has them."""
    features = Features({"image": Image(), "label": ClassLabel(names=["x", "y", "z"])})
    rows = {"image": [{"bytes": png, "path": None} for png in PICTURES], "label": [i % 3 for i in range(7)]}
    return Dataset.from_dict(rows, features)


def test_parquet_of_the_hub_has_its_classes_named(tmp_path):
    classes().to_parquet(str(tmp_path / "train-00000-of-00001.parquet"))
    source = open_source(str(tmp_path))
    names, pictures = in_tables(parquet_tables(source))
    pictures = list(pictures)
    assert names == ("x", "y", "z")
    assert [p.label for p in pictures] == list("xyzxyzx")
    assert pictures[4].source == "train-00000-of-00001.parquet:4"
    assert [parquet_row(source.url, p) for p in pictures] == PICTURES


@pytest.mark.parametrize("said", [["flickr"] * 7, [None, *"abcdef"], list(range(7))])
def test_a_column_source_names_the_pictures_only_if_it_tells_them_apart(tmp_path, said):
    pq.write_table(pa.table({"jpg": PICTURES, "source": said}), tmp_path / "x.parquet")
    (table,) = parquet_tables(open_source(str(tmp_path)))
    assert table.sources == [f"x.parquet:{i}" for i in range(7)]
    assert table.labels == ["image"] * 7


def test_a_folder_of_datasets(tmp_path):
    splits = {"train": classes(), "valid": classes().select(range(2)), "hard": classes().select([3])}
    DatasetDict(splits).save_to_disk(str(tmp_path / "d"))
    source = open_source(str(tmp_path / "d"))
    names, pictures = in_tables(datasets_tables(source))
    pictures = list(pictures)
    assert names == ("x", "y", "z")
    assert [p.split for p in pictures] == ["train"] * 7 + ["validation"] * 2 + ["hard"]
    assert [datasets_row(source.url, p) for p in pictures] == PICTURES + PICTURES[:2] + PICTURES[3:4]


@pytest.mark.parametrize(
    ("columns", "chosen"),
    [
        ({"image": pa.binary(), "other": pa.binary(), "label": pa.int64()}, ("image", "label")),
        ({"thumb": pa.binary(), "fine_label": pa.int64(), "coarse": pa.int64()}, ("thumb", "fine_label")),
        ({"png": pa.struct([("bytes", pa.binary())])}, ("png", None)),
    ],
)
def test_columns_are_recognized(tmp_path, columns, chosen):
    source = open_source(str(parquet(tmp_path)))
    assert columns_of(source, pa.schema(list(columns.items())), "t")[:2] == chosen


def parquet(tmp_path):
    pq.write_table(pa.table({"a": [b"1"], "b": [b"2"], "n": [1]}), tmp_path / "t.parquet")
    return tmp_path


def test_columns_can_be_named_and_a_wrong_name_is_said(tmp_path):
    root = str(parquet(tmp_path))
    (table,) = parquet_tables(open_source(root, "b", "n"))
    assert (table.image_column, table.labels) == ("b", ["1"])
    with pytest.raises(UserError, match="no column of images that could be recognized, but a, b, n: give"):
        parquet_tables(open_source(root))
    with pytest.raises(UserError, match="has no column c, but a, b, n"):
        parquet_tables(open_source(root, "c"))
    with pytest.raises(UserError, match="has no column m, but a, b, n"):
        parquet_tables(open_source(root, "a", "m"))


def test_a_file_that_is_no_parquet_is_named(tmp_path):
    (tmp_path / "t.parquet").write_text("nothing of the kind")
    with pytest.raises(UserError, match=r"t\.parquet is not a Parquet file"):
        parquet_tables(open_source(str(tmp_path)))


def test_labels_as_text():
    assert label_texts([0, 5, "s", None, -1], ("a",)) == ["a", "5", "s", "", ""]
    assert label_texts([-1, 2.5, float("nan"), b"caf\xc3\xa9"], ()) == ["-1", "2.5", "", "café"]
    for several in ([1, 2], {"a": 1}):
        with pytest.raises(UserError, match="not one name or number: give `label_column`"):
            label_texts([several], ())
