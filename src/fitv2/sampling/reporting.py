"""What a caller is told while images are made."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from fitv2.errors import UserError


class Reporting:
    """Tells the share done, by the caller's function or the pipeline's bar; and the caller of each step."""

    def __init__(
        self, pipeline: Any, progress: Callable[[float], None] | None, on_step_end: Any = None
    ) -> None:
        self.pipeline, self.progress, self.on_step_end = pipeline, progress, on_step_end
        self.bar: Any = None
        self.step, self.share = 0, 0.0

    def __enter__(self) -> Reporting:
        if not self.progress:
            self.bar = self.pipeline.progress_bar(total=100)
        return self

    def move(self, share: float) -> None:
        """Tell how much is done."""
        self.share = share
        if self.progress:
            self.progress(share)
        else:
            self.bar.update(round(100 * share) - self.bar.n)

    def end_step(self, latents: list[Tensor]) -> Sequence[Tensor] | None:
        """Call the caller after a step; the tokens that go on, where it gives some."""
        changed = self.on_step_end(self.pipeline, self.step, self.share, {"latents": latents})
        self.step += 1
        if changed is not None and not isinstance(changed, dict):
            raise UserError(f"`callback_on_step_end` gave a {type(changed).__name__}, not a dictionary")
        return None if changed is None else changed.get("latents")

    def __exit__(self, *_: Any) -> None:
        if self.bar is not None:
            self.bar.close()
