"""Names that can be chosen, read from the registries that hold them, and what follows from a name.

Nothing heavy is imported here: the command line builds its help from these.
"""

from typing import TYPE_CHECKING, Literal

from fitv2.runtime.registry import keys_of, one_of

OBJECTIVE_OF_PATH = {"ddpm": "ddpm"}  # paths that are no flow's

if TYPE_CHECKING:
    Extrapolation = str
    OwnExtrapolation = str
    AttentionScale = str
    OwnAttentionScale = str
    PathName = str
    Prediction = str
    LossWeight = str
    Times = str
    Diffusion = str
    Objective = str
    Optimizer = str
    Solver = str
else:  # the one list of each is the registry itself
    Extrapolation = one_of("fitv2.rope:METHODS", first=("none",))
    OwnExtrapolation = one_of("fitv2.rope:METHODS", first=("own", "none"))
    AttentionScale = one_of("fitv2.rope:SCALES", first=("none",))
    OwnAttentionScale = one_of("fitv2.rope:SCALES", first=("own", "none"))
    PathName = one_of("fitv2.diffusion.paths:PATHS", last=tuple(OBJECTIVE_OF_PATH))
    Prediction = one_of("fitv2.diffusion.flow:PREDICTIONS")
    LossWeight = one_of("fitv2.diffusion.flow:WEIGHTS")
    Times = one_of("fitv2.diffusion.flow:TIMES")
    Diffusion = one_of("fitv2.diffusion.paths:FORMS")
    Objective = one_of("fitv2.diffusion.objective:OBJECTIVES")
    Optimizer = one_of("fitv2.training.optim:OPTIMIZERS")
    Solver = one_of(
        *(f"fitv2.diffusion.solvers:{t}" for t in ("FIXED", "MULTISTEP", "ADAPTIVE", "STOCHASTIC", "JUMPS")),
        "fitv2.diffusion.scheduled:SCHEDULERS", "fitv2.diffusion.ddpm:SCHEDULERS",
    )  # fmt: skip


def solvers_of(*tables: str) -> tuple[str, ...]:
    """The solvers of our own in these tables."""
    return tuple(name for table in tables for name in keys_of(f"fitv2.diffusion.solvers:{table}"))


NOISY_SOLVERS = (*solvers_of("STOCHASTIC"), *keys_of("fitv2.diffusion.ddpm:SCHEDULERS"))

ANY_STEP = "any-step"  # objective and solver
# By objective, solver and steps if nothing is said: docs/results/solvers.md and any-step.md.
DEFAULT_SOLVERS = {"flow": ("ab2", 25), "ddpm": ("ddpm", 250), ANY_STEP: (ANY_STEP, 4)}
OUTPUTS = {"ddpm": 2}  # by objective: how many a model has for each channel, where that is not one

Precision = Literal["float32", "bfloat16"]
