"""Validation losses of several runs in one plot, and as one JSON line each.

    python tools/compare_runs.py OUT.png RUN [RUN …]

Prints the last validation loss of each run, and the step at which it first was as low as the first run's
last: how many steps it needs for what the first run reaches.
"""

import json
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.figure import Figure

from fitv2.runtime.files import atomic_file
from fitv2.training.run_folder import read_log

Curve = list[tuple[int, float]]


def validation(run: Path) -> Curve:
    return [
        (line["step"], line["validation"]) for line in read_log(run / "log.jsonl") if "validation" in line
    ]


def reached(curve: Curve, loss: float) -> int | None:
    """The first step with at most this loss, between two of the log by a straight line."""
    for (before, high), (after, low) in pairwise(curve):
        if low <= loss < high:
            return round(before + (after - before) * (high - loss) / (high - low))
    return None


def plot(curves: dict[str, Curve], out: Path) -> None:
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots()
    colours = colormaps["tab20"]
    for i, (name, curve) in enumerate(curves.items()):
        style: dict[str, Any] = {"color": "black", "linewidth": 2} if i == 0 else {"color": colours(i % 20)}
        axes.plot(*zip(*curve, strict=True), label=f"{name}: {curve[-1][1]:.4f}", **style)
    best = min(loss for curve in curves.values() for _, loss in curve)
    axes.set(xlabel="step", ylabel="loss on held-out pictures", yscale="log")
    axes.set(xlim=(0, None), ylim=(0.95 * best, 4 * best))  # the beginning is the same for all
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize="small")
    with atomic_file(out) as partial:
        figure.savefig(partial, dpi=120)


def main() -> None:
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    out, *runs = map(Path, sys.argv[1:])
    curves = {run.name: validation(run) for run in runs}
    goal = next(iter(curves.values()))[-1][1]
    for name, curve in curves.items():
        last, loss = curve[-1]
        print(
            json.dumps(
                {"run": name, "step": last, "validation": loss, "as_low_as_first": reached(curve, goal)}
            )
        )
    plot(curves, out)


if __name__ == "__main__":
    main()
