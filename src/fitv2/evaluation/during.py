"""A judge of a model in training: a few pictures, fixed seeds, the same reference each time."""

from pathlib import Path

import torch

from fitv2.config import Guidance, Positions, Sampling
from fitv2.encoding.images import parse_size
from fitv2.errors import UserError
from fitv2.evaluation.evaluate import choose_subjects, shown_by
from fitv2.evaluation.extract import features_of, pieces
from fitv2.evaluation.features import load_extractor
from fitv2.evaluation.metrics import Moments, frechet, nearest_names
from fitv2.evaluation.pictures import Made
from fitv2.evaluation.reference import ABOUT, Reference, kept_reference, size_name
from fitv2.evaluation.settings import Evaluation
from fitv2.pipeline import FiTPipeline
from fitv2.runtime.device import default_device
from fitv2.tokens import Size
from fitv2.training.best import DISTANCE

FEATURES = "efficientnet"


class TrainingJudge:
    """Distances of a model's pictures to a kept reference, at all its sizes.

    The distance of a few hundred pictures is far above that of many; they are comparable with one another,
    not with those of `fitv2 evaluate`. Raises UserError when the folder is no reference.
    """

    def __init__(self, folder: Path, num: int) -> None:
        self.settings = Evaluation(num=num)
        sizes = [parse_size(path.parent.name) for path in sorted(folder.glob(f"*/{ABOUT}"))]
        if not sizes:
            raise UserError(f"{folder} is not the folder `reference` of an evaluation: see fitv2 evaluate")
        self.references = {size: kept_reference(folder, size, [FEATURES]) for size in sizes}
        self.extractor = load_extractor(FEATURES, default_device())

    def __call__(self, pipeline: FiTPipeline) -> dict[str, float]:
        """Figures by the names of a log; `judge/distance` is the mean of the Fréchet distances."""
        values: dict[str, float] = {}
        distances = []
        for size, reference in self.references.items():
            distance, right = self.at(pipeline, size, reference)
            distances.append(distance)
            values[f"judge/FD_{size_name(size)}"] = distance
            if right is not None:
                values[f"judge/top_5_{size_name(size)}"] = right
        return {DISTANCE: sum(distances) / len(distances)} | values

    def at(self, pipeline: FiTPipeline, size: Size, reference: Reference) -> tuple[float, float | None]:
        """The Fréchet distance at a size, and how often what was asked for is among the nearest five."""
        subjects = choose_subjects(pipeline, reference, self.settings)
        pictures = Made(pipeline, subjects, size, self.settings.seed, Guidance(), Sampling(), Positions())
        found = [
            features_of(pictures.read(piece), piece, [self.extractor]) for piece in pieces(len(pictures))
        ]
        features = torch.cat([piece[FEATURES] for piece in found])
        real, shown = reference.real[FEATURES], shown_by(reference)
        distance = frechet(Moments.of(features), real.moments)
        if not any(shown):
            return distance, None
        asked = [subject.prompt or pipeline.card.labels[subject.label or 0] for subject in subjects]
        nearest = nearest_names(features, real.features, shown)
        return distance, sum(one in names for one, names in zip(asked, nearest, strict=True)) / len(asked)
