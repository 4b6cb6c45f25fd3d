"""Memory: what limits it, and that no setting of malloc outlives its block."""

import ctypes
from pathlib import Path

import pytest
import torch

from ctf.common import memory

CPU = torch.device("cpu")


def test_a_container_and_the_machine_limit_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "meminfo")
    assert memory.available(CPU) > 2**60  # unknown
    (tmp_path / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable: 3000 kB\n")
    assert memory.available(CPU) == 3000 * 1024
    (tmp_path / "memory.max").write_text("2000000\n")
    (tmp_path / "memory.current").write_text("1500000\n")
    (tmp_path / "memory.stat").write_text("anon 5\ninactive_file 200000\n")
    assert memory.available(CPU) == 700000
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.available(CPU) == 3000 * 1024


def test_freed_memory_is_returned_after_the_block() -> None:
    before = memory.resident()[1]
    with memory.keep_freed():
        for _ in range(3):
            held = torch.ones(50_000_000)
            del held
    assert memory.resident()[1] < before + 20


def test_limits_are_restored_after_the_outermost_block(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, int]] = []

    class Libc:
        def mallopt(self, number: int, value: int) -> None:
            calls.append((number, value))

        def malloc_trim(self, _: int) -> None: ...

    monkeypatch.setattr(ctypes, "CDLL", lambda _: Libc())
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.mmap_max=7:glibc.malloc.check=1")
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "0x1000")
    mmap_max, mmap_threshold, trim_threshold = -4, -3, -1  # of malloc.h
    with memory.keep_freed():
        with memory.keep_freed():
            calls.clear()
        assert calls == []
    assert dict(calls) == {mmap_max: 7, mmap_threshold: 32 << 20, trim_threshold: 4096}
