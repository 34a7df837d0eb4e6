"""The paper's Tables III to VI for any model: every size, beyond the trained ones by every extrapolation.

Each cell is an evaluation in a folder of its own, so the study goes on where it was interrupted. The first
pictures of a row are the same prompts from the same noise, whatever the method.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from fitv2.config import Positions
from fitv2.evaluation.evaluate import REFERENCE, Result, StageProgress, evaluate
from fitv2.evaluation.extract import collect
from fitv2.evaluation.judged import How
from fitv2.evaluation.metrics import Figure
from fitv2.evaluation.reference import size_name
from fitv2.evaluation.settings import Evaluation
from fitv2.evaluation.table import provenance
from fitv2.figures import contact_sheet
from fitv2.runtime.files import atomic_file, write_json, write_text
from fitv2.tokens import Size

# Grids of the paper's model of 16×16 tokens; other models get theirs in proportion.
PAPER_SIDE = 16
GROUPS = {
    "trained": ((16, 16), (10, 20), (8, 24)),
    "beyond": ((20, 20), (14, 28), (10, 30)),
    "post-trained": ((32, 32), (20, 40), (16, 48)),
}
PICTURES = 6  # of each cell on the sheet


@dataclass(frozen=True)
class Method:
    """A way to scale positions, under the name that the paper gives it."""

    name: str
    positions: Positions


def methods() -> list[Method]:
    """Those of the paper's Table IV, with and without the attention scale of its Eq. 15; and growth."""
    plain = [
        Method("none", Positions("none")),
        Method("PI", Positions("pi", per_axis=False)),
        Method("VisionPI", Positions("pi")),
        Method("YaRN", Positions("yarn", per_axis=False)),
        Method("VisionYaRN", Positions("yarn")),
        Method("NTK", Positions("ntk", per_axis=False)),
        Method("VisionNTK", Positions("ntk")),
        Method("VisionNTK by parts", Positions("ntk-by-parts")),
    ]
    scaled = [
        Method(f"{method.name} + scale", replace(method.positions, attention_scale="paper"))
        for method in plain
        if method.name in ("none", "VisionPI", "VisionYaRN", "VisionNTK", "VisionNTK by parts")
    ]
    return [*plain, *scaled, Method("grown", Positions())]


def in_proportion(grid: Size, side: int) -> Size:
    """A grid of the paper's for a model whose largest trained square has `side` tokens a side."""
    rows, columns = (max(1, round(tokens * side / PAPER_SIDE)) for tokens in grid)
    return rows, columns


@dataclass(frozen=True)
class Cell:
    """A group of sizes by one method."""

    group: str
    method: Method
    sizes: tuple[Size, ...]  # in pixels

    @property
    def folder(self) -> str:
        """The name of its folder."""
        return f"{self.group}_{self.method.name.replace(' ', '-')}"


def cells(side: int, unit: int, groups: Sequence[str]) -> Iterator[Cell]:
    """All cells for a model of `side` tokens of `unit` pixels; trained sizes as the model is."""
    for group in groups:
        grids = [in_proportion(grid, side) for grid in GROUPS[group]]
        sizes = tuple((rows * unit, columns * unit) for rows, columns in grids)
        used = [Method("own", Positions())] if group == "trained" else methods()
        for method in used:
            yield Cell(group, method, sizes)


def study_sizes(
    model: str,
    reference: str,
    out: Path,
    settings: Evaluation,
    how: How,
    trained: tuple[int, int],
    *,
    groups: Sequence[str] = ("trained", "beyond"),
    progress: StageProgress = lambda stage, done, total: None,
    report: Callable[[str], None] = lambda _: None,
    **options: Any,
) -> dict[str, Result] | None:
    """Evaluate every cell; table.md, sizes.json and a sheet of each size in `out`.

    `trained` is the side of the largest square trained on, in tokens, and of a token, in pixels. None while
    other processes are not done.
    """
    found: dict[str, Result] = {}
    wanted = list(cells(*trained, groups))
    for number, cell in enumerate(wanted):
        here = replace(how, positions=cell.method.positions)
        stage = f"{number + 1} of {len(wanted)}, {cell.method.name}, "
        result = evaluate(
            model, reference, out / cell.folder, settings, here, cell.sizes, keep=out / REFERENCE,
            progress=partial(prefixed, progress, stage), **options,
        )  # fmt: skip
        if result is None:
            continue
        found[cell.folder] = result
        report(cell_line(cell, result))
    if len(found) < len(wanted):
        return None
    write_json(out / "sizes.json", {name: asdict(result) for name, result in found.items()})
    write_text(out / "table.md", tables(wanted, found))
    for group in groups:
        draw_sheets([cell for cell in wanted if cell.group == group], out, settings.num)
    return found


def prefixed(progress: StageProgress, prefix: str, stage: str, done: int, total: int | None) -> None:
    """Progress of one cell."""
    progress(prefix + stage, done, total)


def cell_line(cell: Cell, result: Result) -> str:
    """The first figure of each size of a cell."""
    firsts = [f"{size} {first(figures)}" for size, figures in result.sizes.items()]
    return f"{cell.group}, {cell.method.name}: {', '.join(firsts)}"


def first(figures: dict[str, dict[str, Figure]]) -> Figure:
    """The Fréchet distance in the first network's features."""
    return next(iter(next(iter(figures.values())).values()))


def tables(wanted: Sequence[Cell], found: dict[str, Result]) -> str:
    """A table of each group and network in Markdown: methods by sizes, the best of each column in bold."""
    any_result = next(iter(found.values()))
    lines: list[str] = []
    for network in next(iter(any_result.sizes.values())):
        for group in dict.fromkeys(cell.group for cell in wanted):
            rows = [cell for cell in wanted if cell.group == group]
            lines += [f"{network}, {group}", "", *group_table(rows, found, network), ""]
    return "\n".join([*lines, *provenance(any_result.about)])


def group_table(rows: Sequence[Cell], found: dict[str, Result], network: str) -> list[str]:
    """One table: the distance and, where pictures were asked for by name, how often they are nearest it."""
    sizes = [size_name(size) for size in rows[0].sizes]
    figures = {cell.method.name: found[cell.folder].sizes for cell in rows}
    distance = next(iter(next(iter(figures.values()))[sizes[0]][network]))
    best = {size: min(of[size][network][distance].value for of in figures.values()) for size in sizes}
    lines = ["| | " + " | ".join(f"{size}: {distance} ↓, top 5 ↑" for size in sizes) + " |"]
    lines.append("|---" * (len(sizes) + 1) + "|")
    for name, of in figures.items():
        parts = []
        for size in sizes:
            its = of[size][network]
            text = str(its[distance])
            text = f"**{text}**" if its[distance].value == best[size] and len(figures) > 1 else text
            parts.append(text + (f", {its['top 5'].value:.3f}" if "top 5" in its else ""))
        lines.append(f"| {name} | " + " | ".join(parts) + " |")
    return lines


def draw_sheets(rows: Sequence[Cell], out: Path, num: int) -> None:
    """A sheet of each size: a row for each method."""
    for size in rows[0].sizes:
        name = size_name(size)
        sheet: list[list[tuple[str, Image.Image]]] = []
        for cell in rows:
            shown = [*collect(out / cell.folder / name, num).shown.values()]
            sheet.append([(cell.method.name, image) for image in shown[:PICTURES]])
        with atomic_file(out / f"{rows[0].group}_{name}.png") as scratch:
            contact_sheet(sheet, f"{name}, {rows[0].group}").save(scratch, "PNG")
