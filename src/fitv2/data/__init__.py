"""What training reads: token datasets, and which images a step takes."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fitv2.data.dataset import TokenDataset

__all__ = ["TokenDataset"]


def __getattr__(name: str) -> Any:
    if name != "TokenDataset":
        raise AttributeError(f"module 'fitv2.data' has no attribute {name!r}")
    from fitv2.data.dataset import TokenDataset

    return TokenDataset
