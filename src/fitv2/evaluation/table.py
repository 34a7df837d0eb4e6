"""An evaluation as people read it: a table for each network, and plots."""

from pathlib import Path

from fitv2.evaluation.evaluate import Result
from fitv2.evaluation.score import BETTER_HIGHER
from fitv2.runtime.files import atomic_file

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
    said = [
        f"{name} {about[name]}"
        for name in ("solver", "steps", "evaluations", "fitv2", "torch", "date")
        if name in about
    ]
    lines.append(", ".join(said))
    for size, of in about["references"].items():
        lines.append(f"Reference {size}: hash {of['sha256'][:16]}, {of['left_out']} left out")
    lines += ["", f"`{about['command']}`", ""]
    return "\n".join(lines)


def headed(metric: str) -> str:
    """A metric and which way is better."""
    return f"{metric} {'↑' if metric in BETTER_HIGHER else '↓'}"


def draw_plots(result: Result, out: Path) -> None:
    """Each metric of the first network over the sizes, with its 95 % interval."""
    from matplotlib.figure import Figure as Canvas

    sizes = list(result.sizes)
    networks = list(next(iter(result.sizes.values())))
    most = max(len(next(iter(result.sizes.values()))[network]) for network in networks)
    canvas = Canvas(figsize=(2.3 * most, 2.8 * len(networks)), layout="constrained")
    grid = canvas.subplots(len(networks), most, squeeze=False)
    for row, network in zip(grid, networks, strict=True):
        metrics = list(next(iter(result.sizes.values()))[network])
        for axes in row[len(metrics) :]:
            axes.axis("off")
        for axes, metric in zip(row, metrics, strict=False):
            found = [result.sizes[size][network][metric] for size in sizes]
            values, errors = [f.value for f in found], [1.96 * f.error for f in found]
            axes.errorbar(range(len(sizes)), values, errors, fmt="o", color="#08519c", capsize=4)
            axes.set(title=headed(metric), xlim=(-0.5, len(sizes) - 0.5))
            axes.set_xticks(range(len(sizes)), sizes, rotation=45, ha="right", fontsize=8)
            axes.grid(alpha=0.3)
        row[0].set_ylabel(network)
    canvas.suptitle(f"{result.about['judged']} beside {result.about['reference']}")
    with atomic_file(out) as scratch:
        canvas.savefig(scratch, dpi=110)
