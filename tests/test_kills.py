"""Commands that are ended at random moments, raced, or run out of room: whole results or none, nobody's loss.

Most run in a fork of this process, whose imports are done: so the moments lie in the work. The others are
`python -m fitv2`, for the moments before it.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from conftest import FORK, picture
from fitv2.__main__ import main
from fitv2.checkpoint import checkpoints, newest_checkpoint
from fitv2.runtime.files import remove_leftovers
from fitv2.training import run_folder
from fitv2.training.run_folder import read_log
from fitv2.training.trackers import build_trackers

STOPS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
NOTE = "precious"
PATIENCE = 40  # seconds
CAUGHT = 1 << (signal.SIGTERM - 1)  # in SigCgt of /proc


# Processes --------------------------------------------------------------------------------------


class Forked:
    """`fitv2` with these arguments in a fork of this process, in a group of its own."""

    def __init__(self, arguments, said, change=lambda: None):
        def run():
            os.setpgid(0, 0)
            file = os.open(said, os.O_CREAT | os.O_TRUNC | os.O_WRONLY | os.O_APPEND)
            os.dup2(file, 1)
            os.dup2(file, 2)
            sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))  # noqa: SIM115
            remove_leftovers.cache_clear()  # a new process has none
            tqdm.set_lock(threading.RLock())  # tqdm's own is shared by forks, and a killed one may hold it
            sys.argv = ["fitv2", *map(str, arguments)]
            change()
            main()

        # Before it is forked: importing `fitv2.__main__` above set a command's handlers in this process, by
        # which a child ends without a word until it has its own.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        self.process, self.path = FORK.Process(target=run), said
        self.process.start()
        self.pid = self.process.pid

    def run_for(self, seconds):
        """Let it run for so long, or to its end if that comes first; whether it ended."""
        self.process.join(seconds)
        return self.process.exitcode is not None

    def wait(self):
        self.process.join(PATIENCE)
        if self.process.exitcode is None:
            os.killpg(self.pid, signal.SIGKILL)
            self.process.join()
            pytest.fail(f"it does not end, but says: {self.path.read_text()}")
        return self.process.exitcode, self.path.read_text()


class Fresh:
    """`python -m fitv2` with these arguments, in a group of its own."""

    def __init__(self, arguments, said, environment=()):
        self.path = said
        with said.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "fitv2", *map(str, arguments)],
                env={**os.environ, "OMP_NUM_THREADS": "1", **dict(environment)},
                stdout=file, stderr=file, start_new_session=True,
            )  # fmt: skip
        self.pid = self.process.pid

    def wait(self):
        try:
            return self.process.wait(PATIENCE), self.path.read_text()
        except subprocess.TimeoutExpired:
            os.killpg(self.pid, signal.SIGKILL)
            self.process.wait()
            pytest.fail(f"it does not end, but says: {self.path.read_text()}")


def has_handlers(process):
    """Whether it heeds signals by now. The first moments are Python's own."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
            if line.startswith("SigCgt"):
                return bool(int(line.split()[1], 16) & CAUGHT)
    return False


def children(pid):
    """Its processes that read, and theirs."""
    with contextlib.suppress(OSError):
        found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return [int(child) for child in found]
    return []


def send(process, number, group):
    """A signal to a process, or to all of its group, as Ctrl-C is sent."""
    with contextlib.suppress(ProcessLookupError):
        if group:
            os.killpg(process.pid, number)
        else:
            os.kill(process.pid, number)


def succeed(arguments, tmp_path):
    """Run to the end."""
    status, said = Forked(arguments, tmp_path / "said").wait()
    assert status == 0, said
    return said


# Commands ---------------------------------------------------------------------------------------


