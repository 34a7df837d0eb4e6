"""A judge of a model in training: a few pictures, fixed seeds, the same reference each time."""

import hashlib
from pathlib import Path

import torch

from fitv2.config import DEFAULT_SOLVERS, RESTART, Sampling
from fitv2.encoding.images import parse_size
from fitv2.errors import UserError
from fitv2.evaluation.extract import features_of, pieces
from fitv2.evaluation.features import load_extractor
from fitv2.evaluation.judged import How, JudgedModel, shown_by
from fitv2.evaluation.metrics import Moments, frechet, nearest_names
from fitv2.evaluation.reference import ABOUT, Reference, kept_reference, size_name
from fitv2.evaluation.score import accuracy
from fitv2.evaluation.settings import Evaluation
from fitv2.pipeline import FiTPipeline
from fitv2.runtime.device import default_device
from fitv2.tokens import Size
from fitv2.training.best import DISTANCE

FEATURES = "efficientnet"


class TrainingJudge:
    """Distances of a model's pictures to a kept reference, at all its sizes.

    The distance of a few hundred pictures is far above that of many; they are comparable with one another,
    not with those of `fitv2 evaluate`. With `evaluations` every model is called as often for a picture: by
    Heun's method, or by DDIM; else as the model samples by itself. Raises UserError when the folder is no
    reference.
    """

    def __init__(self, folder: Path, num: int, evaluations: int | None = None) -> None:
        self.settings, self.evaluations = Evaluation(num=num), evaluations
        self.extractor = load_extractor(FEATURES, default_device())
        sizes = [parse_size(path.parent.name) for path in sorted(folder.glob(f"*/{ABOUT}"))]
        if not sizes:
            raise UserError(f"{folder} is not the folder `reference` of an evaluation: see fitv2 evaluate")
        self.references = {size: kept_reference(folder, size, [self.extractor]) for size in sizes}
        self.real = {size: kept.features()[FEATURES] for size, kept in self.references.items()}

    @property
    def identity(self) -> str:
        """What has to be the same for distances to be comparable."""
        of_sizes = [(size, kept.about.sha256) for size, kept in self.references.items()]
        # RESTART and the solver: how images are made where nothing is said.
        how = self.evaluations or DEFAULT_SOLVERS["flow"][0]
        said = repr((self.settings.num, how, self.extractor.digest, of_sizes, RESTART))
        return hashlib.sha256(said.encode()).hexdigest()

    def __call__(self, pipeline: FiTPipeline) -> dict[str, float]:
        """Figures by the names of a log; `judge/distance` is the mean of the Fréchet distances."""
        values: dict[str, float] = {}
        for size, reference in self.references.items():
            values |= self.at(pipeline, size, reference)
        distances = [value for name, value in values.items() if name.startswith("judge/FD_")]
        return {DISTANCE: sum(distances) / len(distances)} | values

    def sampling(self, pipeline: FiTPipeline) -> Sampling:
        """Steps of the solver that takes as many evaluations as were asked for."""
        if self.evaluations is None:
            return Sampling()
        if pipeline.is_flow:
            return Sampling(solver="heun", steps=max(1, self.evaluations // 2))
        return Sampling(solver="ddim", steps=self.evaluations)

    def at(self, pipeline: FiTPipeline, size: Size, reference: Reference) -> dict[str, float]:
        """The Fréchet distance at a size, and how often what was asked for is among the nearest five."""
        judged = JudgedModel(pipeline, self.settings, How(sampling=self.sampling(pipeline)))
        pictures, asked = judged.pictures(size, reference.about)
        found = [
            features_of(pictures.read(piece), piece, [self.extractor]) for piece in pieces(len(pictures))
        ]
        features = torch.cat([piece[FEATURES] for piece in found])
        real, shown = self.real[size], shown_by(reference.about, pipeline)
        values = {f"judge/FD_{size_name(size)}": frechet(Moments.of(features), real.moments)}
        if {*asked} & {*shown} and len({*shown}) > 1:
            right = accuracy(nearest_names(features, real.features, shown), asked, shown)
            values[f"judge/top_5_{size_name(size)}"] = right["top 5"].value
        return values
