"""From a model or pictures and a reference to figures, a table, plots and sheets; resumable.

OUT holds a folder of features for each size, `reference` with those of the real pictures, settings.json, by
which a second call knows whether it goes on with the same, and in the end evaluation.json.
"""

import hashlib
import platform
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fitv2 import __version__
from fitv2.checkpoint import find_model
from fitv2.config import Guidance, Positions, Sampling
from fitv2.errors import UserError, reading
from fitv2.evaluation.extract import Features, collect, extract, write_npz
from fitv2.evaluation.features import Extractor, load_extractor
from fitv2.evaluation.metrics import Figure, nearest
from fitv2.evaluation.pictures import Batch, First, Made, Pictures, Subject, draw_labels
from fitv2.evaluation.reference import (
    Collection,
    Reference,
    batch_reference,
    kept_reference,
    size_name,
)
from fitv2.evaluation.score import figures
from fitv2.evaluation.settings import Evaluation
from fitv2.figures import Captioned, contact_sheet
from fitv2.model import FiT
from fitv2.pipeline import FiTPipeline
from fitv2.runtime.device import default_device
from fitv2.runtime.distributed import ranks
from fitv2.runtime.files import atomic_file, write_json
from fitv2.runtime.rng import derive_seed
from fitv2.runtime.serialization import read_json
from fitv2.tokens import Size

RESULT, SETTINGS, REFERENCE = "evaluation.json", "settings.json", "reference"
PAIRS = 24  # pictures that are shown beside the nearest real one

StageProgress = Callable[[str, int, int | None], None]  # the stage, how many are done, of how many


@dataclass(frozen=True)
class How:
    """How a model makes pictures."""

    guidance: Guidance = field(default_factory=Guidance)
    sampling: Sampling = field(default_factory=Sampling)
    positions: Positions = field(default_factory=Positions)


@dataclass(frozen=True)
class Result:
    """The figures of every size, by network and metric; and all that it takes to get them again."""

    sizes: dict[str, dict[str, dict[str, Figure]]]
    about: dict[str, Any]

    def write(self, out: Path) -> None:
        """Write evaluation.json."""
        write_json(out / RESULT, asdict(self))

    @classmethod
    def read(cls, out: Path) -> "Result":
        """What `write` wrote. Raises UserError when it is damaged."""
        with reading(out / RESULT):
            values = read_json(out / RESULT)
            sizes = {
                size: {network: {k: Figure(**v) for k, v in its.items()} for network, its in of.items()}
                for size, of in values["sizes"].items()
            }
            return cls(sizes, values["about"])


class Judged:
    """What is evaluated: a model, an npz of ADM's, or a collection of pictures."""

    def __init__(self, name: str, settings: Evaluation, how: How, allow_download: bool) -> None:
        self.name, self.settings, self.how = name, settings, how
        self.pipeline: FiTPipeline | None = None
        self.batch = Batch(Path(name)) if name.endswith(".npz") else None
        self.collection: Collection | None = None
        if self.batch:
            return
        if is_model(name):
            self.pipeline = FiTPipeline.from_pretrained(name, allow_download=allow_download)
            self.pipeline.to(default_device())
        else:
            self.collection = Collection.open(name, settings.samples_split)

    @property
    def identity(self) -> dict[str, Any]:
        """What makes it the same, told without the path."""
        if self.pipeline:
            model = self.pipeline.transformer
            solver, steps = self.how.sampling.resolve("ddpm" if model.architecture.path == "ddpm" else "heun")
            strength = self.how.guidance.guidance_scale
            guidance = asdict(self.how.guidance) | {
                "guidance_scale": self.pipeline.card.guidance if strength is None else strength
            }
            return {
                "weights": weights_digest(model), "solver": solver, "steps": steps, "guidance": guidance,
                "sampling": asdict(self.how.sampling), "positions": asdict(self.how.positions),
            }  # fmt: skip
        return {"pictures": self.collection.fingerprint if self.collection else len(self.batch or ())}

    def default_size(self) -> Size:
        """The size where none is asked for. Raises UserError for a collection."""
        if self.pipeline:
            side = self.pipeline.card.square[0] * self.pipeline.unit
            return side, side
        if self.batch:
            return self.batch.pixels
        raise UserError("give `size`: which pictures are compared")

    def pictures(self, pixels: Size, reference: Reference) -> tuple[Pictures, list[str]]:
        """At most `num` of its pictures of a size, and what each is to show, if anybody knows."""
        num = self.settings.num
        if self.batch:
            if pixels != self.batch.pixels:
                raise UserError(f"{self.name} has pictures of {size_name(self.batch.pixels)}")
            return First(self.batch, num), []
        if self.collection:
            exact = not self.settings.fit_samples
            taken = self.collection.pictures(pixels, self.settings.crop_at_most, exact)
            return taken, [*reference_names_of(self.collection, taken.rows)]
        assert self.pipeline
        subjects = choose_subjects(self.pipeline, reference, self.settings)
        how = self.how
        made = Made(
            self.pipeline, subjects, pixels, self.settings.seed, how.guidance, how.sampling, how.positions
        )
        return made, [self.name_of(subject) for subject in subjects]

    def evaluations(self, pictures: Pictures) -> int:
        """How often the model is called for a picture, by making one again; guidance doubles each call."""
        assert self.pipeline
        calls: list[None] = []
        counter = self.pipeline.transformer.head.register_forward_hook(lambda *_: calls.append(None))
        pictures.read(range(1))
        counter.remove()
        return len(calls)

    def name_of(self, subject: Subject) -> str:
        """What a made picture is to show, in words."""
        if subject.prompt is not None or subject.label is None or not self.pipeline:
            return subject.prompt or ""
        return self.pipeline.card.labels[subject.label]