@dataclass
class Command:
    """A command, where it writes, and what it makes of it undisturbed."""

    arguments: list
    out: Path
    again: bool = True  # whether it may be run where its result already lies
    expected: object = None
    seconds: float = field(default=0.0)

    def result(self):
        """What lies there, but for times and speeds."""
        if self.arguments[0] == "train":
            return result_of_run(self.out)
        if self.out.is_file():
            return self.out.read_bytes()
        return contents(self.out)

    def clear(self):
        if self.out.is_file():
            self.out.unlink()
        elif self.out.exists():
            shutil.rmtree(self.out)


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def result_of_run(run):
    newest = newest_checkpoint(run)
    measured = lambda name: name.startswith("speed/") or name == "memory_gib"  # noqa: E731
    log = [{k: v for k, v in line.items() if not measured(k)} for line in read_log(run / "log.jsonl")]
    return {
        "checkpoints": [path.name for path in checkpoints(run)],
        "newest": tensors(newest) if newest else None,
        "log": log,
        "samples": contents(run / "samples"),
    }


def tensors(checkpoint):
    """What a checkpoint holds: the averaged model's files, and the state's tensors as bytes."""
    (state,) = (checkpoint / "state").glob("*.safetensors")
    held = {name: tensor.numpy().tobytes() for name, tensor in load_file(state).items()}
    return held | {path.name: path.read_bytes() for path in (checkpoint / "ema").glob("*.*")}


def scratch_below(folder):
    """What is half-written there."""
    names = (".fitv2-", ".step-", ".encode")
    return [str(p.relative_to(folder)) for p in folder.rglob(".*") if p.name.startswith(names)]


def own_scratch(folder):
    """Scratch that no later start needs."""
    return {path for path in scratch_below(folder) if ".fitv2-" in path}


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """Pictures, their tokens, a run, a released checkpoint and released latents."""
    root = tmp_path_factory.mktemp("given")
    for i in range(24):
        path = root / "pictures" / ("red" if i % 2 else "blue") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(40 + 9 * i % 70, 100 - 7 * i % 60, i).save(path)
    (root / "pictures" / "red" / "bad.jpg").write_bytes(b"\xff\xd8\xff cut off")
    for i in range(12):
        path = root / "latents" / "from_16_to_16" / f"{i}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        latent(path, 2, 1 + i % 4, i)
    build_trackers(("tensorboard",), root / "tracked", 0, {})  # imported once, before processes are forked
    return root


def latent(path, rows, columns, number):
    """A file of the released latents."""
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    feature = torch.randn(2, rows, columns, 16, generator=torch.Generator().manual_seed(number))
    grid, size = torch.stack([column.flatten(), row.flatten()]), torch.tensor([rows, columns])
    save_file({"feature": feature, "grid": grid, "size": size.int(), "label": torch.tensor(number)}, path)


SET = ["--max-tokens", "16", "4", "--shard-size", "5", "--batch-size", "3"]
RUN = ["--steps", "12", "--save-every", "2", "--keep", "1", "--sample-every", "6"]


@pytest.fixture(scope="module")
def command(given, tmp_path_factory):
    """A command by its name, that has been run undisturbed; its place is empty."""
    made = {}
    place = tmp_path_factory.mktemp("places")

    def prepared(name):
        needs = {"train": "encode", "inspect": "encode", "export": "train", "sample": "train",
                 "convert to released": "train", "convert": "convert to released"}  # fmt: skip
        kept = {"encode": "set", "train": "run", "convert to released": "released.safetensors"}
        if name in needs and not (given / kept[needs[name]]).exists():
            prepared(needs[name])
        out = place / name.replace(" ", "-") / ("out.safetensors" if "to released" in name else "out")
        arguments, again = {
            "encode": (["encode", given / "pictures", out, "--workers", "2", *SET], True),
            "train": (["train", "debug", "--data", given / "set", "--out", out, *RUN], True),
            "inspect": (["inspect", given / "set", "--out", out], True),
            "export": (["export", given / "run", out], False),
            "sample": (["sample", given / "run", "--out", out, "--num", "6", "--steps", "9",
                        "--size", "64x64", "--size", "16x80"], True),
            "convert to released": (["convert", given / "run", out, "--to-released"], False),
            "convert": (["convert", given / "released.safetensors", out, "--heads", "2"], False),
            "convert latents": (["convert", given / "latents", out], False),
        }[name]  # fmt: skip
        if name not in made:
            out.parent.mkdir()
            made[name] = Command(arguments, out, again)
            started = time.monotonic()
            status, said = Forked(arguments, place / "said").wait()
            assert status == (3 if name == "encode" else 0), said  # one picture is cut off
            made[name].seconds, made[name].expected = time.monotonic() - started, made[name].result()
            if name in kept:
                out.rename(given / kept[name])
        made[name].clear()
        return made[name]

    return prepared


