"""Figures of a set of pictures beside a reference, from the features of both, tensors (N, D).

The features are those of any judge. What is called FID elsewhere is `frechet` of Inception's features alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import normalize

from fitv2.errors import UserError

BLOCK = 4096  # rows of a matrix of distances that are held at once
MOST = 10_000  # real pictures that are compared pair by pair, as many as ADM's reference batches hold
ENOUGH = 5  # pictures for each number of a picture, from which a distance can be extrapolated
NEIGHBOURS_OF_PRECISION, NEIGHBOURS_OF_DENSITY = 3, 5  # those of the papers


@dataclass(frozen=True)
class Moments:
    """Mean (D,) and covariance (D, D) of features, in float64."""

    mean: Tensor
    covariance: Tensor

    @classmethod
    def of(cls, features: Tensor) -> "Moments":
        """Those of features (N, D), N ≥ 2; the covariance over N − 1."""
        at_least(features, 2)
        wide = features.double()
        return cls(wide.mean(0), wide.T.cov())

    @cached_property
    def root(self) -> Tensor:
        """The square root of the covariance, symmetric."""
        values, vectors = torch.linalg.eigh(self.covariance)
        return (vectors * values.clamp_min(0).sqrt()) @ vectors.T


def frechet(made: Moments, real: Moments) -> float:
    """The Fréchet distance of two Gaussians (Heusel et al., 1706.08500, equation 6).

    |μ1 − μ2|² + tr(Σ1) + tr(Σ2) − 2·tr((Σ1·Σ2)^½); the last is the sum of the roots of the eigenvalues of
    R·Σ1·R, R² = Σ2, which is symmetric: no complex numbers, no ε on the diagonal.
    """
    inner = real.root @ made.covariance @ real.root
    between = torch.linalg.eigvalsh((inner + inner.T) / 2).clamp_min(0).sqrt().sum()
    apart = (made.mean - real.mean).square().sum()
    return float(apart + made.covariance.trace() + real.covariance.trace() - 2 * between)


@dataclass(frozen=True, eq=False)
class RealFeatures:
    """Features (N, D) of the pictures of a reference, and what is computed of them once."""

    features: Tensor
    known: Moments | None = None  # of more pictures than these

    @cached_property
    def moments(self) -> Moments:
        """Their mean and covariance."""
        return self.known or Moments.of(self.features)

    @cached_property
    def some(self) -> Tensor:
        """At most MOST of them, evenly spread: for what grows with the square of their number."""
        return thinned(self.features)

    @cached_property
    def kernel_mean(self) -> float:
        """The mean of the kernel over pairs of them."""
        return kernel_mean(self.some)

    @cached_property
    def radii(self) -> dict[int, Tensor]:
        """The distances to the neighbours that precision and density ask for."""
        return {k: radii(self.some, k) for k in (NEIGHBOURS_OF_PRECISION, NEIGHBOURS_OF_DENSITY)}


def frechet_infinity(made: Tensor, real: Moments) -> float:
    """The Fréchet distance that infinitely many pictures would have.

    That of N pictures is too large by a constant over N (Chong and Forsyth, 1911.07023), so that of half as
    many by twice as much: 2·FD(N) − FD(N/2), the last the mean of two halves. The line that the authors draw
    through nested subsets spreads half as far again, since these are few. Holds for N far above the numbers
    D of a picture: see ENOUGH.
    """
    order = shuffled(len(made))
    halves = [frechet(Moments.of(made[part]), real) for part in order.chunk(2)]
    return 2 * frechet(Moments.of(made), real) - sum(halves) / 2


def kernel_distance(made: Tensor, real: RealFeatures) -> float:
    """The squared maximum mean discrepancy, unbiased, with the kernel (x·y/D + 1)³ (1801.01401).

    Of at most MOST of either; KID is its mean over subsets of 1,000. It may be below 0.
    """
    made = thinned(made)
    between = _kernel_sum(made, real.some) / (len(made) * len(real.some))
    return kernel_mean(made) + real.kernel_mean - 2 * between


def kernel_mean(features: Tensor) -> float:
    """The mean of the kernel over pairs of different pictures."""
    at_least(features, 2)
    return _kernel_sum(features, features, diagonal=False) / (len(features) * (len(features) - 1))


def _kernel_sum(a: Tensor, b: Tensor, diagonal: bool = True) -> float:
    total = 0.0
    for first in range(0, len(a), BLOCK):
        kernel = (a[first : first + BLOCK].double() @ b.T.double() / a.shape[1] + 1) ** 3
        total += float(kernel.sum())
        if not diagonal:
            total -= float(kernel.diagonal(first).sum())
    return total


def inception_score(logits: Tensor, splits: int = 10) -> float:
    """exp(E KL(p(y|x) ‖ p(y))) of class logits (N, classes), the mean of so many parts (1606.03498).

    Shuffled first: pictures in order of their classes would have few of them in a part.
    """
    at_least(logits, 2)
    logits, splits, scores = logits[shuffled(len(logits))], min(splits, len(logits) // 2), []
    for i in range(splits):
        part = logits[i * len(logits) // splits : (i + 1) * len(logits) // splits].double()
        mean = part.softmax(1).mean(0)
        divergence = (part.softmax(1) * (part.log_softmax(1) - mean.log())).sum(1)
        scores.append(divergence.mean().exp())
    return float(torch.stack(scores).mean())


def precision_recall(made: Tensor, real: RealFeatures) -> tuple[float, float]:
    """The share of made pictures near real ones, and of real near made ones (1904.06991).

    Near is within the distance of the other's own third neighbour.
    """
    k = NEIGHBOURS_OF_PRECISION
    precision = _share_within(made, real.some, real.radii[k])
    return precision, _share_within(real.some, made, radii(made, k))


def density_coverage(made: Tensor, real: RealFeatures) -> tuple[float, float]:
    """How many real neighbourhoods a made picture lies in, over k; the share of those that hold one.

    Naeem et al., 2002.09797, k = 5. Unlike recall, coverage does not reward outliers.
    """
    around = real.radii[NEIGHBOURS_OF_DENSITY]
    inside = 0.0
    nearest = torch.full_like(around, torch.inf)
    for block in made.split(BLOCK):
        distances = torch.cdist(block, real.some)
        inside += float((distances < around).sum())
        nearest = torch.minimum(nearest, distances.min(0).values)
    return inside / (NEIGHBOURS_OF_DENSITY * len(made)), float((nearest < around).float().mean())


def radii(features: Tensor, k: int) -> Tensor:
    """Of each picture the distance to its k-th neighbour, (N,)."""
    at_least(features, k + 1)
    return torch.cat([torch.cdist(block, features).kthvalue(k + 1).values for block in features.split(BLOCK)])


def _share_within(some: Tensor, others: Tensor, around: Tensor) -> float:
    """The share of `some` that lie within `around` of one of the others."""
    found = [(torch.cdist(block, others) <= around).any(1) for block in some.split(BLOCK)]
    return float(torch.cat(found).float().mean())


def nearest_rows(made: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """The cosine of each picture with the nearest real one, and its row; (N,) both."""
    real = normalize(real, dim=1)
    found = [(normalize(block, dim=1) @ real.T).max(1) for block in made.split(BLOCK)]
    return torch.cat([one.values for one in found]), torch.cat([one.indices for one in found])


def nearest_names(made: Tensor, real: Tensor, names: Sequence[str], most: int = 5) -> list[list[str]]:
    """Of each picture the names of real pictures near it, nearest first, by the nearest of each name."""
    distinct = list(dict.fromkeys(names))
    number = {name: i for i, name in enumerate(distinct)}
    of_real = torch.tensor([number[name] for name in names])
    real, found = normalize(real, dim=1), []
    for block in made.split(BLOCK):
        cosines = normalize(block, dim=1) @ real.T
        best = torch.full((len(block), len(distinct)), -2.0, dtype=cosines.dtype)
        best.scatter_reduce_(1, of_real.expand_as(cosines), cosines, "amax")
        found += best.topk(min(most, len(distinct))).indices.tolist()
    return [[distinct[i] for i in row] for row in found]


# Student's t for 95 %, by degrees of freedom from 1.
T95 = (12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


@dataclass(frozen=True)
class Figure:
    """A figure, its standard error, and of how many degrees of freedom that is; 0 if there is no error."""

    value: float
    error: float = 0.0
    freedom: int = 0

    @property
    def half_width(self) -> float:
        """Half of the 95 % interval."""
        return self.error * (T95[self.freedom - 1] if self.freedom <= len(T95) else 1.96 + 2.5 / self.freedom)

    def __str__(self) -> str:
        return f"{self.value:.4g} ± {self.half_width:.2g}" if self.freedom else f"{self.value:.4g}"


def with_errors(
    figures: Callable[[Tensor], dict[str, float]], count: int, groups: int = 10
) -> dict[str, Figure]:
    """Figures of all `count` pictures, with the standard error of each by the delete-a-group jackknife.

    `figures` computes them of the pictures that it is given the indices of. Each tenth is left out once; a
    bootstrap would count pictures twice, which distances of neighbours and of Gaussians take for a finding.
    The reference is taken as it is.
    """
    whole = figures(torch.arange(count))
    groups = min(groups, count)
    parts = shuffled(count) % groups
    without = [whole]  # one picture tells no error
    if count > 1:
        try:
            without = [figures((parts != group).nonzero().flatten()) for group in range(groups)]
        except UserError as error:  # of the pictures without a group
            said = f"{count} pictures are too few to tell the error of a figure: give more"
            raise UserError(said) from error
    made = {}
    for name, value in whole.items():
        of_group = torch.tensor([one[name] for one in without]).double()
        spread = (of_group - of_group.mean()).square().sum() * (groups - 1) / groups
        made[name] = Figure(value, float(spread.sqrt()), groups - 1)
    return made


def thinned(features: Tensor) -> Tensor:
    """At most MOST of the features, evenly spread."""
    count = len(features)
    return features if count <= MOST else features[torch.arange(MOST) * count // MOST]


def shuffled(count: int) -> Tensor:
    """The numbers below `count` in an order that says nothing, the same every time."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))


def at_least(features: Tensor, count: int) -> None:
    """UserError for fewer pictures."""
    if len(features) < count:
        raise UserError(f"{len(features)} pictures are too few: this takes {count} or more")
