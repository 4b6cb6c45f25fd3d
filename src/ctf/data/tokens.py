"""The codes of a data set on disk: the manifest, a check, and a reader. Written by `extraction`.

A folder of tokens holds manifest.json, the shards train-00000.npy, ... and val-00000.npy, ... of
shape (images, views, L), and the classes train-classes.npy and val-classes.npy. Each of these
arrays is followed by its checksum, see `shards`.

Shape suffixes: B batch, L codes of an image, N images.
"""

from __future__ import annotations

import dataclasses
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from ctf.common import storage
from ctf.common.config import OMIT_DEFAULT, from_json
from ctf.common.errors import UserError
from ctf.common.progress import Progress
from ctf.data import shards
from ctf.data.transforms import View

Split = Literal["train", "val"]

MANIFEST = "manifest.json"
CLASS_DTYPE = "int64"
WHITE = "#ffffff"


@dataclasses.dataclass(frozen=True)
class Shard:
    """A file of codes or classes and the shape of its array, (images, views, L) or (images,)."""

    file: str
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class SplitManifest:
    """The images of one split and its shards.

    Attributes:
        images: name of the data set.
        fingerprint: of the images, whatever the views; see `ImageSet`.
        order: SHA-256 of the image numbers, int64, in the order of the shards.
        count: number of images.
        views: crops that were taken of each image.
        shards: files of codes; all but the last have the same size.
    """

    images: str
    fingerprint: str
    order: str
    count: int
    views: tuple[View, ...]
    shards: tuple[Shard, ...]


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a folder of tokens was made of: folders with equal manifests have equal content.

    Attributes:
        tokenizer: hash of the tokenizer.
        codebook_size: number of codes V.
        image_size: side of the images in pixels.
        length: number of codes L of an image.
        dtype: of the codes in the shards.
        class_names: name of each class, by class number.
        limit: number of training images; None for all, in the order of the set.
        seed: of the selection of these images; None without a limit.
        train: the training images.
        val: the held-out images.
        precision: of the encoder's large convolutions.
        background: colour behind transparent pixels of the images.
    """

    tokenizer: str
    codebook_size: int
    image_size: int
    length: int
    dtype: Literal["uint16", "int32"]
    class_names: tuple[str, ...]
    limit: int | None
    seed: int | None
    train: SplitManifest
    val: SplitManifest
    precision: Literal["fp32", "bf16"] = "fp32"
    background: str = dataclasses.field(default=WHITE, metadata=OMIT_DEFAULT)

    def split(self, split: Split) -> SplitManifest:
        """Return the manifest of one split."""
        return self.train if split == "train" else self.val

    def classes(self, split: Split) -> Shard:
        """Return the file of a split's classes, int64."""
        return Shard(f"{split}-classes.npy", (self.split(split).count,))


def load_manifest(folder: Path) -> Manifest:
    """Load the manifest of a folder of tokens.

    Raises:
        UserError: there is none, or it is inconsistent.
    """
    path = folder / MANIFEST
    manifest = from_json(Manifest, storage.load_json(path), where=str(path))
    for part in (manifest.train, manifest.val):
        counts = [shard.shape[0] for shard in part.shards]
        shapes = {shard.shape[1:] for shard in part.shards}
        if sum(counts) != part.count or shapes - {(len(part.views), manifest.length)}:
            raise UserError(
                f"{path}: damaged: its shards do not hold {part.count} images x {len(part.views)} "
                f"views x {manifest.length} codes\n"
                "delete the folder and run ctf tokens extract again"
            )
    return manifest


@dataclasses.dataclass(frozen=True)
class CheckResult:
    """How many files are intact, and how many of them have no checksum."""

    files: int
    without_checksum: int


def check(folder: Path, progress: Progress | None = None) -> CheckResult:
    """Read every file of a folder of tokens: checksums, shapes, ranges of codes and classes.

    Args:
        folder: the folder of tokens.
        progress: called with (files checked, files).

    Raises:
        UserError: the folder holds no tokens, or files are damaged; all of these are listed.
    """
    manifest = load_manifest(folder)
    files = [
        shard
        for split in get_args(Split)
        for shard in (manifest.classes(split), *manifest.split(split).shards)
    ]
    damaged, without_checksum = [], 0
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        results = pool.map(lambda shard: verify(folder, shard, manifest), files)
        for done, (shard, result) in enumerate(zip(files, results, strict=True), 1):
            if isinstance(result, shards.DamagedFileError):
                damaged.append(f"{shard.file}: {result}")
            elif not result:
                without_checksum += 1
            if progress is not None:
                progress(done, len(files))
    if damaged:
        raise UserError(
            f"{folder}: {len(damaged)} of {len(files)} files are damaged; run ctf tokens extract "
            "again to replace them\n" + "\n".join(damaged)
        )
    return CheckResult(len(files), without_checksum)


