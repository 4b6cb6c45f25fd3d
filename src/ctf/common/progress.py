"""Progress of long work: bars on a terminal, now and then a plain line anywhere else."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

PLAIN_SECONDS = 15.0  # between two plain lines; the first and the last are always printed
SPEED_SECONDS = (
    600.0  # that the speed of a bar is taken over: a line of a large model takes minutes
)


class Reporter:
    """Is called with (done, total) or (done, total, metrics), as the stages' `report` is."""

    def __init__(self, name: str, console: Console, bar: Progress | None) -> None:
        self.name, self.console, self.bar = name, console, bar
        self.task = bar.add_task(name, total=None, metrics="") if bar is not None else None
        self.first: tuple[int, float] | None = None  # what was done when it was first called
        self.printed = -PLAIN_SECONDS

    def __call__(self, done: int, total: int, metrics: Mapping[str, float] | None = None) -> None:
        now, said = time.monotonic(), _said(metrics or {})
        if self.bar is not None and self.task is not None:
            self.bar.update(self.task, completed=done, total=total, metrics=", ".join(said))
            return
        self.first = self.first or (done, now)
        if now - self.printed < PLAIN_SECONDS and done != total:
            return
        self.printed = now
        # Counted from the first call: a resumed training did not make all steps just now.
        done_before, began = self.first
        if done_before < done < total:
            left = (total - done) * (now - began) / (done - done_before)
            said.append(f"{_duration(left)} left")
        parts = ", ".join([f"{self.name}: {done}/{total}", *said])
        self.console.print(parts, highlight=False, soft_wrap=True)


def _said(metrics: Mapping[str, float]) -> list[str]:
    said = [f"loss {metrics['loss']:.4f}"] if "loss" in metrics else []
    for name, value in metrics.items():
        if name.endswith("_per_second"):
            said.append(f"{value:,.0f} {name.removesuffix('_per_second')}/s")
    return said


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


@contextmanager
def progress(name: str, console: Console | None = None) -> Iterator[Reporter]:
    """A reporter for the time of one stage."""
    console = console or Console(stderr=True)
    if not console.is_terminal:
        yield Reporter(name, console, None)
        return
    with Progress(
        TextColumn("{task.description:<12}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[metrics]}"),
        console=console,
        speed_estimate_period=SPEED_SECONDS,
    ) as bar:
        yield Reporter(name, console, bar)
