"""The main job from end to end: sheets of images of captions by the shipped models, then more training."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path

import pyarrow.parquet as pq
from PIL import Image

from fitv2.config import Encoding, Positions, Training
from fitv2.encoding.encode import encode
from fitv2.errors import UserError
from fitv2.figures import contact_sheet
from fitv2.pipeline import FiTPipeline
from fitv2.presets import preset
from fitv2.runtime.device import default_device
from fitv2.runtime.files import atomic_file
from fitv2.runtime.rng import generator
from fitv2.sampling.saving import distinct_names, file_name, save_image
from fitv2.tokens import Size
from fitv2.training.trainer import train

MODEL, FLOW = "emoji-any-step", "emoji"  # of few steps; and what is trained on
PACK = 512  # tokens: some eight images are shown while the next are made
EVERY = 14  # of so many drawings one is trained on, so that encoding takes seconds

Bar = Callable[..., AbstractContextManager[Callable[..., None]]]


@dataclass(frozen=True)
class Wanted:
    """One image of a sheet."""

    prompt: str
    pixels: Size
    said: str = ""  # below it [default: the prompt]
    positions: Positions = field(default_factory=Positions)


Rows = Sequence[Sequence[Wanted]]

SQUARE = ("fox", "fire engine", "hamburger", "palm tree", "house", "crab", "cat")
PROMPTS: Rows = [
    [Wanted(name, (128, 128)) for name in SQUARE],
    [Wanted(f"two {name} side by side", (80, 160)) for name in ("penguins", "red hearts", "owls", "frogs")],
    [Wanted(f"three {name} in a row", (64, 208)) for name in ("cookies", "red apples", "penguins")],
    [
        Wanted(f"two {name} on top of each other", (160, 80))
        for name in ("hot peppers", "grinning faces", "dogs", "crabs")
    ],
]

SHAPES: Rows = [
    [Wanted("green salad", size, f"{size[0]}x{size[1]}") for size in sizes]
    for sizes in (((96, 96), (128, 128), (160, 80), (208, 64)), ((80, 160), (64, 208)))
]

WAYS = {
    "as they are": Positions("none"),
    "VisionNTK, scaled": Positions("ntk", "paper"),
    "grown": Positions(),
}
BEYOND: Rows = [
    [Wanted(name, size, f"{size[0]}x{size[1]}, {way}", chosen) for way, chosen in WAYS.items()]
    for name, size in (("clown face", (192, 192)), ("two penguins side by side", (128, 256)))
]

SHEETS = {
    "prompts": ("FiTv2: any prompt, any shape", PROMPTS),
    "six_shapes": ("One prompt, six shapes", SHAPES),
    "beyond": ("Larger than anything it was trained on", BEYOND),
}


def demo(out: Path, data: Path, minutes: float, share_bar: Bar, training_bar: Bar) -> None:
    """Make everything below `out`, and say where it lies."""
    if not (data / "train.parquet").is_file():
        raise UserError(f"the emoji set is not at {data}: run this in the repository, or give --data")
    pipeline = FiTPipeline.from_pretrained(MODEL).to(default_device())
    for name, (title, rows) in SHEETS.items():
        make_sheet(pipeline, name, title, rows, out, share_bar)
    tokens, chosen, run = out / "tokens", preset(FLOW), out / "run"
    few = some_drawings(data / "train.parquet", out / "drawings" / "train.parquet")
    encoding = Encoding(
        max_tokens=(64,), mirror=False, autoencoder=FLOW, label_column="artist", caption_column="caption"
    )
    encode(few.parent, tokens, encoding)
    training = continue_training(chosen.training, minutes)
    with training_bar(training) as report:
        train(replace(chosen, training=training), tokens, run, init=FLOW, report=report)
    sheets = " ".join(f"{out}/{name}.png" for name in SHEETS)
    print(
        f"\nsheets         {sheets}\nimages         {out}/images/\nloss curve     {run}/loss.png\n"
        f'trained model  {run}  (fitv2 sample {run} --prompt "red apple")'
    )


def make_sheet(pipeline: FiTPipeline, name: str, title: str, rows: Rows, out: Path, share_bar: Bar) -> Path:
    """The images of a sheet, each in a file, and the sheet; its path."""
    wanted = [one for row in rows for one in row]
    names = distinct_names(tuple(f"{one.prompt} {one.said}".strip() for one in wanted))
    made: dict[int, Image.Image] = {}
    with share_bar(title, len(wanted), "image") as progress:
        for positions in dict.fromkeys(one.positions for one in wanted):
            these = [i for i, one in enumerate(wanted) if one.positions == positions]

            def share(done: float, before: int = len(made), now: int = len(these)) -> None:
                progress((before + done * now) / len(wanted))

            images = pipeline.stream(
                prompt=[wanted[i].prompt for i in these], height=[wanted[i].pixels[0] for i in these],
                width=[wanted[i].pixels[1] for i in these], generator=[generator(0) for _ in these],
                positions=positions, tokens_per_pack=PACK, progress=share,
            )  # fmt: skip
            for i, image in zip(these, images, strict=True):
                save_image(image, out / "images" / file_name(names[i], wanted[i].pixels, 0))
                made[i] = image
    numbers = iter(range(len(wanted)))
    shown = [[(one.said or one.prompt, made[next(numbers)]) for one in row] for row in rows]
    sheet = out / f"{name}.png"
    save_image(contact_sheet(shown, title), sheet)
    return sheet


def some_drawings(source: Path, target: Path) -> Path:
    """A part of a Parquet file: every so many rows."""
    table = pq.read_table(source)
    with atomic_file(target) as partial:
        pq.write_table(table.take(list(range(0, len(table), EVERY))), partial)
    return target


def continue_training(training: Training, minutes: float) -> Training:
    """For a trained model: a tenth of the learning rate, and no decay, as the end is not known."""
    return replace(
        training, learning_rate=training.learning_rate / 10, decay_steps=0, minutes=minutes, log_every=1,
        validate_every=20,
    )  # fmt: skip
