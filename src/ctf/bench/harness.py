"""The harness of all benchmarks: timing in turn, the machine's limits, results that survive kills.

A benchmark is a number of groups; what a group compares is timed in turn, round after round, in one
process. The results are written after each group, so the same command continues with the next one.
Before each group the limits of the machine are measured.
"""

from __future__ import annotations

import dataclasses
import gc
import platform
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from ctf import kernels
from ctf.bench.work import Machine
from ctf.common import claims, config, memory, storage
from ctf.common.errors import UserError
from ctf.common.progress import Progress
from ctf.common.version import __version__
from ctf.kernels.products import Int8, Packed
from ctf.models.sizes import SIZES

LIMIT_SIDE = 2048  # of the square matrices whose product is timed for the limits
LIMIT_SIDE_GPU = 8192  # smaller ones do not fill a GPU
LIMIT_NUMBERS = 2**27  # read for the limit of the memory: 512 MB in float32


@dataclasses.dataclass(frozen=True)
class Timing:
    """One way of computing something; what was measured of it are the fields of a subclass."""

    name: str


Benchmark = TypeVar("Benchmark")  # a frozen dataclass: what is measured
AnyTiming = TypeVar("AnyTiming", bound=Timing)
Key = TypeVar("Key", bound=Hashable)


@dataclasses.dataclass(frozen=True)
class Group(Generic[AnyTiming]):
    """What was timed in turn, what the machine reached just before, and facts besides the times."""

    machine: Machine
    timings: tuple[AnyTiming, ...] = ()
    facts: dict[str, float] = dataclasses.field(default_factory=dict)

    def timing(self, name: str) -> AnyTiming:
        """The timing of a name."""
        return next(timing for timing in self.timings if timing.name == name)


@dataclasses.dataclass(frozen=True)
class Results(Generic[Benchmark, AnyTiming]):
    """Results of a benchmark; a run that was stopped lacks the last groups."""

    benchmark: Benchmark
    environment: dict[str, str]
    groups: dict[str, Group[AnyTiming]]

    def to_json(self) -> dict[str, Any]:
        """Plain values, as `load` takes them."""
        groups = {}
        for name, group in self.groups.items():
            timings = [config.to_json(timing) for timing in group.timings]
            groups[name] = {"machine": config.to_json(group.machine), "timings": timings}
            if group.facts:
                groups[name]["found"] = group.facts
        asked = config.to_json(self.benchmark)
        return {"asked": asked, "where": self.environment, "groups": groups}


def load(
    path: Path, benchmark: type[Benchmark], timing: type[AnyTiming]
) -> Results[Benchmark, AnyTiming]:
    """Load results from a file.

    Raises:
        UserError: The file is missing, damaged, or of another benchmark.
    """
    stored, where = storage.load_object(path), str(path)
    groups = {
        name: Group(
            config.from_json(Machine, group["machine"], where),
            tuple(config.from_json(timing, each, where) for each in group["timings"]),
            group.get("found", {}),
        )
        for name, group in stored["groups"].items()
    }
    asked = config.from_json(benchmark, stored["asked"], where)
    return Results(asked, stored["where"], groups)


def measure(
    benchmark: Benchmark,
    timing: type[AnyTiming],
    jobs: Mapping[str, Callable[[Machine], Group[AnyTiming]]],
    path: Path,
    device: torch.device,
    progress: Progress,
) -> Results[Benchmark, AnyTiming]:
    """Measure the groups that are missing in the file `path`, and write it after each.

    Each of `jobs` measures the group of its name, given the machine's limits.

    Raises:
        UserError: The file is of another benchmark or machine, or its folder holds something else.
    """
    results: Results[Benchmark, AnyTiming] = Results(benchmark, environment(device), {})
    what = "a run of ctf bench"
    with claims.hold(path.parent, path.name, what=what):
        if path.is_file():
            stored = load(path, type(benchmark), timing)
            new, old = ({**r.to_json(), "groups": None} for r in (results, stored))
            claims.check_same(path.parent, old, new, what=what)
            results = stored
        for done, (name, job) in enumerate(jobs.items()):
            progress(done, len(jobs))
            if name in results.groups:
                continue
            groups = {**results.groups, name: job(limits(device))}
            results = dataclasses.replace(results, groups=groups)
            storage.save_json(path, results.to_json())
            gc.collect()
    progress(len(jobs), len(jobs))
    return results


