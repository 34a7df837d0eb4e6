import pytest

from fitv2.encoding.kinds import open_source
from fitv2.errors import UserError


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (["a/1.png", "notes.txt"], "images"),
        (["data/train-0.parquet", "README.md"], "parquet"),
        (["0.tar", "1.tar", "LICENSE"], "tars"),
        (["dataset_dict.json", "train/state.json", "train/data-0.arrow"], "datasets"),
        (["state.json", "dataset_info.json"], "datasets"),
    ],
)
def test_the_kind_of_a_source_is_seen_from_its_files(holding, names, kind):
    assert open_source(holding(*names)).kind == kind


def test_a_pattern_and_a_single_file(holding):
    root = holding("a.tar", "b.tar", "preview.png")
    source = open_source(f"{root}/*.tar")
    assert [source.name(path) for path in source.files] == ["a.tar", "b.tar"]
    assert open_source(f"{root}/a.tar").files.keys() == {f"{root}/a.tar"}


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["a.tar", "b.parquet"], "holds parquet and tars: say which, such as '.*/[*][*]/[*].parquet'"),
        (["a.tar", "a/1.png"], "holds tars and images"),
        (["a.tar.gz"], "decompress them to .tar"),
        ([".hidden/1.png"], "has no images"),
    ],
)
def test_what_cannot_be_read_is_said(holding, names, said):
    with pytest.raises(UserError, match=said):
        open_source(holding(*names))


def test_options_for_tables_are_refused_elsewhere(holding):
    with pytest.raises(UserError, match=r"`caption_column` are for tables; .* holds images"):
        open_source(holding("a/1.png"), label_column="label")


def test_no_name_is_not_the_current_folder():
    with pytest.raises(UserError, match="the source has no name"):
        open_source("")


def test_a_name_of_the_hub_is_not_looked_up_but_suggested():
    with pytest.raises(UserError, match="hf://datasets/organization/name"):
        open_source("organization/name")
