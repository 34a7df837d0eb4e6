"""The oracle is the process as Nichol & Dhariwal write it, in float64, respaced by new betas."""

import math

import numpy as np
import pytest
import torch

from conftest import noise_of
from fitv2.conditioning import Condition
from fitv2.config import Architecture, Sampling, Training
from fitv2.diffusion.ddpm import DDPM, KEPT, STEPS, denoise, scheduler
from fitv2.errors import UserError
from fitv2.runtime.rng import generator
from fitv2.tokens import Layout

BETAS = np.linspace(1e-4, 0.02, 1000)


def respaced(steps):
    """Kept steps, spread evenly from 0 to 999, and the betas between them."""
    stride = 999 / (steps - 1) if steps > 1 else 0
    kept = [round(place) for place in np.cumsum([0.0] + [stride] * (steps - 1)).tolist()]
    alphas = np.cumprod(1 - BETAS)[kept]
    return kept, 1 - alphas / np.append(1.0, alphas[:-1])


class Oracle:
    """p(x_{t−1} | x_t) of a process with these betas, for step i of them."""

    def __init__(self, betas):
        self.betas, self.kept = betas, np.cumprod(1 - betas)
        self.before = np.append(1.0, self.kept[:-1])
        self.variance = betas * (1 - self.before) / (1 - self.kept)
        self.log_variance = np.log(np.append(self.variance[1], self.variance[1:]))

    def posterior(self, i, data, x):
        of_data = self.betas[i] * np.sqrt(self.before[i]) / (1 - self.kept[i])
        of_noisy = (1 - self.before[i]) * np.sqrt(1 - self.betas[i]) / (1 - self.kept[i])
        return of_data * data + of_noisy * x

    def step(self, i, x, noise, ranges):
        data = (x - np.sqrt(1 - self.kept[i]) * noise) / np.sqrt(self.kept[i])
        share = (ranges + 1) / 2
        log_variance = share * np.log(self.betas[i]) + (1 - share) * self.log_variance[i]
        return self.posterior(i, data, x), log_variance

    def ddim(self, i, x, noise, eta, drawn):
        data = (x - np.sqrt(1 - self.kept[i]) * noise) / np.sqrt(self.kept[i])
        sigma = eta * np.sqrt((1 - self.before[i]) / (1 - self.kept[i]) * (1 - self.kept[i] / self.before[i]))
        mean = data * np.sqrt(self.before[i]) + np.sqrt(1 - self.before[i] - sigma**2) * noise
        return mean + (sigma * drawn if i else 0)


def output(x, step):
    """Some noise and variance that depend on all there is."""
    t = step.double() / STEPS
    return torch.cat([torch.sin(2 * x + t), torch.cos(3 * x) * (1 - t)], dim=1)


LAYOUT = Layout.of([(2, 3), (1, 4)])


