"""Compute cells once, through kills, in one process or in several that share a folder.

WORK/<cell>/cell.json      everything that decides the result; another cell is refused
WORK/<cell>/run/           what the cell made: a run's folder, with links to those it needs
WORK/<cell>/result.json    the result; a cell that has it is done
WORK/.<cell>.lock          held by the process that computes the cell
RESULTS/cells/<cell>.json  a copy of the result, which is all that the report needs
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from threadpoolctl import threadpool_limits

from ctf.bench import harness
from ctf.common import claims, storage
from ctf.common.progress import OpenProgress, Progress
from ctf.data.images import open_images
from ctf.reproduce import experiments
from ctf.reproduce.cells import Cell, Workspace
from ctf.reproduce.plan import Plan
from ctf.reproduce.sampling_cells import SpeedCell
from ctf.reproduce.subset import split_off

RESULT, CONFIG, CLOCK = "result.json", "cell.json", "seconds.json"
WHAT = "a cell of ctf reproduce"
CLOCK_SECONDS = 10.0  # a kill loses at most this much of a cell's time
WAIT_SECONDS = 1.0  # between two looks at the cells that other processes compute


def open_workspace(
    plan: Plan, work: Path, results: Path, device: torch.device, open_progress: OpenProgress
) -> Workspace:
    """Open the images of a plan, and name the folders for files (`work`) and for results.

    Raises:
        UserError: See `open_images`.
    """
    images = open_images(plan.source, plan.image_size)
    train, reserved = split_off(images.train, plan.reserved)
    images = dataclasses.replace(images, train=train)
    return Workspace(plan, images, reserved, work, results, device, open_progress)


def compute(
    space: Workspace, cells: Sequence[Cell], after_each: Callable[[], None] = lambda: None
) -> list[str]:
    """Compute the cells that have no result, and those they need, until all have one.

    Returns:
        The names of the cells that this process computed.
    """
    computed: list[str] = []
    with _one_thread():
        while left := [cell for cell in cells if space.result(cell) is None]:
            timed = [cell for cell in left if isinstance(cell, SpeedCell)]
            # Timings come last, one after another, with no other cell beside them.
            for cell in [cell for cell in left if cell not in timed] or timed[:1]:
                with contextlib.suppress(Timeout):
                    _compute(space, cell, computed)
                    after_each()
                    break
            else:
                time.sleep(WAIT_SECONDS)
    return computed


def _compute(space: Workspace, cell: Cell, computed: list[str]) -> None:
    """Compute a cell whose files are missing, after those that it needs, and note their names.

    Raises:
        Timeout: Another process is computing one of them.
    """
    if not cell.has_files and space.result(cell) is not None:
        return
    for needed in cell.needs:
        _compute(space, needed, computed)
    space.work.mkdir(parents=True, exist_ok=True)
    with FileLock(space.work / f".{cell.name}.lock", blocking=False):
        folder, config = space.work / cell.name, cell.to_json()
        if (folder / RESULT).is_file():
            stored = storage.load_object(folder / RESULT)
            claims.check_same(folder, stored["asked"], config, what=WHAT)
        else:
            claims.claim(folder, config, marker=CONFIG, what=WHAT)
            clock = _Clock(folder / CLOCK)
            with clock.running():
                open_progress = clock.saved_by(space.open_progress)
                outcome = cell.compute(dataclasses.replace(space, open_progress=open_progress))
            stored = {
                "cell": cell.name,
                "asked": config,
                "found": outcome,
                "seconds": round(clock.seconds, 1),
                "where": {**harness.environment(space.device), "cores": str(os.cpu_count())},
            }
            storage.save_json(folder / RESULT, stored)
            computed.append(cell.name)
        if space.result(cell) is None:
            storage.save_json(space.results / "cells" / f"{cell.name}.json", stored)


def status(space: Workspace) -> list[tuple[str, str, str]]:
    """Return the name of each cell of the plan, its state, and the seconds that it took."""
    rows = []
    for cell in experiments.select(space.plan).values():
        folder, result = space.work / cell.name, space.result(cell)
        seconds = "" if result is None else f"{result['seconds']:.0f}"
        has_files = (folder / RESULT).is_file()
        if result is not None:
            state = "done" if has_files else "done, its files are elsewhere"
        elif has_files:
            same = storage.load_object(folder / RESULT)["asked"] == cell.to_json()
            state = "computed" if same else "of another plan"
        else:
            state = "started" if folder.is_dir() else "missing"
        rows.append((cell.name, state, seconds))
    return rows


@contextlib.contextmanager
def helpers(count: int, arguments: Sequence[str], work: Path) -> Iterator[None]:
    """Run `ctf` with these arguments in further processes, e.g. to share the cells.

    Their output goes to WORK/helper-1.log and so on. An error here terminates them.
    """
    command = [sys.executable, "-m", "ctf", *arguments]
    with contextlib.ExitStack() as stack:  # at its end it waits for the processes
        processes = []
        for number in range(1, count + 1):
            work.mkdir(parents=True, exist_ok=True)
            log = stack.enter_context(open(work / f"helper-{number}.log", "w", encoding="utf-8"))
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
            processes.append(stack.enter_context(process))
        try:
            yield
        except BaseException:
            for process in processes:
                process.terminate()
            raise


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Compute with one thread, so that a result does not depend on the number of cores.

    Several threads sum in another order; training then ends at other weights.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1):
            yield
    finally:
        torch.set_num_threads(threads)


class _Clock:
    """The seconds that a cell has taken, through all kills."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.before = float(storage.load_json(path)) if path.is_file() else 0.0
        self.began = self.saved = time.monotonic()

    @property
    def seconds(self) -> float:
        return self.before + time.monotonic() - self.began

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        try:
            yield
        finally:
            self._save()

    def _save(self) -> None:
        storage.save_json(self.path, self.seconds)
        self.saved = time.monotonic()

    def saved_by(self, open_progress: OpenProgress) -> OpenProgress:
        """The same progress, each call of which may save the seconds."""

        @contextlib.contextmanager
        def opened(name: str) -> Iterator[Progress]:
            with open_progress(name) as progress:

                def report(
                    done: int, total: int, metrics: Mapping[str, float] | None = None, /
                ) -> None:
                    progress(done, total, metrics)
                    if time.monotonic() - self.saved > CLOCK_SECONDS:
                        self._save()

                yield report

        return opened
