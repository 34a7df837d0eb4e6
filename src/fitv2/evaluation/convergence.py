"""How fast models learn: the paper's ablation and its Figure 8, on any data.

Every variant is trained at one width, on the same images, with the same seeds, and judged on the way. A run
is a folder, so a study goes on where it was interrupted.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch

from fitv2.config import Architecture
from fitv2.data.dataset import open_card
from fitv2.data.packing import images_before
from fitv2.data.storage import Store
from fitv2.errors import UserError
from fitv2.evaluation.during import TrainingJudge
from fitv2.evaluation.identity import settle
from fitv2.evaluation.metrics import Figure
from fitv2.evaluation.settings import Scale
from fitv2.evaluation.variants import SQUARE, VARIANTS, variant
from fitv2.model import FiT
from fitv2.presets import Preset
from fitv2.runtime.files import atomic_file, write_json, write_text
from fitv2.runtime.signals import RECEIVED
from fitv2.training.best import DISTANCE
from fitv2.training.run_folder import read_log
from fitv2.training.throughput import MultiplyAdds
from fitv2.training.trainer import StepReport, train

RATE = "speed/images_per_second"
BASELINES = ("FiT", "FiTv2")  # the first of these that there is, is what others are compared with


@dataclass(frozen=True)
class Curve:
    """A run: its distance and its held-out loss after some steps, and what a step costs."""

    variant: str
    seed: int
    steps: tuple[float, ...]  # of as many images each as one without a ramp-up has
    distances: tuple[float, ...]
    parameters: int
    gmac: float  # of an evaluation of the longest image
    losses: tuple[float, ...] = ()
    seconds: float = 0.0  # a step, the median

    def steps_to(self, distance: float) -> float:
        """The steps to a distance, between evaluations by a line; infinite if it is not reached."""
        before_step, before = 0.0, math.inf
        for step, now in zip(self.steps, self.distances, strict=True):
            if now <= distance:
                if math.isinf(before):
                    return step
                return before_step + (before - distance) / (before - now) * (step - before_step)
            before_step, before = step, now
        return math.inf


@dataclass(frozen=True)
class Planned:
    """A run of a study."""

    name: str
    preset: Preset
    data: str


def tokens_of(data: str) -> tuple[Architecture, int]:
    """What a folder of tokens decides of a model, and the tokens of its longest image."""
    about = open_card(Store(data)).about
    labels = len(about.labels)
    return Architecture(
        1, 4, 1, patch_size=about.patch_size, in_channels=about.in_channels, num_classes=labels
    ), (about.max_tokens)


def plan_convergence(
    data: str, square: str, scale: Scale, variants: Sequence[str] = VARIANTS
) -> list[Planned]:
    """Every variant on tokens of images of any shapes, or of the same images cropped to squares."""
    runs = []
    for name in variants:
        source = square if name.split("+")[0] in SQUARE else data
        runs.append(Planned(name, variant(name, scale, tokens_of(source)[0]), source))
    return runs


def plan_scaling(data: str, scale: Scale, widths: Sequence[int], depths: Sequence[int]) -> list[Planned]:
    """FiTv2 of several sizes, each trained for as many multiply-adds as the one of `scale` takes."""
    tokens, longest = tokens_of(data)
    budget = scale.steps * gmac(variant("FiTv2", scale, tokens).model, longest)
    runs = []
    for width, depth in zip(widths, depths, strict=True):
        size = replace(scale, width=width, heads=max(1, width * scale.heads // scale.width), depth=depth)
        steps = budget / gmac(variant("FiTv2", size, tokens).model, longest)
        judged = max(1, min(scale.steps // scale.every, round(steps)))  # times, at equal shares of the budget
        every = max(1, round(steps / judged))
        size = replace(size, steps=judged * every, every=every)
        chosen = variant("FiTv2", size, tokens)
        runs.append(Planned(f"width {width}, depth {chosen.model.depth}", chosen, data))
    return runs


def run_study(
    runs: Sequence[Planned],
    reference: Path,
    out: Path,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    num: int = 200,
    evaluations: int = 50,
    progress: Callable[[str, StepReport], None] = lambda name, report: None,
    report: Callable[[str], None] = lambda _: None,
    command: str = "",
) -> list[Curve]:
    """Train every run with every seed, and write curves.json, table.md and curves.png in `out`.

    `reference` is the folder of an evaluation; its sizes are those that are judged, by `num` images of
    `evaluations` calls of the model each. Raises UserError as `train` does.
    """
    judge, curves = TrainingJudge(reference, num, evaluations), []
    settle(out, {"judge": judge.identity})
    for seed in seeds:  # all runs once before any is made again
        for planned in runs:
            name = f"{planned.name.replace(', ', '-').replace(' ', '')}-{seed}"
            chosen = replace(planned.preset, training=replace(planned.preset.training, seed=seed))
            train(chosen, planned.data, out / name, judge=judge, report=partial(progress, name))
            if RECEIVED:
                raise UserError("stopped by a signal; run the same command again to resume")
            longest = tokens_of(planned.data)[1]
            curves.append(read_curve(planned.name, seed, out / name, chosen, longest))
            report(f"{name}: {curves[-1].distances[-1]:.1f} after {curves[-1].steps[-1]:.0f} steps")
    write_json(out / "curves.json", {"curves": [asdict(curve) for curve in curves], "command": command})
    write_text(out / "table.md", table(curves, command))
    draw(curves, out / "curves.png")
    return curves


def gmac(architecture: Architecture, tokens: int) -> float:
    """10⁹ multiply-adds of an evaluation of an image."""
    with torch.device("meta"):
        return MultiplyAdds.of(FiT(**asdict(architecture)), tokens).linear / 1e9


def read_curve(name: str, seed: int, run: Path, preset: Preset, tokens: int) -> Curve:
    """The curve of a run that is done."""
    log = read_log(run / "log.jsonl")
    lines = [line for line in log if DISTANCE in line]
    if not lines:
        raise UserError(f"{run} was never judged: fewer steps than are between evaluations")
    model, training = preset.model, preset.training
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in FiT(**asdict(model)).parameters())
    size, rampup = training.batch_size, training.batch_rampup_steps
    steps = tuple(images_before(int(line["step"]), size, rampup) / size for line in lines)
    judged = {line["step"] for line in lines}
    judged = judged if model.path != "ddpm" else set()  # its loss is another one
    losses = [line["validation"] for line in log if "validation" in line and line["step"] in judged]
    rates = [line[RATE] for line in log if line.get(RATE)]
    seconds = size / statistics.median(rates) if rates else 0.0
    distances = tuple(line[DISTANCE] for line in lines)
    return Curve(name, seed, steps, distances, parameters, gmac(model, tokens), tuple(losses), seconds)


def by_variant(curves: Sequence[Curve]) -> dict[str, list[Curve]]:
    """The curves of each variant, in order."""
    found: dict[str, list[Curve]] = {}
    for curve in curves:
        found.setdefault(curve.variant, []).append(curve)
    return found


def factor(curves: Sequence[Curve], slower: Sequence[Curve]) -> Figure | None:
    """How many times fewer steps take a variant to the last distance of a slower one, over seeds.

    None if a seed does not reach it.
    """
    targets = [other.distances[-1] for other in slower]
    taken = [curve.steps_to(target) for curve, target in zip(curves, targets, strict=True)]
    if not all(map(math.isfinite, taken)):
        return None
    before = [other.steps_to(target) for other, target in zip(slower, targets, strict=True)]
    return over_seeds([one / other for one, other in zip(before, taken, strict=True)])


def over_seeds(values: Sequence[float]) -> Figure:
    """The mean over seeds and its standard error, which one seed does not tell."""
    found = torch.tensor(values, dtype=torch.float64)
    error = float(found.std()) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return Figure(float(found.mean()), error, len(values) - 1)


def table(curves: Sequence[Curve], command: str) -> str:
    """Markdown: a row for each variant; ± holds 95 % of the outcomes."""
    found = by_variant(curves)
    baseline = next((name for name in BASELINES if name in found), "the baseline")
    lines = [
        "| | parameters | GMAC | steps | distance at the end | held-out loss | times fewer steps than"
        f" {baseline} |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, runs in found.items():
        last = over_seeds([run.distances[-1] for run in runs])
        loss = over_seeds([run.losses[-1] for run in runs]) if all(run.losses for run in runs) else ""
        fewer = (factor(runs, found[baseline]) or "not reached by every seed") if baseline in found else ""
        first = runs[0]
        cost = f"{first.parameters:,} | {first.gmac:.2f} | {first.steps[-1]:.0f}"
        lines.append(f"| {name} | {cost} | {last} | {loss} | {fewer} |")
    return "\n".join([*lines, "", f"`{command}`", ""])


def draw(curves: Sequence[Curve], path: Path) -> None:
    """Distances over steps, and over multiply-adds; a band from the lowest to the highest seed."""
    from matplotlib.figure import Figure as Canvas
    from matplotlib.ticker import MaxNLocator, NullLocator, ScalarFormatter

    canvas = Canvas(figsize=(13, 5), layout="constrained")
    steps_axes, cost_axes = canvas.subplots(1, 2, sharey=True)
    for i, (name, runs) in enumerate(by_variant(curves).items()):
        steps = runs[0].steps
        values = torch.tensor([run.distances for run in runs])
        for axes, cost in ((steps_axes, 1.0), (cost_axes, 3 * runs[0].gmac)):
            x = [step * cost for step in steps]
            style = {"color": f"C{i % 10}", "linestyle": "--" if i >= 10 else "-", "marker": "."}
            axes.plot(x, values.mean(0), label=name, **style)
            axes.fill_between(x, values.amin(0), values.amax(0), color=f"C{i % 10}", alpha=0.15)
    steps_axes.set(xlabel="steps", ylabel="Fréchet distance, EfficientNet-Lite0", yscale="log")
    cost_axes.set(xlabel="multiply-adds of training, 10⁹ × images of a step")
    for axes in (steps_axes, cost_axes):
        axes.grid(alpha=0.3, which="both")
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_locator(MaxNLocator(9, steps=[1, 2, 5, 10]))
        axes.yaxis.set_major_formatter(ScalarFormatter())
    steps_axes.legend()
    with atomic_file(path) as scratch:
        canvas.savefig(scratch, dpi=110)
