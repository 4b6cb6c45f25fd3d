"""What reading and making tokens costs: a cache of ImageNet's size, and LlamaGen's extraction.

Shapes: B batch, L codes of an image, N pictures.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np

from ctf import checkpoint, loop, shards
from ctf.config import to_json
from ctf.images import PLAIN
from ctf.tokens import MANIFEST, Manifest, Shard, SplitManifest, Tokens

IMAGENET = 1_281_167  # training pictures of ImageNet-1k
LENGTH, CODEBOOK, CLASSES = 256, 16_384, 1000  # of VQ-16 at 256 pixels


def write_cache(folder: Path, count: int, shard_images: int = 4096) -> None:
    """Writes a folder of random tokens, one view of each picture, as `tokens.extract` would.

    The first two codes of a picture are its number: number % CODEBOOK and number // CODEBOOK.
    """

    def part(split: str, count: int) -> SplitManifest:
        starts = range(0, count, shard_images)
        files = tuple(
            Shard(f"{split}-{i:05d}.npy", (min(shard_images, count - start), 1, LENGTH))
            for i, start in enumerate(starts)
        )
        classes_N = np.arange(count) % CLASSES
        shards.save(folder / f"{split}-classes.npy", classes_N)
        for shard, start in zip(files, starts, strict=True):
            codes = loop.generator(0, start).integers(0, CODEBOOK, shard.shape, np.uint16)
            numbers_N = np.arange(start, start + len(codes))
            codes[:, 0, 0], codes[:, 0, 1] = numbers_N % CODEBOOK, numbers_N // CODEBOOK
            shards.save(folder / shard.file, codes)
        return SplitManifest("random", "", "", count, (PLAIN,), files)

    names = tuple(str(c) for c in range(CLASSES))
    manifest = Manifest(
        "", CODEBOOK, 256, LENGTH, "uint16", names, None, None, part("train", count), part("val", 1)
    )
    checkpoint.save_json(folder / MANIFEST, to_json(manifest))


def read(folder: Path, batch: int = 256, steps: int = 2000) -> dict[str, float]:
    """Opens a folder of tokens and reads shuffled batches, as a training does.

    Returns:
        seconds to open it, codes read in a second, and the megabytes that this process grew by: in
        private memory, and in all, maps of files included (Linux; else 0).
    """
    private, resident = memory()
    began = time.perf_counter()
    tokens = Tokens(folder, "train")
    opened = time.perf_counter()
    for step in range(steps):
        tokens.codes(loop.batch_indices(len(tokens), batch, 0, step))
    seconds = time.perf_counter() - opened
    private_after, resident_after = memory()
    return {
        "images": len(tokens),
        "open_seconds": opened - began,
        "codes_per_second": steps * batch * tokens.manifest.length / seconds,
        "private_megabytes": private_after - private,
        "resident_megabytes": resident_after - resident,
    }


def memory() -> tuple[float, float]:
    """Megabytes of this process: its own (RssAnon), and all (VmRSS); 0 where there is no /proc."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    sizes = dict(line.split(":", maxsplit=1) for line in lines)
    own, all_of_it = (int(sizes.get(k, "0 kB").split()[0]) for k in ("RssAnon", "VmRSS"))
    return own / 1024, all_of_it / 1024
