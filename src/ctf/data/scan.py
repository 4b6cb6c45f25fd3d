"""Scan of an image source: decodes every image once to find its size, its hash, and damage.

Results are kept in the user's cache, so that an image is scanned again only if its file changed.

Shape suffix: N images.
"""

from __future__ import annotations

import hashlib
import os
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ctf.common import cache
from ctf.common.progress import Progress
from ctf.data.decode import UnreadableImageError, decode, too_small
from ctf.data.sources.base import ImageSource

THREADS = min(16, os.cpu_count() or 1)  # Pillow's decoders release the interpreter's lock
SAVE_SECONDS = 60.0  # an interrupted scan loses at most this much work
CHUNK = 256  # images submitted at a time, rather than a million futures at once


@dataclass(frozen=True)
class Scan:
    """Result of a scan.

    Attributes:
        digests_N: SHA-256 of the encoded bytes of each image, uint8, (N, 32).
        unreadable: the reason for each image that cannot be used, by row in ascending order.
    """

    digests_N: NDArray[np.uint8]
    unreadable: dict[int, str]


class _ScanCache:
    """Sizes and digests of a source's images: zeros for those that are not known yet."""

    def __init__(self, source: ImageSource) -> None:
        count = len(source.names)
        self.names = source.names
        self.stamps = source.stamps()
        self.sizes = np.zeros((count, 2), np.int32)  # width and height of the upright image
        self.digests = np.zeros((count, 32), np.uint8)
        path = os.fspath(source.path.absolute())
        # "2": of files that the present decoder can read.
        self.file = f"scans/2-{hashlib.sha256(os.fsencode(path)).hexdigest()[:24]}.npz"
        stored = cache.load(self.file)
        if stored is None:
            return
        old_names = cache.to_texts(stored["names"], len(stored["sides"]))
        old_rows = {name: row for row, name in enumerate(old_names)}
        old_N = np.array([old_rows.get(name, -1) for name in source.names], np.int64)
        rows = np.flatnonzero((old_N >= 0) & (self.stamps[:, 0] >= 0))
        rows = rows[(stored["stamps"][old_N[rows]] == self.stamps[rows]).all(1)]
        self.sizes[rows] = stored["sides"][old_N[rows]]
        self.digests[rows] = stored["digests"][old_N[rows]]

    def save(self) -> None:
        rows = np.flatnonzero(self.sizes[:, 0])
        arrays = {
            "names": cache.from_texts([self.names[row] for row in rows]),
            "sides": self.sizes[rows],
            "stamps": self.stamps[rows],
            "digests": self.digests[rows],
        }
        cache.save(self.file, arrays)


def scan(
    source: ImageSource,
    size: int,
    background: tuple[int, ...],
    on_decoded: Callable[[int, Image.Image], None],
    progress: Progress | None,
) -> Scan:
    """Decode the images that are not in the cache, and find those that cannot be used.

    Args:
        source: the images.
        size: smallest allowed width and height in pixels.
        background: RGB colour behind transparent pixels.
        on_decoded: called with the row and the image, large enough, for each that is decoded; from
            several threads.
        progress: called with (scanned images, images).
    """
    known = _ScanCache(source)
    unreadable: dict[int, str] = {}

    def scan_image(row: int) -> None:
        try:
            data = source.read(row)
            image = decode(data, 1, background)
        except UnreadableImageError as reason:
            unreadable[row] = str(reason)
            return
        known.digests[row] = np.frombuffer(hashlib.sha256(data).digest(), np.uint8)
        known.sizes[row] = image.size
        if min(image.size) >= size:
            on_decoded(row, image)

    unknown = np.flatnonzero(known.sizes[:, 0] == 0).tolist()
    last_saved = time.monotonic()
    with warnings.catch_warnings(), ThreadPoolExecutor(THREADS) as pool:
        warnings.simplefilter("ignore")  # Pillow's, about images that end up in `unreadable`
        for start in range(0, len(unknown), CHUNK):
            chunk = pool.map(scan_image, unknown[start : start + CHUNK])
            for done, _ in enumerate(chunk, len(source.names) - len(unknown) + start + 1):
                if progress is not None:
                    progress(done, len(source.names))
            if time.monotonic() - last_saved > SAVE_SECONDS:
                known.save()
                last_saved = time.monotonic()
    if len(unreadable) < len(unknown):
        known.save()
    for row in np.flatnonzero((known.sizes[:, 0] > 0) & (known.sizes.min(1) < size)).tolist():
        width, height = known.sizes[row].tolist()
        unreadable[row] = too_small(width, height, size)
    return Scan(known.digests, dict(sorted(unreadable.items())))
