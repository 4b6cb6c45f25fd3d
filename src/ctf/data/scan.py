"""The one look at every file of a source: is it a picture, how large, and which bytes is it of?

What was found is kept in the user's cache, so a file is looked at again only if it has changed.

Shape suffix: N files.
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
from ctf.data.decode import Unusable, check_size, decode
from ctf.data.sources import Files

THREADS = min(16, os.cpu_count() or 1)  # Pillow's decoders run outside the interpreter's lock
SAVE_SECONDS = 60.0  # a kill loses at most this much looking


@dataclass(frozen=True)
class BadPicture:
    """A file that cannot be used: its path relative to the folder, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Scan:
    """digests_N: (N, 32), the SHA-256 of each file. bad: those that cannot be used, by row."""

    digests_N: NDArray[np.uint8]
    bad: dict[int, BadPicture]


class _Known:
    """What is known of the files of a source: a row for each, of zeros where nothing is."""

    def __init__(self, files: Files) -> None:
        count = len(files.names)
        self.files = files
        self.stamps = files.stamps()
        self.sides = np.zeros((count, 2), np.int32)  # width and height of the upright picture
        self.digests = np.zeros((count, 32), np.uint8)
        source = os.fspath(files.where.absolute())
        self.file = f"scans/{hashlib.sha256(os.fsencode(source)).hexdigest()[:24]}.npz"
        stored = cache.load(self.file)
        if stored is None:
            return
        old = {n: i for i, n in enumerate(cache.to_texts(stored["names"], len(stored["sides"])))}
        old_N = np.array([old.get(name, -1) for name in files.names], np.int64)
        rows = np.flatnonzero((old_N >= 0) & (self.stamps[:, 0] >= 0))
        rows = rows[(stored["stamps"][old_N[rows]] == self.stamps[rows]).all(1)]
        self.sides[rows] = stored["sides"][old_N[rows]]
        self.digests[rows] = stored["digests"][old_N[rows]]

    def save(self) -> None:
        rows = np.flatnonzero(self.sides[:, 0])
        names = cache.from_texts([self.files.names[row] for row in rows])
        arrays = {
            "sides": self.sides[rows],
            "stamps": self.stamps[rows],
            "digests": self.digests[rows],
        }
        cache.save(self.file, {"names": names, **arrays})


def scan(
    files: Files,
    size: int,
    colour: tuple[int, ...],
    keep: Callable[[int, Image.Image], None],
    progress: Progress | None,
) -> Scan:
    """Decodes the files that are not known, and says which cannot be cut to `size` pixels.

    Args:
        keep: is given each usable picture that was decoded, with its row; by several threads.
        progress: called with (files looked at or known, files).
    """
    known = _Known(files)
    bad: dict[int, str] = {}

    def look(row: int) -> None:
        try:
            data = files.read(row)
            image = decode(data, 1, colour)
        except Unusable as why:
            bad[row] = str(why)
            return
        known.digests[row] = np.frombuffer(hashlib.sha256(data).digest(), np.uint8)
        known.sides[row] = image.size
        if min(image.size) >= size:
            keep(row, image)

    count, saved = len(files.names), time.monotonic()
    unknown = np.flatnonzero(known.sides[:, 0] == 0).tolist()
    done = count - len(unknown)
    with warnings.catch_warnings(), ThreadPoolExecutor(THREADS) as pool:
        warnings.simplefilter("ignore")  # Pillow's: about pictures that end up in `bad`
        for start in range(0, len(unknown), 256):  # not a future for each of a million files
            for _ in pool.map(look, unknown[start : start + 256]):
                done += 1
                if progress is not None:
                    progress(done, count)
            if time.monotonic() - saved > SAVE_SECONDS:
                known.save()
                saved = time.monotonic()
    if len(bad) < len(unknown):
        known.save()
    for row in np.flatnonzero((known.sides[:, 0] > 0) & (known.sides.min(1) < size)).tolist():
        width, height = known.sides[row].tolist()
        try:
            check_size(width, height, size)
        except Unusable as why:
            bad[row] = str(why)
    return Scan(known.digests, {row: BadPicture(files.names[row], bad[row]) for row in sorted(bad)})
