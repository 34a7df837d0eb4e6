"""Odd input of every kind, seeded: an answer or one line, never a traceback, a hang, or a loss.

FITV2_FUZZ=10 runs ten times as many.
"""

import io
import json
import os
import resource
import shutil
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from conftest import encoded_picture, randomized
from fitv2.checkpoint import Card, load_model, save_model
from fitv2.cli.commands import COMMANDS, describe, run
from fitv2.cli.parsing import option_names
from fitv2.config import Encoding
from fitv2.data.dataset import TokenDataset, verify_files
from fitv2.encoding.encode import encode
from fitv2.encoding.images import UnusableImage
from fitv2.encoding.kinds import open_source
from fitv2.encoding.manifest import list_images, read_image
from fitv2.model import FiT
from fitv2.training.run_folder import cut_log, read_log, settle

TIMES = int(os.environ.get("FITV2_FUZZ", "1"))
MEMORY = 400 << 10  # KiB that a fuzzer may add to what the process takes


@pytest.fixture(autouse=True)
def bounded_memory():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MEMORY


def answered(work, *arguments, **options):
    """What `work` returns; None if it refuses in one line."""
    try:
        return work(*arguments, **options)
    except SystemExit as stop:
        assert not stop.code
    except Exception as error:
        message, status = describe(error)
        assert status == 2, f"{message!r} of {arguments}"
        assert message.strip()
    return None


# Command lines ----------------------------------------------------------------------------------

VALUES = [
    "", "0", "1", "-1", "2", "3.5", "nan", "inf", "-inf", "1e999", "1e-999", "9" * 30, "9" * 5000, "0x10",
    "1_000",
    "true", "None", "none", "[]", "{}", "a b", "../..", "~", "/", "/dev/null", "é", "\u202e", "\ud800", "\x00", "%s",
    "{0}", "--", "-", "--help=", "64x96", "1x1", "0x0", "65536x65536", "clipart", "debug", "label", "s3://x",
    "foo://bar", "file:///nowhere", "http://", "*", "**/*", "heun", "pixels", "float32", "linear", "'", '"', "\n", "=",
]  # fmt: skip
STARTS = {
    "encode": ["nowhere", "out"], "train": ["debug", "--data", "nowhere", "--out", "run"], "sample": ["nowhere"],
    "convert": ["nowhere", "out"], "export": ["nowhere", "out"], "inspect": ["nowhere"],
    "demo": ["--data", "nowhere"], "flops": ["debug"], "edit": ["nowhere", "nowhere.png"], "app": ["nowhere"],
    "evaluate": ["nowhere", "--reference", "nowhere", "--out", "out"],
    "study solvers": ["nowhere", "--reference", "nowhere", "--out", "out"],
    "study sizes": ["nowhere", "--reference", "nowhere", "--out", "out"],
    "study convergence": ["--data", "nowhere", "--square", "nowhere", "--reference", "nowhere", "--out", "out"],
    "study scaling": ["--data", "nowhere", "--reference", "nowhere", "--out", "out"],
}  # fmt: skip


def command_line(rng):
    name = str(rng.choice(list(COMMANDS)))
    options = sorted(set(option_names(COMMANDS[name][0])) - {"--help"})
    arguments = [*STARTS[name]]
    for _ in range(rng.integers(1, 4)):
        option, value = str(rng.choice(options)), VALUES[rng.integers(len(VALUES))]
        more = (
            [option]
            if rng.random() < 0.1
            else [f"{option}={value}"]
            if rng.random() < 0.3
            else [option, value]
        )
        at = rng.integers(len(arguments) + 1) if rng.random() < 0.1 else len(arguments)
        arguments[at:at] = more
    if rng.random() < 0.1:
        arguments = [VALUES[rng.integers(len(VALUES))] for _ in range(3)]
    return [*name.split(), *arguments]


def test_command_lines(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "thesis").write_text("precious")
    rng = np.random.default_rng(0)
    for _ in range(400 * TIMES):
        answered(run, command_line(rng))
        capsys.readouterr()
    assert (tmp_path / "thesis").read_text() == "precious"


