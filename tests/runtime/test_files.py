import errno
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest

from conftest import FORK
from fitv2.errors import UserError
from fitv2.runtime.files import (
    atomic_file,
    atomic_folder,
    only_writer,
    remove_leftovers,
    remove_own,
    sha256,
    unused,
    write_json,
)


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


# A process that holds a scratch folder or a lock, until it is killed.
HOLDING = """
import sys, time
from pathlib import Path
from fitv2.runtime.files import atomic_file, atomic_folder, only_writer
with {hold}(Path(sys.argv[1])) as partial:
    if partial:
        (partial / "half" if partial.is_dir() else partial).write_text("half")
    print("holding", flush=True)
    time.sleep(60)
"""


def start_holding(hold, path):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDING.format(hold=hold), str(path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "holding\n"
    return process


def kill(process):
    process.send_signal(signal.SIGKILL)
    process.wait()


@pytest.mark.parametrize("hold", ["atomic_file", "atomic_folder"])
def test_what_a_killed_process_left_goes_at_the_next_start_and_what_a_living_one_writes_stays(tmp_path, hold):
    (tmp_path / ".fitv2-thesis").write_text("a file of this name is nobody's scratch")
    process = start_holding(hold, tmp_path / "a")
    try:
        remove_leftovers.__wrapped__(tmp_path)
        assert len(list(tmp_path.iterdir())) == 2
    finally:
        kill(process)
    assert len(list(tmp_path.iterdir())) == 2
    remove_leftovers.cache_clear()
    write_json(tmp_path / "b.json", {})
    assert sorted(path.name for path in tmp_path.iterdir()) == [".fitv2-thesis", "b.json"]


def test_a_folder_has_one_writer_until_its_end(tmp_path):
    process = start_holding("only_writer", tmp_path / "run")
    try:
        with pytest.raises(UserError, match="another process is writing"), only_writer(tmp_path / "run"):
            pass
    finally:
        kill(process)
    with only_writer(tmp_path / "run"):
        (tmp_path / "run" / "x").touch()
    assert (tmp_path / "run" / "x").exists()


def test_a_writer_that_wrote_nothing_leaves_no_folder(tmp_path):
    with pytest.raises(UserError, match="no"), only_writer(tmp_path / "run"):
        raise UserError("no")
    assert not (tmp_path / "run").exists()


def test_only_what_is_ours_is_removed(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    for name in ("own/a.json", "own/thesis/a.json", "own/ours/b.json", "own/ours/notes.txt", "elsewhere/c"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "own" / "link").symlink_to(elsewhere)
    (tmp_path / "own" / "empty").mkdir()
    remove_own(tmp_path / "own", {"a.json", "ours/b.json", "link/c"}.__contains__)
    left = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if not path.is_dir()}
    assert left == {"own/thesis/a.json", "own/ours/notes.txt", "elsewhere/c"}
    assert (tmp_path / "own" / "link").is_symlink()


@pytest.mark.parametrize("said", [
    OSError(errno.EDQUOT, "Disk quota exceeded"),
    RuntimeError("I/O error: No space left on device (os error 28)"),
])  # fmt: skip
def test_a_full_disk_is_known_by_what_libraries_say(tmp_path, said):
    with pytest.raises(OSError, match="No space left") as raised, atomic_folder(tmp_path / "out"):
        raise said
    assert raised.value.filename == str(tmp_path / "out")


def test_what_is_written_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    flushed = []
    monkeypatch.setattr("fitv2.runtime.files.flush", lambda path: flushed.append(str(path)))
    with atomic_folder(tmp_path / "model") as partial:
        (partial / "part").mkdir()
        (partial / "part" / "weights").write_text("1")
        assert not flushed
    assert [path.rpartition("/")[2] for path in flushed] == ["model", "weights", "part", tmp_path.name]
    flushed.clear()
    write_json(tmp_path / "x.json", {})
    assert [path.rpartition("/")[2] for path in flushed] == ["x.json", tmp_path.name]


def test_a_fork_does_not_hold_what_its_parent_held(tmp_path):
    """Readers of a killed command live on for a moment: the next start must not find the folder taken."""
    ready, end = FORK.Event(), FORK.Event()

    def child():
        ready.set()
        end.wait(30)

    def parent():
        with only_writer(tmp_path / "run"):
            (tmp_path / "run" / "x").touch()
            FORK.Process(target=child).start()
            ready.wait(30)
            os.kill(os.getpid(), signal.SIGKILL)

    holder = FORK.Process(target=parent)
    holder.start()
    assert ready.wait(30)
    while os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT) is None:
        pass
    try:
        with only_writer(tmp_path / "run"):
            pass
    finally:
        end.set()
