"""Cells are computed once: through kills, by several processes, from old results."""

import contextlib
import dataclasses
import json
import multiprocessing
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from ctf.common import storage
from ctf.common.errors import UserError
from ctf.reproduce import experiments, report, runner, systems
from ctf.reproduce.cells import Cell, Workspace, with_needs
from ctf.reproduce.plan import SMALL, Plan
from ctf.reproduce.scored import MISSING
from tests.conftest import Command
from tests.reproduce.conftest import CLUSTERS, CODES, open_workspace
from tests.reproduce.test_experiments import EXPERIMENTS


def table1(plan: Plan) -> list[Cell]:
    return [*experiments.select(plan, "table1").values()]


@contextlib.contextmanager
def failing(name: str) -> Iterator[Callable[..., None]]:
    raise AssertionError(f"{name} is computed")
    yield


def test_a_computed_cell_is_not_computed_again(
    space: Workspace, plan: Plan, computed: Path, tmp_path: Path
) -> None:
    before = {path: path.stat().st_mtime_ns for path in (computed / "results/cells").iterdir()}
    space = dataclasses.replace(space, open_progress=failing)
    assert runner.compute(space, table1(plan)) == []
    assert {path: path.stat().st_mtime_ns for path in before} == before
    # Nor is it where there are only the results.
    elsewhere = dataclasses.replace(space, work=tmp_path)
    assert runner.compute(elsewhere, table1(plan)) == []
    states = {name: state for name, state, _ in runner.status(elsewhere)}
    assert states[f"baseline-{CODES}-s0"] == "done, its files are elsewhere"


def test_results_are_published_again_from_the_files(space: Workspace, tmp_path: Path) -> None:
    cell = systems.baseline(space.plan, CODES, 0)
    other = dataclasses.replace(space, results=tmp_path, open_progress=failing)
    assert {name: state for name, state, _ in runner.status(other)}[cell.name] == "computed"
    assert runner.compute(other, [cell]) == []
    assert other.result(cell) == space.result(cell)


def test_a_search_serves_others_where_there_is_only_its_result(
    copied: Workspace, plan: Plan, tmp_path: Path
) -> None:
    shutil.copytree(copied.work, work := tmp_path / "work")
    space = dataclasses.replace(copied, work=work)
    score = experiments.table1(plan, CODES)[0].ctf
    for name in (score.name, score.tuned.name):
        shutil.rmtree(work / name)
    before = space.result(score)
    (space.results / "cells" / f"{score.name}.json").unlink()
    assert runner.compute(space, [score]) == [score.name]
    after = space.result(score)
    assert before is not None and after is not None
    for found in (before["found"], after["found"]):
        del found["seconds_of_scoring"]
    assert after["found"] == before["found"]


def test_status(space: Workspace, plan: Plan) -> None:
    (started := space.work / f"table2-{CODES}").mkdir()
    states = {name: state for name, state, _ in runner.status(space)}
    started.rmdir()
    assert list(states) == list(experiments.select(plan))
    assert {states[cell.name] for cell in table1(plan)} == {"done"}
    assert states[f"table2-{CODES}"] == "started"
    assert states["table3-random"] == "missing"


def test_killed_cells_end_the_same(space: Workspace, plan: Plan, tmp_path: Path) -> None:
    """In the middle of every stage of CTF, and of its scores."""
    cell = experiments.table1(plan, CODES)[0].ctf
    left = 0

    @contextlib.contextmanager
    def dying(stage: str) -> Iterator[Callable[..., None]]:
        nonlocal left

        def report(*_: Any) -> None:
            nonlocal left
            left -= 1
            if not left:
                raise KeyboardInterrupt

        yield report

    kills = 0
    while True:
        left = 1 + kills // 2  # further on each time, so it ends
        try:
            runner.compute(open_workspace(plan, tmp_path, dying), [cell])
            break
        except KeyboardInterrupt:
            kills += 1
    assert kills > 3
    one, other = (s.result(cell) for s in (space, open_workspace(plan, tmp_path)))
    assert one is not None and other is not None
    for part in ("scores", "settings", "pictures"):
        assert one["found"][part] == other["found"][part]
    assert other["seconds"] > 0


def models(plan: Plan) -> list[Cell]:
    pair = experiments.table1(plan, CODES)[0]
    return [*with_needs([pair.baseline.coarse, *pair.ctf.needs[:2]]).values()]


