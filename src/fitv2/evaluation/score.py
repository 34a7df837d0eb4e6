"""The figures of one size, from the features of pictures and of a reference."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fitv2.evaluation.metrics import (
    ENOUGH,
    Figure,
    Moments,
    RealFeatures,
    density_coverage,
    frechet,
    frechet_infinity,
    inception_score,
    kernel_distance,
    nearest_names,
    precision_recall,
    with_errors,
)

# By features: what tables call them. FID, sFID, IS and KID are words for Inception's features alone.
INCEPTION = {"frechet": "FID", "frechet_infinity": "FID∞", "kernel": "KID"}
PLAIN = {"frechet": "FD", "frechet_infinity": "FD∞", "kernel": "KD"}
BETTER_HIGHER = frozenset(["IS", "precision", "recall", "density", "coverage", "top 1", "top 5"])


def figures(
    made: dict[str, Tensor],
    real: dict[str, RealFeatures],
    asked: Sequence[str] = (),
    shown: Sequence[str] = (),
) -> dict[str, dict[str, Figure]]:
    """All figures by the network whose features they are of, each with its standard error.

    `asked` is what each picture was to show, `shown` what each real one does. Where they speak of the same
    things, top 1 is the share of pictures whose nearest real one shows it, top 5 that of pictures which have
    it among the five nearest things: of those whose thing some real one shows.
    """
    found: dict[str, dict[str, Figure]] = {}
    for name, features in made.items():
        network, _, part = name.partition("_")
        if name in real:
            found.setdefault(network, {}).update(_of_features(features, real[name], network, part))
        elif part == "logits":
            found.setdefault(network, {}).update(
                _of_features(features, RealFeatures(features), network, part)
            )
    for network, its in found.items():
        if network != "inception" and {*asked} & {*shown} and len({*shown}) > 1:
            its |= accuracy(nearest_names(made[network], real[network].features, shown), asked, shown)
    return found


def _of_features(made: Tensor, real: RealFeatures, network: str, part: str) -> dict[str, Figure]:
    names = INCEPTION if network == "inception" else PLAIN

    def some(kept: Tensor) -> dict[str, float]:
        few = made[kept]
        if part == "logits":
            return {"IS": inception_score(few)}
        distance = frechet(Moments.of(few), real.moments)
        if part == "spatial":
            return {"sFID": distance}
        figures = {names["frechet"]: distance}
        if len(made) >= ENOUGH * made.shape[1]:
            figures[names["frechet_infinity"]] = frechet_infinity(few, real.moments)
        if not len(real.features):  # only their moments are known
            return figures
        precision, recall = precision_recall(few, real)
        density, coverage = density_coverage(few, real)
        return figures | {
            names["kernel"]: kernel_distance(few, real),
            "precision": precision, "recall": recall, "density": density, "coverage": coverage,
        }  # fmt: skip

    return with_errors(some, len(made))


def accuracy(
    nearest: Sequence[Sequence[str]], asked: Sequence[str], shown: Sequence[str]
) -> dict[str, Figure]:
    """The shares of pictures whose first, and first five, nearest names hold the one asked for.

    Those whose name no real picture has are left out; at least one must remain.
    """
    known = {*shown}
    pairs = [(names, name) for names, name in zip(nearest, asked, strict=True) if name in known]
    top_1 = torch.tensor([names[0] == name for names, name in pairs]).double()
    top_5 = torch.tensor([name in names for names, name in pairs]).double()

    def shares(kept: Tensor) -> dict[str, float]:
        return {"top 1": float(top_1[kept].mean()), "top 5": float(top_5[kept].mean())}

    return with_errors(shares, len(pairs))
