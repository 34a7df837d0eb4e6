"""The commands that make images: `sample`, `edit`, `app`."""

import hashlib
import math
import os
import secrets
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fitv2.cli.options import App, Edit, Sample
from fitv2.cli.progress import share_bar
from fitv2.errors import UserError
from fitv2.limits import check_limit
from fitv2.runtime.signals import leave_on_signals

if TYPE_CHECKING:
    from PIL.Image import Image

    from fitv2.pipeline import FiTPipeline
    from fitv2.sampling.recipe import Recipe

SHEET = 8, 200  # images in a row of a sheet, and at most in all
LOOK_EVERY = 2.0  # seconds


@dataclass(frozen=True)
class Job:
    """A picture to make, and where it goes."""

    path: Path
    recipe: "Recipe"
    caption: str
    given: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the pipeline: `image` and its like."""


def sample(options: Sample) -> int:
    """Run `fitv2 sample`."""
    pipeline, weights = open_pipeline(options)
    if options.from_metadata:
        jobs = [again(options, options.from_metadata, pipeline, weights)]
        options = replace(options, precision=jobs[0].recipe.precision)
    else:
        jobs = plan(options, pipeline, weights)
    say_what_is_done(pipeline, [job.recipe for job in jobs])
    return make_all(pipeline, jobs, options)


def edit(options: Edit) -> int:
    """Run `fitv2 edit`."""
    pipeline, weights = open_pipeline(options)
    if options.toward is None:
        jobs = plan_edits(options, pipeline, weights)
    else:
        jobs = plan_way(options, options.toward, pipeline, weights)
    say_what_is_done(pipeline, [job.recipe for job in jobs])
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


def plan(options: Sample, pipeline: "FiTPipeline", weights: str) -> list[Job]:
    """Every label or prompt at every size, `num` of each."""
    from fitv2.encoding.images import parse_size
    from fitv2.sampling.saving import file_name

    chosen = [parse_size(text[:32]) for text in options.size]  # a longer one is too large in any case
    for size in chosen:
        check_limit("size", max(size))
    side = pipeline.card.square[0] * pipeline.unit
    shown = subjects(pipeline, options)
    sizes = dict.fromkeys(chosen or [(side, side)])
    check_limit("num", options.num * len(shown) * len(sizes))
    recipe, jobs = recipes(options, pipeline, weights), []
    noises, edited = noises_of(options, pipeline, list(sizes))
    for height, width in sizes:  # outermost: images that grow are packed with their neighbours alone
        for name, number, prompt in shown:
            label = None if number is None else pipeline.card.labels[number]
            for seed in range(options.seed, options.seed + options.num):
                made = recipe(
                    height=height, width=width, seed=seed, label=label, label_number=number, prompt=prompt,
                    edited=edited,
                )  # fmt: skip
                path = options.out / file_name(name, (height, width), seed)
                given = {"latents": noises[height, width][seed - options.seed]} if noises else {}
                jobs.append(Job(path, made, prompt or label or "", given))
    return jobs


def noises_of(
    options: Sample, pipeline: "FiTPipeline", sizes: Sequence[tuple[int, int]]
) -> tuple[dict[tuple[int, int], list[Any]], dict[str, Any] | None]:
    """The noises of each size where they are not those of the seeds; and what a recipe says of them.

    Raises UserError for two wishes at once.
    """
    from fitv2.sampling.editing import shared_noises

    if options.toward_seed is not None and options.one_noise:
        raise UserError("give `toward_seed` or `one_noise`")
    said: dict[str, Any] = {"one_noise": " ".join(f"{height}x{width}" for height, width in sizes)}
    if options.toward_seed is not None:
        said = {"seed": options.seed, "toward_seed": options.toward_seed, "num": options.num}
    elif not options.one_noise:
        return {}, None
    grids, channels = [pipeline.grid(size) for size in sizes], pipeline.transformer.token_channels
    noises = shared_noises(grids, channels, options.seed, options.num, options.toward_seed)
    return dict(zip(sizes, noises, strict=True)), said


def recipes(options: Sample | Edit, pipeline: "FiTPipeline", weights: str) -> "Callable[..., Recipe]":
    """What makes a recipe, given what is not the same for all pictures."""
    from fitv2.sampling.recipe import Recipe

    def recipe(**values: Any) -> Recipe:
        same = {name: getattr(options, name) for name in ("model", "negative_prompt", "precision")}
        how = {name: getattr(options, name) for name in ("guidance", "sampling", "positions")}
        return Recipe.of(pipeline, weights=weights, **same | how | values)

    return recipe


def subjects(pipeline: "FiTPipeline", options: Sample) -> list[tuple[str, int | None, str | None]]:
    """What to make images of: a name for files, the number of a label, a prompt.

    Raises UserError for labels and prompts that the model does not take, or not together.
    """
    from fitv2.sampling.saving import distinct_names

    labels = list(dict.fromkeys(pipeline.get_label_ids(options.label)))
    if options.prompt:
        prompts = tuple(dict.fromkeys(options.prompt))
        if len(labels) > 1:
            raise UserError("one label goes with all prompts: give `label` once")
        label = labels[0] if labels else None
        return [(name, label, prompt) for name, prompt in zip(distinct_names(prompts), prompts, strict=True)]
    if options.negative_prompt is not None:
        raise UserError("`negative_prompt` goes with `prompt`")
    if "label" not in pipeline.transformer.architecture.conditions:
        raise UserError("this model takes texts: give `prompt`")
    names = distinct_names(pipeline.card.labels)
    return [(names[i], i, None) for i in labels or range(len(names))]


def again(options: Sample, source: Path, pipeline: "FiTPipeline", weights: str) -> Job:
    """The picture `source`, to be made again. Raises UserError for one that was edited."""
    from fitv2.sampling.recipe import is_made, read_recipe
    from fitv2.sampling.saving import distinct_names, file_name

    kept = ("model", "from_metadata", "out", "grid", "npz", "allow_download")
    if options != Sample(**{name: getattr(options, name) for name in kept}):
        raise UserError("`from_metadata` says how the picture is made: leave out all other settings")
    recipe = read_recipe(source)
    if recipe.edited is not None:
        raise UserError(f"{source} was made from another picture or noise: its recipe does not hold that")
    if recipe.weights != weights:
        said = f"{source} was made by other weights, of {recipe.model}: this will be another picture"
        print(f"fitv2: {said}", file=sys.stderr)
        number = None if recipe.label is None else pipeline.card.label_index(recipe.label)
        recipe = replace(recipe, weights=weights, label_number=number)
    (name,) = distinct_names((recipe.prompt or recipe.label or "",))
    path = options.out / file_name(name, (recipe.height, recipe.width), recipe.seed)
    if path.exists() and path.samefile(source) and not is_made(path, recipe):
        raise UserError(f"{source} would be replaced by another picture: choose another `out`")
    return Job(path, recipe, recipe.prompt or recipe.label or "")


def plan_edits(options: Edit, pipeline: "FiTPipeline", weights: str) -> list[Job]:
    """Variations, parts made anew, or what is around a picture."""
    from fitv2.encoding.images import parse_size
    from fitv2.runtime.files import sha256
    from fitv2.sampling.editing import place

    if options.mask and options.canvas:
        raise UserError("give `mask` or `canvas`")
    if options.at and not options.canvas:
        raise UserError("`at` goes with `canvas`")
    if options.toward_prompt is not None:
        raise UserError("`toward_prompt` goes with `toward`")
    picture = open_picture(options.picture, options.size)
    mask = open_picture(options.mask, options.size) if options.mask else None
    edited: dict[str, Any] = {
        "picture": sha256(options.picture), "strength": options.strength, "size": options.size,
    }  # fmt: skip
    if options.mask:
        edited["mask"] = sha256(options.mask)
    if options.canvas:
        picture, mask = place(picture, parse_size(options.canvas[:32]), options.at)
        edited["canvas"], edited["at"] = options.canvas, str(options.at)
    given = {"image": picture, "mask_image": mask, "strength": options.strength}
    recipe = recipes(options, pipeline, weights)
    number, jobs = label_of(options, pipeline), []
    for seed in range(options.seed, options.seed + options.num):
        made = recipe(
            height=picture.height, width=picture.width, seed=seed, label_number=number, prompt=options.prompt,
            label=None if number is None else pipeline.card.labels[number], edited=edited,
        )  # fmt: skip
        jobs.append(Job(options.out / edit_name(options, made), made, options.prompt or "", given))
    return jobs


def plan_way(options: Edit, toward: Path, pipeline: "FiTPipeline", weights: str) -> list[Job]:
    """Images on the way from a picture to another: between the noises that make them."""
    from fitv2.runtime.files import sha256
    from fitv2.sampling.recipe import is_made

    if options.mask or options.canvas or options.strength is not None:
        raise UserError("`toward` goes without `mask`, `canvas` and `strength`")
    if options.guidance.guidance_scale is None:  # the flow that leads to noise and back has none
        options = replace(options, guidance=replace(options.guidance, guidance_scale=1.0))
    first = open_picture(options.picture, options.size)
    second = open_picture(toward, f"{first.height}x{first.width}")
    other = options.prompt if options.toward_prompt is None else options.toward_prompt
    prompts, number = (options.prompt, other), label_of(options, pipeline)
    same = {
        "picture": sha256(options.picture), "toward": sha256(toward), "size": options.size,
        "prompts": " / ".join(prompt or "" for prompt in prompts),
    }  # fmt: skip
    recipe, wanted = recipes(options, pipeline, weights), []
    for step in range(options.num):
        share = step / max(1, options.num - 1)
        wanted.append(recipe(
            height=first.height, width=first.width, seed=options.seed + step, prompt=prompts[share > 0.5],
            label_number=number, label=None if number is None else pipeline.card.labels[number],
            edited=same | {"share": share},
        ))  # fmt: skip
    paths = [options.out / edit_name(options, each) for each in wanted]
    given: list[dict[str, Any]] = [{} for _ in paths]
    if not all(map(is_made, paths, wanted)):
        given = latents_between(options, pipeline, (first, second), prompts, number)
    captions = [f"step {step} of {options.num}" for step in range(1, options.num + 1)]
    return [Job(*values) for values in zip(paths, wanted, captions, given, strict=True)]


def latents_between(
    options: Edit,
    pipeline: "FiTPipeline",
    pictures: "tuple[Image, Image]",
    prompts: tuple[str | None, str | None],
    label: int | None,
) -> list[dict[str, Any]]:
    """The noise of each image on the way, as arguments of the pipeline."""
    from fitv2.sampling.editing import on_the_way

    shown: dict[str, Any] = {} if label is None else {"class_labels": label}
    if prompts != (None, None):
        shown["prompt"] = [*prompts]
    ends = pipeline.invert([*pictures], sampling=options.sampling, positions=options.positions, **shown)
    return [{"latents": noise} for noise in on_the_way(ends[0], ends[1], options.num)]


def label_of(options: Edit, pipeline: "FiTPipeline") -> int | None:
    """The number of the label that was asked for."""
    return None if options.label is None else pipeline.card.label_index(options.label)


def edit_name(options: Edit, recipe: "Recipe") -> str:
    """PICTURE-PROMPT-HASH_HEIGHTxWIDTH_SEED.png; the hash is of how it was edited."""
    from fitv2.sampling.saving import distinct_names, file_name

    how = {name: value for name, value in (recipe.edited or {}).items() if name != "share"}
    digest = hashlib.sha256(repr((how, recipe.label_number)).encode(errors="replace")).hexdigest()[:6]
    said = "-".join(part for part in (options.picture.stem, recipe.prompt or recipe.label, digest) if part)
    return file_name(distinct_names((said,))[0], (recipe.height, recipe.width), recipe.seed)


def open_picture(path: Path, size: str | None) -> "Image":
    """An image file, upright, brought to a size if one is given. Raises UserError for what is none."""
    from PIL import Image

    from fitv2.encoding.images import UnusableImage, load_rgb, parse_size

    try:
        image = load_rgb(path)
    except (UnusableImage, OSError) as error:
        raise UserError(f"{path} is no picture that can be read: {error}") from error
    if size is None:
        return image
    height, width = parse_size(size[:32])
    check_limit("size", max(height, width))
    return image.resize((width, height), Image.Resampling.BICUBIC)


def say_what_is_done(pipeline: "FiTPipeline", wanted: "Sequence[Recipe]") -> None:
    """Say how images of sizes beyond those trained on are made, and what has no effect."""
    first = wanted[0]
    if first.negative_prompt is not None and first.guidance.guidance_scale == 1:
        said = "--negative-prompt has no effect without guidance: give --guidance-scale above 1"
        print(f"fitv2: {said}", file=sys.stderr)
    sizes = dict.fromkeys((recipe.height, recipe.width) for recipe in wanted)
    if beyond := [size for size in sizes if pipeline.is_beyond(size)]:
        print(f"fitv2: {pipeline.said_beyond(beyond, wanted[0].positions)}", file=sys.stderr)


# Making it ---------------------------------------------------------------------------------------


def make_all(pipeline: "FiTPipeline", jobs: Sequence[Job], options: Sample | Edit) -> int:
    """Make what is not there yet: this process's share of the blocks, then the sheet and the npz."""
    import torch

    from fitv2.runtime.distributed import ranks
    from fitv2.sampling.recipe import is_made

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
    several = len({job.recipe.seed for job in jobs}) > 1
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
