"""Timing in turn, results that survive kills, the memory of a call."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ctf.bench import harness, sample, train
from ctf.bench.harness import Group, Timing
from ctf.bench.shapes import Shapes
from ctf.bench.work import Machine
from ctf.common import memory
from ctf.common.errors import UserError

CPU = torch.device("cpu")
RESULTS = Path(__file__).parents[2] / "docs" / "results"


@dataclasses.dataclass(frozen=True)
class Toy:
    """A benchmark."""

    rounds: int = 2


@dataclasses.dataclass(frozen=True)
class Seconds(Timing):
    """A timing."""

    seconds: tuple[float, ...]


def job(name: str, **facts: float) -> Callable[[Machine], Group[Seconds]]:
    return lambda machine: Group(machine, (Seconds(name, (1.0, 2.0)),), facts)


def silent(done: int, total: int, metrics: object = None, /) -> None:
    pass


def stopping(after: int) -> Callable[..., None]:
    def progress(done: int, total: int, metrics: object = None, /) -> None:
        if done == after:
            raise KeyboardInterrupt

    return progress


@pytest.mark.usefixtures("shapes")
def test_a_killed_benchmark_continues_with_the_next_group(tmp_path: Path) -> None:
    jobs = {"one": job("a"), "two": job("b", equal=3.0)}
    path = tmp_path / "toy.json"
    with pytest.raises(KeyboardInterrupt):
        harness.measure(Toy(), Seconds, jobs, path, CPU, stopping(1))
    before = json.loads(path.read_text())["groups"]
    assert [*before] == ["one"]
    results = harness.measure(Toy(), Seconds, jobs, path, CPU, silent)
    after = json.loads(path.read_text())["groups"]
    assert after["one"] == before["one"]
    assert after["two"]["found"] == {"equal": 3.0}
    assert results.groups["two"].timing("b").seconds == (1.0, 2.0)
    assert harness.load(path, Toy, Seconds) == results
    # All of it from the file:
    assert (
        harness.measure(Toy(), Seconds, dict.fromkeys(jobs, job("x")), path, CPU, silent) == results
    )


@pytest.mark.usefixtures("shapes")
def test_results_of_another_benchmark_are_not_continued(tmp_path: Path) -> None:
    path = tmp_path / "toy.json"
    harness.measure(Toy(), Seconds, {"one": job("a")}, path, CPU, silent)
    with pytest.raises(UserError, match=r"another configuration: asked.rounds was 2, now 3"):
        harness.measure(Toy(3), Seconds, {"one": job("a")}, path, CPU, silent)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="is not a run of ctf bench"):
        harness.measure(Toy(), Seconds, {}, tmp_path / "other" / "toy.json", CPU, silent)


@pytest.mark.parametrize(
    ("name", "benchmark", "timing"),
    [
        ("bench-sample.json", sample.SampleBenchmark, sample.StageTiming),
        ("bench-train.json", train.TrainBenchmark, train.StepTiming),
    ],
)
def test_committed_results_are_read_and_written_alike(
    name: str, benchmark: type, timing: type
) -> None:
    path = RESULTS / name
    results = harness.load(path, benchmark, timing)
    stored = json.loads(path.read_text())
    for group in stored["groups"].values():
        if not group.get("found", True):
            del group["found"]
    assert json.loads(json.dumps(results.to_json())) == stored


def test_ways_take_turns_and_warm_up() -> None:
    calls = []

    def way(name: str) -> Callable[[int], Callable[[], None]]:
        return lambda number: lambda: calls.append(f"{name}{number}")

    counts = []
    seconds = harness.in_turn(
        {"a": way("a"), "b": way("b")}, 2, CPU, warm_up=1,
        progress=lambda done, total, *_: counts.append((done, total)),
    )  # fmt: skip
    assert calls == ["a0", "b0", "a1", "b1", "a2", "b2"]
    assert [len(each) for each in seconds.values()] == [2, 2]
    assert counts == [(1, 3), (2, 3), (3, 3)]


def test_limits_of_the_machine(shapes: Shapes) -> None:
    limits = harness.limits(CPU)
    assert min(dataclasses.astuple(limits)) > 0


def test_working_memory_is_that_of_the_call() -> None:
    def hold() -> None:
        torch.ones(2**24).sum()

    if memory.allocated(CPU):  # systems that report nothing give 0
        assert harness.working_memory(hold, CPU) == pytest.approx(2**26, rel=0.2)
        assert harness.working_memory(lambda: None, CPU) < 2**22
        with memory.keep_freed():  # where freed memory stays for the next tensor
            hold()
            assert harness.working_memory(hold, CPU) == pytest.approx(2**26, rel=0.2)
