"""What every solver makes of as many evaluations: how far from the exact solution, and what a judge sees.

All make the same pictures: the same subjects from the same noise. So their differences are the solvers'.
Each cell is a file of its own, so the study goes on where it was interrupted.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fitv2.config import Guidance, Sampling
from fitv2.diffusion.solvers import ADAPTIVE, FIXED
from fitv2.diffusion.transport import SOLVERS
from fitv2.encoding.images import parse_size
from fitv2.errors import UserError, nearest
from fitv2.evaluation.extract import PIECE, pieces
from fitv2.evaluation.features import Extractor, load_extractor
from fitv2.evaluation.identity import settle
from fitv2.evaluation.judged import How, JudgedModel
from fitv2.evaluation.metrics import Moments, frechet
from fitv2.evaluation.reference import ABOUT, kept_reference, size_name
from fitv2.evaluation.settings import Evaluation
from fitv2.pipeline import FiTPipeline
from fitv2.runtime.device import default_device
from fitv2.runtime.files import atomic_file, write_json, write_text
from fitv2.runtime.serialization import read_json
from fitv2.tokens import Size

# Its error is a hundredth of what any solver has at 25 evaluations: docs/results/solvers.md.
EXACT = Sampling("ab2", 100, shift=2.0)
FEATURES = "efficientnet"


@dataclass(frozen=True)
class Cell:
    """A solver with so many steps."""

    solver: str
    shift: float
    steps: int
    evaluations: int
    """Calls of the model for a picture; guidance doubles each."""
    difference: float
    """Mean absolute difference from the exact solution, in levels of 255."""
    distance: float
    """Fréchet distance to the reference."""

    @property
    def name(self) -> str:
        """The solver, and its shift where there is one."""
        return self.solver if self.shift == 1 else f"{self.solver}, shift {self.shift:g}"


def plan(
    solvers: Sequence[str], shifts: Sequence[float], evaluations: Sequence[int]
) -> list[tuple[str, Sampling]]:
    """What is tried, by names of files. A solver that chooses its steps is tried once.

    Raises UserError for one that does not exist.
    """
    found = []
    for solver in solvers:
        if solver not in SOLVERS:
            raise nearest("solver", solver, SOLVERS)
        if solver in ADAPTIVE:
            found.append((solver, Sampling(solver)))
            continue
        for shift in shifts:
            for count in evaluations:
                steps = max(1, count // len(FIXED[solver].nodes)) if solver in FIXED else count
                found.append((f"{solver}-{shift:g}-{count}", Sampling(solver, steps, shift)))
    return found


class SolverStudy:
    """A model's pictures of one size by many solvers, compared with those of the exact solution.

    `reference` is the folder of an evaluation; its first size is taken. Raises UserError when it is none, and
    for a model without a flow.
    """

    def __init__(
        self, pipeline: FiTPipeline, reference: Path, out: Path, num: int, guidance: Guidance
    ) -> None:
        if not pipeline.is_flow:
            raise UserError("solvers are for models with a flow: FiT v1 is sampled by ddpm or ddim")
        self.pipeline, self.out, self.guidance = pipeline, out, guidance
        self.settings = Evaluation(num=num)
        self.extractor: Extractor = load_extractor(FEATURES, default_device())
        self.size = first_size(reference)
        kept = kept_reference(reference, self.size, [self.extractor])
        self.about, self.real = kept.about, kept.features()[FEATURES].moments
        exact = self.judged(EXACT).identity
        settle(out, {"model": exact, "num": num, "reference": self.about.sha256})
        self.exact = self.make_exact()

    def judged(self, sampling: Sampling) -> JudgedModel:
        """The model with a solver."""
        return JudgedModel(self.pipeline, self.settings, How(self.guidance, sampling))

    def make(self, sampling: Sampling) -> Tensor:
        """All pictures with a solver, uint8 (N, 3, H, W)."""
        pictures, _ = self.judged(sampling).pictures(self.size, self.about)
        made = [picture for piece in pieces(len(pictures)) for picture in pictures.read(piece)]
        return torch.from_numpy(np.stack([np.asarray(picture) for picture in made])).permute(0, 3, 1, 2)

    def make_exact(self) -> Tensor:
        """Those of the exact solution, made once."""
        path = self.out / "exact.safetensors"
        if not path.exists():
            with atomic_file(path) as scratch:
                save_file({"pixels": self.make(EXACT).contiguous()}, scratch)
        return load_file(path)["pixels"]

    def cell(self, name: str, sampling: Sampling) -> Cell:
        """What a solver makes, computed or as it was noted."""
        path = self.out / "cells" / f"{name}.json"
        if path.exists():
            return Cell(**read_json(path))
        made, judged = self.make(sampling), self.judged(sampling)
        evaluations = judged.evaluations(judged.pictures(self.size, self.about)[0])
        solver, steps = sampling.resolve()
        difference = float((made.float() - self.exact.float()).abs().mean())
        cell = Cell(solver, sampling.shift, steps, evaluations, difference, self.distance(made))
        write_json(path, asdict(cell))
        return cell

    def distance(self, made: Tensor) -> float:
        """The Fréchet distance of pictures to the reference."""
        found = [self.extractor(some)[FEATURES] for some in made.split(PIECE)]
        return frechet(Moments.of(torch.cat(found)), self.real)


def first_size(reference: Path) -> Size:
    """The first size of a reference. Raises UserError where there is none."""
    sizes = [parse_size(path.parent.name) for path in sorted(reference.glob(f"*/{ABOUT}"))]
    if not sizes:
        raise UserError(f"{reference} is not the folder `reference` of an evaluation: see fitv2 evaluate")
    return sizes[0]


def study_solvers(
    pipeline: FiTPipeline,
    reference: Path,
    out: Path,
    tried: Sequence[tuple[str, Sampling]],
    *,
    num: int = 100,
    guidance: Guidance,
    progress: Callable[[int, int], None] = lambda done, total: None,
    report: Callable[[str], None] = lambda _: None,
    command: str = "",
) -> list[Cell]:
    """Try every solver, and write solvers.json, table.md and solvers.png in `out`."""
    study = SolverStudy(pipeline, reference, out, num, guidance)
    cells = []
    for number, (name, sampling) in enumerate(tried):
        progress(number, len(tried))
        cells.append(study.cell(name, sampling))
        report(f"{name}: {cells[-1].difference:.2f} levels, distance {cells[-1].distance:.1f}")
    exact = study.distance(study.exact)
    about = {"size": size_name(study.size), "num": num, "exact": exact, "command": command}
    write_json(out / "solvers.json", about | {"cells": [asdict(cell) for cell in cells]})
    write_text(out / "table.md", table(cells, exact, command))
    draw(cells, exact, out / "solvers.png")
    return cells


def table(cells: Sequence[Cell], exact: float, command: str) -> str:
    """The cells in Markdown."""
    lines = [
        f"The exact solution has a distance of {exact:.1f}.",
        "",
        "| solver | steps | evaluations | difference, levels of 255 | distance |",
        "|---|---|---|---|---|",
    ]
    for cell in cells:
        said = cell.name, cell.steps, cell.evaluations, f"{cell.difference:.2f}", f"{cell.distance:.1f}"
        lines.append(f"| {' | '.join(map(str, said))} |")
    return "\n".join([*lines, "", f"`{command}`", ""])


def draw(cells: Sequence[Cell], exact: float, path: Path) -> None:
    """Difference and distance over evaluations."""
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(11, 4.5), layout="constrained")
    left, right = canvas.subplots(1, 2)
    for i, name in enumerate(dict.fromkeys(cell.name for cell in cells)):
        mine = [cell for cell in cells if cell.name == name]
        style: dict[str, Any] = {
            "label": name,
            "color": f"C{i % 10}",
            "marker": "o" if len(mine) > 1 else "*",
        }
        left.plot([c.evaluations for c in mine], [c.difference for c in mine], **style)
        right.plot([c.evaluations for c in mine], [c.distance for c in mine], **style)
    right.axhline(exact, color="black", linewidth=1, linestyle=":", label="exact")
    left.set(ylabel="difference from the exact solution, levels of 255", yscale="log")
    right.set(ylabel="Fréchet distance, EfficientNet-Lite0")
    counts = sorted({cell.evaluations for cell in cells if sum(c.name == cell.name for c in cells) > 1})
    counts = [count for count in counts if count + 1 not in counts]  # Heun's are even
    for axes in (left, right):
        axes.set(xlabel="evaluations of the model", xscale="log")
        axes.set_xticks(counts, [str(count) for count in counts])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    right.legend()
    with atomic_file(path) as scratch:
        canvas.savefig(scratch, dpi=110)
