"""The figures of one size, from the features of pictures and of a reference."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fitv2.evaluation.metrics import (
    Figure,
    Moments,
    Real,
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
    made: dict[str, Tensor], real: dict[str, Real], asked: Sequence[str] = (), shown: Sequence[str] = ()
) -> dict[str, dict[str, Figure]]:
    """All figures by the network whose features they are of, each with its standard error.

    `asked` is what each picture was to show, `shown` what each real one does: where both are given, top 1 is
    the share of pictures whose nearest real one shows it, top 5 that of those whose nearest five things do.
    """
    found: dict[str, dict[str, Figure]] = {}
    for name, features in made.items():
        network, _, part = name.partition("_")
        found.setdefault(network, {}).update(_of_features(features, real[name], network, part))
    for network, its in found.items():
        if asked and shown and network != "inception":
            nearest = nearest_names(made[network], real[network].features, shown)
            its |= accuracy(nearest, asked)
    return found


def _of_features(made: Tensor, real: Real, network: str, part: str) -> dict[str, Figure]:
    def some(kept: Tensor) -> dict[str, float]:
        few = made[kept]
        if part == "logits":
            return {"IS": inception_score(few)}
        if part == "spatial":
            return {"sFID": frechet(Moments.of(few), real.moments)}
        names = INCEPTION if network == "inception" else PLAIN
        precision, recall = precision_recall(few, real)
        density, coverage = density_coverage(few, real)
        return {
            names["frechet"]: frechet(Moments.of(few), real.moments),
            names["frechet_infinity"]: frechet_infinity(few, real.moments),
            names["kernel"]: kernel_distance(few, real),
            "precision": precision, "recall": recall, "density": density, "coverage": coverage,
        }  # fmt: skip

    return with_errors(some, len(made))


def accuracy(nearest: Sequence[Sequence[str]], asked: Sequence[str]) -> dict[str, Figure]:
    """The shares of pictures whose first, and first five, nearest names hold the one asked for."""
    top_1 = torch.tensor([names[0] == name for names, name in zip(nearest, asked, strict=True)]).double()
    top_5 = torch.tensor([name in names for names, name in zip(nearest, asked, strict=True)]).double()

    def shares(kept: Tensor) -> dict[str, float]:
        return {"top 1": float(top_1[kept].mean()), "top 5": float(top_5[kept].mean())}

    return with_errors(shares, len(asked))
