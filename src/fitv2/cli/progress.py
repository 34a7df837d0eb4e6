"""Progress bars of the commands. What they measure knows nothing of them: it calls a function."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

from tqdm import tqdm

from fitv2.config import Training

EVERY = 30.0  # seconds between lines where no terminal is


class Lines:
    """A stream on which each state of a bar is a line of its own, for a log file."""

    encoding = "utf-8"

    def __init__(self) -> None:
        self.last = ""

    def write(self, text: str) -> None:
        """Write what a bar says, unless it has nothing new to say."""
        said = text.strip("\r\n ")
        if said and said != self.last:
            self.last = said
            print(said, file=sys.stderr)

    def flush(self) -> None:
        """Nothing waits here."""
        sys.stderr.flush()


def bar(**options: Any) -> Any:
    """A progress bar; in a log file a line now and then."""
    if sys.stderr.isatty():
        return tqdm(**options)
    return tqdm(
        **options, file=Lines(), mininterval=EVERY, maxinterval=EVERY, miniters=0, ncols=100, ascii=True
    )


@contextlib.contextmanager
def share_bar(title: str, total: int, unit: str, *, shown: bool = True) -> Iterator[Callable[[float], None]]:
    """A progress bar that is told the share done, 0 to 1."""
    with contextlib.ExitStack() as stack:
        bars: list[Any] = []

        def progress(share: float) -> None:
            if not bars:  # only now: what cannot start shows its reason and no bar
                options = {"desc": title, "total": total, "unit": unit, "bar_format": _SHARE_BAR}
                bars.append(stack.enter_context(bar(**options, disable=not shown)))
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
            bars[stage] = bar(
                desc=stage, total=total, initial=done, unit=unit, disable=not shown, smoothing=0.05
            )
        bars[stage].update(done - bars[stage].n)

    def clear() -> None:
        while bars:
            _, last = bars.popitem()
            last.leave = False
            last.close()

    try:
        yield progress
    finally:
        for last in bars.values():
            last.close()


@contextlib.contextmanager
def training_bar(training: Training) -> Iterator[Callable[..., None]]:
    """A bar over the steps, or over the seconds when the run is limited by time."""
    with contextlib.ExitStack() as stack:
        bars: list[Any] = []

        def report(progress: Any) -> None:
            if not bars:  # only now: a run that cannot start shows its reason and no bar
                bars.append(stack.enter_context(new_bar(training, progress.step - 1)))
            (shown,) = bars
            rate = f"{progress.images_per_second:.0f}"
            said = {"step": progress.step, "loss": f"{progress.loss:.4f}", "image/s": rate}
            shown.set_postfix(said, refresh=False)
            elapsed = min(shown.total, shown.format_dict["elapsed"])
            shown.update((progress.step if training.minutes is None else elapsed) - shown.n)

        yield report


def new_bar(training: Training, done: int) -> Any:
    """The bar of a run that has `done` steps behind it."""
    if training.minutes is None:
        return bar(desc="train", total=training.steps, initial=done, unit="step")
    return bar(desc="train", total=round(60 * training.minutes), bar_format=_TIME_BAR)


_TIME_BAR = "{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} s [{remaining} left{postfix}]"
