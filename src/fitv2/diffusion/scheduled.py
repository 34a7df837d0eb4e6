"""Diffusers' flow-matching schedulers, on packed tokens.

Their σ is 1 − t, and their model predicts noise − data, the negative of our velocity.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from fitv2.diffusion.solvers import OnStep, Velocity, no_change
from fitv2.errors import UserError


class Straight(Protocol):
    """What has to be known of a flow."""

    @property
    def path_name(self) -> str:
        """The name of the path."""

    def interval(self) -> tuple[float, float]:
        """The times between which the velocity is finite."""


def _unipc(shift: float) -> Any:
    from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler

    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)


def _dpm_solver(shift: float) -> Any:
    from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler

    return DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
    )


# UniPC (arXiv 2302.04867) and DPM-Solver++(2M) (arXiv 2211.01095), of order 2: an evaluation a step.
SCHEDULERS: dict[str, Callable[[float], Any]] = {"unipc": _unipc, "dpm++": _dpm_solver}


def scheduler_named(name: str, shift: float) -> Any:
    """The scheduler of that name in `SCHEDULERS`, with a shift of its times."""
    return SCHEDULERS[name](shift)


def check_scheduler(scheduler: Any) -> None:
    """UserError for one that is not made for flows, or adds noise along the way."""
    config, name = scheduler.config, type(scheduler).__name__
    if not (name.startswith("FlowMatch") or config.get("use_flow_sigmas")):
        raise UserError(
            f"{name} is not set for flows: give it use_flow_sigmas=True and "
            'prediction_type="flow_prediction", or take a FlowMatch one'
        )
    if config.get("use_flow_sigmas") and config.get("prediction_type") != "flow_prediction":
        raise UserError(f'{name} needs prediction_type="flow_prediction"')
    if config.get("stochastic_sampling") or "sde" in str(config.get("algorithm_type")):
        raise UserError(f"{name} adds noise along the way: `solver` euler-maruyama does so here")


def follow_scheduler(
    scheduler: Any,
    flow: Straight,
    velocity: Velocity,
    x_TC: Tensor,
    steps: int,
    begin: float = 0.0,
    on_step: OnStep = no_change,
) -> Tensor:
    """From `x_TC`, noise or what is at time `begin`, to data, by a scheduler's steps.

    From `begin` a step of Euler leads to the next of the scheduler's times. Raises UserError for a flow whose
    path is not linear, and for a scheduler that does not fit (`check_scheduler`).
    """
    check_scheduler(scheduler)
    if flow.path_name != "linear":
        raise UserError(f"diffusers' schedulers are for `path` linear, not {flow.path_name}")
    try:
        scheduler.set_timesteps(steps, device=x_TC.device)
    except ValueError as error:  # dynamic shifting, which wants to know the size of one image
        raise UserError(f"{type(scheduler).__name__} says: {error}") from error
    times = 1 - scheduler.sigmas[: len(scheduler.timesteps)].to(x_TC.device, torch.float32)
    times = times.clamp(*flow.interval())
    first = int((times < begin).sum())
    if first == len(times):
        raise UserError(f"the start is at time {begin:g}, behind the scheduler's last, {times[-1]:g}")
    first = int((times <= times[first]).sum()) - 1  # Heun's has the end of a step and the start of the next
    if first:
        x_TC = x_TC + (times[first] - begin) * velocity(x_TC, times.new_tensor(begin))
    scheduler.set_begin_index(first)
    for i in range(first, len(times)):
        slope = -velocity(x_TC, times[i])
        x_TC = scheduler.step(slope, scheduler.timesteps[i], x_TC, return_dict=False)[0]
        x_TC = on_step((i + 1 - first) / (len(times) - first), x_TC)
    return x_TC
