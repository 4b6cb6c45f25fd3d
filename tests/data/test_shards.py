"""Arrays with a checksum."""

import gc
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ctf.data import shards


@given(st.integers(0, 2000), st.integers(0, 7))
def test_every_flipped_bit_is_noticed(
    tmp_path_factory: pytest.TempPathFactory, at: int, bit: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "bits.npy"
    shards.save(path, np.arange(100, dtype=np.uint16))
    data = bytearray(path.read_bytes())
    data[at % len(data)] ^= 1 << bit
    path.write_bytes(data)
    with pytest.raises(shards.DamagedFileError):
        shards.verify(path, (100,), "uint16", 2**16)


def test_an_intact_file_is_read_by_numpy_and_at_any_offset(tmp_path: Path) -> None:
    array = np.arange(12, dtype=np.uint16).reshape(3, 4)
    shards.save(tmp_path / "a.npy", array)
    assert np.array_equal(np.load(tmp_path / "a.npy"), array)
    assert shards.verify(tmp_path / "a.npy", (3, 4), "uint16", 12)
    offset = shards.data_offset(tmp_path / "a.npy", (3, 4), "uint16")
    row = np.empty(4, np.uint16)
    shards.Reader(tmp_path / "a.npy").read_into(row, offset + array[:2].nbytes)
    assert np.array_equal(row, array[2])


@pytest.fixture
def collected_often() -> Iterator[None]:
    """Collects garbage at every turn, with a callback, which lets other threads run."""
    before, callback = gc.get_threshold(), lambda *_: sum(range(200))
    interval = sys.getswitchinterval()
    gc.callbacks.append(callback)
    gc.set_threshold(5)
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)
    gc.set_threshold(*before)
    gc.callbacks.remove(callback)


@pytest.mark.usefixtures("collected_often")
def test_several_threads_read_headers_at_a_time(tmp_path: Path) -> None:
    shards.save(tmp_path / "a.npy", np.zeros((3, 4), np.uint16))
    with ThreadPoolExecutor(8) as pool:
        verified = [
            pool.submit(shards.verify, tmp_path / "a.npy", (3, 4), "uint16", 12)
            for _ in range(1000)
        ]
        assert all(future.result() for future in verified)
