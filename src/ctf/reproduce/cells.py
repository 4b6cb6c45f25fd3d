"""Cells: what is computed once for the tables and figures. Each is a folder, and survives a kill.

WORK/<cell>/cell.json    what was asked for; another question is refused
WORK/<cell>/run/         what it made: a stage's folder beside links to those of the cells before it
WORK/<cell>/result.json  what came out; a cell that has it is done
RESULTS/cells/<cell>.json  a copy, which is all that the report needs
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ctf import checkpoint, config
from ctf.errors import UserError
from ctf.fit import Progress
from ctf.loop import first_difference
from ctf.reproduce.jobs import Job, Place, make

RESULT, ASKED, CLOCK = "result.json", "cell.json", "seconds.json"
CLOCK_SECONDS = 10.0  # a kill loses at most so much of a cell's time


@dataclasses.dataclass(frozen=True)
class Cell:
    """A job by its name, which names its folder too."""

    name: str
    job: Job

    @property
    def asked(self) -> dict[str, Any]:
        return {"job": type(self.job).__name__, **config.to_json(self.job)}


@dataclasses.dataclass(frozen=True)
class Desk:
    """Where cells are computed, and where their results are kept."""

    cells: Mapping[str, Cell]
    work: Path
    results: Path
    place: Place
    progress: Progress

    def result(self, name: str) -> dict[str, Any] | None:
        """What came out of a cell, of the same question; None where that is not known."""
        path = self.results / "cells" / f"{name}.json"
        if not path.is_file():
            return None
        stored = checkpoint.load_object(path)
        return stored if stored.get("asked") == self.cells[name].asked else None

    def compute(self, names: Sequence[str]) -> None:
        """Makes the cells whose results are missing, and those that they need."""
        for name in names:
            if self.result(name) is None:
                stored = self._made(name)
                checkpoint.save_json(self.results / "cells" / f"{name}.json", stored)

    def _made(self, name: str) -> dict[str, Any]:
        """The result of a cell in the working folder; whatever it needs is made first."""
        cell, folder = self.cells[name], self.work / name
        for needed in cell.job.needs:
            self._made(needed)
        if (folder / RESULT).is_file():
            stored = checkpoint.load_object(folder / RESULT)
            _check_same(folder, stored["asked"], cell.asked)
            return stored
        if (folder / ASKED).is_file():
            _check_same(folder, checkpoint.load_json(folder / ASKED), cell.asked)
        elif not checkpoint.is_vacant(folder):
            raise UserError(
                f"{folder} exists and is no cell of ctf reproduce; choose another --out"
            )
        checkpoint.save_json(folder / ASKED, cell.asked)
        clock = _Clock(folder / CLOCK)
        with clock.running():
            found = make(cell.job, folder / "run", self.work, self.place, clock.told(self.progress))
        stored = {
            "cell": name,
            "asked": cell.asked,
            "found": found,
            "seconds": round(clock.seconds, 1),
            "where": self.place.where,
        }
        checkpoint.save_json(folder / RESULT, stored)
        return stored


def _check_same(folder: Path, stored: Any, asked: Any) -> None:
    if stored != asked:
        raise UserError(
            f"{folder} was made for another question: {first_difference(stored, asked)}\n"
            "delete it to make it anew, or choose another --out"
        )


class _Clock:
    """The seconds that a cell has taken, through all kills."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.before = float(checkpoint.load_json(path)) if path.is_file() else 0.0
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
        checkpoint.save_json(self.path, self.seconds)
        self.saved = time.monotonic()

    def told(self, progress: Progress) -> Progress:
        """The same progress, which also keeps the clock."""

        @contextlib.contextmanager
        def opened(name: str) -> Iterator[Callable[..., None]]:
            with progress(name) as report:

                def kept(*args: Any) -> None:
                    report(*args)
                    if time.monotonic() - self.saved > CLOCK_SECONDS:
                        self._save()

                yield kept

        return opened  # type: ignore[return-value]
