"""How long a command takes to start, with garbage collected during imports and without.

    python benchmarks/start.py [--module fitv2.pipeline] [--rounds 7]

Imports a module in processes of their own, in turns: plainly, and as commands do; beside them the floor,
which is PyTorch and the classes of diffusers that the pipeline stands on.
Prints one JSON object: medians in seconds from the start of a process to its end, and their ratio.
"""

import argparse
import json
import statistics
import subprocess
import sys
from time import perf_counter


def seconds(source: str) -> float:
    """Run Python with this source to the end of its process."""
    started = perf_counter()
    subprocess.run([sys.executable, "-c", source], check=True)
    return perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--module", default="fitv2.pipeline")
    parser.add_argument("--rounds", type=int, default=7)
    chosen = parser.parse_args()
    ways = {
        "plain_seconds": f"import {chosen.module}",
        "seconds": f"from fitv2.runtime.imports import import_quickly; import_quickly('{chosen.module}')",
        "diffusers_seconds": "from diffusers import AutoencoderKL, DiffusionPipeline, ModelMixin",
    }
    seconds(ways["plain_seconds"])  # files are read from the disk once, whoever is first
    times: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(chosen.rounds):
        for way, source in ways.items():
            times[way].append(seconds(source))
    medians = {way: statistics.median(values) for way, values in times.items()}
    ratio = medians["plain_seconds"] / medians["seconds"]
    rounded = {name: round(value, 2) for name, value in {**medians, "ratio": ratio}.items()}
    print(json.dumps({"module": chosen.module, **rounded, "rounds": chosen.rounds}))


if __name__ == "__main__":
    main()
