"""The likelihood of data under a flow, as in FFJORD (arXiv 1810.01367)."""

import math
from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from fitv2.config import Sampling
from fitv2.diffusion import solvers
from fitv2.diffusion.solvers import Velocity
from fitv2.diffusion.transport import Field, transport
from fitv2.errors import UserError
from fitv2.tokens import Layout


def log_likelihood(
    flow: Field,
    velocity: Velocity,
    layout: Layout,
    x_TC: Tensor,
    generators: Sequence[Generator],
    sampling: Sampling = Sampling(solver="dopri5", rtol=1e-5, atol=1e-5),  # noqa: B008  frozen
    *,
    probes: int = 1,
) -> Tensor:
    """log p(data) of each image of tokens `x_TC`, (B,), natural, by the instantaneous change of variables.

    log p(x1) = log N(x0; 0, I) − ∫ div v dt along the ODE (Chen et al., arXiv 1806.07366). The divergence
    is Hutchinson's estimate with `probes` random signs a number, fixed along the way and drawn from
    each image's own generator: unbiased, and exact where the Jacobian is diagonal. `velocity` must not
    be guided. The estimate is of the density of latents, not of pixels.
    """
    if sampling.solver in solvers.STOCHASTIC or probes < 1:
        raise UserError("a likelihood needs an ODE solver and at least one probe")
    channels = x_TC.shape[1]
    shape = (probes, channels)
    drawn = [
        torch.randint(0, 2, (n, *shape), generator=rng)
        for n, rng in zip(layout.lengths, generators, strict=True)
    ]
    signs_TPC = (2.0 * torch.cat(drawn) - 1.0).to(x_TC.device)

    def augmented(state: Tensor, t: Tensor) -> Tensor:
        """The velocity, and beside it each token's part of the divergence as one more channel."""
        with torch.enable_grad():
            x = state[:, :channels].detach().requires_grad_()
            v = velocity(x, t)
            divergence = torch.zeros_like(x[:, :1])
            for i in range(probes):
                signs = signs_TPC[:, i]
                (gradient,) = torch.autograd.grad((v * signs).sum(), x, retain_graph=i + 1 < probes)
                divergence += (gradient * signs).sum(1, keepdim=True) / probes
        return torch.cat([v.detach(), divergence], dim=1)

    start = torch.cat([x_TC, torch.zeros_like(x_TC[:, :1])], dim=1)
    end = transport(flow, augmented, layout, start, generators, sampling, to_noise=True)
    per_token = -0.5 * (end[:, :channels].square() + math.log(2 * math.pi)).sum(1) + end[:, channels]
    return layout.sum_per_image(per_token)
