"""What can be chosen, as frozen values: the model, its training, its sampling."""

from fitv2.config.architecture import Architecture, Network, Rope
from fitv2.config.encoding import Encoding
from fitv2.config.names import (
    ANY_STEP,
    DEFAULT_SOLVERS,
    OBJECTIVE_OF_PATH,
    Diffusion,
    PathName,
    Precision,
    Prediction,
    Solver,
)
from fitv2.config.sampling import RESTART, Guidance, Positions, Sampling
from fitv2.config.training import FREE, Training

__all__ = [
    "ANY_STEP",
    "DEFAULT_SOLVERS",
    "FREE",
    "OBJECTIVE_OF_PATH",
    "RESTART",
    "Architecture",
    "Diffusion",
    "Encoding",
    "Guidance",
    "Network",
    "PathName",
    "Positions",
    "Precision",
    "Prediction",
    "Rope",
    "Sampling",
    "Solver",
    "Training",
]
