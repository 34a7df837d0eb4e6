"""The commands that make images: `sample`, `edit`, `app`."""

import math
import os
import secrets
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fitv2.cli.jobs import Job, again, plan, plan_edits, plan_way
from fitv2.cli.options import App, Edit, Sample
from fitv2.cli.progress import share_bar
from fitv2.errors import UserError
from fitv2.runtime.signals import leave_on_signals

if TYPE_CHECKING:
    from fitv2.pipeline import FiTPipeline

SHEET = 8, 200  # images in a row of a sheet, and at most in all
LOOK_EVERY = 2.0  # seconds


def sample(options: Sample) -> int:
    """Run `fitv2 sample`."""
    pipeline, weights = open_pipeline(options)
    if options.from_metadata:
        jobs = [again(options, options.from_metadata, pipeline, weights)]
        options = replace(options, precision=jobs[0].recipe.precision)
    else:
        jobs = plan(options, pipeline, weights)
    say_what_is_done(pipeline, jobs)
    return make_all(pipeline, jobs, options)


def edit(options: Edit) -> int:
    """Run `fitv2 edit`."""
    pipeline, weights = open_pipeline(options)
    if options.toward is None:
        jobs = plan_edits(options, pipeline, weights)
    else:
        jobs = plan_way(options, options.toward, pipeline, weights)
    say_what_is_done(pipeline, jobs)
    return make_all(pipeline, jobs, options)


def app(options: App) -> int:
    """Run `fitv2 app`."""
    from fitv2.pipeline import FiTPipeline
    from fitv2.runtime.device import default_device

    pipeline = FiTPipeline.from_pretrained(options.model, allow_download=options.allow_download)
    from fitv2.app.page import KEEP, serve  # after what may fail: Gradio takes seconds
    from fitv2.app.studio import Bounds, Studio

    bounds = Bounds(max_side=options.max_side, max_images=options.max_images)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as with Ctrl-C: the folder is removed
    with tempfile.TemporaryDirectory(prefix="fitv2-") as scratch:
        # A new folder: the page gives out whatever lies in its own.
        folder = (options.out or Path(scratch)).resolve() / f"page-{secrets.token_hex(4)}"
        keep = KEEP if options.out is None else None
        studio = Studio(pipeline.to(default_device()), options.model, folder, bounds, keep)
        serve(studio, host=options.host, port=options.port, queue=options.queue)
    return 0


def open_pipeline(options: Sample | Edit) -> "tuple[FiTPipeline, str]":
    """The pipeline of a model, and the digest of its weights."""
    from fitv2.checkpoint import weights_digest
    from fitv2.pipeline import FiTPipeline
    from fitv2.runtime.device import default_device

    pipeline = FiTPipeline.from_pretrained(options.model, allow_download=options.allow_download)
    weights = weights_digest(pipeline.transformer, pipeline.vae)
    return pipeline.to(default_device()), weights


# What to make ------------------------------------------------------------------------------------


def say_what_is_done(pipeline: "FiTPipeline", jobs: Sequence[Job]) -> None:
    """Say how images of sizes beyond those trained on are made, and what has no effect."""
    wanted = [job.recipe for job in jobs]
    first = wanted[0]
    if first.negative_prompt is not None and first.guidance.guidance_scale == 1:
        said = "--negative-prompt has no effect without guidance: give --guidance-scale above 1"
        print(f"fitv2: {said}", file=sys.stderr)
    sizes = dict.fromkeys((recipe.height, recipe.width) for recipe in wanted)
    if beyond := [size for size in sizes if pipeline.is_beyond(size)]:
        restart = first.positions.restart_time(pipeline.is_flow)
        grows = any("latents" not in job.given and job.start < restart for job in jobs)
        print(f"fitv2: {pipeline.said_beyond(beyond, first.positions, grows)}", file=sys.stderr)


# Making it ---------------------------------------------------------------------------------------


def make_all(pipeline: "FiTPipeline", jobs: Sequence[Job], options: Sample | Edit) -> int:
    """Make what is not there yet: this process's share of the blocks, then the sheet and the npz."""
    import torch

    from fitv2.runtime.distributed import ranks
    from fitv2.sampling.recipe import is_made

    check_nothing_is_lost(jobs)
    pipeline.transformer.cast(getattr(torch, options.precision))
    rank, world = ranks()
    leave_on_signals("; run the same command again to resume")
    every = list(blocks(jobs, pipeline))
    mine = every[rank::world]
    others = [job for i, block in enumerate(every) if i % world != rank for job in block]
    written, done = Written(options.out, {job.path.name for job in others}), 0
    # One bar for all processes: that of the first, who sees what the others have written.
    with share_bar("sample", len(jobs), "image", shown=rank == 0) as progress:
        for block in mine:

            def report(part: float, before: int = done, size: int = len(block)) -> None:
                progress((before + part * size + written.count()) / len(jobs))

            make_block(pipeline, block, report)
            done += len(block)
    if not all(is_made(job.path, job.recipe) for job in others):
        print(f"{options.out}: this share is done; another process makes the rest")
        return 0
    if options.grid:
        draw_grid(jobs, options.out / "grid.png")
    if isinstance(options, Sample) and options.npz:
        write_batches(jobs, options.out)
    print(f"{len(jobs)} images in {options.out}")
    return 0


