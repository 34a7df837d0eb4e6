"""The main job from end to end: pictures of six sizes from the shipped model, then more training."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from fitv2.checkpoint import Card, load_model
from fitv2.config import Encoding, Sampling, Training
from fitv2.encoding.encode import encode
from fitv2.errors import UserError
from fitv2.figures import contact_sheet
from fitv2.presets import preset
from fitv2.runtime.device import default_device
from fitv2.runtime.files import whole_file
from fitv2.sampling.generate import Request, file_name, generate, load_codec
from fitv2.tokens import Size
from fitv2.training.trainer import train

# The paper's test grids for a model trained at 16×16 tokens (its tables 1 and 4).
TRAINED = ((16, 16), (10, 20), (8, 24))
BEYOND = ((20, 20), (14, 28), (10, 30))
CLIPART_LIMITS = (64, 36, 16)  # what the shipped model was trained on
LABELS = ("flags", "smilies", "roadsigns", "fruit")
STEPS = 14  # so that the first picture is there within 20 seconds on two cores

Bar = Callable[..., AbstractContextManager[Callable[..., None]]]


def demo(out: Path, data: Path, minutes: float, share_bar: Bar, training_bar: Bar) -> None:
    """Make everything below `out`, and say where it lies."""
    if not data.is_dir():
        raise UserError(f"the clip-art set is not at {data}: run this in the repository, or give --data")
    model, card = load_model("clipart")
    model.to(default_device())
    sheet = make_pictures(model, card, out, share_bar)
    tokens = out / "tokens"
    encode(data, tokens, Encoding(max_tokens=CLIPART_LIMITS, mirror=False))
    chosen = preset("clipart")
    run = out / "run"
    training = continued(chosen.training, minutes)
    with training_bar(training) as report:
        train(replace(chosen, training=training), tokens, run, init="clipart", report=report)
    print(
        f"\npictures       {out}/pictures/\ncontact sheet  {sheet}\n"
        f"loss curve     {run}/loss.png\ntrained model  {run}  (fitv2 sample {run} --label flags)"
    )


def make_pictures(model: Any, card: Card, out: Path, share_bar: Bar) -> Path:
    """One packed batch at six grids, as single pictures and as one sheet; the sheet's path."""
    codec, unit = load_codec(model, card)
    labels = [card.label_index(name) for name in LABELS]
    requests = [Request(label, scaled(size, card), 0) for size in (*TRAINED, *BEYOND) for label in labels]
    made: list[tuple[Request, Image.Image]] = []
    with share_bar("six sizes, one batch", len(requests), "image") as progress:
        made_in_one_pack = generate(
            model, codec, requests, guidance=card.guidance, sampling=Sampling(steps=STEPS), progress=progress,
            tokens_a_pack=sum(rows * columns for rows, columns in (r.size for r in requests)),
        )  # fmt: skip
        for request, image in made_in_one_pack:
            name = file_name(card, request, unit)
            with whole_file(out / "pictures" / name) as path:
                image.save(path)
            made.append((request, image))
    sheet = out / "contact_sheet.png"
    with whole_file(sheet) as path:
        contact_sheet(rows_of(made, card, unit), "FiTv2: one model, one batch, six sizes").save(path)
    return sheet


def scaled(size: Size, card: Card) -> Size:
    """A grid of the paper's for a model whose square is another than 16×16."""
    side = card.square[0]
    return max(1, size[0] * side // 16), max(1, size[1] * side // 16)


def rows_of(
    made: list[tuple[Request, Image.Image]], card: Card, unit: int
) -> list[list[tuple[str, Image.Image]]]:
    """The pictures of each size as a row, captioned."""
    rows: dict[Size, list[tuple[str, Image.Image]]] = {}
    for request, image in made:
        height, width = (side * unit for side in request.size)
        note = "" if request.size[0] * request.size[1] <= card.max_tokens else ", beyond training"
        row = rows.setdefault(request.size, [])
        first = f" {height}x{width}{note}" if not row else ""
        row.append((card.labels[request.label] + first, image))
    return list(rows.values())


def continued(training: Training, minutes: float) -> Training:
    """For a trained model: a tenth of the learning rate, and no decay, as the end is not known."""
    return replace(
        training, learning_rate=training.learning_rate / 10, decay_steps=0, minutes=minutes, log_every=1,
        validate_every=20,
    )  # fmt: skip
