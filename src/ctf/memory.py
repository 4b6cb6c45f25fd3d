"""The memory of this process: how much it takes, and how the C library deals with what is freed."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from pathlib import Path

# Of glibc's mallopt (malloc.h).
TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX = -1, -3, -4


def used() -> tuple[float, float]:
    """Megabytes: this process's own (RssAnon), and with files mapped (VmRSS); 0 without /proc."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    sizes = dict(line.split(":", maxsplit=1) for line in lines)
    own, all_of_it = (int(sizes.get(k, "0 kB").split()[0]) for k in ("RssAnon", "VmRSS"))
    return own / 1024, all_of_it / 1024


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """Keeps what is freed meanwhile for the next tensor, and gives it back to the system after.

    By default glibc asks the system for each tensor of more than 32 MB, and the system clears it
    page by page: more than a quarter of the time in which VQ-16 encodes a picture of 256 pixels.
    Elsewhere than on glibc this does nothing.
    """
    library = ctypes.CDLL(None)
    if not (hasattr(library, "mallopt") and hasattr(library, "malloc_trim")):
        yield
        return
    library.mallopt(MMAP_MAX, 0)
    library.mallopt(TRIM_THRESHOLD, 2**31 - 1)
    try:
        yield
    finally:
        # Where glibc's own, moving limits end, too, once large tensors have been freed.
        library.mallopt(MMAP_MAX, 1 << 16)
        library.mallopt(MMAP_THRESHOLD, 32 << 20)
        library.mallopt(TRIM_THRESHOLD, 64 << 20)
        library.malloc_trim(0)
