"""From a model or pictures and a reference to figures, a table, plots and sheets; resumable.

OUT holds a folder of features for each size, `reference` with those of the real pictures, settings.json, by
which a second call knows whether it goes on with the same, and in the end evaluation.json.
"""

import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fitv2 import __version__
from fitv2.errors import UserError, reading
from fitv2.evaluation.extract import Features, collect, extract, is_whole, write_pictures
from fitv2.evaluation.features import Extractor, load_extractor
from fitv2.evaluation.identity import settle
from fitv2.evaluation.judged import How, Judged, JudgedModel, open_judged, shown_by
from fitv2.evaluation.metrics import Figure, RealFeatures, nearest_rows
from fitv2.evaluation.pictures import Pictures
from fitv2.evaluation.reference import (
    ABOUT,
    Collection,
    Reference,
    as_statistics,
    batch_reference,
    kept_reference,
    size_name,
)
from fitv2.evaluation.score import figures
from fitv2.evaluation.settings import Evaluation
from fitv2.figures import Captioned, contact_sheet
from fitv2.runtime.device import default_device
from fitv2.runtime.distributed import ranks
from fitv2.runtime.files import atomic_file, sha256, write_json
from fitv2.runtime.serialization import read_json
from fitv2.tokens import Size

RESULT, REFERENCE = "evaluation.json", "reference"
PAIRS = 24  # pictures that are shown beside the nearest real one

StageProgress = Callable[[str, int, int | None], None]  # the stage, how many are done, of how many


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
        """What `write` wrote; nothing if there is no such file. Raises UserError when it is damaged."""
        if not (out / RESULT).exists():
            return cls({}, {"references": {}})
        with reading(out / RESULT):
            values = read_json(out / RESULT)
            sizes = {
                size: {network: {k: Figure(**v) for k, v in its.items()} for network, its in of.items()}
                for size, of in values["sizes"].items()
            }
            return cls(sizes, values["about"])


@dataclass(frozen=True)
class Cell:
    """Pictures of one size, and what they are compared with."""

    pixels: Size
    pictures: Pictures
    asked: list[str]  # what each is to show, if anybody knows
    reference: Reference


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
    subject = open_judged(judged, settings, how, allow_download)
    real, identity = open_reference(reference, settings)
    wanted = list(dict.fromkeys(sizes)) or [subject.default_size()]
    about = {
        "judged": Path(judged).name, "reference": identity,
        "networks": {extractor.names[0]: extractor.digest for extractor in extractors},
        "settings": {k: v for k, v in asdict(settings).items() if not k.endswith("weights")},
        **subject.identity,
    }  # fmt: skip
    settle(out, about, place[0] == 0)
    known = Result.read(out)
    cells = []
    for pixels in wanted:
        if size_name(pixels) in known.sizes:
            continue
        name = size_name(pixels)
        tell = partial(progress, f"reference {name}")
        beside = reference_at(real, pixels, settings, extractors, keep or out / REFERENCE, place, tell)
        pictures, asked = subject.pictures(pixels, beside.about)
        cells.append(Cell(pixels, pictures, asked, beside))
        extract(pictures, extractors, out / name, place, partial(progress, name), settings.npz)
    if not all(is_whole(out / size_name(cell.pixels), len(cell.pictures)) for cell in cells):
        return None
    return conclude(subject, cells, known, out, about | environment(command), settings.npz, progress)


