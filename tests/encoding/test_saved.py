import json
import shutil

import pyarrow as pa
import pytest
from datasets import Dataset

from conftest import encoded_picture
from fitv2.encoding.kinds import open_source
from fitv2.encoding.manifest import list_images
from fitv2.encoding.saved import data_files, is_compressed
from fitv2.errors import UserError

DATA = "data-00000-of-00001.arrow"


@pytest.fixture
def saved(tmp_path):
    """A folder that `datasets` saved, and one beside it that it must not read."""
    rows = Dataset.from_dict({"image": [encoded_picture()] * 2, "label": ["a", "b"]})
    for name in ("set", "secret"):
        rows.save_to_disk(str(tmp_path / name))
    return tmp_path / "set"


def said(folder):
    with pytest.raises(UserError) as raised:
        list_images(open_source(str(folder)))
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_a_saved_folder_is_read(saved):
    source = open_source(str(saved))
    assert list(data_files(source)) == ["state.json", "dataset_info.json", DATA]
    assert list_images(source).labels == ("a", "b")


@pytest.mark.parametrize("name", [f"../secret/{DATA}", f"x/../../secret/{DATA}", "{absolute}"])
def test_its_files_lie_inside_it(saved, name):
    state = json.loads((saved / "state.json").read_text())
    name = name.format(absolute=saved.parent / "secret" / DATA)
    (saved / "state.json").write_text(json.dumps(state | {"_data_files": [{"filename": name}]}))
    assert "lies outside it, where nothing is read" in said(saved)


def test_its_links_lead_nowhere_else(saved):
    (saved / DATA).unlink()
    (saved / DATA).symlink_to(saved.parent / "secret" / DATA)
    assert f"{DATA} lies outside it" in said(saved)


def test_parts_lie_inside_it(saved):
    whole = saved.parent / "whole"
    shutil.copytree(saved, whole / "train")
    (whole / "dataset_dict.json").write_text('{"splits": ["train"]}')
    assert list_images(open_source(str(whole))).splits == {"train": (0, 2)}
    (whole / "dataset_dict.json").write_text('{"splits": ["../secret"]}')
    assert "lies outside it" in said(whole)


@pytest.mark.parametrize(
    "text", ["[1]", "[" * 5000, '{"_data_files": ' + "9" * 5000 + "}", '{"_data_files": [3]}']
)
def test_a_state_that_is_none_is_one_line(saved, text):
    (saved / "state.json").write_text(text)
    assert "cannot be read" in said(saved)


def test_a_pointer_in_place_of_its_data_is_said(saved):
    (saved / DATA).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert f"{DATA} is a Git LFS pointer" in said(saved)


@pytest.mark.parametrize("dictionary", [False, True])
@pytest.mark.parametrize("compression", ["zstd", "lz4", None])
def test_compressed_data_is_refused(saved, compression, dictionary):
    labels = pa.array(["a", "b"])
    table = pa.table(
        {"image": [encoded_picture()] * 2, "label": labels.dictionary_encode() if dictionary else labels}
    )
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with pa.ipc.new_stream(str(saved / DATA), table.schema, options=options) as writer:
        writer.write_table(table)
    assert is_compressed(str(saved / DATA)) == (compression is not None)
    if compression:
        assert "is compressed, which `datasets` does not" in said(saved)
