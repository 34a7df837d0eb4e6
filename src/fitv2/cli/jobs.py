"""What `fitv2 sample` and `fitv2 edit` are to make: a job for each picture, planned before any is begun."""

import hashlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fitv2.cli.options import Edit, Sample
from fitv2.errors import UserError
from fitv2.limits import check_limit

if TYPE_CHECKING:
    from PIL.Image import Image

    from fitv2.pipeline import FiTPipeline
    from fitv2.sampling.recipe import Recipe


@dataclass(frozen=True)
class Job:
    """A picture to make, and where it goes."""

    path: Path
    recipe: "Recipe"
    caption: str
    given: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the pipeline: `image` and its like."""

    @property
    def start(self) -> float:
        """The time from which on it is made, 0 noise to 1 data."""
        from fitv2.sampling.requests import STRENGTH

        if "image" not in self.given:
            return 0.0
        usual = STRENGTH if self.given.get("mask_image") is None else 1.0
        strength = self.given.get("strength")
        return 1.0 - (usual if strength is None else strength)


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
    mask = open_picture(options.mask, options.size, "black") if options.mask else None
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


def open_picture(path: Path, size: str | None, background: str = "white") -> "Image":
    """An image file, upright, brought to a size if one is given; what is transparent shows the background.

    Raises UserError for what is none.
    """
    from PIL import Image

    from fitv2.encoding.images import UnusableImage, load_rgb, parse_size

    try:
        image = load_rgb(path, background=background)
    except (UnusableImage, OSError) as error:
        raise UserError(f"{path} is no picture that can be read: {error}") from error
    if size is None:
        return image
    height, width = parse_size(size[:32])
    check_limit("size", max(height, width))
    return image.resize((width, height), Image.Resampling.BICUBIC)
