from types import SimpleNamespace

import pytest

from fitv2.errors import UserError
from fitv2.runtime.files import atomic_file, atomic_folder, sha256, unused, write_json


def test_folder_appears_whole(tmp_path):
    with atomic_folder(tmp_path / "a" / "out") as partial:
        (partial / "x").write_text("1")
        assert not (tmp_path / "a" / "out").exists()
    assert (tmp_path / "a" / "out" / "x").read_text() == "1"


def test_failure_leaves_nothing_behind(tmp_path):
    with pytest.raises(OSError, match="full"), atomic_folder(tmp_path / "out") as partial:
        (partial / "x").write_text("1")
        raise OSError("disk is full")
    with pytest.raises(OSError, match="full"), atomic_file(tmp_path / "file") as partial:
        partial.write_text("1")
        raise OSError("disk is full")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("free", [0, 1 << 40])
def test_any_error_on_a_full_disk_says_so(tmp_path, monkeypatch, free):
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=free))
    expected = (OSError, "No space left") if free == 0 else (RuntimeError, "unexpected pos")
    with pytest.raises(expected[0], match=expected[1]), atomic_folder(tmp_path / "out"):
        raise RuntimeError("unexpected pos 1097344 vs 1097232")


def test_what_is_there_is_never_overwritten_by_a_folder(tmp_path):
    (tmp_path / "mine").write_text("precious")
    with pytest.raises(UserError, match="not empty"), atomic_folder(tmp_path):
        pass
    assert (tmp_path / "mine").read_text() == "precious"


def test_failed_rewrite_keeps_the_old_file(tmp_path):
    write_json(tmp_path / "x.json", {"a": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "x.json", {"a": object()})
    assert '"a": 1' in (tmp_path / "x.json").read_text()


def test_a_name_that_is_taken_gets_a_number(tmp_path):
    assert unused(tmp_path / "a") == tmp_path / "a"
    (tmp_path / "a").mkdir()
    assert unused(tmp_path / "a") == tmp_path / "a-2"
    (tmp_path / "a-2").touch()
    assert unused(tmp_path / "a") == tmp_path / "a-3"


def test_the_digest_of_a_file(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
