"""How OpenMP's threads wait for each other, chosen before torch is imported, which reads it then.

A thread that waits busily answers at once, and on a core that others use it takes the time of the very
thread that it waits for. benchmarks/threads.py measures both.
"""

import os
import time
from pathlib import Path

# What users or launchers decide with. Where one is set, all stays as it is.
CHOICES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
# Turns of a loop, about a millisecond: as fast as the 300,000 of GNU's library, and eight times as fast
# where the cores get busy later.
QUIET = ("GOMP_SPINCOUNT", "20000")
BUSY = ("OMP_WAIT_POLICY", "PASSIVE")
WATCHED = 0.05  # seconds


def choose_waiting(stat: Path = Path("/proc/stat")) -> None:
    """Set in the environment how threads wait: without spinning where other processes use the cores.

    What is set already stays, and so does all where the system does not tell how busy it is.
    """
    cores = os.cpu_count() or 1
    if cores == 1 or any(name in os.environ for name in CHOICES):
        return
    before = idle_seconds(stat)
    if before is None:
        return
    started = time.perf_counter()
    time.sleep(WATCHED)
    idle = ((idle_seconds(stat) or 0.0) - before) / (time.perf_counter() - started)
    name, value = QUIET if idle > cores - 0.6 else BUSY  # a tick of the clock is a fifth of WATCHED
    os.environ[name] = value


def idle_seconds(stat: Path) -> float | None:
    """Seconds for which the cores were idle, or worked for processes that yield to all (`nice`)."""
    try:
        _, nice, _, idle, waiting, *_ = map(int, stat.read_text().split("\n")[0].split()[1:])
    except (OSError, ValueError):
        return None
    return (nice + idle + waiting) / os.sysconf("SC_CLK_TCK")