def weights_digest(model: FiT) -> str:
    """The SHA-256 of a model's weights, in the order of their names."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def is_model(name: str) -> bool:
    """Whether a name is that of a model, else of pictures."""
    with suppress(UserError):
        find_model(name)
        return True
    return (Path(name) / "model_index.json").exists()


def reference_names_of(collection: Collection, rows: range) -> Iterable[str]:
    """What each picture of a collection shows: its caption, else its label."""
    for row in rows:
        picture = collection.manifest.picture(row)
        yield picture.caption or picture.label


def shown_by(reference: Reference) -> list[str]:
    """What each real picture shows: its caption, else its label."""
    about = reference.about
    return [caption or label for caption, label in zip(about.captions, about.labels, strict=True)]


def choose_subjects(pipeline: FiTPipeline, reference: Reference, settings: Evaluation) -> list[Subject]:
    """What a model is to show: captions of the reference, shuffled, or labels by chance.

    A label that the reference has beside the caption goes with it, if the model knows it by name.
    """
    about = reference.about
    if "text" not in pipeline.transformer.architecture.conditions:
        classes = pipeline.transformer.architecture.num_classes
        return draw_labels(settings.num, classes, settings.seed, settings.balanced)
    rows = [i for i, caption in enumerate(about.captions) if caption]
    if not rows:
        raise UserError("this model takes texts, and the reference has no captions: give `caption_column`")
    rng = torch.Generator().manual_seed(derive_seed(settings.seed, len(rows)))
    order = torch.randperm(len(rows), generator=rng).tolist()
    known = {label: number for number, label in enumerate(pipeline.card.labels)}
    chosen = [rows[order[i % len(order)]] for i in range(settings.num)]
    return [Subject(known.get(about.labels[row]), about.captions[row]) for row in chosen]


def evaluate(
    judged: str,
    reference: str,
    out: Path,
    settings: Evaluation | None = None,
    how: How | None = None,
    sizes: Sequence[Size] = (),
    *,
    allow_download: bool = False,
    progress: StageProgress = lambda stage, done, total: None,
    command: str = "",
    keep: Path | None = None,
) -> Result | None:
    """Compare pictures with real ones at one or more sizes; go on where an earlier call was interrupted.

    `judged` is a model, an npz of ADM's, or a collection of pictures; `reference` a collection of real
    pictures, the folder `reference` of an earlier evaluation, or an npz of ADM's. Under torchrun each process
    does its share; the one that finishes last has the result, the others None. Raises UserError for what is
    not there or does not fit, and when `out` holds another evaluation. `keep` is where references
    are kept [default: out/reference].
    """
    settings, how, place = settings or Evaluation(), how or How(), ranks()
    extractors = load_extractors(settings, allow_download)
    subject = Judged(judged, settings, how, allow_download)
    real = open_reference(reference, settings)
    wanted = list(dict.fromkeys(sizes)) or [subject.default_size()]
    about = {
        "judged": Path(judged).name, "reference": Path(reference).name,
        "settings": {k: v for k, v in asdict(settings).items() if not k.endswith("weights")},
        **subject.identity,
    }  # fmt: skip
    settle(out, about, place[0] == 0)
    if (out / RESULT).exists():
        known = Result.read(out)
        if [*known.sizes] == [size_name(pixels) for pixels in wanted]:
            return known
    found: dict[str, tuple[Features, Reference, list[str]]] = {}
    for pixels in wanted:
        name = size_name(pixels)
        tell = partial(progress, f"reference {name}")
        beside = reference_at(real, pixels, settings, extractors, keep or out / REFERENCE, place, tell)
        pictures, asked = subject.pictures(pixels, beside)
        extract(pictures, extractors, out / name, place, partial(progress, name), settings.npz)
        features = collect(out / name, len(pictures))
        if features is None:
            continue
        if settings.npz:
            write_npz(out / name, len(pictures), out / f"{name}.npz")
        asked = [asked[number] for number in features.numbers] if asked else []
        found[name] = features, beside, asked
    if len(found) < len(wanted):
        return None
    if subject.pipeline:
        about["evaluations"] = subject.evaluations(pictures)
    return conclude(found, out, about | environment(command), progress)


def conclude(
    found: dict[str, tuple[Features, Reference, list[str]]],
    out: Path,
    about: dict[str, Any],
    progress: StageProgress,
) -> Result:
    """Compute the figures of all sizes, and write them."""
    sizes, references = {}, {}
    for done, (name, (features, beside, asked)) in enumerate(found.items()):
        progress("figures", done, len(found))
        title = f"{about['judged']} {name}"
        draw_sheet([("", image) for image in features.shown.values()], out / f"{name}.png", title)
        if pairs := beside_nearest(features, beside, asked):
            draw_sheet(pairs, out / f"{name}_nearest.png", f"{title}, each beside the nearest real picture")
        sizes[name] = figures(features.values, beside.real, asked, shown_by(beside))
        references[name] = beside.about.brief | {"pictures_judged": len(features.numbers)}
    progress("figures", len(found), len(found))
    result = Result(sizes, about | {"references": references})
    result.write(out)
    return result


def open_reference(name: str, settings: Evaluation) -> Collection | Path:
    """A collection, or the path of a kept reference or an npz."""
    path = Path(name)
    if name.endswith(".npz") or any(path.glob("*/reference.json")):
        return path
    columns = settings.image_column, settings.label_column, settings.caption_column
    return Collection.open(name, settings.split, *columns, most=settings.most_real)


def reference_at(
    real: Collection | Path,
    pixels: Size,
    settings: Evaluation,
    extractors: Sequence[Extractor],
    folder: Path,
    place: tuple[int, int],
    progress: Callable[[int, int], None],
) -> Reference:
    """The reference of a size, kept in `folder`."""
    names = [name for extractor in extractors for name in extractor.names]
    if isinstance(real, Collection):
        return real.reference(pixels, settings.crop_at_most, extractors, folder, place, progress)
    if real.suffix == ".npz":
        return batch_reference(real, extractors, folder, place, progress)
    return kept_reference(real, pixels, names)


def load_extractors(settings: Evaluation, allow_download: bool) -> list[Extractor]:
    """Those that the settings name."""
    weights = {"inception": settings.inception_weights, "dinov2": settings.dinov2_weights}
    chosen = dict.fromkeys(settings.features)
    return [load_extractor(name, default_device(), weights.get(name), allow_download) for name in chosen]


def settle(out: Path, about: dict[str, Any], begins: bool) -> None:
    """Note what is evaluated in a new folder, or compare it with what was noted.

    Raises UserError naming what differs.
    """
    path = out / SETTINGS
    if not path.exists():
        if out.exists() and any(child.name != REFERENCE for child in out.iterdir()) and begins:
            raise UserError(f"{out} already exists and is not empty: remove it or choose another")
        if begins:
            out.mkdir(parents=True, exist_ok=True)
            write_json(path, about)
        return
    before, now = _flat(read_json(path)), _flat(about)
    if differing := [key for key in now if before.get(key) != now[key]]:
        changes = "; ".join(f"{key} was {before.get(key)!r}, now {now[key]!r}" for key in differing)
        raise UserError(f"{out} holds another evaluation: {changes}. Choose another folder")


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values in nested dictionaries by their paths, lists for tuples."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = list(value) if isinstance(value, tuple) else value
    return found


def environment(command: str) -> dict[str, Any]:
    """Where figures come from."""
    return {
        "command": command,
        "fitv2": __version__,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else platform.processor() or "CPU",
        "date": datetime.now(UTC).date().isoformat(),
    }


def beside_nearest(features: Features, beside: Reference, asked: Sequence[str]) -> list[Captioned]:
    """Some pictures, each followed by the real one that is nearest and their cosine: copied, or not."""
    network = next(name for name in features.values if "_" not in name)
    rows = [*features.shown][:PAIRS]
    cosines, numbers = nearest(features.values[network][rows], beside.real[network].features, 1)
    shown, pairs = shown_by(beside), []
    for row, cosine, number in zip(rows, cosines[:, 0].tolist(), numbers[:, 0].tolist(), strict=True):
        if real := beside.picture(number):
            caption = shown[number] if shown else ""
            pairs += [(asked[row] if asked else "", features.shown[row]), (f"{cosine:.2f} {caption}", real)]
    return pairs


def draw_sheet(captioned: Sequence[Captioned], path: Path, title: str) -> None:
    """A sheet of pictures, as many in a row as fit a screen."""
    across = max(2, min(10, 1400 // (captioned[0][1].width + 14)) // 2 * 2)
    cut = [(text[: max(8, image.width // 7)], image) for text, image in captioned]
    sheet = contact_sheet([cut[i : i + across] for i in range(0, len(cut), across)], title)
    with atomic_file(path) as scratch:
        sheet.save(scratch, "PNG")
