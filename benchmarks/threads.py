"""What it costs when OpenMP's threads wait busily, on quiet cores and on busy ones.

    python benchmarks/threads.py [--preset debug fast] [--state quiet busy] [--rounds 3]

A training step of a preset on synthetic images, as many threads as cores, under several settings of how
threads wait; and with one thread. All settings take turns, first on quiet cores, then beside one process a
core that computes without end. The setting is read when torch is imported, so each run
is a process of its own.
Prints one JSON object a preset and state: images per second, medians over the rounds.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SETTINGS: dict[str, dict[str, str]] = {
    "as it is": {},
    "1 thread": {"OMP_NUM_THREADS": "1"},
    "passive": {"OMP_WAIT_POLICY": "PASSIVE"},
    "spin 1000": {"GOMP_SPINCOUNT": "1000"},
    "spin 10000": {"GOMP_SPINCOUNT": "10000"},
    "spin 15000": {"GOMP_SPINCOUNT": "15000"},
    "spin 20000": {"GOMP_SPINCOUNT": "20000"},
}


def measure(name: str, seconds: float) -> None:
    """Print the images per second of a preset's training on images of many sizes."""
    from dataclasses import replace
    from time import perf_counter

    import torch

    from fitv2.data.dataset import TokenDataset
    from fitv2.presets import preset
    from fitv2.training.trainer import Trainer
    from loading import synthetic

    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        synthetic(Path(folder) / "data", 200)
        chosen = preset(name)
        data = TokenDataset(Path(folder) / "data")
        model = replace(chosen.model, in_channels=4, patch_size=2, num_classes=1000)
        training = replace(chosen.training, steps=10**6, log_every=10**7, validate_every=10**7)
        training = replace(training, sample_every=10**7, save_every=10**7, check_data=False)
        trainer = Trainer(
            replace(chosen, model=model, training=training),
            data,
            Path(folder) / "data",
            Path(folder) / "run",
            None,
        )
        images, started = 0, perf_counter()
        for step in range(10**6):
            if step == 3:
                images, started = 0, perf_counter()
            trainer.advance(lambda _: None)
            images += training.batch_size
            if step > 3 and perf_counter() - started > seconds:
                break
        print(images / (perf_counter() - started))


def burn() -> None:
    """Keep a core busy."""
    while True:
        pass


@contextmanager
def busy(processes: int) -> Iterator[None]:
    """So many processes that compute without end."""
    burners = [multiprocessing.Process(target=burn, daemon=True) for _ in range(processes)]
    for burner in burners:
        burner.start()
    try:
        yield
    finally:
        for burner in burners:
            burner.terminate()


def run(name: str, seconds: float, variables: dict[str, str]) -> float:
    """Images per second of a process with these environment variables, and none of OpenMP's else."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_", "KMP_"))}
    command = [sys.executable, __file__, "--child", "--preset", name, "--seconds", str(seconds)]
    done = subprocess.run(command, env=kept | variables, check=True, stdout=subprocess.PIPE, text=True)
    return float(done.stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--preset", nargs="+", default=["debug", "fast"])
    parser.add_argument("--state", nargs="+", default=["quiet", "busy"], choices=["quiet", "busy"])
    parser.add_argument("--setting", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        return measure(arguments.preset[0], arguments.seconds)
    cores = len(os.sched_getaffinity(0))
    for name in arguments.preset:
        for state in arguments.state:
            speeds = defaultdict[str, list[float]](list)
            with busy(cores if state == "busy" else 0):
                for _ in range(arguments.rounds):
                    for setting in arguments.setting:
                        speeds[setting].append(run(name, arguments.seconds, SETTINGS[setting]))
            medians = {setting: round(statistics.median(found), 1) for setting, found in speeds.items()}
            print(
                json.dumps({"preset": name, "cores": cores, "state": state, **medians, "runs": speeds}),
                flush=True,
            )
    return None


if __name__ == "__main__":
    main()