COMMANDS = [
    "encode", "train", "inspect", "export", "sample", "convert to released", "convert", "convert latents"
]  # fmt: skip


# Kills ------------------------------------------------------------------------------------------


def end(process, number, group, tally):
    """Send a signal now; the exit status. What it says must fit."""
    heeds = has_handlers(process)
    send(process, number, group)
    status, said = process.wait()
    if status in (0, 3):
        tally["had finished"] += 1
        return status
    if number == signal.SIGKILL:
        assert status == -number, said
    elif not heeds and status in (-number, 1):
        tally["before handlers"] += 1  # Python itself was starting, and does as it always does
    else:
        assert status == 128 + number, said
        lines = [line for line in said.splitlines() if line.startswith("fitv2: stopped by ")]
        assert len(lines) == 1, said
        assert lines[0].split()[3].strip(";") == number.name
        assert "Traceback" not in said
        assert "Error" not in said
        tally["stopped"] += 1
    tally[number.name] += 1
    return status


def go_on(command, number, status, before):
    """After it was ended: no new scratch after a signal it heeded; a whole result is right, and removed."""
    if number != signal.SIGKILL:
        assert own_scratch(command.out.parent) <= before
    if status in (0, 3) or (not command.again and command.out.exists()):
        assert command.result() == command.expected
        command.clear()


def finish(command, tmp_path):
    """Run to the end, compare, and see that nothing half-written is left."""
    status, said = Forked(command.arguments, tmp_path / "said").wait()
    assert status == (3 if command.arguments[0] == "encode" else 0), said
    assert command.result() == command.expected
    assert scratch_below(command.out.parent) == []
    command.clear()


def kill_often(command, kills, rng, tmp_path, tally):
    """End and start a command again and again, at moments within the time it has been seen to take."""
    seconds = command.seconds
    for _ in range(kills):
        number, group = STOPS[rng.integers(3)], bool(rng.integers(2))
        before = own_scratch(command.out.parent)
        process, started = Forked(command.arguments, tmp_path / "said"), time.monotonic()
        if process.run_for(rng.uniform(0.0, seconds)):
            seconds = min(seconds, time.monotonic() - started)  # a busy machine may have become a quiet one
        status = end(process, number, group, tally)
        tally["left scratch"] += any(
            ".fitv2-" in p or ".step-" in p for p in scratch_below(command.out.parent)
        )
        go_on(command, number, status, before)
    finish(command, tmp_path)


@pytest.mark.parametrize("name", COMMANDS)
def test_ended_at_random_moments_the_result_is_that_of_an_undisturbed_run(command, tmp_path, name):
    chosen, tally = command(name), Counter()
    kills = 3 if name in ("encode", "train") else 1
    kill_often(chosen, kills, np.random.default_rng(0), tmp_path, tally)


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_ended_often_the_result_is_that_of_an_undisturbed_run(command, tmp_path, name):
    chosen, tally, rng = command(name), Counter(), np.random.default_rng(1)
    kills = 20 if name in ("encode", "train") else 10
    kill_often(chosen, kills, rng, tmp_path, tally)
    print(f"\n{name}: {kills} kills, {dict(tally)}")
    assert sum(tally[number.name] for number in STOPS) >= kills // 3  # they came in time


