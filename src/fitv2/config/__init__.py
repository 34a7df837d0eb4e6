"""What can be chosen, as frozen values: the model, its training, its sampling."""

from fitv2.config.architecture import Architecture, Network, Rope
from fitv2.config.encoding import Encoding
from fitv2.config.names import (
    ANY_STEP,
    OBJECTIVE_OF_PATH,
    SOLVERS,
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
    "FREE",
    "OBJECTIVE_OF_PATH",
    "RESTART",
    "SOLVERS",
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
