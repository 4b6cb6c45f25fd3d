"""Standard input, output and error of the process: closed, broken, or of another encoding."""

from __future__ import annotations

import errno
import io
import os
import sys
from typing import Any, TextIO

# The reader has gone: the other end of a pipe, or a terminal that was closed.
_GONE = (errno.EPIPE, errno.EIO, errno.ESHUTDOWN, errno.ECONNRESET)


class _Output(io.FileIO):
    """A file whose reader may go away, as that of `ctf --help | head` does: the work goes on."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in _GONE:
                raise
            return memoryview(data).nbytes


def prepare() -> None:
    """Make the standard streams of this process safe to use.

    Those that are closed become /dev/null, so that no file that is opened later takes their place.
    What cannot be encoded is written with a backslash, and what nobody reads is dropped.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, which is this one
    if sys.stdin is None:
        sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stdout = _output(1, sys.stdout)
    sys.stderr = _output(2, sys.stderr)


def _output(number: int, stream: TextIO | None) -> io.TextIOWrapper:
    if stream is not None:
        stream.flush()
    file = _Output(number, "w", closefd=False)
    return io.TextIOWrapper(
        io.BufferedWriter(file),
        encoding=stream.encoding if stream is not None else "utf-8",
        errors="backslashreplace",
        line_buffering=number == 2 or file.isatty(),
    )
