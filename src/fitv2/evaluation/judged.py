"""What is evaluated: a model, an npz of ADM's, or a collection of pictures; and what a model is to show."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from fitv2.checkpoint import CARD, SHIPPED, weights_digest
from fitv2.config import Guidance, Positions, Sampling
from fitv2.errors import UserError
from fitv2.evaluation.pictures import Batch, Made, Pictures, Subject, draw_labels
from fitv2.evaluation.reference import About, Collection, size_name
from fitv2.evaluation.settings import Evaluation
from fitv2.hub import INDEX
from fitv2.pipeline import FiTPipeline
from fitv2.runtime.device import default_device
from fitv2.runtime.files import sha256
from fitv2.runtime.rng import SUBJECTS, generator
from fitv2.tokens import Size


@dataclass(frozen=True)
class How:
    """How a model makes pictures."""

    guidance: Guidance = field(default_factory=Guidance)
    sampling: Sampling = field(default_factory=Sampling)
    positions: Positions = field(default_factory=Positions)


class JudgedModel:
    """A model, which makes `num` pictures of each size."""

    def __init__(self, pipeline: FiTPipeline, settings: Evaluation, how: How) -> None:
        self.pipeline, self.settings, self.how = pipeline, settings, how

    @property
    def identity(self) -> dict[str, Any]:
        """What makes it the same, told without the path."""
        pipe, model, how = self.pipeline, self.pipeline.transformer, self.how
        solver, steps = how.sampling.resolve(model.architecture.objective_name)
        rope = how.positions.apply(model.architecture.rope, pipe.card.square[0], pipe.unit)
        strength = how.guidance.guidance_scale
        guidance = {"guidance_scale": pipe.card.guidance if strength is None else strength}
        return {
            "weights": weights_digest(model, pipe.vae), "text_encoder": pipe.card.text_encoder,
            "architecture": asdict(model.architecture), "solver": solver, "steps": steps,
            "guidance": asdict(how.guidance) | guidance, "sampling": asdict(how.sampling),
            "positions": asdict(rope) | {"restart": how.positions.restart_time(pipe.is_flow)},
        }  # fmt: skip

    def default_size(self) -> Size:
        """The largest square trained on."""
        side = self.pipeline.card.square[0] * self.pipeline.unit
        return side, side

    def pictures(self, pixels: Size, about: About) -> tuple[Pictures, list[str]]:
        """Its pictures of a size, and what each is to show."""
        subjects = choose_subjects(self.pipeline, about, self.settings)
        how, seed = self.how, self.settings.seed
        made = Made(self.pipeline, subjects, pixels, seed, how.guidance, how.sampling, how.positions)
        return made, [name_of(self.pipeline, subject) for subject in subjects]

    def evaluations(self, pictures: Pictures) -> int:
        """How often the model is called for a picture, by making one again; guidance doubles each call."""
        calls: list[None] = []
        counter = self.pipeline.transformer.head.register_forward_hook(lambda *_: calls.append(None))
        pictures.read(range(1))
        counter.remove()
        return len(calls)


class JudgedBatch:
    """An npz of ADM's."""

    def __init__(self, path: Path) -> None:
        self.path, self.batch = path, Batch(path)
        self.identity: dict[str, Any] = {"npz": sha256(path)}

    def default_size(self) -> Size:
        """That of its pictures."""
        return self.batch.pixels

    def pictures(self, pixels: Size, about: About) -> tuple[Pictures, list[str]]:
        """All of them. Raises UserError for another size."""
        if pixels != self.batch.pixels:
            raise UserError(f"{self.path} has pictures of {size_name(self.batch.pixels)}")
        return self.batch, []


class JudgedCollection:
    """A collection of pictures."""

    def __init__(self, collection: Collection, settings: Evaluation) -> None:
        self.collection, self.settings = collection, settings
        self.identity: dict[str, Any] = {"pictures": collection.identity}

    def default_size(self) -> Size:
        """There is none: UserError."""
        raise UserError("give `size`: which pictures are compared")

    def pictures(self, pixels: Size, about: About) -> tuple[Pictures, list[str]]:
        """Those that have the size, or all brought to it; and what each shows."""
        exact = not self.settings.fit_samples
        taken = self.collection.pictures(pixels, self.settings.crop_at_most, exact)
        return taken, things(*self.collection.captions_and_labels(range(len(taken))))


Judged = JudgedModel | JudgedBatch | JudgedCollection


def open_judged(name: str, settings: Evaluation, how: How, allow_download: bool) -> Judged:
    """What a name means. Raises UserError when it is nothing of these."""
    of_adm = name.endswith(".npz")
    if not of_adm and is_model(name):
        pipeline = FiTPipeline.from_pretrained(name, allow_download=allow_download)
        pipeline.transformer.cast(getattr(torch, settings.precision))
        return JudgedModel(pipeline.to(default_device()), settings, how)
    if how != How():
        raise UserError(f"{name} has pictures: settings of guidance, solver and positions are for models")
    if of_adm:
        return JudgedBatch(Path(name))
    columns = settings.image_column, settings.label_column, settings.caption_column
    with suppress(UserError):  # samples in a folder have no columns
        return JudgedCollection(Collection.open(name, settings.samples_split, *columns), settings)
    return JudgedCollection(Collection.open(name, settings.samples_split), settings)


def is_model(name: str) -> bool:
    """Whether a name is that of a model, else of pictures."""
    path = Path(name)
    if path.exists():
        return any((path / file).exists() for file in ("run.json", CARD, INDEX))
    return (SHIPPED / name).is_dir() or not any(mark in name for mark in ("*", ":", "."))


def things(captions: Sequence[str], labels: Sequence[str]) -> list[str]:
    """What pictures show: the caption of each, else its label."""
    return [caption or label for caption, label in zip(captions, labels, strict=True)]


def shown_by(about: About, judged: Judged | FiTPipeline) -> list[str]:
    """What real pictures show, in the words that `judged` knows: labels alone for a model of labels."""
    pipeline = judged.pipeline if isinstance(judged, JudgedModel) else judged
    if isinstance(pipeline, FiTPipeline) and "text" not in pipeline.transformer.architecture.conditions:
        return [*about.labels]
    return things(about.captions, about.labels)


def name_of(pipeline: FiTPipeline, subject: Subject) -> str:
    """What a made picture is to show, in words."""
    if subject.prompt is not None or subject.label is None:
        return subject.prompt or ""
    return pipeline.card.labels[subject.label]


def choose_subjects(pipeline: FiTPipeline, about: About, settings: Evaluation) -> list[Subject]:
    """What a model is to show: captions of the reference, shuffled, or labels by chance.

    A label that the reference has beside the caption goes with it, if the model takes labels and knows its
    name. Raises UserError for a model of texts when there are no captions.
    """
    conditions = pipeline.transformer.architecture.conditions
    if "text" not in conditions:
        classes = pipeline.transformer.architecture.num_classes
        return draw_labels(settings.num, classes, settings.seed, settings.balanced)
    rows = [i for i, caption in enumerate(about.captions) if caption]
    if not rows:
        raise UserError("this model takes texts, and the reference has no captions: give `caption_column`")
    order = torch.randperm(len(rows), generator=generator(settings.seed, SUBJECTS)).tolist()
    labels = pipeline.card.labels if "label" in conditions else ()
    known = {label: number for number, label in enumerate(labels)}
    chosen = [rows[order[i % len(order)]] for i in range(settings.num)]
    return [Subject(known.get(about.labels[row]), about.captions[row]) for row in chosen]