def _compute_models(plan: Plan, folder: Path) -> list[str]:
    space = open_workspace(plan, folder)
    return runner.compute(space, models(plan), lambda: report.write(space))


def test_processes_share_the_cells(space: Workspace, plan: Plan, tmp_path: Path) -> None:
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        both = [pool.submit(_compute_models, plan, tmp_path) for _ in range(2)]
        computed = [name for each in both for name in each.result(timeout=120)]
    assert sorted(computed) == sorted(cell.name for cell in models(plan))
    for cell in models(plan):
        one, other = (s.outcome(cell) for s in (space, open_workspace(plan, tmp_path)))
        assert one is not None and other is not None
        assert one.get("loss") == other.get("loss")


def test_a_cell_of_another_process_is_left_to_it(space: Workspace, tmp_path: Path) -> None:
    """And timings wait until nothing else is left, then for each other."""
    space = dataclasses.replace(space, results=tmp_path)
    table2 = dataclasses.replace(experiments.table2(space.plan), batches=(1,), rounds=1)
    timed, last = (dataclasses.replace(table2, name=f"speed-{number}") for number in (1, 2))
    clusters = systems.clusters(space.plan, CODES)
    identity = systems.clusters(space.plan, CODES, method="identity")
    lock = FileLock(space.work / f".clusters-{CODES}-{CLUSTERS}.lock", blocking=False)
    order = []

    def after_each() -> None:
        order.append({path.stem for path in (tmp_path / "cells").iterdir()})
        lock.release(force=True)

    with lock:
        runner.compute(space, [timed, last, clusters, identity], after_each)
    assert len(order) == 4
    assert clusters.name not in order[0]
    assert timed.name not in order[1] and timed.name in order[2]
    assert last.name not in order[2] and last.name in order[3]


def test_helpers_write_logs_and_stop_with_this_process(tmp_path: Path) -> None:
    with runner.helpers(2, ["cost", "--help"], tmp_path):
        pass
    logs = [(tmp_path / f"helper-{number}.log").read_text() for number in (1, 2)]
    assert all(log.startswith("usage: ctf cost") for log in logs)
    serve = ["studio", "fashion-mnist", "--port", "0"]  # would run for ever
    with pytest.raises(KeyboardInterrupt), runner.helpers(1, serve, tmp_path):
        raise KeyboardInterrupt


def test_files_of_another_plan_are_refused(plan: Plan, computed: Path) -> None:
    other = dataclasses.replace(plan, samples=24)
    space = open_workspace(other, computed)
    with pytest.raises(UserError, match=r"samples was 12, now 24"):
        runner.compute(space, [experiments.table1(other, CODES)[0].ctf])


def test_results_are_plain_json(space: Workspace) -> None:
    for path in (space.results / "cells").iterdir():
        stored = json.loads(path.read_text())
        assert stored.keys() == {"cell", "asked", "found", "seconds", "where"}
        assert stored["cell"] == path.stem
        assert stored["where"]["threads"] == "1"
        assert storage.load_object(path) == stored


def test_the_command(ctf: Command, tmp_path: Path) -> None:
    common = ("--budget", "small", "--out", tmp_path / "out", "--results", tmp_path / "results")
    status = ctf("reproduce", "status", *common)
    assert status.code == 0
    assert f"0 of {len(experiments.select(SMALL))} cells are done" in status.out
    for what in ("all", *EXPERIMENTS):
        dry = ctf("reproduce", what, *common, "--dry-run")
        assert dry.code == 0
        assert "tokenizer-16384" in dry.out
    wrong = ctf("reproduce", "table1", *common, "--only", "tokenizer-16348")
    assert wrong.code == 2
    assert "did you mean 'tokenizer-16384'" in wrong.err
    assert not list(tmp_path.iterdir())
    assert ctf("reproduce", "report", *common).code == 0
    assert MISSING in (tmp_path / "results" / "small" / "report.md").read_text()
    colour = ctf("reproduce", "table1", *common, "--images", "eurosat", "--dry-run")
    assert colour.code == 0
    assert "classifier, table1-baseline-16384-s0" in colour.out
    assert ctf("reproduce", "report", *common, "--images", "eurosat").code == 0
    text = (tmp_path / "results" / "eurosat-small" / "report.md").read_text()
    assert "Made by `ctf reproduce all --images eurosat --budget small`" in text
    assert "eurosat at 64 pixels" in text
