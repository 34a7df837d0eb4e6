"""What is published: a wheel and an sdist that build, with a README whose links lead somewhere."""

import importlib.util
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ADDRESS = "https://example.org/someone/fitv2"
SPEC = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
hook = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(hook)


def build(folder, out, kind):
    """The file that hatchling, which pip and build call, makes of a tree."""
    command = [sys.executable, "-m", "hatchling", "build", "-t", kind, "-d", str(out)]
    environment = os.environ | {"FITV2_REPOSITORY": ADDRESS}
    subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True)
    (made,) = out.iterdir()
    return made


def metadata_of(wheel):
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith("METADATA"))
        return message_from_bytes(archive.read(name)), archive.namelist()


def test_an_sdist_builds_and_so_does_the_wheel_of_it(tmp_path):
    source = build(ROOT, tmp_path / "source", "sdist")
    with tarfile.open(source) as archive:
        archive.extractall(tmp_path / "tree", filter="data")
    (tree,) = (tmp_path / "tree").iterdir()
    assert not (tree / "data").exists()
    told, held = metadata_of(build(tree, tmp_path / "wheel", "wheel"))
    assert {"fitv2/model.py", "fitv2/py.typed", "fitv2/conversion/imagenet.txt"} <= set(held)
    assert any(name.startswith("fitv2/models/emoji-any-step/") for name in held)
    assert f"Source, {ADDRESS}" in told.get_all("Project-URL")
    text = told.get_payload(decode=True).decode()
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert len(links) > 40
    assert all(link.startswith(("https://", "#")) for link in links)
    ours = [link.removeprefix(f"{ADDRESS}/") for link in links if link.startswith(ADDRESS)]
    kinds = {kind for kind, _, _ in (link.split("/", 2) for link in ours)}
    assert kinds == {"blob", "raw"}
    assert all((ROOT / link.split("/", 2)[2].partition("#")[0]).exists() for link in ours)


@pytest.mark.parametrize(
    ("remote", "address"),
    [
        ("https://example.org/a/fitv2.git", "https://example.org/a/fitv2"),
        ("git@example.org:a/fitv2.git", "https://example.org/a/fitv2"),
        ("ssh://git@example.org/a/fitv2", "https://example.org/a/fitv2"),
        ("ssh://git@example.org:2222/a/fitv2.git", "https://example.org/a/fitv2"),
        ("/home/someone/fitv2", ""),
        ("https://user:secret@example.org/a/fitv2", ""),
    ],
)
def test_the_address_is_that_of_the_clone_where_it_is_in_the_web(remote, address, tmp_path):
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    subprocess.run(["git", "-C", tmp_path, "remote", "add", "origin", remote], check=True)
    assert hook.origin(tmp_path) == address


def test_without_git_or_a_remote_there_is_none(tmp_path):
    assert hook.origin(tmp_path) == ""
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    assert hook.origin(tmp_path) == ""


def test_only_relative_links_change():
    text = "[a](docs/a.md#b) ![p](docs/p.png) [c](https://x.org) [d](#here) [e](mailto:a@b.c)"
    assert hook.absolute(text, "https://h/o/r") == (
        "[a](https://h/o/r/blob/HEAD/docs/a.md#b) ![p](https://h/o/r/raw/HEAD/docs/p.png)"
        " [c](https://x.org) [d](#here) [e](mailto:a@b.c)"
    )