def verify(folder: Path, shard: Shard, manifest: Manifest) -> bool | shards.DamagedFileError:
    """Return the damage of a file, or whether it has a checksum."""
    path = folder / shard.file
    is_classes = len(shard.shape) == 1
    dtype = CLASS_DTYPE if is_classes else manifest.dtype
    below = len(manifest.class_names) if is_classes else manifest.codebook_size
    try:
        return shards.verify(path, shard.shape, dtype, below)
    except shards.DamagedFileError as damage:
        return damage


def is_damaged(folder: Path, shard: Shard, manifest: Manifest) -> bool:
    """Whether a file is missing or damaged."""
    return isinstance(verify(folder, shard, manifest), shards.DamagedFileError)


class Tokens:
    """The codes of one split, read from disk on demand.

    Shards are opened by each process when it first reads from them, so that the reader can be
    pickled to data-loading workers. Classes are held in memory, codes are not.

    Args:
        folder: the folder of tokens.
        split: "train" or "val".
        tokenizer_hash: the expected tokenizer; None for any.

    Raises:
        UserError: the folder holds no tokens, is incomplete, or was made by another tokenizer. The
            codes themselves are only verified by `check`.
    """

    def __init__(self, folder: Path, split: Split, tokenizer_hash: str | None = None) -> None:
        self.folder = folder
        self.split = split
        self.manifest = load_manifest(folder)
        if tokenizer_hash is not None and self.manifest.tokenizer != tokenizer_hash:
            raise UserError(
                f"{folder}: made by tokenizer {self.manifest.tokenizer[:12]}, expected "
                f"{tokenizer_hash[:12]}: the tokenizer has changed\n"
                "run ctf tokens extract again, for another run or after deleting this folder"
            )
        part, classes = self.manifest.split(split), self.manifest.classes(split)
        damaged, self._offsets = [], []
        for shard in (classes, *part.shards):
            dtype = CLASS_DTYPE if shard is classes else self.manifest.dtype
            try:
                self._offsets.append(shards.data_offset(folder / shard.file, shard.shape, dtype))
            except shards.DamagedFileError:
                damaged.append(shard.file)
        if damaged:
            raise UserError(
                f"{folder}: incomplete: {damaged[0]} is missing or damaged"
                + (f", and {len(damaged) - 1} more" if len(damaged) > 1 else "")
                + "\nrun ctf tokens extract again; it keeps the files that are intact"
            )
        self.classes_N: np.ndarray = np.load(folder / classes.file)
        del self._offsets[0]  # that of the classes
        self._readers: dict[int, shards.Reader] = {}

    def __len__(self) -> int:
        return self.manifest.split(self.split).count

    @property
    def views(self) -> int:
        """Number of views of each image."""
        return len(self.manifest.split(self.split).views)

    def codes(self, indices: np.ndarray, views: np.ndarray | int = 0) -> Tensor:
        """Read the codes of images.

        Args:
            indices: image numbers, (B,).
            views: number of the view of each image, (B,), or of all.

        Returns:
            Codes (B, L), int64: torch cannot index with the uint16 of the shards.

        Raises:
            IndexError: there is no such image or view.
            UserError: a shard was damaged after the reader was made.
        """
        indices = np.asarray(indices, np.int64)
        views = np.broadcast_to(np.asarray(views, np.int64), indices.shape)
        for values, count, name in ((indices, len(self), "image"), (views, self.views, "view")):
            outside = values[(values < 0) | (values >= count)]
            if len(outside):
                raise IndexError(f"{name} {outside[0]} of {count} in {self.folder}")
        codes_BL = np.empty((len(indices), self.manifest.length), self.manifest.dtype)
        if len(indices):
            size = self.manifest.split(self.split).shards[0].shape[0]
            shard_B, row_B = np.divmod(indices, size)
            offset_B = (row_B * self.views + views) * codes_BL[0].nbytes
            for row_L, shard, offset in zip(
                codes_BL, shard_B.tolist(), offset_B.tolist(), strict=True
            ):
                self._read_into(row_L, shard, offset)
        return torch.from_numpy(codes_BL.astype(np.int64))

    def _read_into(self, row_L: np.ndarray, shard: int, offset: int) -> None:
        path = self.folder / self.manifest.split(self.split).shards[shard].file
        try:
            if shard not in self._readers:
                self._readers[shard] = shards.Reader(path)
            self._readers[shard].read_into(row_L, self._offsets[shard] + offset)
        except OSError as error:
            raise UserError(
                f"{path}: cannot be read ({error.strerror or error}); "
                "run ctf tokens check to list damaged files"
            ) from None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_readers": {}}  # open files cannot be pickled
