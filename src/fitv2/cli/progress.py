"""Progress bars of the commands. What they measure knows nothing of them: it calls a function."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from tqdm import tqdm

from fitv2.config import Training


@contextlib.contextmanager
def share_bar(title: str, total: int, unit: str) -> Iterator[Callable[[float], None]]:
    """A progress bar that is told the share done, 0 to 1."""
    with contextlib.ExitStack() as stack:
        bars: list[Any] = []

        def progress(share: float) -> None:
            if not bars:  # only now: what cannot start shows its reason and no bar
                bars.append(
                    stack.enter_context(tqdm(desc=title, total=total, unit=unit, bar_format=_SHARE_BAR))
                )
            bars[0].update(share * total - bars[0].n)

        yield progress


_SHARE_BAR = "{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} [{elapsed}<{remaining}, {rate_fmt}]"


@contextlib.contextmanager
def stages_bar(unit: str, shown: bool = True) -> Iterator[Callable[[str, int, int | None], None]]:
    """One bar for stages after one another: told the stage, how many are done, and of how many.

    What was done before a stage began counts for no speed. The last stage's bar stays.
    """
    bars: dict[str, Any] = {}

    def progress(stage: str, done: int, total: int | None) -> None:
        if stage not in bars:  # only now: what cannot start shows its reason and no bar
            clear()
            bars[stage] = tqdm(
                desc=stage, total=total, initial=done, unit=unit, disable=not shown, smoothing=0.05
            )
        bars[stage].update(done - bars[stage].n)

    def clear() -> None:
        while bars:
            _, bar = bars.popitem()
            bar.leave = False
            bar.close()

    try:
        yield progress
    finally:
        for bar in bars.values():
            bar.close()


@contextlib.contextmanager
def training_bar(training: Training) -> Iterator[Callable[..., None]]:
    """A bar over the steps, or over the seconds when the run is limited by time."""
    with contextlib.ExitStack() as stack:
        bars: list[Any] = []

        def report(progress: Any) -> None:
            if not bars:  # only now: a run that cannot start shows its reason and no bar
                bars.append(stack.enter_context(new_bar(training, progress.step - 1)))
            (bar,) = bars
            rate = f"{progress.images_per_second:.0f}"
            bar.set_postfix({"step": progress.step, "loss": f"{progress.loss:.4f}", "image/s": rate})
            elapsed = min(bar.total, bar.format_dict["elapsed"])
            bar.update((progress.step if training.minutes is None else elapsed) - bar.n)

        yield report


def new_bar(training: Training, done: int) -> Any:
    """The bar of a run that has `done` steps behind it."""
    if training.minutes is None:
        return tqdm(desc="train", total=training.steps, initial=done, unit="step")
    return tqdm(desc="train", total=round(60 * training.minutes), bar_format=_TIME_BAR)


_TIME_BAR = "{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} s [{remaining} left{postfix}]"
