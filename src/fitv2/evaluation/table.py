"""An evaluation as people read it: a table for each network, and plots."""

from pathlib import Path
from typing import Any

from fitv2.evaluation.evaluate import Result
from fitv2.evaluation.score import BETTER_HIGHER
from fitv2.runtime.files import atomic_file

ACROSS = 5  # plots
NETWORKS = {
    "efficientnet": "EfficientNet-Lite0, trained on ImageNet",
    "inception": "Inception-v3",
    "dinov2": "DINOv2 ViT-L/14",
}


def table(result: Result) -> str:
    """Markdown: a table for each network, a row for each size; ± holds 95 % of the outcomes."""
    about = result.about
    lines = []
    for network in next(iter(result.sizes.values())):
        metrics = list(next(iter(result.sizes.values()))[network])
        lines += [
            f"Features of {NETWORKS[network]}", "",
            " | ".join([f"| {about['judged']}", "made : real", *map(headed, metrics), ""]),
            "|---" * (len(metrics) + 2) + "|",
        ]  # fmt: skip
        for size, figures in result.sizes.items():
            counts = about["references"][size]
            pictures = f"{counts['pictures_judged']} : {counts['pictures']}"
            row = " | ".join(str(figures[network][name]) for name in metrics)
            lines.append(f"| {size} | {pictures} | {row} |")
        lines.append("")
    lines += provenance(about)
    return "\n".join(lines)


def provenance(about: dict[str, Any]) -> list[str]:
    """Lines that say how figures came about."""
    said = [f"{name} {about[name]}" for name in ("solver", "steps") if name in about]
    if guidance := about.get("guidance"):
        start, stop = guidance["guidance_interval"]
        said.append(f"guidance {guidance['guidance_scale']:g} at times {start:g} to {stop:g}")
    if "weights" in about:
        said += [f"seeds from {about['settings']['seed']}", f"weights {about['weights'][:16]}"]
    said += [f"{name} {about[name]}" for name in ("fitv2", "torch", "device", "date") if name in about]
    lines = [", ".join(said), ""]
    for size, of in about["references"].items():
        calls = f", {of['evaluations']} evaluations a picture" if "evaluations" in of else ""
        lines.append(f"- {size}: reference {of['sha256'][:16]}, {of['left_out']} left out{calls}")
    return [*lines, "", f"`{about['command']}`", ""]


def headed(metric: str) -> str:
    """A metric and which way is better."""
    return f"{metric} {'↑' if metric in BETTER_HIGHER else '↓'}"


def draw_plots(result: Result, out: Path) -> None:
    """Each metric of the first network over the sizes, with its 95 % interval."""
    from matplotlib.figure import Figure as Canvas

    sizes = list(result.sizes)
    networks = list(next(iter(result.sizes.values())))
    panels = [(network, metric) for network in networks for metric in result.sizes[sizes[0]][network]]
    rows = -(-len(panels) // ACROSS)
    canvas = Canvas(figsize=(2.6 * ACROSS, 2.8 * rows), layout="constrained")
    grid = canvas.subplots(rows, ACROSS, squeeze=False)
    for place, axes in enumerate(grid.flat):
        axes.axis("on" if place < len(panels) else "off")
        for network, metric in panels[place : place + 1]:
            found = [result.sizes[size][network][metric] for size in sizes]
            values, errors = [f.value for f in found], [f.half_width for f in found]
            axes.errorbar(range(len(sizes)), values, errors, fmt="o", color="#08519c", capsize=4)
            axes.set(title=headed(metric), xlim=(-0.5, len(sizes) - 0.5))
            axes.set_xticks(range(len(sizes)), sizes, rotation=45, ha="right", fontsize=8)
            axes.grid(alpha=0.3)
            axes.set_ylabel(network, fontsize=8)
    canvas.suptitle(f"{result.about['judged']} beside real pictures, 95 % intervals")
    with atomic_file(out) as scratch:
        canvas.savefig(scratch, dpi=110)
