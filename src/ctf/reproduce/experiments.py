"""What `ctf reproduce` does: the cells of a table or figure in turn, and the report of all."""

from __future__ import annotations

import contextlib
import dataclasses
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from ctf.common import storage
from ctf.common.config import did_you_mean
from ctf.common.errors import UserError
from ctf.common.progress import OpenProgress
from ctf.data.images import open_images
from ctf.reproduce import figure1, figure2, report, table1, table2, table3
from ctf.reproduce.cells import RESULT, Cell, Desk
from ctf.reproduce.jobs import Place
from ctf.reproduce.plan import BUDGETS, Plan
from ctf.reproduce.subset import split_off

# In the order in which they are computed by "all": what matters most first.
PARTS: dict[str, Callable[[Plan], list[Cell]]] = {
    "table1": table1.cells,
    "table3": table3.cells,
    "figure1": figure1.cells,
    "figure2": figure2.cells,
    "table2": table2.cells,
}


def cells(plan: Plan, what: str) -> dict[str, Cell]:
    """The cells of a table or figure, or of "all", by name, each after those that it needs."""
    parts = PARTS if what == "all" else {what: PARTS[what]}
    found: dict[str, Cell] = {}
    for part in parts.values():
        for cell in part(plan):
            if found.setdefault(cell.name, cell) != cell:
                raise AssertionError(f"two cells are called {cell.name}")
    return found


def open_desk(
    plan: Plan, work: Path, results: Path, device: torch.device, open_progress: OpenProgress
) -> Desk:
    """Raises UserError: see `open_images`."""
    images = open_images(plan.source, plan.image_size)
    train, kept_back = split_off(images.train, plan.kept_back)
    images = dataclasses.replace(images, train=train)
    place = Place(plan.source, images, kept_back, plan.features, device)
    return Desk(cells(plan, "all"), work, results, place, open_progress)


def chosen(plan: Plan, what: str, only: str | None) -> list[str]:
    """Names of the cells to compute, in order.

    Raises:
        UserError: there is no cell `only`.
    """
    names = list(cells(plan, what))
    if only is None:
        return names
    if only not in names:
        raise UserError(f"unknown cell {only!r}{did_you_mean(only, names)}")
    return [only]


def run(desk: Desk, plan: Plan, names: list[str]) -> None:
    """Computes cells and writes the report anew after each."""
    desk.compute(names, lambda: report.write(desk, plan))


@contextlib.contextmanager
def helpers(count: int, arguments: Sequence[str], work: Path) -> Iterator[None]:
    """So many processes beside this one that run `ctf` with these arguments, e.g. to share cells.

    What they say goes to WORK/helper-1.log and so on. They are told to stop where this one stops.
    """
    with contextlib.ExitStack() as stack:
        started = []
        for number in range(1, count + 1):
            work.mkdir(parents=True, exist_ok=True)
            log = stack.enter_context(open(work / f"helper-{number}.log", "w", encoding="utf-8"))
            command = [sys.executable, "-m", "ctf", *arguments]
            started.append(subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT))
        try:
            yield
        except BaseException:
            for process in started:
                process.terminate()
            raise
        finally:
            for process in started:
                process.wait()


def status(desk: Desk) -> list[tuple[str, str, str]]:
    """Of each cell: its name, how it stands, and the seconds that it took."""
    rows = []
    for name in desk.cells:
        folder, result = desk.work / name, desk.result(name)
        if result is not None:
            how = "done" if (folder / RESULT).is_file() else "done, its files are elsewhere"
            rows.append((name, how, f"{result['seconds']:.0f}"))
        elif (folder / RESULT).is_file():
            stored = storage.load_object(folder / RESULT)
            rows.append(
                (name, "made" if stored["asked"] == desk.asked(name) else "of another plan", "")
            )
        else:
            rows.append((name, "begun" if folder.is_dir() else "left", ""))
    return rows


def plan_of(budget: str) -> Plan:
    """Raises UserError for an unknown budget."""
    if budget not in BUDGETS:
        raise UserError(f"unknown budget {budget!r}{did_you_mean(budget, BUDGETS)}")
    return BUDGETS[budget]
