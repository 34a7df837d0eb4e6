"""Paths x_t = α(t)·data + σ(t)·noise, from noise at t = 0 to data at t = 1.

SiT (Ma et al., arXiv 2401.08740), section 2 and table 1, with time in the released FiTv2's direction.
A path's velocity and its score are two views of one field:

    v(x, t) = r(t)·x + g(t)·score(x, t),   r = α'/α,   g = r·σ² − σ·σ'

Times are tensors of any shape; everything is elementwise and float32.
"""

import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from fitv2.errors import nearest


class Path(Protocol):
    """How much of an image is there at each time."""

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """α, σ."""

    def derivatives(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """α', σ'."""

    def growth(self, t: Tensor) -> Tensor:
        """r = α'/α, infinite where α is 0."""

    def score_rate(self, t: Tensor) -> Tensor:
        """g = r·σ² − σ·σ'."""


class Linear:
    """α = t, σ = 1 − t: rectified flow (arXiv 2209.03003), the path of FiTv2."""

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """α, σ."""
        return t, 1 - t

    def derivatives(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """α', σ'."""
        return torch.ones_like(t), -torch.ones_like(t)

    def growth(self, t: Tensor) -> Tensor:
        """1/t."""
        return 1 / t

    def score_rate(self, t: Tensor) -> Tensor:
        """σ/t."""
        return (1 - t) / t


class GVP:
    """α = sin(πt/2), σ = cos(πt/2): α² + σ² = 1, so g = r."""

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """α, σ."""
        return torch.sin(t * (math.pi / 2)), torch.cos(t * (math.pi / 2))

    def derivatives(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """α', σ'."""
        alpha, sigma = self.coefficients(t)
        return math.pi / 2 * sigma, -math.pi / 2 * alpha

    def growth(self, t: Tensor) -> Tensor:
        """(π/2)·cot(πt/2)."""
        return math.pi / 2 / torch.tan(t * (math.pi / 2))

    def score_rate(self, t: Tensor) -> Tensor:
        """Equal to the growth."""
        return self.growth(t)


class VP:
    """The variance-preserving SDE's path (Song et al., arXiv 2011.13456): β from 0.1 to 20, g = r = β/2."""

    beta_min, beta_max = 0.1, 20.0

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """α, σ."""
        log_alpha = self._log_alpha(t)
        return log_alpha.exp(), (-torch.expm1(2 * log_alpha)).sqrt()

    def derivatives(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """α', σ' = −α·α'/σ; the latter infinite at data."""
        alpha, sigma = self.coefficients(t)
        rate = alpha * self.growth(t)
        return rate, -alpha * rate / sigma

    def growth(self, t: Tensor) -> Tensor:
        """β/2."""
        return (self.beta_min + (1 - t) * (self.beta_max - self.beta_min)) / 2

    def score_rate(self, t: Tensor) -> Tensor:
        """Equal to the growth."""
        return self.growth(t)

    def _log_alpha(self, t: Tensor) -> Tensor:
        return -((1 - t) ** 2) * (self.beta_max - self.beta_min) / 4 - (1 - t) * self.beta_min / 2


PATHS: dict[str, Path] = {"linear": Linear(), "gvp": GVP(), "vp": VP()}


def score(path: Path, velocity: Tensor, x: Tensor, t: Tensor) -> Tensor:
    """∇ log p_t(x) of the field with this velocity: (α/α'·v − x) / (g·α/α'). Infinite at data."""
    alpha, sigma = path.coefficients(t)
    alpha_rate, sigma_rate = path.derivatives(t)
    inverse_growth = alpha / alpha_rate
    return (inverse_growth * velocity - x) / (sigma**2 - inverse_growth * sigma_rate * sigma)


# w(t), the strength of the noise in dx = (v + w·score)·dt + √(2w)·dW (SiT, section 3.4); sbdm is the
# reversed noising SDE.
FORMS: dict[str, Callable[[Path, Tensor, float], Tensor]] = {
    "constant": lambda path, t, norm: torch.full_like(t, norm),
    "sbdm": lambda path, t, norm: norm * path.score_rate(t),
    "sigma": lambda path, t, norm: norm * path.coefficients(t)[1],
    "linear": lambda path, t, norm: norm * (1 - t),
    "decreasing": lambda path, t, norm: 0.25 * (norm * torch.cos(math.pi * t) + 1) ** 2,
    "increasing-decreasing": lambda path, t, norm: norm * torch.sin(math.pi * t) ** 2,
}


def diffusion(path: Path, form: str, t: Tensor, norm: float = 1.0) -> Tensor:
    """The strength w(t) of that form. Raises UserError for an unknown form."""
    if form not in FORMS:
        raise nearest("diffusion", form, FORMS)
    return FORMS[form](path, t, norm)
