import os
import signal
import subprocess
import sys

import pytest

from fitv2.runtime.signals import RECEIVED, catch_interrupts

# Writes half a file, then says so and waits; swallows every exception, as libraries do when imported.
WRITING = """
import sys, time
from pathlib import Path
from fitv2.runtime.signals import leave_on_signals
leave_on_signals("; that is all")
from fitv2.runtime.files import atomic_file
with atomic_file(Path(sys.argv[1])) as partial:
    partial.write_text("half")
    print("writing", flush=True)
    while True:
        try:
            time.sleep(60)
        except BaseException:
            pass
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_who_has_nothing_to_save_leaves_at_once(tmp_path, number):
    process = subprocess.Popen(
        [sys.executable, "-c", WRITING, str(tmp_path / "a")],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout.readline() == "writing\n"
    process.send_signal(number)
    _, said = process.communicate(timeout=20)
    assert process.returncode == 128 + number
    assert said.split("\n") == ["", f"fitv2: stopped by {number.name}; that is all", ""]
    assert not list(tmp_path.iterdir())


def test_an_ignored_signal_stays_ignored():
    code = "import signal; from fitv2.runtime.signals import leave_on_signals; leave_on_signals();" \
        "print(signal.getsignal(signal.SIGINT) is signal.SIG_IGN)"  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )  # fmt: skip
    assert done.stdout == "True\n"


def test_the_first_signal_is_noted_and_the_second_acts_as_usual():
    def usual(*_):
        raise InterruptedError

    before = signal.signal(signal.SIGTERM, usual)
    try:
        with catch_interrupts() as came:
            assert not came()
            os.kill(os.getpid(), signal.SIGTERM)
            assert came()
            assert RECEIVED == [signal.SIGTERM]
            with pytest.raises(InterruptedError):
                os.kill(os.getpid(), signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) is usual
    finally:
        signal.signal(signal.SIGTERM, before)
