"""What all benchmarks share: timing, the limits of the machine, and runs that can be killed.

A run is a number of groups, each measured at once. After each group the file has it, so the same
command goes on with what is missing. Before each group the machine's limits are measured.
"""

from __future__ import annotations

import gc
import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from ctf.bench.work import Machine
from ctf.common import claims, config, memory, storage
from ctf.common.progress import Progress
from ctf.common.version import __version__
from ctf.kernels import sampling_cpu

SIDE, READ = 2048, 2**27  # of the square matrices, and of the numbers that are read


class Result(Protocol):
    """A whole run, made of these three: what was asked for, where, and groups by name."""

    @property
    def asked(self) -> Any: ...
    @property
    def where(self) -> dict[str, str]: ...
    @property
    def groups(self) -> dict[str, Any]: ...


R = TypeVar("R", bound=Result)


def measured(
    kind: type[R],
    asked: Any,
    jobs: Mapping[str, Callable[[Machine], Any]],
    path: Path,
    device: torch.device,
    progress: Progress,
) -> R:
    """Does the jobs whose group is not in the file yet, and writes it after each of them.

    Raises:
        UserError: the file there is of another run, or the folder holds something else.
    """
    make: Callable[..., R] = kind
    result = make(asked, where(device), {})
    what = "a run of ctf bench"
    if claims.is_ours(path.parent, path.name, what=what):
        there = config.from_json(kind, storage.load_json(path), str(path))
        made_by = [{**config.to_json(run), "groups": None} for run in (there, result)]
        claims.check_same(path.parent, *made_by, what=what)
        result = there
    for done, (name, measure) in enumerate(jobs.items()):
        progress(done, len(jobs))
        if name in result.groups:
            continue
        group = measure(limits(device))
        result = make(asked, result.where, {**result.groups, name: group})
        storage.save_json(path, config.to_json(result))
        gc.collect()
    progress(len(jobs), len(jobs))
    return result


def where(device: torch.device) -> dict[str, str]:
    """What a run depends on besides what was asked for."""
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


def limits(device: torch.device) -> Machine:
    """The best that products of 2048 x 2048 and reading 512 MB reach, of several each."""
    side, many = SIDE, READ
    a, b = torch.randn(2, side, side, device=device)
    products: dict[str, list[Callable[[], Any]]] = {"fp32": [lambda: a @ b], "bf16": [], "int8": []}
    low_a, low_b = a.bfloat16(), b.bfloat16()
    products["bf16"].append(lambda: low_a @ low_b)
    if sampling_cpu.available("auto", device):
        packed = sampling_cpu.Packed(b)
        products["fp32"].append(lambda: packed(a))
    if sampling_cpu.available("int8", device):
        small = sampling_cpu.Int8(b)
        products["int8"].append(lambda: small(a))
    numbers = torch.ones(many, device=device)
    rates = {
        name: max((2.0 * side**3 / best(way, device) for way in ways), default=0.0)
        for name, ways in products.items()
    }
    # Without int8 there is nothing that is counted in it.
    return Machine(
        fp32=rates["fp32"],
        bf16=rates["bf16"],
        int8=rates["int8"] or rates["fp32"],
        bandwidth=4.0 * many / best(numbers.sum, device),
    )


def best(way: Callable[[], Any], device: torch.device, repeats: int = 5) -> float:
    return min(timed(way, device)[0] for _ in range(repeats))


def timed(way: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    wait(device)
    began = time.perf_counter()
    result = way()
    wait(device)
    return time.perf_counter() - began, result


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def working_memory(way: Callable[[], Any], device: torch.device) -> int:
    """Bytes that a call holds at the most beyond what is held before."""
    gc.collect()
    memory.trim()  # what was freed and is still there would be used again, and not be seen
    before = memory.allocated(device)
    memory.reset_peak(device)
    way()
    return max(0, memory.peak(device) - before)
