"""How a picture was made, told in the picture: text in the PNG file, which other programs show too."""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from fitv2 import __version__
from fitv2.config import Guidance, Positions, Precision, Sampling
from fitv2.errors import UserError, in_one_line
from fitv2.limits import check_limits
from fitv2.pipeline import FiTPipeline
from fitv2.runtime.files import atomic_file
from fitv2.runtime.serialization import from_dict, parse_json

KEY = "fitv2"  # of our text in a PNG
LONGEST = 100_000  # characters of it that are read


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All that decides a picture, but for the machine."""

    ADDED: ClassVar[frozenset[str]] = frozenset({"edited", "label_number"})

    model: str
    """As it was named."""
    weights: str
    """SHA-256 of those of the model and its autoencoder."""
    label: str | None
    prompt: str | None
    negative_prompt: str | None
    height: int
    width: int
    seed: int
    precision: Precision
    guidance: Guidance
    sampling: Sampling
    positions: Positions
    label_number: int | None = None
    """Of the label: two may have one name."""
    edited: dict[str, str | float | None] | None = None
    """What it was made from, where that is more than noise."""

    def __post_init__(self) -> None:
        """UserError for a number outside its range."""
        check_limits(self)

    @classmethod
    def of(cls, pipeline: FiTPipeline, **values: Any) -> "Recipe":
        """A recipe with what a model uses by itself filled in."""
        guidance, sampling = values["guidance"], values["sampling"]
        if guidance.guidance_scale is None:
            guidance = replace(guidance, guidance_scale=pipeline.card.guidance)
        solver, steps = sampling.resolve(pipeline.transformer.architecture.objective_name)
        sampling = replace(sampling, solver=solver, steps=steps)
        return cls(**values | {"guidance": guidance, "sampling": sampling})

    @property
    def arguments(self) -> dict[str, Any]:
        """What it is in the arguments of `FiTPipeline.stream`."""
        said: dict[str, Any] = {"height": self.height, "width": self.width}
        if self.label is not None:
            said["class_labels"] = self.label if self.label_number is None else self.label_number
        if self.prompt is not None:
            said["prompt"] = self.prompt
        if self.negative_prompt is not None:
            said["negative_prompt"] = self.negative_prompt
        return said


def save_picture(image: Image.Image, path: Path, recipe: Recipe) -> None:
    """Write a PNG with its recipe, whole or not at all."""
    with atomic_file(path) as partial:
        image.save(partial, "PNG", pnginfo=png_text(recipe))


def png_text(recipe: Recipe) -> PngInfo:
    """The texts of a PNG file: ours, and those that the PNG specification names."""
    text = PngInfo()
    shown = recipe.prompt or recipe.label or ""
    text.add_itxt("Description", shown.encode(errors="replace").decode())
    text.add_text("Software", f"fitv2 {__version__}")
    text.add_itxt(KEY, json.dumps(asdict(recipe)))
    return text


def read_recipe(path: Path) -> Recipe:
    """The recipe in a PNG. Raises UserError where there is none, or a damaged one."""
    try:
        with Image.open(path) as image:
            said = image.info.get(KEY)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} is no picture that can be read: {in_one_line(error)}") from error
    if not isinstance(said, str) or len(said) > LONGEST:
        raise UserError(f"{path} does not say how it was made: it is not of fitv2, or was saved anew")
    try:
        return from_dict(Recipe, parse_json(path, said.encode()), complete=True)
    except UserError as error:
        raise UserError(f"what {path} says of how it was made is damaged: {error}") from error


def is_made(path: Path, recipe: Recipe) -> bool:
    """Whether a file holds the picture of a recipe."""
    try:
        return path.exists() and read_recipe(path) == recipe
    except UserError:
        return False
