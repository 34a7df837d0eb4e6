"""FiTv2: a diffusion transformer for images of every size and shape, on packed tokens.

`import fitv2` is instant; what you name is imported when you name it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fitv2.checkpoint import Card, load_model, save_model
    from fitv2.conditioning import Condition
    from fitv2.model import FiT
    from fitv2.pipeline import FiTPipeline
    from fitv2.tokens import Layout, PackedTokens, pack, unpack

__version__ = "0.1.0"

_HOME = {
    "Card": "checkpoint",
    "Condition": "conditioning",
    "FiT": "model",
    "FiTPipeline": "pipeline",
    "Layout": "tokens",
    "PackedTokens": "tokens",
    "load_model": "checkpoint",
    "pack": "tokens",
    "save_model": "checkpoint",
    "unpack": "tokens",
}
__all__ = [
    "Card",
    "Condition",
    "FiT",
    "FiTPipeline",
    "Layout",
    "PackedTokens",
    "load_model",
    "pack",
    "save_model",
    "unpack",
]


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'fitv2' has no attribute {name!r}")
    return getattr(import_module(f"fitv2.{_HOME[name]}"), name)