def stop_at_start(command, delay, number, tmp_path, tally):
    before = own_scratch(command.out.parent)
    process = Fresh(command.arguments, tmp_path / "said")
    time.sleep(delay)
    go_on(command, number, end(process, number, bool(int(1000 * delay) % 2), tally), before)


@pytest.mark.parametrize("number", STOPS[1:])
def test_a_signal_during_imports_is_one_line(command, tmp_path, number):
    chosen = command("encode")
    process = Fresh(chosen.arguments, tmp_path / "said")
    deadline = time.monotonic() + PATIENCE
    while not has_handlers(process) and time.monotonic() < deadline:
        time.sleep(0.002)
    assert end(process, number, False, Counter()) == 128 + number
    assert not chosen.out.exists()


@pytest.mark.slow
def test_signals_from_the_first_moment_on(command, tmp_path):
    tally, delays = Counter(), np.geomspace(0.02, 4, 24)
    for place, delay in enumerate(delays):
        chosen = command(COMMANDS[place % len(COMMANDS)])
        stop_at_start(chosen, delay, STOPS[1 + place // 2 % 2], tmp_path, tally)
        chosen.clear()
    print(f"\nfrom the start: {len(delays)} signals, {dict(tally)}")
    assert tally["stopped"] > len(delays) // 2


def stop_while_readers_start(command, number, group, delay, tmp_path, tally):
    before = own_scratch(command.out.parent)
    # In no repository: git, which is asked for the commit, would be taken for a reader.
    no_git = lambda: setattr(run_folder, "PACKAGE", tmp_path)  # noqa: E731
    process = Forked([*command.arguments, "--workers", "2"], tmp_path / "said", no_git)
    deadline = time.monotonic() + 20
    while not children(process.pid) and process.process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(delay)
    tally["with readers"] += bool(children(process.pid))
    go_on(command, number, end(process, number, group, tally), before)


@pytest.mark.parametrize("name", ["encode", "train"])
def test_a_signal_while_readers_start(command, tmp_path, name):
    chosen, tally = command(name), Counter()
    stop_while_readers_start(chosen, signal.SIGINT, True, 0.0, tmp_path, tally)
    finish(chosen, tmp_path)
    assert tally["with readers"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["encode", "train"])
def test_signals_while_readers_start(command, tmp_path, name):
    chosen, tally = command(name), Counter()
    for place, delay in enumerate(np.linspace(0, 0.1, 12)):
        stop_while_readers_start(chosen, STOPS[1 + place % 2], place % 4 < 2, delay, tmp_path, tally)
    finish(chosen, tmp_path)
    print(f"\n{name}, readers: 12 signals, {dict(tally)}")
    assert tally["with readers"] >= 8


EMOJI = Path(__file__).parents[1] / "data" / "emoji"


@pytest.mark.slow
@pytest.mark.parametrize("number", STOPS[1:])
def test_demo_leaves_on_signals(tmp_path, number):
    tally = Counter()
    for delay in (1, 4, 8):
        process = Fresh(["demo", "--out", tmp_path / "demo", "--data", EMOJI], tmp_path / "said")
        time.sleep(delay)
        end(process, number, True, tally)
        assert not own_scratch(tmp_path)
    assert tally["stopped"] == 3


# Races ------------------------------------------------------------------------------------------


def race(command, tmp_path):
    """Two at once; how many found the other at work."""
    both = [Forked(command.arguments, tmp_path / f"said {number}") for number in (1, 2)]
    ends = [process.wait() for process in both]
    away = [said for status, said in ends if status == 2]
    for said in away:
        lines = [line for line in said.splitlines() if line.startswith("fitv2: ")]
        assert len(lines) == 1, said
        assert "another process is writing" in lines[0]
    assert [status for status, _ in ends if status not in (0, 2, 3)] == [], ends
    assert len(away) < 2, ends
    assert command.result() == command.expected
    assert scratch_below(command.out.parent) == []
    command.clear()
    return len(away)


@pytest.mark.parametrize("name", ["encode", "train"])
@pytest.mark.parametrize("times", [2, pytest.param(8, marks=pytest.mark.slow)])
def test_of_two_in_one_folder_one_does_the_work(command, tmp_path, name, times):
    chosen = command(name)
    met = [race(chosen, tmp_path) for _ in range(times)]
    print(f"\n{name}: {times} races, {sum(met)} left at once")
    assert sum(met) > 0


# What failed is corrected -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [["--tokens-per-step", "3"], ["--conditions", "nonsense"], ["--grad-accum-steps", "100000"],
     ["--width", "12"], ["--init", "nothing"]],
    ids=lambda wrong: wrong[0],
)  # fmt: skip
def test_a_run_that_failed_before_its_first_step_is_corrected(command, tmp_path, wrong):
    chosen = command("train")
    status, said = Forked([*chosen.arguments, *wrong], tmp_path / "said").wait()
    assert status == 2, said
    assert len([line for line in said.splitlines() if line.startswith("fitv2: ")]) == 1
    finish(chosen, tmp_path)


