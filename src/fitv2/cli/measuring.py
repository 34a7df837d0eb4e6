"""The commands that measure: `evaluate`, `study …`, `flops`."""

import os
import shlex
import sys
from dataclasses import asdict
from typing import Any

from tqdm import tqdm

from fitv2.cli.options import (
    Evaluate,
    Flops,
    StudyConvergence,
    StudyScaling,
    StudySizes,
    StudySolvers,
    TrainingStudy,
)
from fitv2.cli.progress import stages_bar
from fitv2.errors import UserError
from fitv2.limits import check_limit
from fitv2.presets import PRESETS
from fitv2.runtime.signals import leave_on_signals


def evaluate(options: Evaluate) -> int:
    """Run `fitv2 evaluate`."""
    from fitv2.encoding.images import parse_size
    from fitv2.evaluation.evaluate import evaluate
    from fitv2.evaluation.judged import How
    from fitv2.evaluation.table import draw_plots, table
    from fitv2.runtime.files import write_text

    sizes = [parse_size(text[:32]) for text in options.size]
    for size in sizes:
        check_limit("size", max(size))
    how = How(options.guidance, options.sampling, options.positions)
    with stages_bar("image", os.environ.get("LOCAL_RANK", "0") == "0") as progress:
        leave_on_signals("; run the same command again to resume")
        result = evaluate(
            options.judged, options.reference, options.out, options.evaluation, how, sizes,
            allow_download=options.allow_download, progress=progress, command=command_line(),
        )  # fmt: skip
    if result is None:
        print(f"{options.out}: this share is done; the process that finishes last computes the figures")
        return 0
    write_text(options.out / "table.md", table(result))
    draw_plots(result, options.out / "plots.png")
    print(table(result))
    return 0


def study_sizes(options: StudySizes) -> int:
    """Run `fitv2 study sizes`."""
    from fitv2.evaluation.judged import How
    from fitv2.evaluation.sizes import study_sizes
    from fitv2.pipeline import FiTPipeline

    pipeline = FiTPipeline.from_pretrained(options.model, allow_download=options.allow_download)
    trained = pipeline.card.square[0], pipeline.unit
    with stages_bar("image", os.environ.get("LOCAL_RANK", "0") == "0") as progress:
        leave_on_signals("; run the same command again to resume")
        found = study_sizes(
            options.model, options.reference, options.out, options.evaluation,
            How(options.guidance, options.sampling), trained, groups=options.groups, progress=progress,
            report=tqdm.write, allow_download=options.allow_download, command=command_line(),
        )  # fmt: skip
    if found is None:
        print(f"{options.out}: this share is done; the process that finishes last makes the tables")
        return 0
    print((options.out / "table.md").read_text(encoding="utf-8"))
    return 0


def study_solvers(options: StudySolvers) -> int:
    """Run `fitv2 study solvers`."""
    from fitv2.evaluation.solver_study import plan, study_solvers
    from fitv2.pipeline import FiTPipeline
    from fitv2.runtime.device import default_device

    tried = plan(options.solvers, options.shifts, options.evaluations)
    pipeline = FiTPipeline.from_pretrained(options.model, allow_download=options.allow_download)
    with stages_bar("cell") as bar:
        leave_on_signals("; run the same command again to resume")
        study_solvers(
            pipeline.to(default_device()), options.reference, options.out, tried, num=options.num,
            guidance=options.guidance, progress=lambda done, total: bar("solvers", done, total),
            report=tqdm.write, command=command_line(),
        )  # fmt: skip
    print((options.out / "table.md").read_text(encoding="utf-8"))
    return 0


def study_convergence(options: StudyConvergence) -> int:
    """Run `fitv2 study convergence`."""
    from fitv2.evaluation.convergence import plan_convergence

    runs = plan_convergence(options.data, options.square, options.scale, options.variants)
    return train_study(runs, options)


def study_scaling(options: StudyScaling) -> int:
    """Run `fitv2 study scaling`."""
    from fitv2.evaluation.convergence import plan_scaling

    if len(options.widths) != len(options.depths):
        raise UserError("`widths` and `depths` go together: as many of each")
    return train_study(plan_scaling(options.data, options.scale, options.widths, options.depths), options)


def train_study(runs: Any, options: TrainingStudy) -> int:
    """Train the runs of a study, and print its table."""
    from fitv2.evaluation.convergence import run_study

    with stages_bar("step") as bar:
        run_study(
            runs, options.reference, options.out, seeds=options.seeds, num=options.num,
            evaluations=options.evaluations, report=tqdm.write,
            progress=lambda name, report: bar(name, report.step, None), command=command_line(),
        )  # fmt: skip
    print((options.out / "table.md").read_text(encoding="utf-8"))
    return 0


def command_line() -> str:
    """What was typed, for results to be made again."""
    return shlex.join(["fitv2", *sys.argv[1:]])


def flops(options: Flops) -> int:
    """Run `fitv2 flops`."""
    import torch

    from fitv2.checkpoint import find_model, read_architecture
    from fitv2.encoding.images import parse_size
    from fitv2.model import FiT
    from fitv2.training.throughput import MultiplyAdds

    known = PRESETS.get(options.model)
    architecture = known.model if known else read_architecture(find_model(options.model))
    with torch.device("meta"):
        model = FiT(**asdict(architecture))
    print(f"{options.model}: {sum(p.numel() for p in model.parameters()):,} parameters")
    unit = architecture.patch_size * (1 if architecture.in_channels == 3 else 8)  # pixels, or SD's latents
    for height, width in map(parse_size, options.size or ("256x256",)):
        check_limit("size", max(height, width))
        tokens = -(-height // unit) * -(-width // unit)
        found = MultiplyAdds.of(model, tokens)
        print(
            f"{height}x{width}: {tokens:,} tokens, {found.linear / 1e9:.2f} GMAC of linear layers (as papers"
            f" count), {found.attention / 1e9:.2f} GMAC of attention's products"
        )
    return 0
