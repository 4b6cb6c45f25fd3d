"""Arrays on disk whose damage is noticed: .npy files that end with the SHA-256 of what is before.

The checksum is a second array in the same file, after the first one, where np.load does not look:
so a file and its checksum are there together or not at all. Files without one, as earlier versions
wrote them, can be read as well.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ctf.common import storage

CHUNK = 1 << 20  # bytes looked at in one go


class Damaged(Exception):
    """What is wrong with a file, in a few words."""


def save(path: Path, array: np.ndarray) -> None:
    """Writes an array and its checksum; the file is whole or not there."""
    buffer = io.BytesIO()  # numpy's own writing to a full disk fails without saying why
    np.save(buffer, array)
    buffer.write(_ending(hashlib.sha256(buffer.getbuffer())))
    with storage.atomic(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def first_byte(path: Path, shape: tuple[int, ...], dtype: str) -> int:
    """Where the values of the array begin in the file; looks at nothing but its header and size.

    Raises:
        Damaged: there is no file, it is cut off, or it holds another array.
    """
    try:
        with open(path, "rb") as file:
            return _first_byte(file, shape, dtype)
    except OSError as error:
        raise Damaged(_reason(error)) from None


def verify(path: Path, shape: tuple[int, ...], dtype: str, below: int) -> bool:
    """Reads all of a file, in the memory of a chunk; returns whether it has a checksum.

    Raises:
        Damaged: see `first_byte`; or it is not what its checksum says, or it holds a value that is
            not in 0..below - 1.
    """
    try:
        with open(path, "rb") as file:
            start = _first_byte(file, shape, dtype)
            file.seek(0)
            digest = hashlib.sha256(file.read(start))
            left = math.prod(shape) * np.dtype(dtype).itemsize
            outside = None
            while left:
                chunk = file.read(min(left, CHUNK))
                if not chunk:
                    raise Damaged("cut off")
                left -= len(chunk)
                digest.update(chunk)
                values = np.frombuffer(chunk, dtype)
                if outside is None and not (values.min() >= 0 and values.max() < below):
                    outside = int(values[(values < 0) | (values >= below)][0])
            ending = file.read()
    except OSError as error:
        raise Damaged(_reason(error)) from None
    if ending and ending != _ending(digest):
        raise Damaged("its content is not what its checksum says")
    if outside is not None:
        raise Damaged(f"holds {outside}, expected 0 to {below - 1}")
    return bool(ending)


class Reader:
    """A file that is read at any place, by several threads too, without a map into memory.

    Unlike a map, it takes no memory for what was read once, and a file that was cut off or a disk
    that fails is an error that can be told instead of the end of the process.
    """

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            os.close(self._file)

    def read_into(self, row: np.ndarray, at: int) -> None:
        """Fills a contiguous array with what is in the file from byte `at` on.

        Raises:
            OSError: there is less, or the disk fails.
        """
        if os.preadv(self._file, [row.data], at) != row.nbytes:
            raise OSError("it is cut off")


def _first_byte(file: BinaryIO, shape: tuple[int, ...], dtype: str) -> int:
    try:
        if np.lib.format.read_magic(file) != (1, 0):
            raise Damaged("not an array of this kind")
        got, by_column, kind = np.lib.format.read_array_header_1_0(file)
    except Damaged:
        raise
    except Exception:  # the parser raises nearly everything when the header is damaged
        raise Damaged("not an array, or cut off") from None
    if (got, kind) != (shape, np.dtype(dtype)) or by_column:
        raise Damaged(f"holds {kind} of shape {got}, expected {dtype} of {shape}")
    start = file.tell()
    size = os.fstat(file.fileno()).st_size
    if size < start + math.prod(shape) * kind.itemsize:
        raise Damaged("cut off")
    return start


def _ending(digest: hashlib._Hash) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.frombuffer(digest.digest(), np.uint8))
    return buffer.getvalue()


def _reason(error: OSError) -> str:
    return "missing" if isinstance(error, FileNotFoundError) else str(error.strerror)
