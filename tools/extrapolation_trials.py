"""Try ways to scale positions beyond the trained sizes, and print the distance of each at each size.

    python tools/extrapolation_trials.py MODEL REFERENCE OUT --size 160x160 [--num 200] [--only NAME] …

REFERENCE is the folder `reference` of an evaluation that has the sizes. A trial is a method of fitv2.rope, or
one that is made here and is nowhere else. Every trial makes the same prompts from the same noise. Goes on
where it was interrupted. Writes OUT/trials.json.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from fitv2.config import Positions, Rope, Sampling
from fitv2.encoding.images import parse_size
from fitv2.evaluation.evaluate import How, evaluate
from fitv2.evaluation.settings import Evaluation
from fitv2.rope import METHODS, SCALES, frequencies, ntk, position_interpolation


def by_turns(most: float, fewest: float) -> None:
    """Register a method: frequencies that turn more than `most` times within the trained side stay.

    Those that turn less than `fewest` times follow PI; in between by the logarithm of their turns. YaRN's 32
    and 1 are for texts of thousands of words: within 8 or 16 rows no frequency turns 32 times.
    """

    def method(stretch_B: Tensor, dims: int, base: float, train_side: int) -> Tensor:
        own_F = frequencies(dims, base, stretch_B.device)
        turns_F = own_F * train_side / (2 * torch.pi)
        kept_F = ((turns_F / fewest).log() / torch.tensor(most / fewest).log()).clamp(0, 1)
        return torch.lerp(position_interpolation(stretch_B, dims, base), own_F, kept_F)

    METHODS[f"turns {most:g} to {fewest:g}"] = method


def slow_stay(fewest: float) -> None:
    """Register a method: PI but for frequencies so slow that they never leave a straight line."""

    def method(stretch_B: Tensor, dims: int, base: float, train_side: int) -> Tensor:
        own_F = frequencies(dims, base, stretch_B.device)
        slow_F = (own_F * train_side / (2 * torch.pi) < fewest).float()
        return torch.lerp(
            position_interpolation(stretch_B, dims, base), own_F.expand(len(stretch_B), -1), slow_F
        )

    METHODS[f"PI above {fewest:g} turns"] = method


def part_of_ntk(share: float) -> None:
    """Register a method: NTK by a power of the stretch."""

    def method(stretch_B: Tensor, dims: int, base: float, train_side: int) -> Tensor:
        return ntk(stretch_B**share, dims, base, train_side)

    METHODS[f"NTK of stretch^{share:g}"] = method


def part_of_pi(share: float) -> None:
    """Register a method: PI by a power of the stretch."""

    def method(stretch_B: Tensor, dims: int, base: float, train_side: int) -> Tensor:
        return position_interpolation(stretch_B**share, dims, base)

    METHODS[f"PI of stretch^{share:g}"] = method


def temperature(power: float) -> None:
    """Register an attention scale: that of the tokens, to a power; below 0 it softens."""

    def scale(size_B2: Tensor, rope: Rope) -> Tensor:
        return SCALES["tokens"](size_B2, rope) ** power

    SCALES[f"tokens^{power:g}"] = scale


def trials() -> Iterator[tuple[str, Positions]]:
    """All of them, by their names."""
    for most, fewest in ((2, 0.5), (1, 0.25), (0.5, 0.125), (0.25, 0.03)):
        by_turns(most, fewest)
    for fewest in (0.05, 0.2):
        slow_stay(fewest)
    for share in (0.5, 2.0):
        part_of_ntk(share)
    part_of_pi(0.5)
    for power in (-1.0, 0.5, 2.0):
        temperature(power)
    for method in ("none", *METHODS):
        yield method, Positions(method)
    for method in ("none", "ntk", "turns 1 to 0.25"):
        for scale in SCALES:
            yield f"{method} + {scale}", Positions(method, scale)
    for time in (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.99):
        yield f"none, restart at {time:g}", Positions("none", restart=time)
        yield f"ntk + tokens, restart at {time:g}", Positions("ntk", "tokens", restart=time)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("reference")
    parser.add_argument("out", type=Path)
    parser.add_argument("--num", type=int, default=200)
    parser.add_argument("--solver", help="as of fitv2 sample")
    parser.add_argument("--steps", type=int, help="of the solver")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--size", action="append", default=[])
    parser.add_argument("--only", action="append", default=[])
    chosen = parser.parse_args()
    sizes = [parse_size(text) for text in chosen.size]
    found = {}
    for name, positions in trials():
        if chosen.only and name not in chosen.only:
            continue
        folder = chosen.out / name.replace(" ", "_").replace("^", "-").replace(",", "")
        settings = Evaluation(num=chosen.num, precision=chosen.precision)
        how = How(sampling=Sampling(chosen.solver, chosen.steps), positions=positions)
        result = evaluate(chosen.model, chosen.reference, folder, settings, how, sizes)
        if result is None:
            continue
        found[name] = {size: next(iter(figures.values())) for size, figures in result.sizes.items()}
        line = ", ".join(f"{size} FD {its['FD']}, top 5 {its['top 5']}" for size, its in found[name].items())
        print(f"{name}: {line}", flush=True)
    figures = {
        name: {size: {k: [v.value, v.error] for k, v in its.items()} for size, its in of.items()}
        for name, of in found.items()
    }
    (chosen.out / "trials.json").write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
