"""Diffusers' schedulers on packed tokens, and the multistep solver of our own."""

import math
from itertools import pairwise

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)

from conftest import noise_of
from fitv2.config import Sampling
from fitv2.diffusion import solvers
from fitv2.diffusion.flow import Flow
from fitv2.diffusion.scheduled import follow_scheduler
from fitv2.diffusion.transport import times_between
from fitv2.errors import UserError
from fitv2.pipeline import FiTPipeline
from fitv2.runtime.rng import generator
from fitv2.tokens import Layout

LAYOUT = Layout.of([(2, 3), (4, 1)])
FOR_FLOWS = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
STD = 0.5  # of the data below


def to_gaussian(x, t):
    """The velocity from noise to data of N(1, STD²), exact; it counts its calls."""
    to_gaussian.calls += 1
    variance = (t * STD) ** 2 + (1 - t) ** 2
    return 1 + (t * STD**2 - (1 - t)) / variance * (x - t)


def solution(noise):
    return 1 + STD * noise


@pytest.fixture(autouse=True)
def calls():
    to_gaussian.calls = 0


def distance(made, noise):
    return float((made - solution(noise)).square().mean().sqrt())


def test_multistep_is_of_second_order_with_one_evaluation_a_step():
    noise = noise_of(LAYOUT, 4)
    found = []
    for steps in (20, 40, 80):
        to_gaussian.calls = 0
        found.append(distance(solvers.adams_bashforth(to_gaussian, noise, times_between(0, 1, steps)), noise))
        assert to_gaussian.calls == steps
    orders = [math.log2(a / b) for a, b in pairwise(found)]
    assert all(1.7 < order < 2.4 for order in orders), found


def test_multistep_keeps_its_order_on_uneven_times():
    noise = noise_of(LAYOUT, 4)
    found = [
        distance(solvers.adams_bashforth(to_gaussian, noise, times_between(0, 1, steps, shift=0.5)), noise)
        for steps in (40, 80)
    ]
    assert 1.7 < math.log2(found[0] / found[1]) < 2.4


def test_a_shift_makes_steps_shorter_near_the_noise():
    times = times_between(0.1, 0.9, 8, shift=3)
    assert times[0] == pytest.approx(0.1)
    assert times[-1] == pytest.approx(0.9)
    assert bool((times.diff().diff() > 0).all())
    left = torch.linspace(1, 0, 9)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=left[:-1].tolist())
    assert torch.allclose(1 - times_between(0, 1, 8, shift=3), scheduler.sigmas, atol=1e-6)


@pytest.mark.parametrize(
    ("scheduler", "within"),
    [
        (FlowMatchEulerDiscreteScheduler(), 0.02),
        (FlowMatchHeunDiscreteScheduler(), 0.002),
        (UniPCMultistepScheduler(**FOR_FLOWS), 0.002),
        (DPMSolverMultistepScheduler(**FOR_FLOWS), 0.005),
    ],
)
def test_diffusers_schedulers_lead_from_noise_to_data(scheduler, within):
    noise = noise_of(LAYOUT, 4)
    shares = []
    made = follow_scheduler(
        scheduler, Flow(), to_gaussian, noise, 50, on_step=lambda done, x: shares.append(done) or x
    )
    assert distance(made, noise) < within
    assert shares[-1] == 1
    assert shares == sorted(shares)
    again = follow_scheduler(scheduler, Flow(), to_gaussian, noise, 50)
    assert torch.equal(made, again)  # nothing of the first time is left in it


@pytest.mark.parametrize("begin", [0.3, 0.505])
@pytest.mark.parametrize("kind", [UniPCMultistepScheduler, FlowMatchHeunDiscreteScheduler])
def test_they_start_on_the_way_too(kind, begin):
    noise = noise_of(LAYOUT, 4)
    there = begin + math.sqrt((begin * STD) ** 2 + (1 - begin) ** 2) * noise  # where the exact flow is
    scheduler = kind(**(FOR_FLOWS if kind is UniPCMultistepScheduler else {}))
    made = follow_scheduler(scheduler, Flow(), to_gaussian, there, 50, begin)
    assert distance(made, noise) < 0.002
    assert to_gaussian.calls < (40 if kind is UniPCMultistepScheduler else 80)


@pytest.mark.parametrize(
    ("scheduler", "said"),
    [
        (DDIMScheduler(), "use_flow_sigmas"),
        (UniPCMultistepScheduler(), "use_flow_sigmas"),
        (UniPCMultistepScheduler(use_flow_sigmas=True), "flow_prediction"),
        (DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++", **FOR_FLOWS), "adds noise"),
        (FlowMatchEulerDiscreteScheduler(stochastic_sampling=True), "adds noise"),
        (FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), "says"),
    ],
)
def test_one_that_does_not_fit_is_refused(scheduler, said):
    with pytest.raises(UserError, match=said):
        follow_scheduler(scheduler, Flow(), to_gaussian, noise_of(LAYOUT, 4), 5)


def test_other_paths_and_the_way_back_are_refused():
    with pytest.raises(UserError, match="linear, not gvp"):
        follow_scheduler(UniPCMultistepScheduler(**FOR_FLOWS), Flow("gvp"), to_gaussian, torch.zeros(1, 1), 5)
    with pytest.raises(UserError, match="towards noise"):
        output = lambda x, t: x  # noqa: E731
        Flow().invert(output, LAYOUT, noise_of(LAYOUT, 4), [], Sampling("unipc"))
    with pytest.raises(UserError, match="start is at time"):
        follow_scheduler(
            UniPCMultistepScheduler(**FOR_FLOWS), Flow(), to_gaussian, torch.zeros(1, 1), 5, 0.99
        )


@pytest.mark.parametrize("solver", ["ab2", "unipc", "dpm++", FlowMatchHeunDiscreteScheduler()])
def test_a_pack_is_made_as_each_image_alone(pixel_model, solver):
    pipeline = FiTPipeline.from_pretrained(pixel_model)
    labels, sizes = ["red", "blue", "red"], [(16, 16), (8, 24), (12, 8)]
    each = {"sampling": Sampling(solver, 4), "output_type": "np"}
    rows, columns = zip(*sizes, strict=True)
    together = pipeline(labels, rows, columns, generator=[generator(3, i) for i in range(3)], **each).images
    for i, (label, size) in enumerate(zip(labels, sizes, strict=True)):
        alone = pipeline(label, *size, generator=[generator(3, i)], **each).images[0]
        assert abs(together[i] - alone).max() < 2 / 255


def test_the_pipelines_scheduler_is_followed_and_kept(pixel_model, tmp_path):
    pipeline = FiTPipeline.from_pretrained(pixel_model)
    make = lambda p, **how: p("red", generator=generator(0), output_type="np", **how).images  # noqa: E731
    expected = make(pipeline, sampling=Sampling("unipc", 6))
    pipeline.scheduler = UniPCMultistepScheduler(**FOR_FLOWS)
    assert (make(pipeline, num_inference_steps=6) == expected).all()
    pipeline.save_pretrained(tmp_path / "saved")
    opened = FiTPipeline.from_pretrained(tmp_path / "saved")
    assert isinstance(opened.scheduler, UniPCMultistepScheduler)
    assert (make(opened, num_inference_steps=6) == expected).all()
    heun = make(opened, sampling=Sampling("heun", 6))
    assert not (heun == expected).all()  # what is said goes before what is kept