def environment(device: torch.device) -> dict[str, str]:
    """Describe the machine and the software that results depend on."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        name = lines[0].partition(":")[2].strip() if lines else name
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    return {
        "device": f"{device.type}: {name}",
        "threads": str(torch.get_num_threads()),
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "ctf": __version__,
    }


def check_positive(**options: int) -> None:
    """Raise a UserError if an option is below 1."""
    for name, value in options.items():
        if value < 1:
            raise UserError(f"{name}: got {value}, expected 1 or more")


def check_sizes(sizes: Sequence[str]) -> None:
    """Raise a UserError if there is no size, or one of them is unknown."""
    if not sizes:
        raise UserError("sizes: expected at least one")
    for size in sizes:
        if size not in SIZES:
            raise UserError(f"unknown size {size!r}, expected some of {', '.join(SIZES)}")


# --- Timing ---------------------------------------------------------------------------------------


def timed(call: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Return the seconds of a call, and its result."""
    synchronize(device)
    began = time.perf_counter()
    result = call()
    synchronize(device)
    return time.perf_counter() - began, result


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def in_turn(
    ways: Mapping[Key, Callable[[int], Callable[[], Any]]],
    rounds: int,
    device: torch.device,
    *,
    warm_up: int = 0,
    progress: Progress | None = None,
) -> dict[Key, tuple[float, ...]]:
    """Time several ways of computing something in turn, so that a slow minute slows all of them.

    Each way is given the number of the round and prepares the call that is timed. The times of the
    first `warm_up` rounds do not count.

    Returns:
        Seconds of each round.
    """
    seconds: dict[Key, list[float]] = {key: [] for key in ways}
    for number in range(warm_up + rounds):
        for key, prepare in ways.items():
            call = prepare(number)
            seconds[key].append(timed(call, device)[0])
            del call  # and what it holds, before the next one
        if progress is not None:
            progress(number + 1, warm_up + rounds)
    return {key: tuple(each[warm_up:]) for key, each in seconds.items()}


def working_memory(call: Callable[[], Any], device: torch.device) -> int:
    """Return the most bytes that a call holds beyond those that were held before."""
    gc.collect()
    memory.trim()  # freed memory would be used again, and not be seen
    before = memory.allocated(device)
    memory.reset_peak(device)
    call()
    return max(0, memory.peak(device) - before)


def limits(device: torch.device) -> Machine:
    """Measure the best of several products of large matrices, and of reading from memory."""
    side = LIMIT_SIDE if device.type == "cpu" else LIMIT_SIDE_GPU
    a, b = torch.randn(2, side, side, device=device)
    low_a, low_b = a.bfloat16(), b.bfloat16()
    numbers = torch.ones(LIMIT_NUMBERS, device=device)
    fp32: list[Callable[[], Any]] = [lambda: a @ b]
    if kernels.available("auto", device):
        packed = Packed(b)
        fp32.append(lambda: packed(a))

    def best(call: Callable[[], Any]) -> float:
        return min(timed(call, device)[0] for _ in range(5))

    operations = 2.0 * side**3
    fastest = max(operations / best(product) for product in fp32)
    bf16 = operations / best(lambda: low_a @ low_b)
    int8 = fastest  # where there is no int8, nothing is counted in it
    if kernels.available("int8", device):
        quantised = Int8(b)
        int8 = operations / best(lambda: quantised(a))
    return Machine(fastest, bf16, int8, bandwidth=4.0 * LIMIT_NUMBERS / best(numbers.sum))