def conclude(
    judged: Judged,
    cells: Sequence[Cell],
    known: Result,
    out: Path,
    about: dict[str, Any],
    npz: bool,
    progress: StageProgress,
) -> Result:
    """Compute the figures of one size after another, and write them beside those that are known."""
    sizes, references = {**known.sizes}, {**known.about["references"]}
    for done, cell in enumerate(cells):
        progress("figures", done, len(cells))
        name, beside = size_name(cell.pixels), cell.reference
        features, real = collect(out / name, len(cell.pictures)), beside.features()
        asked = [cell.asked[number] for number in features.numbers] if cell.asked else []
        title = f"{about['judged']} {name}"
        draw_sheet([("", image) for image in features.shown.values()], out / f"{name}.png", title)
        pairs = beside_nearest(features, beside, real, asked, shown_by(beside.about, judged))
        if pairs:
            draw_sheet(pairs, out / f"{name}_nearest.png", f"{title}, each beside the nearest real picture")
        if npz:
            own = as_statistics({key: RealFeatures(value) for key, value in features.values.items()})
            write_pictures(out / name, len(cell.pictures), out / f"{name}.npz", own)
        sizes[name] = figures(features.values, real, asked, shown_by(beside.about, judged))
        references[name] = beside.about.brief | {"pictures_judged": len(features.numbers)}
        if isinstance(judged, JudgedModel):
            references[name]["evaluations"] = judged.evaluations(cell.pictures)
    result = Result(sizes, about | {"references": references})
    result.write(out)
    return result


def open_reference(name: str, settings: Evaluation) -> tuple[Collection | Path, dict[str, Any]]:
    """A collection, or the path of a kept reference or an npz; and what makes it the same."""
    path = Path(name)
    kept = sorted(path.glob(f"*/{ABOUT}"))
    if name.endswith(".npz"):
        if not path.is_file():
            raise UserError(f"{path} does not exist")
        return path, {"npz": sha256(path)}
    if kept:
        return path, {file.parent.name: sha256(file) for file in kept}
    columns = settings.image_column, settings.label_column, settings.caption_column
    collection = Collection.open(name, settings.split, *columns, most=settings.most_real)
    return collection, collection.identity


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
    if isinstance(real, Collection):
        return real.reference(pixels, settings.crop_at_most, extractors, folder, place, progress)
    if real.suffix == ".npz":
        return batch_reference(real, pixels, extractors, folder, place, progress)
    return kept_reference(real, pixels, extractors)


def load_extractors(settings: Evaluation, allow_download: bool) -> list[Extractor]:
    """Those that the settings name."""
    weights = {"inception": settings.inception_weights, "dinov2": settings.dinov2_weights}
    chosen = dict.fromkeys(settings.features)
    return [load_extractor(name, default_device(), weights.get(name), allow_download) for name in chosen]


def environment(command: str) -> dict[str, Any]:
    """Where figures come from."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "CPU"
    return {
        "command": command, "fitv2": __version__, "torch": torch.__version__, "device": device,
        "date": datetime.now(UTC).date().isoformat(),
    }  # fmt: skip


def beside_nearest(
    features: Features,
    beside: Reference,
    real: dict[str, RealFeatures],
    asked: Sequence[str],
    shown: Sequence[str],
) -> list[Captioned]:
    """Some pictures, each followed by the real one that is nearest and their cosine: copied, or not."""
    network = next(name for name in features.values if "_" not in name)
    rows = [*features.shown][:PAIRS]
    if not rows or not len(real[network].features):
        return []
    cosines, numbers = nearest_rows(features.values[network][rows], real[network].features)
    pairs: list[Captioned] = []
    for row, cosine, number in zip(rows, cosines.tolist(), numbers.tolist(), strict=True):
        if image := beside.picture(number):
            caption = shown[number] if shown else ""
            pairs += [(asked[row] if asked else "", features.shown[row]), (f"{cosine:.2f} {caption}", image)]
    return pairs


def draw_sheet(captioned: Sequence[Captioned], path: Path, title: str) -> None:
    """A sheet of pictures, as many in a row as fit a screen; none of none."""
    if not captioned:
        return
    across = max(2, min(10, 1400 // (captioned[0][1].width + 14)) // 2 * 2)
    cut = [(text[: max(8, image.width // 7)], image) for text, image in captioned]
    sheet = contact_sheet([cut[i : i + across] for i in range(0, len(cut), across)], title)
    with atomic_file(path) as scratch:
        sheet.save(scratch, "PNG")
