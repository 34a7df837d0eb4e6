import os
import subprocess
import sys

import pytest

from fitv2.runtime import threads
from fitv2.runtime.threads import CHOICES, choose_waiting, idle_seconds


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """Nothing chosen before, and nothing left after; four cores."""
    for name in (*CHOICES, "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)


def chosen():
    return {name: os.environ[name] for name in CHOICES if name in os.environ}


@pytest.mark.parametrize(
    ("idle_cores", "expected"),
    [
        (4.0, {"GOMP_SPINCOUNT": "20000"}),
        (3.8, {"GOMP_SPINCOUNT": "20000"}),
        (3.0, {"OMP_WAIT_POLICY": "PASSIVE"}),
        (0.0, {"OMP_WAIT_POLICY": "PASSIVE"}),
    ],
)
def test_threads_spin_only_where_nobody_else_computes(monkeypatch, idle_cores, expected):
    clock = [0.0]
    monkeypatch.setattr(threads.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(threads.time, "sleep", lambda seconds: clock.__setitem__(0, clock[0] + seconds))
    monkeypatch.setattr(threads, "idle_seconds", lambda _: 100 + idle_cores * clock[0])
    choose_waiting()
    assert chosen() == expected


@pytest.mark.parametrize("name", CHOICES)
def test_what_the_user_set_stays(monkeypatch, name):
    monkeypatch.setenv(name, "ACTIVE")
    choose_waiting()
    assert chosen() == {name: "ACTIVE"}


def test_nothing_is_set_where_it_cannot_be_known(tmp_path, monkeypatch):
    choose_waiting(tmp_path / "none")
    assert chosen() == {}
    monkeypatch.setattr(os, "cpu_count", lambda: 1)  # nothing to wait for
    choose_waiting()
    assert chosen() == {}


def test_idle_is_what_waits_and_what_yields(tmp_path):
    stat = tmp_path / "stat"
    stat.write_text("cpu  1000 200 1000 3000 400 50 50 0 0 0\ncpu0 1 1 1 1 1\n")
    assert idle_seconds(stat) == pytest.approx((200 + 3000 + 400) / os.sysconf("SC_CLK_TCK"))
    for content in ("", "cpu\n", "cpu a b c d e\n"):
        stat.write_text(content)
        assert idle_seconds(stat) is None


def test_the_commands_choose_before_torch_is_imported():
    program = (
        "import sys, fitv2.__main__ as main\n"
        "def choose():\n"
        "    assert 'torch' not in sys.modules\n"
        "    print('chosen')\n"
        "main.choose_waiting = choose\n"
        "sys.argv = ['fitv2', '--version']\n"
        "main.main()"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout.startswith("chosen\n"), done.stderr
