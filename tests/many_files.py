"""How long a folder of very many pictures takes to open, and how much memory.

    python -m tests.many_files --count 1000000

Makes a folder of that many names in 1000 classes, hard links to a few hundred small pictures,
opens it twice, each time in a process of its own, and deletes it. The first time every file is
decoded; then what was found is in the cache, and sizes and times of the files are compared. Seconds
are by the clock, and of computing.
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
began, before = time.monotonic(), time.process_time()
splits = open_images(sys.argv[1], int(sys.argv[2]))
print(json.dumps({
    "train": len(splits.train), "val": len(splits.val), "classes": len(splits.train.class_names),
    "seconds": time.monotonic() - began, "computing": time.process_time() - before,
    "megabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
}))
"""


def make(folder: Path, count: int) -> None:
    """Names in CLASSES folders; a file of its own for every one of DISTINCT pictures."""
    random = np.random.default_rng(0)
    originals = folder.with_name("originals")
    originals.mkdir()
    for number in range(DISTINCT):
        pixels = random.integers(0, 256, (SIDE, SIDE, 3), np.uint8)
        Image.fromarray(pixels).save(originals / f"{number}.png")
    folder.mkdir()
    for kind in range(min(CLASSES, count)):
        (folder / f"{kind:04d}").mkdir()
    for number in range(count):
        name = f"{number % CLASSES:04d}/{number}.png"
        os.link(originals / f"{number % DISTINCT}.png", folder / name)


def opened(folder: Path, cache: Path, size: int = SIDE) -> dict[str, float]:
    """What a process of its own finds, and what that takes."""
    source = Path(ctf.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", OPEN, str(folder), str(size)],
        env={**os.environ, "CTF_CACHE": str(cache), "PYTHONPATH": str(source)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    found: dict[str, float] = json.loads(done.stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=1_000_000)
    count = parser.parse_args().count
    with tempfile.TemporaryDirectory(prefix="ctf-many-") as temporary:
        folder, cache = Path(temporary) / "pictures", Path(temporary) / "cache"
        make(folder, count)
        print(f"{count:,} files made", flush=True)
        for what in ("first", "second"):
            found = opened(folder, cache)
            print(
                f"{what} time: {found['train']:,.0f} + {found['val']:,.0f} pictures of "
                f"{found['classes']} classes, {found['seconds']:.1f} s, computing "
                f"{found['computing']:.1f} s, at most {found['megabytes']:,.0f} MB",
                flush=True,
            )


if __name__ == "__main__":
    main()
