"""The likelihood of Gaussians, which is known."""

import math

import pytest
import torch

from conftest import GAUSSIAN_MEAN as MEAN
from conftest import GAUSSIAN_STD as STD
from conftest import gaussian, noise_of
from fitv2.config import Sampling
from fitv2.diffusion.flow import Flow
from fitv2.diffusion.likelihood import log_likelihood
from fitv2.diffusion.paths import PATHS
from fitv2.runtime.rng import generator
from fitv2.tokens import Layout


def known_log_density(data, lengths):
    per_number = -0.5 * ((data - MEAN) / STD) ** 2 - math.log(STD) - 0.5 * math.log(2 * math.pi)
    return torch.stack([image.sum() for image in per_number.split(lengths)])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("solver", ["dopri5", "heun"])
def test_log_likelihood_of_a_gaussian(path, solver):
    """To 1e-3 a dimension; its velocity has a diagonal Jacobian, so one probe is exact."""
    flow, layout = Flow(path), Layout.of([(3, 4), (1, 2), (5, 5)])
    data = MEAN + STD * noise_of(layout, 3)
    rngs = [generator(i) for i in range(3)]
    precise = {"rtol": 1e-6, "atol": 1e-6} if solver == "dopri5" else {}
    sampling = Sampling(solver, 200, **precise)
    ours = log_likelihood(flow, gaussian(flow, layout), layout, data, rngs, sampling)
    dimensions = torch.tensor(layout.lengths) * 3
    error = (ours - known_log_density(data, layout.lengths)).abs() / dimensions
    assert error.max() < 1e-3


def test_log_likelihood_of_a_correlated_gaussian_takes_more_probes():
    """Data A·z with A not diagonal: the estimate is right on average, and closer with more probes."""
    flow, layout = Flow(), Layout.of([(1, 1)] * 64)
    a = torch.tensor([[1.0, 0.0], [0.8, 0.6]])
    covariance = a @ a.T

    def velocity(x, t):
        t = float(t.flatten()[0])
        at = t**2 * covariance + (1 - t) ** 2 * torch.eye(2)
        return x @ torch.linalg.solve(at, t * covariance - (1 - t) * torch.eye(2))

    data = noise_of(layout, 2) @ a.T
    exact = torch.distributions.MultivariateNormal(torch.zeros(2), covariance).log_prob(data)
    errors = []
    for probes in (1, 64):
        rngs = [generator(i) for i in range(64)]
        settings = Sampling("heun", 100)
        ours = log_likelihood(flow, velocity, layout, data, rngs, settings, probes=probes)
        errors.append((ours - exact).abs().mean().item())
        assert (ours - exact).mean().abs() < 4 * errors[-1] / 8 + 1e-3  # unbiased
    assert errors[1] < 0.2 * errors[0]  # an eighth is expected


def test_log_likelihood_does_not_depend_on_the_neighbours():
    flow, layout = Flow(), Layout.of([(3, 4), (1, 2)])
    data = noise_of(layout, 3)
    both = log_likelihood(flow, gaussian(flow, layout), layout, data, [generator(5), generator(6)])
    small = Layout.of([(1, 2)])
    alone = log_likelihood(flow, gaussian(flow, small), small, data[12:], [generator(6)])
    torch.testing.assert_close(both[1:], alone)
