"""Progress of long work: a bar on a terminal, a plain line now and then anywhere else."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Protocol

from ctf.common.text import printable

if TYPE_CHECKING:
    from rich.console import Console

LINE_SECONDS = 15.0  # between two plain lines; the first and the last are always printed
# The speed of a bar is averaged over this time: a large model takes minutes between two calls.
SPEED_SECONDS = 600.0


class Progress(Protocol):
    """A callback that is told how far a piece of work has come."""

    def __call__(
        self, done: int, total: int, metrics: Mapping[str, float] | None = None, /
    ) -> None:
        """Receive how much is done, of how much in all, and the latest metrics if there are any."""


# Opens the progress of one stage, given the stage's name, e.g. `show_progress`.
OpenProgress = Callable[[str], AbstractContextManager[Progress]]


@contextmanager
def show_progress(
    name: str, console: Console | None = None, clock: Callable[[], float] = time.monotonic
) -> Iterator[Progress]:
    """Show the progress of one stage on a console; standard error by default."""
    from rich import progress  # here, since all rooms import this module
    from rich.console import Console

    console = console or Console(stderr=True, markup=False, emoji=False)
    if not console.is_terminal:
        yield _Lines(name, console, clock)
        return
    with progress.Progress(
        progress.TextColumn("{task.description:<12}", markup=False),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeRemainingColumn(),
        progress.TextColumn("{task.fields[metrics]}", markup=False),
        console=console,
        speed_estimate_period=SPEED_SECONDS,
    ) as bar:
        task = bar.add_task(name, total=None, metrics="")

        def update(done: int, total: int, metrics: Mapping[str, float] | None = None) -> None:
            shown = ", ".join(_format_metrics(metrics or {}))
            bar.update(task, completed=done, total=total, metrics=shown)

        yield update


class _Lines:
    """Prints a line now and then."""

    def __init__(self, name: str, console: Console, clock: Callable[[], float]) -> None:
        self.name, self.console, self.clock = name, console, clock
        self.first: tuple[int, float] | None = None  # done, and the time, at the first call
        self.printed = -LINE_SECONDS

    def __call__(self, done: int, total: int, metrics: Mapping[str, float] | None = None) -> None:
        now = self.clock()
        self.first = self.first or (done, now)
        if now - self.printed < LINE_SECONDS and done != total:
            return
        self.printed = now
        parts = [f"{self.name}: {done}/{total}", *_format_metrics(metrics or {})]
        # Counted from the first call: a resumed training starts with steps that took no time now.
        done_before, began = self.first
        if done_before < done < total:
            left = (total - done) * (now - began) / (done - done_before)
            parts.append(f"{format_duration(left)} left")
        self.console.print(printable(", ".join(parts)), highlight=False, soft_wrap=True)


def _format_metrics(metrics: Mapping[str, float]) -> list[str]:
    shown = [f"loss {metrics['loss']:.4f}"] if "loss" in metrics else []
    for name, value in metrics.items():
        if name.endswith("_per_second"):
            shown.append(f"{value:,.0f} {name.removesuffix('_per_second')}/s")
    return shown


def format_duration(seconds: float) -> str:
    """Return a duration in words, in its two largest units."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