def check_nothing_is_lost(jobs: Sequence[Job]) -> None:
    """UserError where a picture of another prompt or label has the name of one that is to be made."""
    for job in jobs:
        shown = shown_in(job.path)
        if shown not in (None, job.recipe.prompt or job.recipe.label):
            raise UserError(f"{job.path} shows something else, {shown!r}: give another `out`")


def shown_in(path: Path) -> str | None:
    """The prompt or label of a picture that was made; None for another file, or none."""
    from fitv2.sampling.recipe import read_recipe

    try:
        recipe = read_recipe(path)
    except (UserError, OSError):
        return None
    return recipe.prompt or recipe.label


class Written:
    """How many of some files there are in a folder, looked up now and then."""

    def __init__(self, folder: Path, names: set[str]) -> None:
        self.folder, self.names = folder, names
        self.found, self.looked = 0, -math.inf

    def count(self) -> int:
        """As it was at most LOOK_EVERY seconds ago."""
        if self.names and time.monotonic() - self.looked > LOOK_EVERY:
            there = {entry.name for entry in os.scandir(self.folder)} if self.folder.exists() else set()
            self.found, self.looked = len(self.names & there), time.monotonic()
        return self.found


def blocks(jobs: Sequence[Job], pipeline: "FiTPipeline") -> Iterator[list[Job]]:
    """Jobs in packs, the same for any number of processes: a pack decides the last bits of its images."""
    from fitv2.sampling.generate import default_tokens_per_pack

    most = default_tokens_per_pack(pipeline.transformer.device)
    block: list[Job] = []
    filled = 0
    for job in jobs:
        rows, columns = pipeline.grid((job.recipe.height, job.recipe.width))
        tokens = rows * columns
        if block and filled + tokens > most:
            yield block
            block, filled = [], 0
        block.append(job)
        filled += tokens
    if block:
        yield block


def make_block(pipeline: "FiTPipeline", block: Sequence[Job], progress: Callable[[float], None]) -> None:
    """Make the images of a block, if they are not all there."""
    from fitv2.runtime.rng import generator
    from fitv2.sampling.recipe import is_made, save_picture

    if all(is_made(job.path, job.recipe) for job in block):
        progress(1.0)
        return
    recipe = block[0].recipe
    each = [job.recipe.arguments | job.given for job in block]
    names = dict.fromkeys(name for arguments in each for name in arguments)
    arguments: dict[str, Any] = {name: [one.get(name) for one in each] for name in names}
    made = pipeline.stream(
        generator=[generator(job.recipe.seed) for job in block], guidance=recipe.guidance,
        sampling=recipe.sampling, positions=recipe.positions, progress=progress, **arguments,
    )  # fmt: skip
    for job, image in zip(block, made, strict=True):
        save_picture(image, job.path, job.recipe)


def draw_grid(jobs: Sequence[Job], path: Path) -> None:
    """A sheet of the first images: rows of one size, and of one subject where there are several of it."""
    from itertools import groupby

    from PIL import Image

    from fitv2.figures import contact_sheet
    from fitv2.runtime.files import atomic_file

    across, most = SHEET
    several = max(Counter(job.caption for job in jobs).values()) > 1
    rows = []
    for _, run in groupby(
        jobs[:most], lambda job: (job.recipe.height, job.recipe.width, job.caption if several else "")
    ):
        row = [(job.caption, Image.open(job.path)) for job in run]
        rows += [row[i : i + across] for i in range(0, len(row), across)]
    with atomic_file(path) as partial:
        contact_sheet(rows).save(partial, "PNG")


def write_batches(jobs: Sequence[Job], out: Path) -> None:
    """Write the images of each size as an npz."""
    import numpy as np
    from PIL import Image

    from fitv2.runtime.npz import write_npz

    for size in dict.fromkeys((job.recipe.height, job.recipe.width) for job in jobs):
        paths = [job.path for job in jobs if (job.recipe.height, job.recipe.width) == size]
        images = (np.asarray(Image.open(path)).tobytes() for path in paths)
        write_npz(out / f"{size[0]}x{size[1]}.npz", (len(paths), *size, 3), images)
