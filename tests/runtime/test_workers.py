import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest

from fitv2.errors import UserError
from fitv2.runtime.workers import end_with_parent, read_ahead


def squared(number):
    """The square; 7 cannot be had."""
    if number == 7:
        raise UserError("there is no 7")
    return number**2


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_items_come_in_order(workers):
    assert list(read_ahead(squared, range(6), workers)) == [0, 1, 4, 9, 16, 25]
    assert list(read_ahead(squared, [], workers)) == []


@pytest.mark.parametrize("workers", [0, 2])
def test_a_mistake_in_a_process_is_said_in_its_own_words(workers):
    items = read_ahead(squared, range(4, 20), workers)
    assert [next(items) for _ in range(3)] == [16, 25, 36]
    with pytest.raises(UserError, match=r"^there is no 7$"):
        next(items)


def ended(number):
    """A process that is ended from outside, as for want of memory."""
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_that_was_ended_is_one_line():
    with pytest.raises(
        UserError, match=r"^a reading process was ended from outside.*run the same command again to"
    ):
        list(read_ahead(ended, range(3), 1))


def test_a_worker_ends_when_its_parent_was_killed():
    fork = multiprocessing.get_context("fork")
    told = fork.SimpleQueue()

    def worker():
        end_with_parent(0)
        told.put(os.getpid())
        time.sleep(60)

    def parent():
        fork.Process(target=worker).start()
        time.sleep(60)

    process = fork.Process(target=parent)
    process.start()
    left = told.get()
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    deadline = time.monotonic() + 5
    while alive(left) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(left)


def alive(pid):
    """Whether a process runs; one that ended may wait for ever for somebody to ask how."""
    try:
        with open(f"/proc/{pid}/stat") as file:  # noqa: PTH123
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


SPAWNED = """
import sys
from pathlib import Path
import torch
from fitv2.data.dataset import Steps, TokenDataset, batches
from fitv2.encoding.encode import encode
from fitv2.data.packing import TokenBudget
from fitv2.config import Encoding

if __name__ == "__main__":
    torch.multiprocessing.set_start_method("spawn")
    encode(sys.argv[1], Path(sys.argv[2]), Encoding(max_tokens=(16,)), workers=1)
    dataset = TokenDataset(sys.argv[2])
    steps = Steps(dataset, TokenBudget(dataset.images(), 60, seed=0))
    assert torch.equal(next(batches(steps, 2, 1)).packed.x_TC, steps.batch(2).packed.x_TC)
"""


@pytest.mark.slow
def test_processes_may_be_started_afresh(folder, tokens, tmp_path):
    """As on macOS, and everywhere from Python 3.14 on."""
    (tmp_path / "script.py").write_text(SPAWNED)
    command = [sys.executable, tmp_path / "script.py", folder, tmp_path / "set"]
    subprocess.run(command, check=True, timeout=120)
    for path in tokens.iterdir():
        assert path.read_bytes() == (tmp_path / "set" / path.name).read_bytes()