# Nobody's loss ----------------------------------------------------------------------------------


def note(folder):
    """Somebody's file in a folder of its own."""
    path = folder / "thesis" / "notes.txt"
    path.parent.mkdir(parents=True)
    path.write_text(NOTE)
    return path


def killed_midway(command, tmp_path, until):
    """Start, and kill as soon as something is there."""
    process = Forked(command.arguments, tmp_path / "said")
    deadline = time.monotonic() + 60
    while not until() and time.monotonic() < deadline:
        time.sleep(0.001)
    send(process, signal.SIGKILL, True)
    return process.wait()[0]


@pytest.mark.parametrize("place", [".", ".encode"])
def test_what_is_nobodys_of_ours_survives_encode(command, tmp_path, place):
    chosen = command("encode")
    assert killed_midway(chosen, tmp_path, (chosen.out / ".encode" / "plan.json").exists) == -signal.SIGKILL
    mine = note(chosen.out / place)
    assert Forked(chosen.arguments, tmp_path / "said").wait()[0] == 3
    assert mine.read_text() == NOTE
    assert Forked(chosen.arguments, tmp_path / "said").wait()[0] == 3  # it is whole already
    assert mine.read_text() == NOTE
    ours = {name: held for name, held in chosen.result().items() if "thesis" not in name}
    assert ours == chosen.expected


@pytest.mark.parametrize("place", [".", ".encode"])
def test_what_is_nobodys_of_ours_survives_an_encode_that_fails(tmp_path, place):
    pictures, out = tmp_path / "pictures", tmp_path / "out"
    for number in range(40):
        path = pictures / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"\x89PNG\r\n\x1a\n cut off")
    failing = Command(["encode", pictures, out, "--workers", "0"], out)
    killed_midway(failing, tmp_path, (out / ".encode" / "plan.json").exists)
    if not out.exists():  # it was faster
        (out / ".encode").mkdir(parents=True)
    mine = note(out / place)
    status, said = Forked(failing.arguments, tmp_path / "said").wait()
    assert status == 2, said
    assert mine.read_text() == NOTE
    assert [path for path in out.rglob("*") if path.is_file()] == [mine]


def test_what_is_nobodys_of_ours_survives_train(command, tmp_path):
    """In the run, in a checkpoint that gets too old, and in one that is half-written."""
    chosen = command("train")
    first = [*chosen.arguments, "--steps", "2"]
    succeed(first, tmp_path)
    (old,) = checkpoints(chosen.out)
    half = chosen.out / "checkpoints" / ".step-0000004"
    mine = [note(chosen.out), note(old), note(old / "state"), note(old / "ema"), note(half)]
    succeed(chosen.arguments, tmp_path)
    newest = newest_checkpoint(chosen.out)
    assert newest.name == "step-0000012"
    kept = [path for path in chosen.out.rglob("notes.txt") if path.read_text() == NOTE]
    assert len(kept) == len(mine)
    assert tensors(newest) == chosen.expected["newest"]


