"""How images are made with a trained model.

Nothing heavy is imported here: the command line builds its help from these.
"""

from dataclasses import dataclass, fields, replace
from typing import ClassVar, Literal

from fitv2.config.architecture import Rope
from fitv2.config.names import (
    DEFAULT_SOLVERS,
    NOISY_SOLVERS,
    Diffusion,
    OwnAttentionScale,
    OwnExtrapolation,
    Solver,
    keys_of,
    solvers_of,
)
from fitv2.errors import UserError
from fitv2.limits import check_limits


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance; see `fitv2.diffusion.guidance`."""

    ADDED: ClassVar[frozenset[str]] = frozenset({"internal_scale", "internal_interval"})

    guidance_scale: float | None = None
    """How far to go beyond the conditional prediction; 1 is no guidance [default: the model's own]."""
    guidance_channels: int | None = None
    """Guide only so many of the latent's channels [default: all; the released code: 3]."""
    guidance_power: float | None = None
    """Exponent s of the power-cosine schedule, from full strength at noise to none at data [default: constant
    strength]."""
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    """Guide only between these times; 0 is noise, 1 is data. Outside, half the cost is saved."""
    internal_scale: float = 1.0
    """How far to go beyond the early head's prediction, for a model with one; 1 is no internal guidance, 1.5
    to 2.3 are usual. It costs no evaluation."""
    internal_interval: tuple[float, float] = (0.0, 0.7)
    """Guide so only between these times."""

    def __post_init__(self) -> None:
        """UserError for an interval that is none."""
        check_limits(self)
        for name in ("guidance_interval", "internal_interval"):
            start, stop = getattr(self, name)
            if not 0 <= start < stop <= 1:
                said = f"`{name}` is {start} {stop}"
                raise UserError(f"{said}; it must be two rising times, 0 (noise) to 1 (data)")


RESTART = 0.7  # distances are alike from here on: docs/results/extrapolation.md


@dataclass(frozen=True)
class Positions:
    """How images beyond the trained sizes are made; what is left out is the model's own.

    By itself an image of more tokens than trained on grows: see `restart`.
    """

    extrapolation: OwnExtrapolation = "own"
    """pi: positions scaled down. ntk: a larger base. ntk-by-parts and yarn: per frequency. none: as they are.
    own: as the model has them."""
    attention_scale: OwnAttentionScale = "own"
    """Sharper attention on larger grids: the paper's Eq. 15, the released code's pro1 and pro2, or by the
    tokens alone. own: as the model has it, and none with --extrapolation."""
    per_axis: bool = True
    """Scale rows and columns each by its own length (the paper's Vision…); else both by the longer."""
    train_side: int | None = None
    """Rows of the largest square trained on, in tokens [default: the model's own]."""
    restart: float | None = None
    """Make images of more tokens than trained on at the trained size first, enlarge them, and make them on
    from this time, 0 noise to 1 data. 0: at their own size at once [default: 0.7; 0 with another
    extrapolation or attention scale, and without a flow]."""

    def __post_init__(self) -> None:
        """UserError for a number outside its range."""
        check_limits(self)

    @property
    def are_own(self) -> bool:
        """Whether positions are scaled as the model has them."""
        return (self.extrapolation, self.attention_scale) == ("own", "own")

    def restart_time(self, is_flow: bool) -> float:
        """See `restart`. Raises UserError for one that is asked of a model without a flow."""
        if self.restart and not is_flow:
            raise UserError("`restart` is for models with a flow, not for a DDPM")
        if self.restart is not None:
            return self.restart
        return RESTART if is_flow and self.are_own else 0.0

    def apply(self, own: Rope, trained: int, unit: int) -> Rope:
        """A model's positions, scaled so.

        `trained` is the side of the largest square trained on, in tokens of `unit` pixels. Raises UserError
        where nothing is scaled.
        """
        if self.are_own:
            if self.train_side is not None or not self.per_axis:
                raise UserError("`train_side` and `per_axis` do nothing without `extrapolation`")
            return own
        return replace(
            own,
            extrapolation=own.extrapolation if self.extrapolation == "own" else self.extrapolation,
            attention_scale="none" if self.attention_scale == "own" else self.attention_scale,
            per_axis=own.per_axis if self.extrapolation == "own" else self.per_axis,
            train_side=next(s for s in (self.train_side, own.train_side, trained) if s is not None),
            pixels_per_token=unit,
            grid=None,
        )


# By setting, the solvers that read it, where not all do.
READ_BY = {
    "shift": solvers_of("FIXED", "MULTISTEP", "JUMPS") + keys_of("fitv2.diffusion.scheduled:SCHEDULERS"),
    **dict.fromkeys(("rtol", "atol"), solvers_of("ADAPTIVE")),
    **dict.fromkeys(("diffusion", "diffusion_norm", "last_step", "last_step_size"), solvers_of("STOCHASTIC")),
    "eta": ("ddim",),
}


@dataclass(frozen=True)
class Sampling:
    """How a trained model's flow is followed."""

    solver: Solver | None = None
    """ab2 takes one evaluation a step, heun two; dopri5 to adaptive-heun choose their steps; euler-maruyama
    and stochastic-heun add noise along the way; unipc and dpm++ are those of diffusers; any-step is for
    any-step models, ddpm and ddim are for FiT v1 [default: ab2; any-step or ddpm for such models]."""
    steps: int | None = None
    """Steps of the solver [default: 25; 4 of any-step; 250 of a stochastic one, ddpm and ddim]."""
    shift: float = 1.0
    """Above 1 steps are shorter near the noise and longer near the data, below 1 the other way round."""
    rtol: float = 1e-3
    """Relative error per step that a solver which chooses its steps allows; added to the absolute one."""
    atol: float = 1e-4
    """Absolute error per step that it allows."""
    diffusion: Diffusion = "sigma"
    """Strength of the noise along the way of a stochastic solver."""
    diffusion_norm: float = 1.0
    """Factor on the strength of that noise."""
    last_step: Literal["mean", "tweedie", "euler", "none"] = "mean"
    """A stochastic solver's last step, which adds no noise."""
    last_step_size: float = 0.04
    """Length of the last step, of the time from 0 to 1."""
    eta: float = 0.0
    """Noise of ddim: 0 is none, 1 that of ddpm."""

    def __post_init__(self) -> None:
        """UserError for a number outside its range."""
        check_limits(self)

    def resolve(self, objective: str = "flow") -> tuple[str, int]:
        """Solver and steps; where they were not chosen, those that models with this objective use.

        Raises UserError for a setting that the solver does not read.
        """
        solver, steps = DEFAULT_SOLVERS.get(objective, DEFAULT_SOLVERS["flow"])
        if self.solver not in (None, solver):
            solver, steps = self.solver, 250 if self.solver in NOISY_SOLVERS else 25
        for field in fields(self):
            if (
                solver not in READ_BY.get(field.name, (solver,))
                and getattr(self, field.name) != field.default
            ):
                named = solver if isinstance(solver, str) else type(solver).__name__
                raise UserError(f"`{field.name}` does nothing with `solver` {named}")
        return solver, self.steps or steps
