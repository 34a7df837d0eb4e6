"""The commands that make images: `sample`, `edit`, `app`."""

import signal
import sys
import tempfile
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
    say_beyond(pipeline, [job.recipe for job in jobs])
    return make_all(pipeline, jobs, options)


def edit(options: Edit) -> int:
    """Run `fitv2 edit`."""
    pipeline, weights = open_pipeline(options)
    if options.toward is None:
        jobs = plan_edits(options, pipeline, weights)
    else:
        jobs = plan_way(options, options.toward, pipeline, weights)
    say_beyond(pipeline, [job.recipe for job in jobs])
    return make_all(pipeline, jobs, options)


def app(options: App) -> int:
    """Run `fitv2 app`."""
    from fitv2.app.page import serve
    from fitv2.app.studio import Bounds, Studio
    from fitv2.pipeline import FiTPipeline
    from fitv2.runtime.device import default_device

    pipeline = FiTPipeline.from_pretrained(options.model, allow_download=options.allow_download)
    bounds = Bounds(max_side=options.max_side, max_images=options.max_images)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as with Ctrl-C: the folder is removed
    with tempfile.TemporaryDirectory(prefix="fitv2-") as scratch:
        folder = (options.out or Path(scratch)).resolve()
        studio = Studio(pipeline.to(default_device()), options.model, folder, bounds)
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
    for height, width in sizes:  # outermost: images that grow are packed with their neighbours alone
        for name, number, prompt in shown:
            label = None if number is None else pipeline.card.labels[number]
            for seed in range(options.seed, options.seed + options.num):
                made = recipe(height=height, width=width, seed=seed, label=label, prompt=prompt)
                path = options.out / file_name(name, (height, width), seed)
                # By number: two labels may have one name.
                given = {} if number is None else {"class_labels": number}
                jobs.append(Job(path, made, prompt or label or "", given))
    return jobs


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
    from fitv2.sampling.recipe import read_recipe
    from fitv2.sampling.saving import distinct_names, file_name

    if options.label or options.prompt or options.size or options.negative_prompt is not None:
        raise UserError(
            "`from_metadata` says what to show, and how large: leave out labels, prompts and sizes"
        )
    recipe = read_recipe(source)
    if recipe.edited is not None:
        raise UserError(f"{source} was made from another picture: see fitv2 edit")
    if recipe.weights != weights:
        said = f"{source} was made by other weights, of {recipe.model}: this will be another picture"
        print(f"fitv2: {said}", file=sys.stderr)
        recipe = replace(recipe, weights=weights)
    (name,) = distinct_names((recipe.prompt or recipe.label or "",))
    path = options.out / file_name(name, (recipe.height, recipe.width), recipe.seed)
    return Job(path, replace(recipe, model=options.model), recipe.prompt or recipe.label or "")


def plan_edits(options: Edit, pipeline: "FiTPipeline", weights: str) -> list[Job]:
    """Variations, parts made anew, or what is around a picture."""
    from fitv2.encoding.images import parse_size
    from fitv2.runtime.files import sha256
    from fitv2.sampling.editing import place

    if options.mask and options.canvas:
        raise UserError("give `mask` or `canvas`")
    if options.at and not options.canvas:
        raise UserError("`at` goes with `canvas`")
    picture = open_picture(options.picture, options.size)
    mask = open_picture(options.mask, options.size) if options.mask else None
    edited: dict[str, Any] = {"picture": sha256(options.picture), "strength": options.strength}
    if options.mask:
        edited["mask"] = sha256(options.mask)
    if options.canvas:
        picture, mask = place(picture, parse_size(options.canvas[:32]), options.at)
        edited["canvas"], edited["at"] = options.canvas, str(options.at)
    given = {"image": picture, "mask_image": mask, "strength": options.strength}
    recipe = recipes(options, pipeline, weights)
    jobs = []
    for seed in range(options.seed, options.seed + options.num):
        made = recipe(
            height=picture.height, width=picture.width, seed=seed, label=label_of(options, pipeline),
            prompt=options.prompt, edited=edited,
        )  # fmt: skip
        jobs.append(Job(options.out / edit_name(options, made), made, options.prompt or "", given))
    return jobs


def plan_way(options: Edit, toward: Path, pipeline: "FiTPipeline", weights: str) -> list[Job]:
    """Images on the way from a picture to another: between the noises that make them."""
    from fitv2.runtime.files import sha256
    from fitv2.sampling.editing import between

    if options.mask or options.canvas or options.strength is not None:
        raise UserError("`toward` goes without `mask`, `canvas` and `strength`")
    first = open_picture(options.picture, options.size)
    size = f"{first.height}x{first.width}"
    second = open_picture(toward, size)
    prompts = [options.prompt, options.toward_prompt if options.toward_prompt is not None else options.prompt]
    label = label_of(options, pipeline)
    shown: dict[str, Any] = {} if label is None else {"class_labels": label}
    if options.prompt is not None:
        shown["prompt"] = prompts
    ends = pipeline.invert([first, second], sampling=options.sampling, **shown)
    edited = {"picture": sha256(options.picture), "toward": sha256(toward)}
    recipe, jobs = recipes(options, pipeline, weights), []
    for number in range(options.num):
        share = number / max(1, options.num - 1)
        made = recipe(
            height=first.height, width=first.width, seed=options.seed + number, label=label,
            prompt=prompts[share > 0.5], edited=edited | {"share": share},
        )  # fmt: skip
        given = {"latents": between(ends[0], ends[1], share)}
        jobs.append(Job(options.out / edit_name(options, made), made, f"{share:.2f}", given))
    return jobs