@pytest.mark.parametrize("steps", [2, 10, 21, 43, 250, 1000])
def test_ddpm_steps_and_respacing_equal_the_released_process(steps):
    layout = Layout.of([(2, 3)])
    start = noise_of(layout, 3)
    made = denoise(output, layout, start, [generator(7)], steps=steps)
    kept, betas = respaced(steps)
    assert scheduler("ddpm", steps).timesteps.tolist() == kept[::-1]
    oracle, x = Oracle(betas), start.double().numpy()
    rng = generator(7)
    for i in reversed(range(steps)):
        out = output(torch.from_numpy(x), torch.tensor(kept[i])).numpy()
        mean, log_variance = oracle.step(i, x, *np.split(out, 2, axis=1))
        drawn = torch.randn(6, 3, generator=rng).double().numpy() if i else 0
        x = mean + np.exp(0.5 * log_variance) * drawn
    torch.testing.assert_close(made.double(), torch.from_numpy(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("steps", [10, 50, 250])
def test_ddim_steps_equal_the_released_process(steps, eta):
    layout = Layout.of([(2, 3)])
    start = noise_of(layout, 3)
    made = denoise(output, layout, start, [generator(7)], solver="ddim", steps=steps, eta=eta)
    kept = list(range(0, 1000, 1000 // steps))
    alphas = np.cumprod(1 - BETAS)[kept]
    oracle, x = Oracle(1 - alphas / np.append(1.0, alphas[:-1])), start.double().numpy()
    rng = generator(7)
    for i in reversed(range(steps)):
        noise = output(torch.from_numpy(x), torch.tensor(kept[i])).numpy()[:, :3]
        x = oracle.ddim(i, x, noise, eta, torch.randn(6, 3, generator=rng).double().numpy() if eta else 0)
    torch.testing.assert_close(made.double(), torch.from_numpy(x), rtol=1e-4, atol=1e-4)


def test_an_image_does_not_depend_on_its_neighbours():
    start = noise_of(LAYOUT, 3)
    both = denoise(output, LAYOUT, start, [generator(7), generator(8)], steps=20)
    alone = denoise(output, Layout.of([(1, 4)]), start[6:], [generator(8)], steps=20)
    torch.testing.assert_close(both[6:], alone)


@pytest.mark.parametrize(("solver", "steps"), [("ddpm", 1001), ("ddim", 300)])
def test_steps_that_do_not_fit_are_refused(solver, steps):
    with pytest.raises(UserError, match=f"`steps` is {steps}; with {solver} it must be"):
        scheduler(solver, steps)


def test_corruption_is_the_closed_form():
    data, noise = noise_of(LAYOUT, 3), noise_of(LAYOUT, 3, first=5)
    sample = DDPM().add_noise(data, LAYOUT, noise, torch.tensor([0, 999]))
    for image, step in ((slice(0, 6), 0), (slice(6, 10), 999)):
        expected = KEPT[step].sqrt() * data[image] + (1 - KEPT[step]).sqrt() * noise[image]
        torch.testing.assert_close(sample.x_TC[image], expected.float())


def test_steps_are_drawn_and_spaced_evenly():
    rng = torch.Generator().manual_seed(0)
    drawn = torch.stack([DDPM().draw_times(rng)[0] for _ in range(5000)])
    assert drawn.min() >= 0
    assert drawn.max() <= 999
    assert drawn.double().mean().item() == pytest.approx(499.5, abs=15)
    assert DDPM().quantiles(torch.tensor([0.0, 0.5, 1 - 1e-7])).tolist() == [999, 500, 0]
    assert DDPM().progress(torch.tensor([0, 500, 999])).tolist() == pytest.approx([1, 0.5, 0.001], abs=1e-6)


def normal_cdf(z):
    return 0.5 * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)))


def test_the_hybrid_loss_is_squared_error_plus_the_bound_in_bits():
    oracle, steps = Oracle(BETAS), torch.tensor([0, 600])
    data = noise_of(LAYOUT, 3).clamp(-1.2, 1.2)
    sample = DDPM().add_noise(data, LAYOUT, noise_of(LAYOUT, 3, first=5), steps)
    out = output(sample.x_TC.double(), torch.tensor(300)).float()
    losses = DDPM().error(out, sample)
    noise, ranges = np.split(out.double().numpy(), 2, axis=1)
    x, x0 = sample.x_TC.double().numpy(), data.double().numpy()
    squared = (noise - sample.noise_TC.double().numpy()) ** 2

    mean, log_variance = oracle.step(600, x[6:], noise[6:], ranges[6:])
    true_log = oracle.log_variance[600]
    true = oracle.posterior(600, x0[6:], x[6:])
    kl = 0.5 * (log_variance - true_log - 1 + np.exp(true_log - log_variance)
                + (true - mean) ** 2 * np.exp(-log_variance))  # fmt: skip
    expected = squared[6:].mean() + kl.mean() / math.log(2)
    assert losses[1].item() == pytest.approx(expected, rel=1e-4)

    mean, log_variance = oracle.step(0, x[:6], noise[:6], ranges[:6])
    scale = np.exp(-0.5 * log_variance)
    above = normal_cdf((x0[:6] - mean + 1 / 255) * scale)
    below = normal_cdf((x0[:6] - mean - 1 / 255) * scale)
    inside = np.where(x0[:6] < -0.999, above, np.where(x0[:6] > 0.999, 1 - below, above - below))
    expected = squared[:6].mean() - np.log(np.clip(inside, 1e-12, None)).mean() / math.log(2)
    assert losses[0].item() == pytest.approx(expected, rel=1e-3)


def test_the_bound_teaches_the_variance_alone():
    data = noise_of(LAYOUT, 3)
    sample = DDPM().add_noise(data, LAYOUT, noise_of(LAYOUT, 3, first=5), torch.tensor([300, 600]))
    out = output(sample.x_TC, torch.tensor(300)).float().requires_grad_()
    (gradient,) = torch.autograd.grad(DDPM().error(out, sample).sum(), out)
    error = out[:, :3] - sample.noise_TC
    share = torch.tensor([1 / 18.0] * 6 + [1 / 12.0] * 4)[:, None]
    torch.testing.assert_close(gradient[:, :3], 2 * error * share)
    assert gradient[:, 3:].abs().max() > 0


def test_the_loss_of_a_model_is_the_error_of_what_it_says():
    sample = DDPM().add_noise(
        noise_of(LAYOUT, 3), LAYOUT, noise_of(LAYOUT, 3, first=5), torch.tensor([300, 0])
    )
    out, asked = output(sample.x_TC, torch.tensor(300)).bfloat16(), []
    condition = Condition.of(label=torch.arange(2))
    losses = DDPM().loss(lambda *inputs: asked.append(inputs) or out, sample, condition)
    assert asked == [(sample.x_TC, LAYOUT, sample.t_B, condition)]
    for loss_B in losses:
        assert torch.equal(loss_B, DDPM().error(out, sample))


@pytest.mark.parametrize(
    ("sampling", "settings"),
    [
        (Sampling(), {"solver": "ddpm", "steps": 250}),
        (Sampling("ddpm", 20), {"solver": "ddpm", "steps": 20}),
        (Sampling("ddim", 10, eta=0.7), {"solver": "ddim", "steps": 10, "eta": 0.7}),
    ],
)
def test_images_are_made_as_the_settings_say(sampling, settings):
    start, seen = noise_of(LAYOUT, 3), []
    rngs = [generator(7), generator(8)]
    made = DDPM().generate(output, LAYOUT, start, rngs, sampling, lambda done, x: seen.append(done) or x)
    expected = denoise(output, LAYOUT, start, [generator(7), generator(8)], **settings)
    assert torch.equal(made, expected)
    assert len(seen) == settings["steps"]
    assert seen[-1] == 1


def test_a_solver_of_flows_is_refused():
    with pytest.raises(UserError, match="heun follows a flow; this model is a DDPM: choose ddpm or ddim"):
        DDPM().generate(output, LAYOUT, noise_of(LAYOUT, 3), [], Sampling("heun"))


def test_what_a_flow_alone_can_have_is_refused():
    tiny = {"depth": 1, "width": 32, "heads": 2, "path": "ddpm"}
    noise = Architecture(**tiny, prediction="noise")
    DDPM(noise, Training())
    for changes in ({}, {"prediction": "score"}, {"prediction": "noise", "time_shift": 2.0}):
        with pytest.raises(UserError, match="predicts noise, and its times are not shifted"):
            DDPM(Architecture(**tiny, **changes))
    with pytest.raises(UserError, match="`direction_weight` is for velocities"):
        DDPM(noise, Training(direction_weight=0.5))
    with pytest.raises(UserError, match="`loss_weight` is for flows"):
        DDPM(noise, Training(loss_weight="velocity"))
