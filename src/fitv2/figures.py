"""Images to look at: sheets of samples and curves."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from fitv2.runtime.files import atomic_file

Captioned = tuple[str, Image.Image]


GAP, LINE = 14, 16  # pixels between images, and of a line below one


def contact_sheet(rows: Sequence[Sequence[Captioned]], title: str = "", zoom: int = 1) -> Image.Image:
    """Rows of captioned images on white, each row as high as its highest image.

    A caption is as wide as its image: a longer one has several lines.
    """
    font, small = ImageFont.load_default(20), ImageFont.load_default(13)
    cells = [[_Cell(image, text, small, zoom) for text, image in row] for row in rows]
    widest = max(sum(cell.width + GAP for cell in row) for row in cells)
    top = GAP + (36 if title else 0)
    height = top + sum(max(cell.height for cell in row) + GAP for row in cells)
    sheet = Image.new("RGB", (max(widest, int(font.getlength(title)) + GAP) + GAP, height), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((GAP, GAP), title, "black", font)
    for row in cells:
        left = GAP
        for cell in row:
            sheet.paste(cell.image, (left, top))
            outline = (left - 1, top - 1, left + cell.image.width, top + cell.image.height)
            draw.rectangle(outline, outline="#dddddd")
            for number, line in enumerate(cell.lines):
                draw.text((left, top + cell.image.height + 3 + LINE * number), line, "#555555", small)
            left += cell.width + GAP
        top += max(cell.height for cell in row) + GAP
    return sheet


class _Cell:
    """An image, enlarged, and the lines below it."""

    def __init__(self, image: Image.Image, text: str, font: Any, zoom: int) -> None:
        size = image.width * zoom, image.height * zoom
        self.image = image.resize(size, Image.Resampling.BICUBIC)
        self.lines: list[str] = []
        for word in text.split():
            longer = f"{self.lines[-1]} {word}" if self.lines else word
            if self.lines and font.getlength(longer) <= max(size[0], 64):
                self.lines[-1] = longer
            else:
                self.lines.append(word)
        self.width = max([size[0], *(int(font.getlength(line)) for line in self.lines)])
        self.height = size[1] + 4 + LINE * len(self.lines)


HELD_OUT = {
    "validation": ("held-out images, the EMA model", "#d95f0e"),
    "validation_jump": ("the same, steps to the data", "#7570b3"),
    "validation_early": ("the same, its early head", "#1b9e77"),
}


def loss_curve(lines: Sequence[dict[str, Any]], out: Path, title: str, *, other_loss: bool = False) -> None:
    """Plot `loss` and what was measured of held-out images, of the lines of a log, against `step`.

    With `other_loss` the two are not comparable, as those of an any-step model, and have axes of their own.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6.5 if other_loss else 4.5), layout="constrained")
    panels = figure.subplots(2 if other_loss else 1, sharex=True, squeeze=False)[:, 0]
    train = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    if train:
        steps, losses = zip(*train, strict=True)
        window = max(1, len(losses) // 40)
        means = [sum(losses[max(0, i - window + 1) : i + 1]) / min(i + 1, window) for i in range(len(losses))]
        if window > 1:
            panels[0].plot(steps, losses, color="#9ecae1", linewidth=0.8, label="training, lines of the log")
        said = f"training, mean of the last {window}" if window > 1 else "training, lines of the log"
        panels[0].plot(steps, means, color="#08519c", label=said)
    for name, (label, color) in HELD_OUT.items():
        points = [(line["step"], line[name]) for line in lines if name in line]
        if points:
            panels[-1].plot(*zip(*points, strict=True), "o-", color=color, markersize=3, label=label)
    panels[0].set(title=title, ylabel="loss")
    panels[-1].set(xlabel="step", ylabel="squared error" if other_loss else "loss")
    for axes in panels:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:.3g}")
        axes.grid(alpha=0.3, which="both")
        if axes.lines:
            axes.legend()
    with atomic_file(out) as partial:
        figure.savefig(partial, dpi=120)


def dataset_plots(
    tokens: np.ndarray, aspects: np.ndarray, labels: dict[str, int], out: Path, title: str
) -> None:
    """Plot what a dataset holds: tokens an image, aspect ratios (columns over rows), images a label."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4.5), layout="constrained")
    lengths, shapes, counts = figure.subplots(1, 3)
    lengths.hist(tokens, bins=40, color="#08519c")
    lengths.set(xlabel="tokens", ylabel="images, with their variants", title="length")
    # On a logarithmic axis 1:2 and 2:1 lie equally far from a square.
    widest = max(2.0, float(np.abs(np.log2(aspects)).max()) + 0.2)
    shapes.hist(aspects, bins=np.geomspace(2**-widest, 2**widest, 41), color="#08519c")
    shapes.set_xscale("log", base=2)
    shapes.xaxis.set_major_formatter(lambda ratio, _: f"{ratio:g}:1" if ratio >= 1 else f"1:{1 / ratio:g}")
    shapes.set(xlabel="columns to rows", title="aspect ratio")
    most = sorted(labels.items(), key=lambda pair: -pair[1])[:30]
    counts.bar(range(len(most)), [count for _, count in most], color="#08519c")
    counts.set_xticks(range(len(most)), [name[:18] for name, _ in most], rotation=90, fontsize=8)
    some = f"the {len(most)} commonest of {len(labels)} labels"
    counts.set(ylabel="pictures", title="labels" if len(most) == len(labels) else some)
    figure.suptitle(title)
    with atomic_file(out) as partial, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # labels may be in any script
        figure.savefig(partial, dpi=100)
