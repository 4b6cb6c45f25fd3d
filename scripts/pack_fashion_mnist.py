"""Pack the published files of Fashion-MNIST into the data file that the package includes.

    python scripts/pack_fashion_mnist.py /usr/share/datasets/fashion-mnist

The argument is a folder with the four original idx .gz files, for example that of Debian's package
dataset-fashion-mnist. The images are stacked into grey PNG sheets of a thousand images each. The
result is read back and compared with the originals bit by bit.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import struct
import sys
import zipfile
from pathlib import Path

import numpy as np
import tyro
from numpy.typing import NDArray
from PIL import Image

from ctf.common.errors import UserError
from ctf.common.storage import atomic
from ctf.data import fashion_mnist

SHEET = 1000  # 28,000 pixels high: less than the 32,767 that many viewers can show
ORIGINAL_NAMES = {"train": "train", "test": "t10k"}


def read_idx(path: Path) -> NDArray[np.uint8]:
    """Read an idx file of bytes: two zero bytes, type 8, rank, the lengths, the values."""
    try:
        data = gzip.decompress(path.read_bytes())
    except (OSError, EOFError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    zeros, element_type, rank = struct.unpack(">HBB", data[:4])
    if (zeros, element_type) != (0, 8):
        raise UserError(f"{path}: not an idx file of bytes")
    shape = struct.unpack(f">{rank}I", data[4 : 4 + 4 * rank])
    return np.frombuffer(data, dtype=np.uint8, offset=4 + 4 * rank).reshape(shape)


def to_png(sheet: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    filtered = 1  # zlib's Z_FILTERED strategy: the smallest of its five on these sheets
    Image.fromarray(sheet).save(buffer, "PNG", compress_level=9, compress_type=filtered)
    return buffer.getvalue()


def pack(originals: tyro.conf.Positional[Path]) -> None:
    """Pack the published files of Fashion-MNIST into the data file that the package includes.

    Args:
        originals: folder of the four idx .gz files, e.g. /usr/share/datasets/fashion-mnist
    """
    splits = {}
    for split, name in ORIGINAL_NAMES.items():
        pixels = read_idx(originals / f"{name}-images-idx3-ubyte.gz")
        labels = read_idx(originals / f"{name}-labels-idx1-ubyte.gz")
        digest = hashlib.sha256(pixels.tobytes() + labels.tobytes()).hexdigest()
        if digest != fashion_mnist.SHA256[split]:
            raise UserError(
                f"{originals}: its {split} images are not the published ones: got SHA-256 "
                f"{digest}, expected {fashion_mnist.SHA256[split]}"
            )
        splits[split] = pixels, labels
    path = fashion_mnist.FOLDER / "pictures.zip"
    with atomic(path) as temporary, zipfile.ZipFile(temporary, "w") as file:
        for split, (pixels, labels) in splits.items():
            for start in range(0, len(pixels), SHEET):
                sheet = pixels[start : start + SHEET].reshape(-1, pixels.shape[2])
                # A ZipInfo has a fixed date, so that the same images make the same file.
                name = f"{split}/pixels-{start // SHEET:03d}.png"
                file.writestr(zipfile.ZipInfo(name), to_png(sheet))
            entry = zipfile.ZipInfo(f"{split}/labels")
            file.writestr(entry, labels.tobytes(), zipfile.ZIP_DEFLATED)
    for split, original in splits.items():
        for before, after in zip(original, fashion_mnist.load_arrays(split), strict=True):
            if not np.array_equal(before, after):
                raise UserError(f"{path}: {split} read back differs from {originals}")
    print(f"{path}: {path.stat().st_size / 1e6:.2f} MB, equal to the originals")


if __name__ == "__main__":
    try:
        tyro.cli(pack)
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