def test_a_resumed_run_writes_the_same_bytes(command, tmp_path):
    """Of the state too, not of its tensors alone."""
    chosen, written = command("train"), []
    for begins in (["12"], ["2", "12"]):
        for steps in begins:
            succeed([*chosen.arguments, "--steps", steps], tmp_path)
        written.append(contents(newest_checkpoint(chosen.out)))
        chosen.clear()
    assert written[0] == written[1]


@pytest.mark.slow
def test_a_run_that_fails_while_others_read_for_it_ends(command, tmp_path):
    chosen = command("train")
    succeed([*chosen.arguments, "--steps", "2"], tmp_path)
    (chosen.out / "checkpoints" / ".step-0000004").write_text(NOTE)  # where the next one is written
    process = Fresh([*chosen.arguments, "--workers", "1"], tmp_path / "said")
    status, said = process.wait()
    assert (status, "cannot be written" in said) == (2, True)


@pytest.mark.parametrize(
    "part",
    ["state", "ema"],
)
def test_what_lies_in_a_half_written_checkpoint_is_in_nobodys_way(command, tmp_path, part):
    chosen = command("train")
    succeed([*chosen.arguments, "--steps", "2"], tmp_path)
    mine = note(chosen.out / "checkpoints" / ".step-0000004" / part)
    succeed(chosen.arguments, tmp_path)
    kept = [path for path in chosen.out.rglob("notes.txt") if path.read_text() == NOTE]
    assert len(kept) == 1, mine


@pytest.mark.parametrize("name", ["sample", "inspect"])
def test_what_is_nobodys_of_ours_survives_commands_that_write_into_a_folder(command, tmp_path, name):
    chosen = command(name)
    mine = [note(chosen.out), note(chosen.out / ".fitv2")]
    succeed(chosen.arguments, tmp_path)
    assert [path.read_text() for path in mine] == [NOTE, NOTE]


@pytest.mark.parametrize("name", ["export", "convert", "convert latents", "convert to released"])
def test_commands_that_make_something_new_refuse_what_is_there(command, tmp_path, name):
    chosen = command(name)
    if chosen.out.suffix:
        mine = chosen.out
        mine.write_text(NOTE)
    else:
        mine = note(chosen.out)
    status, said = Forked(chosen.arguments, tmp_path / "said").wait()
    assert (status, "already exists" in said) == (2, True)
    assert mine.read_text() == NOTE


# A full disk ------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MiB, where one may be mounted."""
    place = tmp_path / "small"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(place)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no file system can be mounted here")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("free", [0, 8, pytest.param(24, marks=pytest.mark.slow)])
def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(command, small_disk, tmp_path, name, free):
    usual = command(name)
    out = small_disk / "folder" / usual.out.name
    out.parent.mkdir()
    moved = [out if argument == usual.out else argument for argument in usual.arguments]
    chosen = Command(moved, out, usual.again, usual.expected)
    filler = fill(small_disk, free)
    status, said = Forked(chosen.arguments, tmp_path / "said").wait()
    if status in (0, 3):  # there was room enough
        assert free > 0
        assert chosen.result() == chosen.expected
        return
    lines = [line for line in said.splitlines() if line.startswith("fitv2: ")]
    assert status == 2, said
    assert "No space left" in lines[-1]
    assert len(lines) == 1, said
    assert "Traceback" not in said
    assert not [path for path in scratch_below(small_disk) if ".encode" not in path]
    filler.unlink()
    finish(chosen, tmp_path)


def fill(disk, free):
    """A file that leaves so many KiB of a file system."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(4096)):
            pass
    with filler.open("r+b") as file:
        file.truncate(max(0, filler.stat().st_size - 1024 * free))
    return filler
