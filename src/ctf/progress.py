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

PLAIN_SECONDS = 15.0  # between two plain lines


class Reporter:
    """Is called with (done, total) or (done, total, metrics), as the stages' `report` is."""

    def __init__(self, name: str, console: Console, bar: Progress | None) -> None:
        self.name, self.console, self.bar = name, console, bar
        self.task = bar.add_task(name, total=None, metrics="") if bar is not None else None
        self.printed = time.monotonic()

    def __call__(self, done: int, total: int, metrics: Mapping[str, float] | None = None) -> None:
        text = f"loss {metrics['loss']:.4f}" if metrics and "loss" in metrics else ""
        if self.bar is not None and self.task is not None:
            self.bar.update(self.task, completed=done, total=total, metrics=text)
        elif time.monotonic() - self.printed > PLAIN_SECONDS or done == total:
            self.printed = time.monotonic()
            self.console.print(f"{self.name}: {done}/{total} {text}".rstrip(), highlight=False)


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
    ) as bar:
        yield Reporter(name, console, bar)