ODD_SAMPLING = [
    ("--solver", ["euler", "heun", "rk4", "dopri5", "bosh3", "adaptive-heun", "fehlberg2", "euler-maruyama", "ddim"]),
    ("--steps", ["1", "2", "0", "10001"]), ("--guidance-scale", ["1", "-3", "999", "nan"]),
    ("--guidance-power", ["0", "1000", "0.001"]), ("--guidance-channels", ["1", "3", "4"]),
    ("--rtol", ["0", "1e-9", "1"]), ("--atol", ["1e-12", "1", "0"]), ("--eta", ["1", "0.5"]),
    ("--extrapolation", ["ntk", "yarn", "pi", "ntk-by-parts", "none"]), ("--train-side", ["2", "32767", "1"]),
    ("--attention-scale", ["paper", "pro1", "pro2"]), ("--size", ["1x1", "7x300", "64x8", "0x9", "1x40000"]),
    ("--label", ["0", "b", "B", "\u00e9", "3"]), ("--seed", ["0", "9223372036854775807", "9" * 25]),
    ("--num", ["1", "2", "0"]), ("--diffusion-norm", ["0", "1000"]), ("--last-step-size", ["0", "0.99", "1"]),
]  # fmt: skip


def test_sampling_settings(tmp_path, monkeypatch, capsys):
    shape = {"depth": 1, "width": 16, "heads": 2, "patch_size": 8, "in_channels": 3, "num_classes": 2}
    save_model(randomized(FiT(**shape)), Card(("a", "b"), "pixels", 16), tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(1)
    made = 0
    for _ in range(100 * TIMES):
        chosen = rng.choice(len(ODD_SAMPLING), rng.integers(1, 4), replace=False)
        options = [text for i in chosen for text in (ODD_SAMPLING[i][0], str(rng.choice(ODD_SAMPLING[i][1])))]
        small = [] if "--size" in options else ["--size", "16x24"]
        few = [] if "--steps" in options else ["--steps", "2"]
        made += answered(run, ["sample", "model", *options, *small, *few]) == 0
        capsys.readouterr()
    assert made > 20 * TIMES
    assert not list((tmp_path / "samples").glob(".*"))


# Artefacts --------------------------------------------------------------------------------------

ODD_JSON = [
    None,
    True,
    -1,
    0,
    1e308,
    2**63,
    "",
    "x",
    "a/b",
    [],
    [1],
    {},
    {"a": 1},
    [[[[]]]],
    "\u0000",
    float("nan"),
]
ODD_FILES = [b"", b"\x00" * 64, b"null", b"[]", b'"x"', b"{", b"[" * 5000, b"1" * 5000, b"<html>", b"\xff\xfe\x00",
             b"version https://git-lfs.github.com/spec/v1\n", b"\x1f\x8b\x08"]  # fmt: skip


def places_of(value, path=()):
    """All keys and places in a json value."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(items)[:30]:
        yield from places_of(inner, (*path, key))


def mutate_json(content, rng):
    value = json.loads(content)
    places = list(places_of(value))[1:]
    if not places:
        return content
    *above, key = places[rng.integers(len(places))]
    holder = value
    for step in above:
        holder = holder[step]
    how = rng.integers(3)
    if how == 0:
        del holder[key]
    elif how == 1 or isinstance(holder, list):
        holder[key] = ODD_JSON[rng.integers(len(ODD_JSON))]
    else:
        holder[f"{key}x"] = holder.pop(key)
    return json.dumps(value).encode()


def mutate(content, rng):
    """A file that is not quite what it was."""
    if content[:1] == b"{" and rng.random() < 0.6:
        try:
            return mutate_json(content, rng)
        except ValueError:  # json lines
            pass
    how = rng.integers(5)
    broken = bytearray(content)
    if how == 0:
        return content[: rng.integers(len(content) + 1)]
    if how == 1:
        return ODD_FILES[rng.integers(len(ODD_FILES))]
    if how == 2:
        at = int(rng.integers(len(content) + 1))
        return content[:at] + rng.bytes(8) + content[at:]
    for _ in range(1 if how == 3 else 20):
        if broken:
            # Headers are where it hurts.
            at = rng.integers(min(len(broken), 2000) if rng.random() < 0.7 else len(broken))
            broken[at] = rng.integers(256)
    return bytes(broken)


def broken_copies(folder, tmp_path, rng, count):
    """Copies of a folder with one file mutated or gone, each removed before the next."""
    files = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    for _ in range(count):
        copy = tmp_path / "copy"
        shutil.copytree(folder, copy)
        path = copy / files[rng.integers(len(files))]
        if rng.random() < 0.05:
            path.unlink()
        else:
            path.write_bytes(mutate(path.read_bytes(), rng))
        yield copy
        shutil.rmtree(copy)


@pytest.mark.parametrize("hashed", [True, False])
def test_model_folders(model, tmp_path, hashed):
    save_model(model, Card(("a", "b", "c", "d", "e"), "pixels", 16), tmp_path / "model")
    if not hashed:
        (tmp_path / "model" / "files.json").unlink()
    rng, opened = np.random.default_rng(2), 0
    for copy in broken_copies(tmp_path / "model", tmp_path, rng, 150 * TIMES):
        loaded = answered(load_model, copy)
        opened += loaded is not None
    assert opened < 150 * TIMES * (0.2 if hashed else 0.7)


def test_token_folders(tokens, tmp_path):
    def use(copy):
        dataset = TokenDataset(copy)
        verify_files(dataset.store, dataset.card)
        rows = np.arange(len(dataset.sizes))
        dataset.batch(rows)
        return dataset.sources(rows)

    rng = np.random.default_rng(3)
    for copy in broken_copies(tokens, tmp_path, rng, 150 * TIMES):
        answered(use, copy)


def test_run_folders(tokens, tmp_path):
    from fitv2.presets import preset

    debug, data = preset("debug"), TokenDataset(tokens).card
    settle(tmp_path / "run", debug, data, None)
    (tmp_path / "run" / "log.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n')
    (tmp_path / "run" / "checkpoints" / "step-0000002").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "step-0000002" / "x").write_text("x")

    def use(copy):
        settle(copy, debug, data, None)
        cut_log(copy / "log.jsonl", 1)
        return read_log(copy / "log.jsonl")

    for copy in broken_copies(tmp_path / "run", tmp_path, np.random.default_rng(4), 100 * TIMES):
        answered(use, copy)


# Collections ------------------------------------------------------------------------------------


def images():
    """Images of many formats, and files that are none."""
    made = [encoded_picture(40, 24)]
    for form, mode in (("JPEG", "RGB"), ("WEBP", "RGBA"), ("GIF", "P"), ("TIFF", "CMYK"), ("BMP", "1"), ("PNG", "LA"),
                       ("PNG", "I;16"), ("TIFF", "F"), ("ICO", "RGBA"), ("PPM", "L"), ("JPEG2000", "RGB")):  # fmt: skip
        file = io.BytesIO()
        Image.new(mode, (33, 17)).save(file, form)
        made.append(file.getvalue())
    return made


IMAGES = images()
FOLDERS = [
    "",
    "cat/",
    "dog/",
    "train/",
    "val/",
    "train/cat/",
    "test/dog/",
    "a/b/c/",
    "@eaDir/",
    "é/",
    "e\u0301/",
    " /",
]
ENDINGS = [
    ".png",
    ".jpg",
    ".JPEG",
    ".webp",
    ".gif",
    ".tif",
    "",
    ".txt",
    ".mask.png",
    ".v1.png",
    ".svg",
    ".json",
]
TABLES = ["metadata.csv", "metadata.jsonl", "dataset_infos.json", "README.md", "LICENSE"]


def file_of(name, rng):
    if name.endswith((".csv", ".jsonl")):
        return (
            b"file_name,label\n1.png,cat\n"
            if name.endswith("csv")
            else b'{"file_name": "1.png", "label": 3}\n'
        )
    if name.endswith(".json"):
        return json.dumps({"label": ODD_JSON[rng.integers(len(ODD_JSON))]}).encode()
    return IMAGES[rng.integers(len(IMAGES))]


def collection(folder, rng):
    """A random collection of one kind, with some of its files mutated."""
    names = [
        f"{rng.choice(FOLDERS)}{rng.integers(5)}{rng.choice(ENDINGS)}" for _ in range(rng.integers(1, 7))
    ]
    if rng.random() < 0.3:
        names.append(str(rng.choice(FOLDERS)) + str(rng.choice(TABLES)))
    files = {name: file_of(name, rng) for name in names}
    kind = rng.choice(["images", "tars", "parquet"])
    if kind == "tars":
        members, files = files, {}
        files[str(rng.choice(["train-0.tar", "cats.tar", "val/x.tar"]))] = archive(members, rng)
    elif kind == "parquet":
        files = {str(rng.choice(["train-0.parquet", "x.parquet", "test/0.parquet"])): table(rng)}
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(mutate(content, rng) if rng.random() < 0.4 else content)
    if rng.random() < 0.1:
        os.mkfifo(folder / "pipe.png")
    if rng.random() < 0.1:
        (folder / "link.png").symlink_to("/etc/hostname")
    return str(folder)


def archive(members, rng):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=int(rng.integers(3))) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            if rng.random() < 0.05:
                info.type, info.linkname, info.size = tarfile.SYMTYPE, "/etc/passwd", 0
            tar.addfile(info, io.BytesIO(content))
    return file.getvalue()


def table(rng):
    count = int(rng.integers(0, 4))
    cells = [IMAGES[rng.integers(len(IMAGES))] for _ in range(count)]
    image = [{"bytes": None if rng.random() < 0.3 else cell, "path": "/etc/hostname"} for cell in cells]
    labels = [[0, 1, None, 2, -1], ["a", "é", None, "", "b" * 300], [0.0, float("nan"), 1.0, 1.5, None],
              [[1], [], None, [2, 3], [1]], [True, False, None, True, True]][rng.integers(5)]  # fmt: skip
    noted = (
        {"label": {"names": ["x", "y"], "_type": "ClassLabel"}}
        if rng.random() < 0.5
        else ODD_JSON[rng.integers(15)]
    )
    columns = {"image": image if rng.random() < 0.7 else cells, "label": labels[:count]}
    schema = {b"huggingface": json.dumps({"info": {"features": noted}}).encode()}
    file = io.BytesIO()
    pq.write_table(pa.table(columns).replace_schema_metadata(schema), file, row_group_size=2)
    return file.getvalue()


def test_collections(tmp_path):
    rng, used, skipped = np.random.default_rng(5), 0, 0
    for number in range(400 * TIMES):
        folder = tmp_path / str(number)
        folder.mkdir()
        source = collection(folder, rng)
        manifest = answered(lambda source=source: list_images(open_source(source)))
        for row in range(len(manifest.table)) if manifest else ():
            try:
                assert read_image(manifest, manifest.picture(row)).mode == "RGB"
                used += 1
            except UnusableImage as error:
                assert str(error)
                skipped += 1
        shutil.rmtree(folder)
    assert used > 200 * TIMES
    assert skipped > 100 * TIMES


def test_encoding_of_collections(tmp_path):
    """Whole: what is encoded and what is skipped is all there is, or nothing is left behind."""
    rng, whole = np.random.default_rng(6), 0
    for number in range(40 * TIMES):
        folder, out = tmp_path / str(number), tmp_path / f"out-{number}"
        folder.mkdir()
        source = collection(folder, rng)
        report = answered(encode, source, out, Encoding(max_tokens=(4,)), workers=0)
        if report is None:
            assert not out.exists()
        else:
            whole += 1
            manifest = list_images(open_source(source))
            assert sum(report.encoded.values()) + report.skipped == len(manifest.table)
            assert not [path for path in out.iterdir() if path.name.startswith(".")]
            verify_files(
                TokenDataset(out, next(iter(report.encoded))).store,
                TokenDataset(out, next(iter(report.encoded))).card,
            )
        shutil.rmtree(folder)
    assert whole > 10 * TIMES
