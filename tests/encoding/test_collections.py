"""The everyday collections of docs/guides/data.md, row by row: what each becomes."""

import io
import json
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from conftest import encoded_picture
from fitv2.encoding.images import UnusableImage
from fitv2.encoding.kinds import open_source
from fitv2.encoding.manifest import list_images, read_image
from fitv2.errors import UserError

PNG = encoded_picture()
GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "data.md"


def tar(members):
    """A tar of names, or of names and contents."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name in members:
            content = members[name] if isinstance(members, dict) else PNG
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return file.getvalue()


def table(features=None, **columns):
    """A Parquet file; `features` is what `datasets` notes of its columns."""
    images = pa.array([PNG] * len(next(iter(columns.values()))), pa.binary())
    file, columns = io.BytesIO(), {"image": images, **columns}
    noted = {b"huggingface": json.dumps({"info": {"features": features}}).encode()} if features else None
    pq.write_table(pa.table(columns).replace_schema_metadata(noted), file)
    return file.getvalue()


NAMES = {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"

# Name of the row in the guide: files (None: a small PNG), then each image as SPLIT/LABEL, "-" where it is
# not used; and a part of the summary.
BECOMES = {
    "class folders": ({"cat/1.png": None, "dog/2.png": None}, "train/cat train/dog", "2 classes from folder names"),
    "class folders and splits": (
        {"train/cat/1.png": None, "val/cat/2.png": None, "test/dog/3.png": None},
        "test/dog train/cat validation/cat", "2 classes"),
    "train and eval": ({"train/cat/1.png": None, "eval/dog/2.png": None}, "train/cat validation/dog", "2 classes"),
    "a flat test beside class folders in train": (
        {"train/cat/1.png": None, "test/2.png": None, "test/3.png": None}, "- - train/cat",
        "test has no labels: 2 pictures skipped"),
    "flat splits": ({"train/1.png": None, "val/2.png": None}, "train/image validation/image", "no labels"),
    "a flat folder": ({"1.png": None, "2.png": None}, "train/image train/image", "no labels"),
    "a stray picture": ({"cover.png": None, "cat/1.png": None}, "train/cat -", "1 of 2 pictures in train have no label"),
    "a stray picture beside splits": ({"cover.png": None, "train/cat/1.png": None}, "- train/cat", "1 classes"),
    "texts without an ending": ({"LICENSE": b"x", "README": b"x", "cat/1.png": None}, "train/cat", "1 classes"),
    "images without an ending": ({"cat/1": None, "dog/2": None}, "train/cat train/dog", "2 classes"),
    "thumbnails of a system": (
        {"cat/1.png": None, "cat/@eaDir/1.png/T.jpg": None, "__MACOSX/cat/._1.png": None, "cat/Thumbs.db": b"x"},
        "train/cat", "1 classes"),
    "a class named as a split": ({"train/1.png": None, "bus/2.png": None, "car/3.png": None},
                                 "train/bus train/car train/train", "3 classes"),
    "metadata.csv": (
        {"1.png": None, "a/2.png": None, "3.png": None, "metadata.csv": b"file_name,label\n1.png,cat\na/2.png,dog\n"},
        "train/cat - train/dog", "2 classes from metadata"),
    "metadata.jsonl in splits": (
        {"train/1.png": None, "val/2.png": None,
         "train/metadata.jsonl": b'{"file_name": "1.png", "label": "cat"}\n',
         "val/metadata.jsonl": b'{"file_name": "2.png", "label": "dog"}\n'},
        "train/cat validation/dog", "2 classes from metadata"),
    "metadata without labels": (
        {"cat/1.png": None, "metadata.csv": b"file_name,text\ncat/1.png,a cat\n"}, "train/cat", "folder names"),
    "spellings of Unicode": (
        {"caf\u00e9/1.png": None, "cafe\u0301/2.png": None}, "train/caf\u00e9 train/caf\u00e9", "1 classes"),
    "a tar of class folders": ({"x.tar": tar(["cat/1.png", "dog/2.png"])}, "train/cat train/dog", "2 classes"),
    "a tar a class": ({"cats.tar": tar(["1.png"]), "dogs.tar": tar(["1.png"])}, "train/cats train/dogs",
                      "2 classes from the names of the archives"),
    "a tar a class of ImageNet": (
        {"n01440764.tar": tar(["1.JPEG"]), "n01443537.tar": tar(["1.JPEG"])},
        "train/n01440764 train/n01443537", "2 classes"),
    "shards": ({"data-000.tar": tar(["1.png"]), "data-001.tar": tar(["2.png"])}, "train/image train/image", "no labels"),
    "tars named by their split": ({"train.tar": tar(["1.png"]), "val.tar": tar(["2.png"])},
                                  "train/image validation/image", "no labels"),
    "splits in a tar": ({"x.tar": tar(["train/1.png", "val/2.png"])}, "train/image validation/image", "no labels"),
    "splits and classes in a tar": (
        {"x.tar": tar(["train/cat/1.png", "val/dog/2.png"])}, "train/cat validation/dog", "2 classes"),
    "labels of a tar that are missing, null, a list or cut off": (
        {"x.tar": tar({"a.png": PNG, "a.cls": b"cat", "b.png": PNG, "c.png": PNG, "c.json": b'{"label": null}',
                       "d.png": PNG, "d.json": b'{"label": ["x"]}', "e.png": PNG, "e.json": b'{"label": "do'})},
        "train/cat - - - -", "4 of 5 pictures in train have no label"),
    "dots in the names of a tar": (
        {"x.tar": tar(["cat/1.v1.png", "cat/1.v2.png", "cat/2.0.png"])}, "train/cat train/cat train/cat", "1 classes"),
    "masks beside pictures": (
        {"x.tar": tar(["cat/1.jpg", "cat/1.png", "cat/2.image.png", "cat/2.mask.png", "cat/3.jpg", "cat/3.seg.png"])},
        "train/cat - train/cat - train/cat -", "1 classes"),
    "classes of a table": (
        {"train.parquet": table(NAMES, label=[0, 1, None])}, "train/cat train/dog -", "2 classes from column label"),
    "classes stored as floats": (
        {"train.parquet": table(NAMES, label=[0.0, 1.0, float("nan")])}, "train/cat train/dog -", "2 classes"),
    "classes of one name": (
        {"train.parquet": table({"label": {"names": ["crane", "crane"], "_type": "ClassLabel"}}, label=[0, 1])},
        "train/crane train/crane (1)", "2 classes"),
    "numbered splits": (
        {"train2017/1.png": None, "val2017/2.png": None, "test_images/3.png": None},
        "test/image train/image validation/image", "no labels"),
    "a folder around all others": (
        {"archive/train/cat/1.png": None, "archive/val/dog/2.png": None}, "train/cat validation/dog", "2 classes"),
    "a folder around class folders": (
        {"PetImages/Cat/1.png": None, "PetImages/Dog/2.png": None}, "train/Cat train/Dog", "2 classes"),
    "a folder around all others in a tar": (
        {"x.tar": tar(["net/train/cat/1.png", "net/val/dog/2.png"])}, "train/cat validation/dog", "2 classes"),
    "a folder of pictures beside one of masks": (
        {"train/images/1.jpg": None, "train/masks/1.png": None}, "train/image -", "1 images that are about others"),
    "masks beside pictures in folders": (
        {"cat/1.jpg": None, "cat/1_mask.png": None, "cat/2.jpg": None, "cat/2.seg.png": None},
        "train/cat - train/cat -", "2 images that are about others"),
    "a flat test beside class folders": (
        {"cat/1.png": None, "dog/2.png": None, "test/3.png": None}, "- train/cat train/dog",
        "test has no labels: 1 pictures skipped"),
    "images without an ending beside others": (
        {"cat/1": None, "cat/2.png": None, "cat/README": b"x"}, "train/cat train/cat", "1 classes"),
    "images and texts without an ending in a tar": (
        {"x.tar": tar({"cat/1": PNG, "cat/README": b"x", "dog/2.png": PNG})}, "train/cat train/dog", "2 classes"),
    "labels of names with dots": (
        {"x.tar": tar({"a.1.png": PNG, "a.1.cls": b"cat", "a.2.png": PNG, "a.2.png.json": b'{"label": "dog"}'})},
        "train/cat train/dog", "2 classes"),
    "labels of a tar that are floats, long, or of several lines": (
        {"x.tar": tar({"a.png": PNG, "a.json": b'{"label": 3.0}', "b.png": PNG, "b.cls": b"4",
                       "c.png": PNG, "c.cls": b"x" * 2000, "d.png": PNG, "d.cls": b"cat\ndog"})},
        "train/3 train/4 - -", "2 of 4 pictures"),
    "several tars a class": (
        {"cats-000.tar": tar(["1.png"]), "cats-001.tar": tar(["2.png"]), "dogs-000.tar": tar(["3.png"])},
        "train/cats train/cats train/dogs", "2 classes from the names of the archives"),
    "tars a class in splits": (
        {f"{split}/{name}.tar": tar(["images/1.png"]) for split in ("train", "val") for name in ("cats", "dogs")},
        "train/cats train/dogs validation/cats validation/dogs", "2 classes"),
    "tars in class folders": (
        {"cats/000.tar": tar(["1.png"]), "dogs/000.tar": tar(["2.png"])}, "train/cats train/dogs", "2 classes"),
    "metadata with a list, a null, or two labels": (
        {f"{i}.png": None for i in range(4)}
        | {"metadata.jsonl": b"\n".join(json.dumps({"file_name": f"{i}.png", "label": label}).encode()
                                        for i, label in ((0, "cat"), (1, ["a"]), (2, None), (3, "a"), (3, "b")))},
        "train/cat - - -", "3 of 4 pictures"),
    "metadata in another spelling of Unicode": (
        {"cafe\u0301.png": None, "metadata.csv": "file_name,label\ncaf\u00e9.png,cat\n".encode()}, "train/cat", "1 classes"),
    "floats without names": (
        {"train.parquet": table(label=[0.0, 1.0, None])}, "train/0 train/1 -", "2 classes"),
    "test without a column of labels": (
        {"train.parquet": table(NAMES, label=[0, 1]), "test.parquet": table(text=["a"])}, "- train/cat train/dog",
        "test has no labels: 1 pictures skipped"),
    "names of classes in one of the files": (
        {"train.parquet": table(NAMES, label=[0, 1]), "test.parquet": table(label=[1, -1])},
        "test/dog - train/cat train/dog", "2 classes"),
    "a table of test images": ({"test.parquet": table(NAMES, label=[0])}, "test/cat", "training needs images of"),
}  # fmt: skip

REFUSED = {
    "a third folder beside splits": (
        {"train/cat/1.png": None, "val/cat/2.png": None, "extra/3.png": None},
        "holds train and val, named as splits are, beside extra: are those labels or splits\\? Give one folder"),
    "a flat train beside one folder": (
        {"train/1.png": None, "cat/2.png": None}, "holds train, named as splits are, beside cat: are those labels"),
    "a column of lists": ({"x.parquet": table(label=[["a"]])}, "has lists in its column label, .*: give `label_column`"),
    "a column without one label": (
        {"x.parquet": table(label=pa.array([None], pa.string()))}, r"not one of its 1 images has a label \(column label\)"),
    "more rows than bytes": (
        {"x.parquet": table(text=pa.nulls(50_000, pa.string()), image=pa.nulls(50_000, pa.binary()))},
        "50000 rows in .* bytes: those are no images"),
    "a Git LFS pointer for a tar": ({"x.tar": LFS}, "a Git LFS pointer.*: run git lfs pull"),
    "a tar compressed by gzip": ({"x.tar": b"\x1f\x8b\x08" + bytes(99)}, "compressed by gzip under another name"),
    "a tar of tars": ({"x.tar": tar({"cat.tar": tar(["1.png"])})}, "holds archives, not images: unpack it first"),
    "an empty table": ({"x.parquet": table(label=[])}, "has no rows"),
    "a Git LFS pointer for a table": ({"x.parquet": LFS}, "a Git LFS pointer.*: run git lfs pull"),
    "a page of HTML for a table": ({"x.parquet": b"<!DOCTYPE html><p>404"}, "a page of HTML"),
    "a table compressed by gzip": ({"x.parquet": b"\x1f\x8b\x08" + bytes(99)}, "compressed by gzip under another name"),
    "a line that is none in metadata.jsonl": (
        {"1.png": None, "metadata.jsonl": b'{"file_name": "1.png"}\n["x"]\n'}, "line 2 of metadata.jsonl is no json"),
}  # fmt: skip


def fill(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(PNG if content is None else content)
    return str(folder)


def became(manifest):
    """Each image as SPLIT/LABEL, "-" if it is not used."""
    for row in range(len(manifest.table)):
        image = manifest.picture(row)
        try:
            read_image(manifest, image)
            yield f"{image.split}/{image.label}"
        except UnusableImage:
            yield "-"


@pytest.mark.parametrize("name", BECOMES)
def test_everyday_collections_become_what_their_owners_see(name, tmp_path):
    files, expected, said = BECOMES[name]
    manifest = list_images(open_source(fill(tmp_path / "set", files)))
    assert " ".join(became(manifest)) == expected
    assert said in "; ".join(manifest.summary)


@pytest.mark.parametrize("name", REFUSED)
def test_what_can_mean_two_things_or_nothing_is_refused(name, tmp_path):
    files, said = REFUSED[name]
    with pytest.raises(UserError, match=said) as raised:
        list_images(open_source(fill(tmp_path / "set", files)))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", [*BECOMES, *REFUSED])
def test_the_guide_has_a_row_of_each(name):
    rows = re.findall(r"^\| ([^|]+) \|", GUIDE.read_text(encoding="utf-8"), re.MULTILINE)
    assert name in rows


CAPTIONED = {
    "texts beside pictures": {"cat/1.png": None, "cat/1.txt": b" a cat\n on a mat ", "cat/2.png": None},
    "metadata.jsonl": {
        "1.png": None, "2.png": None,
        "metadata.jsonl": b'{"file_name": "1.png", "text": "a cat on a mat"}\n{"file_name": "2.png"}\n'},
    "a table": {"x.parquet": table(label=["x", "x"], caption=["a cat on a mat", None])},
    "several captions in a table": {"x.parquet": table(label=["x", "x"], captions=[["a cat on a mat", "b"], []])},
    "texts in a tar": {"x.tar": tar({"1.png": PNG, "1.txt": b"a cat on a mat", "2.png": PNG})},
    "json in a tar": {"x.tar": tar({"1.png": PNG, "1.json": b'{"caption": "a cat on a mat"}', "2.png": PNG})},
}  # fmt: skip


@pytest.mark.parametrize("name", CAPTIONED)
def test_captions_lie_where_people_put_them(name, tmp_path):
    manifest = list_images(open_source(fill(tmp_path / "set", CAPTIONED[name])))
    assert [manifest.picture(row).caption for row in range(2)] == ["a cat on a mat", ""]
    assert "1 pictures have a caption, 1 have none" in manifest.summary
    assert not manifest.others or name == "metadata.jsonl"


def test_a_column_of_captions_can_be_named(tmp_path):
    files = {"x.parquet": table(label=["x"], caption=["one"], alt=["two"])}
    folder = fill(tmp_path / "set", files)
    assert list_images(open_source(folder, caption_column="alt")).picture(0).caption == "two"
    with pytest.raises(UserError, match="has no column alternative, but image, label, caption, alt"):
        list_images(open_source(folder, caption_column="alternative"))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (LFS, "a Git LFS pointer"),
        (b"\x1f\x8b\x08" + bytes(50), "compressed by gzip"),
        (b"\xef\xbb\xbf\n<HTML><p>", "a page of HTML"),
        (b"PK\x03\x04" + bytes(50), "a compressed archive"),
    ],
)
def test_what_is_no_image_says_what_it_is(content, said, tmp_path):
    manifest = list_images(open_source(fill(tmp_path / "set", {"cat/1.jpg": content})))
    with pytest.raises(UnusableImage, match=f"not an image but {said}"):
        read_image(manifest, manifest.picture(0))


def test_all_images_can_be_taken_as_one_split(tmp_path):
    files = {"test.parquet": table(NAMES, label=[0]), "val.parquet": table(NAMES, label=[1])}
    source = open_source(fill(tmp_path / "set", files), split="train")
    assert list(became(list_images(source))) == ["train/cat", "train/dog"]


def test_a_source_that_is_gone_stops_all(tmp_path):
    manifest = list_images(open_source(fill(tmp_path / "set", {"cat/1.png": None})))
    (tmp_path / "set").rename(tmp_path / "moved")
    with pytest.raises(UserError, match="set is gone: put it back"):
        read_image(manifest, manifest.picture(0))


# What is small on the disk and large in memory; how much of it reading all of it may take in MB.
BOMBS = {
    "a picture of one colour": ("1.png", "Image.new('RGBA', (12_000, 12_000), 'red').save(path, compress_level=9)", 300),
    "a picture of a palette": ("1.png", "Image.new('P', (13_000, 13_000)).save(path, transparency=0)", 300),
    "a large JPEG": ("1.jpg", "Image.new('RGB', (13_000, 13_000), 'red').save(path)", 900),
    "a table that repeats one image": (
        "1.parquet", "pq.write_table(pa.table({'image': pa.array([bytes(9 << 20)] * 400, pa.binary()),"
        " 'label': ['x'] * 400}), path, compression='zstd')", 300),
    "a table that repeats one label": (
        "1.parquet", "pq.write_table(pa.table({'image': pa.array([b'x'] * 900, pa.binary()),"
        " 'label': ['x' * (4 << 20)] * 900}), path, compression='zstd')", 300),
}  # fmt: skip
READING = """
import sys
from fitv2.encoding.images import UnusableImage
from fitv2.encoding.kinds import open_source
from fitv2.encoding.manifest import list_images, read_image
from fitv2.errors import UserError
import pyarrow.parquet
def most():  # not ru_maxrss, which begins with that of the process that started this one
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM"))
before = most()
said = ""
try:
    manifest = list_images(open_source(sys.argv[1]))
    for row in range(len(manifest.table)):
        try:
            said = read_image(manifest, manifest.picture(row)).size
        except UnusableImage as error:
            said = error
