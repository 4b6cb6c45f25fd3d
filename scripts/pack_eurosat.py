"""Pack the published images of EuroSAT into the data file that the package includes.

    python scripts/pack_eurosat.py eurosat-rgb.tar

The argument is a .tar file of the RGB images, with a folder for each class. They are stacked into
sheets of WebP; `ctf.data.eurosat.split` chooses the split of each. The same images and the same
libwebp make the same file. Prints its size, how much it differs from the originals, and the
checksums that ctf/data/eurosat.py states.
"""

from __future__ import annotations

import hashlib
import io
import sys
import tarfile
import zipfile
from pathlib import Path, PurePosixPath

import numpy as np
import tyro
from numpy.typing import NDArray
from PIL import Image, features

from ctf.common.errors import UserError
from ctf.common.storage import atomic
from ctf.data import eurosat

SHEET = 255  # 16,320 pixels high; WebP allows 16,383
QUALITY = 88  # the highest that makes a file of 21.5 MB or less
COUNT = 27_000


def read_originals(
    path: Path,
) -> tuple[list[str], NDArray[np.int64], NDArray[np.uint8]]:
    """Return the file name, class number and pixels of each published image, sorted by path."""
    originals = {}
    with tarfile.open(path) as file:
        for member in file:
            data = file.extractfile(member)
            parts = PurePosixPath(member.name).parts
            if data is not None and len(parts) > 1 and parts[-2] in eurosat.CLASSES:
                image = Image.open(io.BytesIO(data.read()))
                if (image.size, image.mode) != ((eurosat.SIZE, eurosat.SIZE), "RGB"):
                    raise UserError(f"{path}: {member.name}: not an RGB image of 64 x 64 pixels")
                originals[parts[-2:]] = np.asarray(image)
    if len(originals) != COUNT:
        raise UserError(f"{path}: got {len(originals)} images, expected {COUNT}")
    keys = sorted(originals)
    names, classes = [key[1] for key in keys], [eurosat.CLASSES.index(key[0]) for key in keys]
    return names, np.array(classes), np.stack([originals[key] for key in keys])


def to_webp(sheet: NDArray[np.uint8], quality: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(sheet).save(buffer, "WEBP", quality=quality, method=6)
    return buffer.getvalue()


def mean_square_errors(left: NDArray[np.uint8], right: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Return the mean square error of each image."""
    return np.array(
        [np.square(a.astype(float) - b).mean() for a, b in zip(left, right, strict=True)]
    )


def pack(originals: tyro.conf.Positional[Path], quality: int = QUALITY) -> None:
    """Pack the published images of EuroSAT into the data file that the package includes.

    Args:
        originals: .tar file of the RGB images
        quality: of WebP, 0 to 100
    """
    names, classes_N, pixels_NHWC = read_originals(originals)
    splits = eurosat.split(names, classes_N)
    path = eurosat.sheets().path
    with atomic(path) as temporary, zipfile.ZipFile(temporary, "w") as file:
        for split, rows in splits.items():
            for start in range(0, len(rows), SHEET):
                sheet = pixels_NHWC[rows[start : start + SHEET]].reshape(-1, eurosat.SIZE, 3)
                # A ZipInfo has a fixed date, so that the same images make the same file.
                entry = zipfile.ZipInfo(f"{split}/pixels-{start // SHEET:03d}.webp")
                file.writestr(entry, to_webp(sheet, quality))
            labels = classes_N[rows].astype(np.uint8).tobytes()
            file.writestr(zipfile.ZipInfo(f"{split}/labels"), labels, zipfile.ZIP_DEFLATED)
    print(f"{path}: {path.stat().st_size / 1e6:.2f} MB, by libwebp {features.version('webp')}")
    print(f"FILE_SHA256 {hashlib.sha256(path.read_bytes()).hexdigest()}")
    errors = []
    for split, rows in splits.items():
        decoded, labels_N = eurosat.sheets().pixels(split), eurosat.sheets().labels(split)
        if not np.array_equal(labels_N, classes_N[rows]):
            raise UserError(f"{path}: the labels of {split} read back differ from {originals}")
        errors.append(mean_square_errors(decoded, pixels_NHWC[rows]))
        digest = hashlib.sha256(decoded.tobytes() + labels_N.tobytes()).hexdigest()
        print(f"SHA256 of {split}: {digest}")
    errors_N = np.concatenate(errors)
    psnr_N = 10 * np.log10(255**2 / errors_N)
    print(
        f"PSNR: {10 * np.log10(255**2 / errors_N.mean()):.2f} dB of all pixels; of images "
        f"{psnr_N.mean():.2f} on average, {np.percentile(psnr_N, 1):.2f} at the first percentile, "
        f"{psnr_N.min():.2f} at least"
    )


if __name__ == "__main__":
    try:
        tyro.cli(pack)
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
