"""FiTv2: a diffusion transformer for images of every size and shape, on packed tokens.

`import fitv2` is instant; what you name is imported when you name it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fitv2.checkpoint import Card, load_model, save_model
    from fitv2.model import FiT
    from fitv2.sampling.generate import Request, generate, load_codec
    from fitv2.tokens import PackedTokens, pack, unpack

__version__ = "0.1.0"

_HOME = {
    "Card": "checkpoint",
    "FiT": "model",
    "PackedTokens": "tokens",
    "Request": "sampling.generate",
    "load_codec": "sampling.generate",
    "generate": "sampling.generate",
    "load_model": "checkpoint",
    "pack": "tokens",
    "save_model": "checkpoint",
    "unpack": "tokens",
}
__all__ = [
    "Card",
    "FiT",
    "PackedTokens",
    "Request",
    "generate",
    "load_codec",
    "load_model",
    "pack",
    "save_model",
    "unpack",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'fitv2' has no attribute {name!r}")
    return getattr(import_module(f"fitv2.{_HOME[name]}"), name)
