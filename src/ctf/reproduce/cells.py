"""Cells: what is computed once for the tables and figures. Each is a folder, and survives a kill.
Several processes with the same folders share the cells: each takes one that no other is making.

WORK/<cell>/cell.json    what was asked for; another question is refused
WORK/<cell>/run/         what it made: a stage's folder beside links to those of the cells before it
WORK/<cell>/result.json  what came out; a cell that has it is done
WORK/.<cell>.lock        held by the process that makes it
RESULTS/cells/<cell>.json  a copy, which is all that the report needs
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from threadpoolctl import threadpool_limits

from ctf.bench import measuring
from ctf.common import claims, config, storage
from ctf.common.progress import OpenProgress, Progress
from ctf.reproduce.jobs import Job, Place, SpeedJob, make

RESULT, ASKED, CLOCK = "result.json", "cell.json", "seconds.json"
CELL = "a cell of ctf reproduce"
CLOCK_SECONDS = 10.0  # a kill loses at most so much of a cell's time
WAIT_SECONDS = 1.0  # until a process looks again whether what it needs has been made by another


@dataclasses.dataclass(frozen=True)
class Cell:
    """A job by its name, which names its folder too."""

    name: str
    job: Job


@dataclasses.dataclass(frozen=True)
class Desk:
    """Where cells are computed, and where their results are kept."""

    cells: Mapping[str, Cell]
    work: Path
    results: Path
    place: Place
    open_progress: OpenProgress

    def asked(self, name: str) -> dict[str, Any]:
        """All that decides the result of a cell; of the cells that it needs, a hash of theirs."""
        job = self.cells[name].job
        needs = {needed: storage.hash_json(self.asked(needed))[:16] for needed in job.needs}
        return {"job": type(job).__name__, **config.to_json(job), "needs": needs}

    def result(self, name: str) -> dict[str, Any] | None:
        """What came out of a cell, of the same question; None where that is not known."""
        path = self.results / "cells" / f"{name}.json"
        if not path.is_file():
            return None
        stored = storage.load_object(path)
        return stored if stored.get("asked") == self.asked(name) else None

    def compute(self, names: Sequence[str], then: Callable[[], None] = lambda: None) -> None:
        """Makes the cells whose results are missing, and those that they need, until none is left.

        Args:
            then: is called after each of `names`.
        """
        with _one_thread():
            while left := [name for name in names if self.result(name) is None]:
                for name in left:
                    if isinstance(self.cells[name].job, SpeedJob) and len(left) > 1:
                        continue  # what is timed comes last, with no other beside it
                    with contextlib.suppress(Timeout):
                        self._make(name)
                        then()
                        break
                else:
                    time.sleep(WAIT_SECONDS)

    def _make(self, name: str) -> None:
        """Makes a cell that is not in the working folder, after those that it needs.

        Raises:
            Timeout: another process is just making it, or one that it needs.
        """
        for needed in self.cells[name].job.needs:
            self._make(needed)
        self.work.mkdir(parents=True, exist_ok=True)
        with FileLock(self.work / f".{name}.lock", blocking=False):
            self._make_alone(name)

    def _make_alone(self, name: str) -> None:
        job, folder, asked = self.cells[name].job, self.work / name, self.asked(name)
        if (folder / RESULT).is_file():
            stored = storage.load_object(folder / RESULT)
            claims.check_same(folder, stored["asked"], asked, what=CELL)
            self._keep(name, stored)
            return
        claims.claim(folder, asked, marker=ASKED, what=CELL)
        clock = _Clock(folder / CLOCK)
        with clock.running():
            found = make(job, folder / "run", self.work, self.place, clock.told(self.open_progress))
        stored = {
            "cell": name,
            "asked": asked,
            "found": found,
            "seconds": round(clock.seconds, 1),
            "where": {**measuring.where(self.place.device), "cores": str(os.cpu_count())},
        }
        storage.save_json(folder / RESULT, stored)
        self._keep(name, stored)

    def _keep(self, name: str, stored: dict[str, Any]) -> None:
        if self.result(name) is None:
            storage.save_json(self.results / "cells" / f"{name}.json", stored)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """On a CPU several would add up in another order, by which trainings end as others of their
    kind: no result could be had again by another number of cores.
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

    def told(self, open_progress: OpenProgress) -> OpenProgress:
        """The same, which also keeps the clock."""

        @contextlib.contextmanager
        def opened(name: str) -> Iterator[Progress]:
            with open_progress(name) as progress:

                def kept(*args: Any) -> None:
                    progress(*args)
                    if time.monotonic() - self.saved > CLOCK_SECONDS:
                        self._save()

                yield kept

        return opened
