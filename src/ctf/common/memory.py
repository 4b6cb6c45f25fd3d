"""Memory: how much is available, how much is allocated, and how malloc reuses it."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")
STATUS = Path("/proc/self/status")


def available(device: torch.device) -> int:
    """Return the bytes that can be allocated on a device; `sys.maxsize` if that is unknown."""
    if device.type == "cuda":
        # What PyTorch holds for its next tensors is not free to the driver.
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    if device.type != "cpu":
        return sys.maxsize
    return min(_read_kilobytes(MEMINFO, "MemAvailable") or sys.maxsize, _available_in_cgroup())


def _available_in_cgroup() -> int:
    """Return what a control group (version 2) leaves; pages that cache files count as free."""
    try:
        limit = (CGROUP / "memory.max").read_text().strip()
        used = int((CGROUP / "memory.current").read_text())
        stat = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        return sys.maxsize if limit == "max" else int(limit) - used + int(stat["inactive_file"])
    except (OSError, ValueError, KeyError):
        return sys.maxsize


def reset_peak(device: torch.device) -> None:
    """Start a new measurement of `peak`."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif STATUS.is_file():
        Path("/proc/self/clear_refs").write_text("5")


def peak(device: torch.device) -> int:
    """Return the most bytes that this process held since `reset_peak`; 0 if that is unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _read_kilobytes(STATUS, "VmHWM")


def allocated(device: torch.device) -> int:
    """Return the bytes that this process holds on a device; 0 if that is unknown."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return _read_kilobytes(STATUS, "VmRSS")


def resident() -> tuple[float, float]:
    """Return the MiB of main memory that this process holds, without and with mapped files."""
    return _read_kilobytes(STATUS, "RssAnon") / 2**20, _read_kilobytes(STATUS, "VmRSS") / 2**20


def _read_kilobytes(path: Path, key: str) -> int:
    """Return the bytes of a line such as "VmRSS:  12 kB" of a file in /proc; 0 if missing."""
    text = path.read_text() if path.is_file() else ""
    found = re.search(rf"^{key}:\s*(\d+)", text, re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


# Limits of glibc's malloc: number for mallopt (malloc.h), and where glibc's own, moving limits end
# once large tensors have been freed. glibc can't tell a limit, nor let it move again once set.
_LIMITS = {
    "mmap_max": (-4, 1 << 16),
    "mmap_threshold": (-3, 32 << 20),
    "trim_threshold": (-1, 64 << 20),
}
_blocks = 0  # of `keep_freed` that are open


@contextlib.contextmanager
def keep_freed() -> Iterator[None]:
    """Within the block, keep freed memory for the next tensor; return it to the system after.

    By default, glibc gets each tensor of more than 32 MB from the system, which clears it page by
    page: more than a quarter of the time in which VQ-16 encodes an image of 256 pixels. With
    another C library this does nothing.
    """
    global _blocks
    libc = ctypes.CDLL(None)
    if not (hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim")):
        yield
        return
    _set_limits(libc, mmap_max=0, trim_threshold=2**31 - 1)
    _blocks += 1
    try:
        yield
    finally:
        _blocks -= 1
        if not _blocks:
            _set_limits(libc, **{name: _configured(name) for name in _LIMITS})
            trim()


def _set_limits(libc: ctypes.CDLL, **values: int) -> None:
    for name, value in values.items():
        libc.mallopt(_LIMITS[name][0], value)


def _configured(name: str) -> int:
    """Return the limit that the environment sets, else glibc's."""
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    found = re.findall(rf"glibc\.malloc\.{name}=(\w+)", tunables)
    text = found[-1] if found else os.environ.get(f"MALLOC_{name.upper()}_", "")
    try:
        return int(text, 0)
    except ValueError:
        return _LIMITS[name][1]


def trim() -> None:
    """Return freed memory to the system; with another C library than glibc this does nothing."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
