"""How long a folder of very many images takes to open, and how much memory.

    python -m tests.many_files --count 1000000

Makes a folder of that many files in 1000 classes, hard links to a few hundred small images, opens
it twice, each time in a new process, and deletes it. The first time every file is decoded; the
second time the scan is in the cache, and only the stamps of the files are compared. Prints
wall-clock and CPU seconds and the peak memory.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

import ctf

DISTINCT, CLASSES, SIDE = 300, 1000, 32
OPEN = """
import json, os, resource, sys, time
from ctf.data.images import open_images
start, cpu_start = time.monotonic(), time.process_time()
splits = open_images(sys.argv[1], int(sys.argv[2]))
print(json.dumps({
    "train": len(splits.train), "val": len(splits.val), "classes": len(splits.train.class_names),
    "seconds": time.monotonic() - start, "cpu_seconds": time.process_time() - cpu_start,
    "megabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
}))
"""


def make(folder: Path, count: int) -> None:
    """Make `count` files in CLASSES folders, links to DISTINCT images of noise."""
    random = np.random.default_rng(0)
    originals = folder.with_name("originals")
    originals.mkdir()
    for number in range(DISTINCT):
        pixels = random.integers(0, 256, (SIDE, SIDE, 3), np.uint8)
        Image.fromarray(pixels).save(originals / f"{number}.png")
    folder.mkdir()
    for number in range(min(CLASSES, count)):
        (folder / f"{number:04d}").mkdir()
    for number in range(count):
        name = f"{number % CLASSES:04d}/{number}.png"
        os.link(originals / f"{number % DISTINCT}.png", folder / name)


def open_in_process(folder: Path, cache: Path, size: int = SIDE) -> dict[str, float]:
    """Open the folder in a new process; return what it contains and what that took."""
    source = Path(ctf.__file__).parents[1]
    process = subprocess.run(
        [sys.executable, "-c", OPEN, str(folder), str(size)],
        env={**os.environ, "CTF_CACHE": str(cache), "PYTHONPATH": str(source)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    result: dict[str, float] = json.loads(process.stdout)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=1_000_000)
    count = parser.parse_args().count
    with tempfile.TemporaryDirectory(prefix="ctf-many-") as temporary:
        folder, cache = Path(temporary) / "images", Path(temporary) / "cache"
        make(folder, count)
        print(f"{count:,} files made", flush=True)
        for time in ("first", "second"):
            r = open_in_process(folder, cache)
            print(
                f"{time} time: {r['train']:,.0f} + {r['val']:,.0f} images of {r['classes']} "
                f"classes, {r['seconds']:.1f} s, {r['cpu_seconds']:.1f} s of CPU time, at most "
                f"{r['megabytes']:,.0f} MB",
                flush=True,
            )


if __name__ == "__main__":
    main()
