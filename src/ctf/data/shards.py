""".npy files that end with a checksum, so that damage is noticed.

The SHA-256 is a second array in the same file, behind the first, where np.load does not look: a
file and its checksum are written together or not at all. Files without one, written by earlier
versions, can be read as well.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
import threading
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ctf.common import storage

CHUNK_BYTES = 1 << 20  # read at a time
# NumPy parses a header as Python's syntax, and ast.parse of Python 3.11 fails now and then if
# another thread is in it, too ("AST constructor recursion depth mismatch").
_PARSING = threading.Lock()


class DamagedFileError(Exception):
    """A file that does not hold the expected array; the message is the reason, in a few words."""


def save(path: Path, array: np.ndarray) -> None:
    """Write an array and its checksum atomically."""
    buffer = io.BytesIO()  # np.save to a file does not say why it failed on a full disk
    np.save(buffer, array)
    buffer.write(_checksum(hashlib.sha256(buffer.getbuffer())))
    with storage.atomic(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def data_offset(path: Path, shape: tuple[int, ...], dtype: str) -> int:
    """Return the offset of the array's values in the file, from its header and size alone.

    Raises:
        DamagedFileError: there is no file, it is truncated, or it holds another array.
    """
    try:
        with open(path, "rb") as file:
            return _data_offset(file, shape, dtype)
    except OSError as error:
        raise DamagedFileError(_reason(error)) from None


def verify(path: Path, shape: tuple[int, ...], dtype: str, below: int) -> bool:
    """Read a whole file, a chunk at a time, and return whether it has a checksum.

    Raises:
        DamagedFileError: see `data_offset`; or the checksum does not match, or a value is not in
            0..below - 1.
    """
    try:
        with open(path, "rb") as file:
            start = _data_offset(file, shape, dtype)
            file.seek(0)
            digest = hashlib.sha256(file.read(start))
            left = math.prod(shape) * np.dtype(dtype).itemsize
            outside = None
            while left:
                chunk = file.read(min(left, CHUNK_BYTES))
                if not chunk:
                    raise DamagedFileError("truncated")
                left -= len(chunk)
                digest.update(chunk)
                values = np.frombuffer(chunk, dtype)
                if outside is None and not (values.min() >= 0 and values.max() < below):
                    outside = int(values[(values < 0) | (values >= below)][0])
            checksum = file.read()
    except OSError as error:
        raise DamagedFileError(_reason(error)) from None
    if checksum and checksum != _checksum(digest):
        raise DamagedFileError("does not match its checksum")
    if outside is not None:
        raise DamagedFileError(f"holds {outside}, expected 0 to {below - 1}")
    return bool(checksum)


class Reader:
    """A file that several threads can read at any offset, without mapping it into memory.

    Unlike a memory map, it holds no memory for pages that were read once, and a truncated file or a
    failing disk raises an error instead of killing the process.
    """

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            os.close(self._file)

    def read_into(self, row: np.ndarray, offset: int) -> None:
        """Fill a contiguous array with the bytes of the file from `offset` on.

        Raises:
            OSError: the file is too short, or the disk fails.
        """
        if os.preadv(self._file, [row.data], offset) != row.nbytes:
            raise OSError("truncated")


def _data_offset(file: BinaryIO, shape: tuple[int, ...], dtype: str) -> int:
    try:
        if np.lib.format.read_magic(file) != (1, 0):
            raise DamagedFileError("not a .npy file of version 1.0")
        with _PARSING:
            got, by_column, got_dtype = np.lib.format.read_array_header_1_0(file)
    except DamagedFileError:
        raise
    except Exception:  # a damaged header makes the parser raise nearly any exception
        raise DamagedFileError("not a .npy file, or truncated") from None
    if (got, got_dtype) != (shape, np.dtype(dtype)) or by_column:
        raise DamagedFileError(
            f"holds {got_dtype} of shape {got}, expected {dtype} of shape {shape}"
        )
    start = file.tell()
    size = os.fstat(file.fileno()).st_size
    if size < start + math.prod(shape) * got_dtype.itemsize:
        raise DamagedFileError("truncated")
    return start


def _checksum(digest: hashlib._Hash) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.frombuffer(digest.digest(), np.uint8))
    return buffer.getvalue()


def _reason(error: OSError) -> str:
    return "missing" if isinstance(error, FileNotFoundError) else str(error.strerror)