except UserError as error:
    said = error
print((most() - before) >> 10, said)
"""


@pytest.mark.parametrize("name", BOMBS)
def test_what_is_small_on_the_disk_takes_no_more_memory_than_it_may(name, tmp_path):
    file, write, most = BOMBS[name]
    (tmp_path / "set" / "cat").mkdir(parents=True)
    path = tmp_path / "set" / ("cat" if file.endswith("g") else "") / file
    code = (
        f"from PIL import Image; import pyarrow as pa, pyarrow.parquet as pq; path = {str(path)!r}; {write}"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    done = subprocess.run(
        [sys.executable, "-c", READING, str(tmp_path / "set")], check=True, capture_output=True, text=True
    )
    megabytes, said = done.stdout.split(" ", 1)
    assert int(megabytes) < most, said


def test_every_member_of_a_tar_is_used_or_listed(tmp_path):
    members = {"cat/1.png": PNG, "cat/1.cls": b"cat", "cat/1.nfo": b"a", "cat/2.nfo": b"b", "README": b"x"}
    manifest = list_images(open_source(fill(tmp_path / "set", {"x.tar": tar(members)})))
    assert manifest.others == [
        {"source": "x.tar/README", "reason": "no image by its first bytes", "files_like_it": 1},
        {
            "source": "x.tar/cat/1.nfo",
            "reason": "no image by its name, which ends in .nfo",
            "files_like_it": 2,
        },
    ]


@pytest.mark.parametrize("url", ["reference://x", "dir://x", "zip://x::nothing", "foo://bar", "hf://"])
def test_a_url_that_leads_nowhere_is_one_line(url):
    with pytest.raises(UserError, match=f"{re.escape(url)} cannot be re") as raised:
        open_source(url)
    assert "\n" not in str(raised.value)
