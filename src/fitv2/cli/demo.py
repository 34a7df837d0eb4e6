"""The main job from end to end: images of six sizes from the shipped model, then more training."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

from PIL import Image

from fitv2.checkpoint import Card
from fitv2.cli.saving import distinct_names, file_name, save_image
from fitv2.config import Encoding, Sampling, Training
from fitv2.encoding.encode import encode
from fitv2.errors import UserError
from fitv2.figures import contact_sheet
from fitv2.pipeline import FiTPipeline
from fitv2.presets import preset
from fitv2.runtime.device import default_device
from fitv2.runtime.rng import generator
from fitv2.tokens import Size
from fitv2.training.trainer import train

# The paper's test grids for a model trained at 16×16 tokens (its tables 1 and 4).
TRAINED = ((16, 16), (10, 20), (8, 24))
BEYOND = ((20, 20), (14, 28), (10, 30))
CLIPART_LIMITS = (64, 36, 16)  # what the shipped model was trained on
LABELS = ("flags", "smilies", "roadsigns", "fruit")
STEPS = 14  # so that the first image is there within 20 seconds on two cores

Bar = Callable[..., AbstractContextManager[Callable[..., None]]]


def demo(out: Path, data: Path, minutes: float, share_bar: Bar, training_bar: Bar) -> None:
    """Make everything below `out`, and say where it lies."""
    if not data.is_dir():
        raise UserError(f"the clip-art set is not at {data}: run this in the repository, or give --data")
    sheet = make_sheet(FiTPipeline.from_pretrained("clipart").to(default_device()), out, share_bar)
    tokens = out / "tokens"
    encode(data, tokens, Encoding(max_tokens=CLIPART_LIMITS, mirror=False))
    chosen = preset("clipart")
    run = out / "run"
    training = continue_training(chosen.training, minutes)
    with training_bar(training) as report:
        train(replace(chosen, training=training), tokens, run, init="clipart", report=report)
    print(
        f"\nimages         {out}/images/\ncontact sheet  {sheet}\n"
        f"loss curve     {run}/loss.png\ntrained model  {run}  (fitv2 sample {run} --label flags)"
    )


def make_sheet(pipeline: FiTPipeline, out: Path, share_bar: Bar) -> Path:
    """One packed batch at six sizes, as single images and as one sheet; the sheet's path."""
    card, unit = pipeline.card, pipeline.unit
    names = distinct_names(card.labels)
    sizes = [scale_grid(grid, card) for grid in (*TRAINED, *BEYOND)]
    wanted = [(label, rows, columns) for rows, columns in sizes for label in pipeline.get_label_ids(LABELS)]
    rows: dict[Size, list[tuple[str, Image.Image]]] = {}
    with share_bar("six sizes, one batch", len(wanted), "image") as progress:
        made = pipeline.stream(
            [label for label, *_ in wanted], [rows * unit for _, rows, _ in wanted],
            [columns * unit for *_, columns in wanted], [generator(0) for _ in wanted],
            sampling=Sampling(steps=STEPS), progress=progress,
            tokens_per_pack=sum(rows * columns for _, rows, columns in wanted),
        )  # fmt: skip
        for (label, *grid), image in zip(wanted, made, strict=True):
            pixels = image.height, image.width
            save_image(image, out / "images" / file_name(names[label], pixels, 0))
            row = rows.setdefault((grid[0], grid[1]), [])
            note = "" if grid[0] * grid[1] <= card.max_tokens else ", beyond training"
            size = "" if row else f" {pixels[0]}x{pixels[1]}{note}"
            row.append((card.labels[label] + size, image))
    sheet = out / "contact_sheet.png"
    save_image(contact_sheet(list(rows.values()), "FiTv2: one model, one batch, six sizes"), sheet)
    return sheet


def scale_grid(grid: Size, card: Card) -> Size:
    """A grid of the paper's for a model whose square is another than 16×16."""
    side = card.square[0]
    return max(1, grid[0] * side // 16), max(1, grid[1] * side // 16)


def continue_training(training: Training, minutes: float) -> Training:
    """For a trained model: a tenth of the learning rate, and no decay, as the end is not known."""
    return replace(
        training, learning_rate=training.learning_rate / 10, decay_steps=0, minutes=minutes, log_every=1,
        validate_every=20,
    )  # fmt: skip
