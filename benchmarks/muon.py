"""Muon's own products, and three ways to make them cheaper.

    python benchmarks/muon.py [--preset emoji] [--rounds 8]

Steps of Muon on the matrices of a preset, gradients at random, alternating in one process: as it is, with
three iterations in place of five, and with a change every other step (two steps timed, halved). Then two
processes that share the work, each with the gradients of all. The floor is the operations of the products at
the rate of a large product. Prints one JSON object a way, medians.
"""

import argparse
import json
import multiprocessing
import statistics
import tempfile
from pathlib import Path
from time import perf_counter

import torch
import torch.distributed as dist

from evaluation import CPU, peak
from fitv2.config import Training
from fitv2.model import FiT
from fitv2.runtime.device import has_bfloat16_matmuls
from fitv2.training.muon import Muon
from fitv2.training.optim import build_optimizers

WAYS = {
    "as it is": Training(optimizer="muon"),
    "3 iterations": Training(optimizer="muon", muon_iterations=3),
    "every other step": Training(optimizer="muon", muon_every=2),
}


def muon_of(preset: str, training: Training = WAYS["as it is"]) -> Muon:
    """Muon for the matrices of a preset, with gradients."""
    torch.manual_seed(0)
    muon, _ = build_optimizers(FiT.from_preset(preset), training)
    assert isinstance(muon, Muon)
    for group in muon.param_groups:
        for matrix in group["params"]:
            matrix.grad = torch.randn_like(matrix)
    return muon


def operations(muon: Muon) -> float:
    """Of the products of one change: of an R by C matrix 4R²C + 2R³ in each iteration."""
    total = 0.0
    for group in muon.param_groups:
        for matrix in group["params"]:
            rows, columns = matrix.shape[0] // group["pieces"], matrix.shape[1]
            short, long = sorted((rows, columns))
            total += group["pieces"] * muon.iterations * (4 * short**2 * long + 2 * short**3)
    return total


def timed(muon: Muon) -> float:
    """Seconds of a step, the mean of as many as lie between two changes."""
    started = perf_counter()
    for _ in range(muon.every):
        muon.step()
    return (perf_counter() - started) / muon.every


def share(rank: int, size: int, store: str, preset: str, rounds: int, out: str) -> None:
    """One of several processes; the first writes its times."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    muon = muon_of(preset)
    times = [timed(muon) for _ in range(rounds + 1)][1:]
    if rank == 0:
        Path(out).write_text(json.dumps(times))
    dist.destroy_process_group()


def shared_times(preset: str, rounds: int, size: int = 2) -> list[float]:
    """Seconds of a step of several processes."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        store, out = f"{folder}/store", f"{folder}/times"
        arguments = [(rank, size, store, preset, rounds, out) for rank in range(size)]
        processes = [context.Process(target=share, args=one) for one in arguments]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        times: list[float] = json.loads(Path(out).read_text())
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--preset", default="emoji")
    parser.add_argument("--rounds", type=int, default=8)
    options = parser.parse_args()
    muons = {way: muon_of(options.preset, training) for way, training in WAYS.items()}
    floor = operations(muons["as it is"]) / peak(
        torch.bfloat16 if has_bfloat16_matmuls(CPU) else torch.float32
    )
    times: dict[str, list[float]] = {way: [] for way in muons}
    for number in range(options.rounds + 1):
        for way, muon in muons.items():
            seconds = timed(muon)
            if number:  # the first warms up
                times[way].append(seconds)
    times["two processes"] = shared_times(options.preset, options.rounds)
    for way, taken in times.items():
        median = statistics.median(taken)
        ratio = statistics.median(times["as it is"]) / median
        found = {"way": way, "milliseconds": round(1e3 * median, 1), "times_as_fast": round(ratio, 2)}
        print(json.dumps({"preset": options.preset, **found, "floor_ms": round(1e3 * floor, 1)}), flush=True)


if __name__ == "__main__":
    main()
