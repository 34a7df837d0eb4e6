import pytest
import torch

from fitv2.diffusion.paths import PATHS, diffusion, score
from fitv2.errors import UserError

TIMES = torch.linspace(0.05, 0.95, 19, dtype=torch.double)
FORMS = ("constant", "sbdm", "sigma", "linear", "decreasing", "increasing-decreasing")


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_derivatives_are_those_of_the_coefficients(path):
    h = 1e-5
    before, after = path.coefficients(TIMES - h), path.coefficients(TIMES + h)
    for rate, low, high in zip(path.derivatives(TIMES), before, after, strict=True):
        torch.testing.assert_close(rate, (high - low) / (2 * h), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_growth_and_score_rate_are_their_definitions(path):
    (alpha, sigma), (alpha_rate, sigma_rate) = path.coefficients(TIMES), path.derivatives(TIMES)
    torch.testing.assert_close(path.growth(TIMES), alpha_rate / alpha)
    defined = path.growth(TIMES) * sigma**2 - sigma * sigma_rate
    torch.testing.assert_close(path.score_rate(TIMES), defined)


@pytest.mark.parametrize("name", PATHS)
def test_from_noise_to_data(name):
    alpha, sigma = PATHS[name].coefficients(torch.tensor([0.0, 1.0], dtype=torch.double))
    assert alpha[0] < 0.01  # VP still holds e^-5 of the data
    torch.testing.assert_close(alpha[1], torch.tensor(1.0, dtype=torch.double))
    assert sigma[0] > 0.99
    assert sigma[1] < 1e-9


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_score_of_a_gaussian(path):
    """For data N(m, s²): x_t ~ N(αm, α²s² + σ²), whose score and velocity are known."""
    x, m, s = torch.tensor(0.7, dtype=torch.double), 0.4, 0.6
    (alpha, sigma), (alpha_rate, sigma_rate) = path.coefficients(TIMES), path.derivatives(TIMES)
    variance = alpha**2 * s**2 + sigma**2
    slope = (alpha * alpha_rate * s**2 + sigma * sigma_rate) / variance
    velocity = alpha_rate * m + slope * (x - alpha * m)
    known = -(x - alpha * m) / variance
    torch.testing.assert_close(score(path, velocity, x, TIMES), known)
    torch.testing.assert_close(path.growth(TIMES) * x + path.score_rate(TIMES) * known, velocity)


@pytest.mark.parametrize("form", FORMS)
def test_diffusion_is_never_negative_and_scales(form):
    once, twice = (diffusion(PATHS["linear"], form, TIMES, norm) for norm in (1.0, 2.0))
    assert once.min() >= 0
    if form != "decreasing":
        torch.testing.assert_close(twice, 2 * once)


def test_unknown_diffusion_names_the_nearest():
    with pytest.raises(UserError, match="did you mean sigma"):
        diffusion(PATHS["linear"], "sigmas", TIMES)