def label_of(options: Edit, pipeline: "FiTPipeline") -> str | None:
    """The name of the label that was asked for."""
    if options.label is None:
        return None
    return pipeline.card.labels[pipeline.card.label_index(options.label)]


def edit_name(options: Edit, recipe: "Recipe") -> str:
    """PICTURE_HEIGHTxWIDTH_SEED.png."""
    from fitv2.sampling.saving import distinct_names, file_name

    said = "-".join(part for part in (options.picture.stem, recipe.prompt or recipe.label) if part)
    return file_name(distinct_names((said,))[0], (recipe.height, recipe.width), recipe.seed)


def open_picture(path: Path, size: str | None) -> "Image":
    """An image file, brought to a size if one is given. Raises UserError for what is none."""
    from PIL import Image, UnidentifiedImageError

    from fitv2.encoding.images import parse_size
    from fitv2.errors import in_one_line

    try:
        with Image.open(path) as image:
            image.load()
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise UserError(f"{path} is no picture that can be read: {in_one_line(error)}") from error
    if size is None:
        return image
    height, width = parse_size(size[:32])
    check_limit("size", max(height, width))
    return image.resize((width, height), Image.Resampling.BICUBIC)


def say_beyond(pipeline: "FiTPipeline", wanted: "Sequence[Recipe]") -> None:
    """Say how images of sizes beyond those trained on are made."""
    sizes = dict.fromkeys((recipe.height, recipe.width) for recipe in wanted)
    if beyond := [size for size in sizes if pipeline.is_beyond(size)]:
        print(f"fitv2: {pipeline.said_beyond(beyond, wanted[0].positions)}", file=sys.stderr)


# Making it ---------------------------------------------------------------------------------------


def make_all(pipeline: "FiTPipeline", jobs: Sequence[Job], options: Sample | Edit) -> int:
    """Make what is not there yet: this process's share of the blocks, then the sheet and the npz."""
    import torch

    from fitv2.runtime.distributed import ranks

    torch.nn.Module.to(pipeline.transformer, getattr(torch, options.precision))
    rank, world = ranks()
    leave_on_signals("; run the same command again to resume")
    with share_bar("sample", len(jobs), "image", shown=rank == 0) as progress:
        for block in list(blocks(jobs, pipeline))[rank::world]:
            make_block(pipeline, block, jobs, progress)
    if not all(job.path.exists() for job in jobs):
        print(f"{options.out}: this share is done; another process makes the rest")
        return 0
    if options.grid:
        draw_grid(jobs, options.out / "grid.png")
    if isinstance(options, Sample) and options.npz:
        write_batches(jobs, options.out)
    if rank == 0 or world == 1:
        print(f"{len(jobs)} images in {options.out}")
    return 0


def blocks(jobs: Sequence[Job], pipeline: "FiTPipeline") -> Iterator[list[Job]]:
    """Jobs in packs, the same for any number of processes: a pack decides the last bits of its images."""
    from fitv2.sampling.generate import default_tokens_per_pack

    most, unit = default_tokens_per_pack(pipeline.transformer.device), pipeline.unit
    block: list[Job] = []
    filled = 0
    for job in jobs:
        tokens = -(-job.recipe.height // unit) * -(-job.recipe.width // unit)
        if block and filled + tokens > most:
            yield block
            block, filled = [], 0
        block.append(job)
        filled += tokens
    if block:
        yield block


def make_block(
    pipeline: "FiTPipeline", block: Sequence[Job], jobs: Sequence[Job], progress: Callable[[float], None]
) -> None:
    """Make the images of a block, if they are not all there."""
    from fitv2.runtime.rng import generator
    from fitv2.sampling.recipe import is_made, save_picture

    done = sum(job.path.exists() for job in jobs)  # also those of other processes
    if all(is_made(job.path, job.recipe) for job in block):
        progress(done / len(jobs))
        return
    missing = sum(not job.path.exists() for job in block)
    recipe = block[0].recipe
    each = [job.recipe.arguments | job.given for job in block]
    arguments: dict[str, Any] = {name: [one.get(name) for one in each] for name in each[0]}
    made = pipeline.stream(
        generator=[generator(job.recipe.seed) for job in block], guidance=recipe.guidance,
        sampling=recipe.sampling, positions=recipe.positions,
        progress=lambda part: progress((done + part * missing) / len(jobs)), **arguments,
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
