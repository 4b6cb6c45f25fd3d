"""Pictures -> codes, once, ahead of training: shards on disk, a manifest, a check, and a reader.

A folder of tokens holds manifest.json, the shards train-00000.npy, ... and val-00000.npy, ... of
shape (pictures, views, L), and the classes train-classes.npy and val-classes.npy. Each of these
arrays ends with its checksum (`shards`).

Shapes: B batch, C channels, H, W height and width, L codes of an image, N pictures.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ctf.common import claims, memory, signals, storage
from ctf.common.config import from_json, to_json
from ctf.common.distributed import ALONE, World
from ctf.common.errors import Stopped, UserError
from ctf.common.precision import Precision, uses_bf16
from ctf.common.progress import Progress
from ctf.data import shards
from ctf.data.images import VIEWS, ImageSet, Splits, View, as_tensor
from ctf.kernels import tokenizer_cpu
from ctf.models.tokenizer import VQModel

Split = Literal["train", "val"]

MANIFEST = "manifest.json"
CLASS_DTYPE = "int64"


@dataclasses.dataclass(frozen=True)
class TokensConfig:
    """What is extracted of each training picture; held-out pictures are seen plainly."""

    views: Literal["plain", "flip", "ten-crop"] = "flip"
    batch_size: int = 64
    shard_images: int = 4096  # a kill loses at most one shard; each is an open file for the reader
    seed: int = 0  # of the order in which `limit` takes pictures

    def __post_init__(self) -> None:
        for name in ("batch_size", "shard_images"):
            if getattr(self, name) < 1:
                raise UserError(f"tokens: {name} is {getattr(self, name)}, expected 1 or more")


@dataclasses.dataclass(frozen=True)
class Shard:
    """One file of codes."""

    file: str
    shape: tuple[int, ...]  # (pictures, views, L)


@dataclasses.dataclass(frozen=True)
class SplitManifest:
    """What the shards of one split were made of, and what they are."""

    images: str
    fingerprint: str  # of the pictures before any view of them was taken
    order: str  # SHA-256 of the numbers of the pictures, int64, in the order of the shards
    count: int
    views: tuple[View, ...]
    shards: tuple[Shard, ...]


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What made a folder of tokens: two runs with equal manifests make equal folders."""

    tokenizer: str  # hash
    codebook_size: int
    image_size: int
    length: int  # L
    dtype: Literal["uint16", "int32"]
    class_names: tuple[str, ...]
    limit: int | None  # None: every training picture, in the order of the set
    seed: int | None  # None where there is no limit, and so nothing to draw
    train: SplitManifest
    val: SplitManifest
    precision: Literal["fp32", "bf16"] = "fp32"  # of the encoder's large convolutions

    def split(self, split: Split) -> SplitManifest:
        return self.train if split == "train" else self.val

    def classes(self, split: Split) -> Shard:
        """The file of the classes of a split's pictures, int64."""
        return Shard(f"{split}-classes.npy", (self.split(split).count,))


@memory.kept()
def extract(
    tokenizer: VQModel,
    tokenizer_hash: str,
    images: Splits,
    folder: Path,
    config: TokensConfig,
    *,
    limit: int | None = None,
    precision: Precision = "auto",
    progress: Progress | None = None,
    world: World = ALONE,
) -> Manifest:
    """Encodes every view of every picture into `folder`; shards that are there and whole are kept.

    Killed at any moment and called again, it ends with the same files to the bit; called on a
    complete folder, it encodes nothing. Upon SIGTERM it ends after the batch, and keeps what it has
    of the shard in a file beside it, train-00000.begun.npy. Of several processes each one encodes
    its share of the shards. `limit` takes only that many training pictures, the first of
    `balanced_order`, and no more held-out ones; these are seen in the plain view.

    Args:
        precision: of the encoder's large convolutions. "bf16" is faster where the device multiplies
            bfloat16, and codes near a border change. "auto" is "fp32": codes are kept for long.

    Raises:
        UserError: the folder holds something else, the tokenizer is for another image size,
            `limit` is below 1, or the device does not multiply bfloat16 and should.
        Stopped: by SIGTERM, which any of the processes got; what was encoded is saved.
    """
    size = tokenizer.config.image_size
    if images.train.image_size != size:
        raise UserError(
            f"the pictures are {images.train.image_size} pixels wide, the tokenizer is for {size}; "
            f"open them at --image-size {size}"
        )
    if limit is not None and limit < 1:
        raise UserError(f"limit of training pictures is {limit}, expected 1 or more")
    device = next(tokenizer.parameters()).device
    low = precision == "bf16" and uses_bf16(precision, device)
    if limit is not None and limit >= len(images.train):
        limit = None
    sets: dict[Split, ImageSet] = {"train": images.train, "val": images.val}
    chosen: dict[Split, np.ndarray] = {
        split: np.arange(len(image_set), dtype=np.int64)
        if limit is None
        else balanced_order(image_set.classes_N, config.seed)[:limit]
        for split, image_set in sets.items()
    }
    codebook_size, length = tokenizer.config.codebook_size, tokenizer.grid**2
    manifest = Manifest(
        tokenizer=tokenizer_hash,
        codebook_size=codebook_size,
        image_size=size,
        length=length,
        dtype="uint16" if codebook_size <= 2**16 else "int32",
        class_names=images.train.class_names,
        limit=limit,
        seed=None if limit is None else config.seed,
        train=_split_manifest("train", images.train, chosen["train"], config, length),
        val=_split_manifest("val", images.val, chosen["val"], config, length),
        precision="bf16" if low else "fp32",
    )
    if world.main:
        _claim(folder, manifest)
    world.barrier()

    tokenizer = copy.deepcopy(tokenizer)  # the caller's model keeps its layers
    tokenizer_cpu.prepare(tokenizer, "encoder", torch.bfloat16 if low else torch.float32)
    total = sum(
        len(part.views) * shard.shape[0]
        for part in (manifest.train, manifest.val)
        for shard in part.shards[world.rank :: world.size]
    )
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, total)

    left = False
    with signals.asked() as asked:
        for split, image_set in sets.items():
            classes = manifest.classes(split)
            if world.main and _damage(folder, classes, manifest):
                classes_N = image_set.classes_N[chosen[split]].astype(np.int64)
                shards.save(folder / classes.file, classes_N)
            part = manifest.split(split)
            start = 0
            for number, shard in enumerate(part.shards):
                numbers = chosen[split][start : start + shard.shape[0]]
                start += len(numbers)
                if number % world.size != world.rank:
                    continue
                begun = (folder / shard.file).with_suffix(".begun.npy")
                if not _damage(folder, shard, manifest):
                    begun.unlink(missing_ok=True)
                    advance(len(numbers) * len(part.views))
                    continue
                codes = np.empty(shard.shape, manifest.dtype)
                encoded = _load_begun(begun, codes, codebook_size)
                if encoded:
                    advance(encoded * len(part.views))
                # Batches begin with the shard, so a resumed run encodes the same batches.
                while encoded < len(numbers) and not asked.is_set():
                    batch = slice(encoded, encoded + config.batch_size)
                    views = image_set.read_views(numbers[batch], part.views)
                    for v, pictures in enumerate(views):
                        codes[batch, v] = _encode(tokenizer, pictures)
                        advance(len(numbers[batch]))
                    encoded += len(numbers[batch])
                if encoded == len(numbers):
                    shards.save(folder / shard.file, codes)
                    begun.unlink(missing_ok=True)
                else:
                    left = True
                    if encoded:
                        shards.save(begun, codes[:encoded])
        if world.any(left):  # which waits for all, too
            said = f"{folder}: stopped, and saved what was encoded; run it again to go on"
            raise Stopped(said if world.main else "")
    return manifest


def _load_begun(path: Path, codes: np.ndarray, codebook_size: int) -> int:
    """Puts what a stopped run had encoded of a shard into `codes`: how many pictures."""
    try:
        begun = np.load(path)
        shards.verify(path, (len(begun), *codes.shape[1:]), str(codes.dtype), codebook_size)
        codes[: len(begun)] = begun
    except (OSError, ValueError, EOFError, shards.Damaged):  # none, or not of this shard
        return 0
    return len(begun)


def balanced_order(classes_N: np.ndarray, seed: int) -> np.ndarray:
    """A random permutation of the pictures of which every beginning has its classes in balance.

    Each class's pictures are shuffled, and dealt out in rounds of one of each class that has any
    left. So two classes differ by at most one picture until the smaller one is used up.

    Returns:
        (N,), int64.
    """
    shuffled = np.random.default_rng(seed).permutation(len(classes_N))
    by_class = np.argsort(classes_N[shuffled], kind="stable")
    sizes = np.bincount(classes_N)
    first = np.cumsum(sizes) - sizes  # where each class begins in `by_class`
    round_N = np.empty(len(classes_N), np.int64)
    round_N[by_class] = np.arange(len(classes_N)) - first[classes_N[shuffled[by_class]]]
    return shuffled[np.argsort(round_N, kind="stable")].astype(np.int64)


@dataclasses.dataclass(frozen=True)
class Checked:
    """What `check` found whole: files, and those among them that have no checksum."""

    files: int
    without_checksum: int


def check(folder: Path, progress: Progress | None = None) -> Checked:
    """Reads every file of a folder of tokens: checksums, shapes, ranges of codes and classes.

    Args:
        progress: called with (files, files in all).

    Raises:
        UserError: the folder holds no tokens, or some of its files are damaged; names them all.
    """
    manifest = _load_manifest(folder)
    parts: tuple[Split, ...] = ("train", "val")
    files = [
        shard for name in parts for shard in (manifest.classes(name), *manifest.split(name).shards)
    ]
    broken, without_checksum = [], 0
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        results = pool.map(lambda shard: _look(folder, shard, manifest), files)
        for done, (shard, found) in enumerate(zip(files, results, strict=True), 1):
            if isinstance(found, shards.Damaged):
                broken.append(f"{shard.file}: {found}")
            elif not found:
                without_checksum += 1
            if progress is not None:
                progress(done, len(files))
    if broken:
        raise UserError(
            f"{folder}: {len(broken)} of {len(files)} files are damaged; run ctf tokens extract "
            "again, which makes them anew and keeps the others\n" + "\n".join(broken)
        )
    return Checked(len(files), without_checksum)


def _look(folder: Path, shard: Shard, manifest: Manifest) -> bool | shards.Damaged:
    """What is wrong with a shard, or whether it has a checksum."""
    path = folder / shard.file
    try:
        if len(shard.shape) == 1:
            return shards.verify(path, shard.shape, CLASS_DTYPE, len(manifest.class_names))
        return shards.verify(path, shard.shape, manifest.dtype, manifest.codebook_size)
    except shards.Damaged as damage:
        return damage


def _damage(folder: Path, shard: Shard, manifest: Manifest) -> bool:
    return isinstance(_look(folder, shard, manifest), shards.Damaged)


class Tokens:
    """The codes of one split of a folder of tokens, read from the disk where they are asked for.

    The shards are opened by each process that reads, when it first does, so the reader can be
    pickled to data-loading workers. It holds the classes in memory, and no codes.

    Raises:
        UserError: the folder holds no tokens, was made by another tokenizer than
            `tokenizer_hash`, or is incomplete. The codes themselves are looked at by `check`.
    """

    def __init__(self, folder: Path, split: Split, tokenizer_hash: str | None = None) -> None:
        self.folder = folder
        self.split = split
        self.manifest = _load_manifest(folder)
        if tokenizer_hash is not None and self.manifest.tokenizer != tokenizer_hash:
            raise UserError(
                f"{folder}: made by tokenizer {self.manifest.tokenizer[:12]}, expected "
                f"{tokenizer_hash[:12]}: the tokenizer changed\n"
                "run ctf tokens extract again, into another folder or after deleting this one"
            )
        part, classes = self.manifest.split(split), self.manifest.classes(split)
        broken, self._starts = [], []
        for shard in (classes, *part.shards):
            dtype = CLASS_DTYPE if shard is classes else self.manifest.dtype
            try:
                self._starts.append(shards.first_byte(folder / shard.file, shard.shape, dtype))
            except shards.Damaged:
                broken.append(shard.file)
        if broken:
            raise UserError(
                f"{folder}: incomplete: {broken[0]} is missing or damaged"
                + (f", and {len(broken) - 1} more" if len(broken) > 1 else "")
                + "\nrun ctf tokens extract again; it keeps what is whole"
            )
        self.classes_N: np.ndarray = np.load(folder / classes.file)
        del self._starts[0]  # that of the classes
        self._readers: dict[int, shards.Reader] = {}

    def __len__(self) -> int:
        return self.manifest.split(self.split).count

    @property
    def views(self) -> int:
        """How many views there are of each picture."""
        return len(self.manifest.split(self.split).views)

    def codes(self, indices: np.ndarray, views: np.ndarray | int = 0) -> Tensor:
        """The codes of pictures `indices` (B,), each in its view of `views` (B,) or in the same.

        Returns:
            (B, L), int64: torch cannot index with the uint16 that the shards hold.

        Raises:
            IndexError: a picture or a view that there is not.
            UserError: a shard that was damaged since the reader was made.
        """
        indices = np.asarray(indices, np.int64)
        views = np.broadcast_to(np.asarray(views, np.int64), indices.shape)
        for values, count, name in ((indices, len(self), "picture"), (views, self.views, "view")):
            outside = values[(values < 0) | (values >= count)]
            if len(outside):
                raise IndexError(f"{name} {outside[0]} of {count} in {self.folder}")
        codes_BL = np.empty((len(indices), self.manifest.length), self.manifest.dtype)
        if len(indices):
            # All shards but the last are of the first one's size.
            size = self.manifest.split(self.split).shards[0].shape[0]
            shard_B, row_B = np.divmod(indices, size)
            offset_B = (row_B * self.views + views) * codes_BL[0].nbytes
            for row_L, shard, offset in zip(
                codes_BL, shard_B.tolist(), offset_B.tolist(), strict=True
            ):
                try:
                    self._reader(shard).read_into(row_L, self._starts[shard] + offset)
                except OSError as error:
                    file = self.manifest.split(self.split).shards[shard].file
                    raise UserError(
                        f"{self.folder / file}: cannot be read ({error.strerror or error}); "
                        "ctf tokens check says what is damaged"
                    ) from None
        return torch.from_numpy(codes_BL.astype(np.int64))

    def _reader(self, shard: int) -> shards.Reader:
        if shard not in self._readers:
            file = self.manifest.split(self.split).shards[shard].file
            self._readers[shard] = shards.Reader(self.folder / file)
        return self._readers[shard]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_readers": {}}  # an open file is this process's own


def _load_manifest(folder: Path) -> Manifest:
    """Raises UserError where there is none, or where its parts contradict each other."""
    path = folder / MANIFEST
    manifest = from_json(Manifest, storage.load_json(path), where=str(path))
    for part in (manifest.train, manifest.val):
        counts = [shard.shape[0] for shard in part.shards]
        shapes = {shard.shape[1:] for shard in part.shards}
        if sum(counts) != part.count or shapes - {(len(part.views), manifest.length)}:
            raise UserError(
                f"{path}: damaged: its shards are not {part.count} pictures of {len(part.views)} "
                f"views of {manifest.length} codes\n"
                "delete the folder and run ctf tokens extract again"
            )
    return manifest


def _split_manifest(
    split: Split, images: ImageSet, chosen: np.ndarray, config: TokensConfig, length: int
) -> SplitManifest:
    views = VIEWS[config.views if split == "train" else "plain"]
    starts = range(0, len(chosen), config.shard_images)
    return SplitManifest(
        images=images.name,
        fingerprint=images.fingerprint,
        order=hashlib.sha256(chosen.astype("<i8").tobytes()).hexdigest(),
        count=len(chosen),
        views=views,
        shards=tuple(
            Shard(
                f"{split}-{number:05d}.npy",
                (min(config.shard_images, len(chosen) - start), len(views), length),
            )
            for number, start in enumerate(starts)
        ),
    )


def _claim(folder: Path, manifest: Manifest) -> None:
    """Writes the manifest, or makes sure that the one that is there is the same."""
    path = folder / MANIFEST
    if claims.is_ours(folder, MANIFEST, what="a folder of tokens"):
        stored = to_json(from_json(Manifest, storage.load_json(path), where=str(path)))
        claims.check_same(folder, stored, to_json(manifest), what="a folder of tokens")
    else:
        storage.save_json(path, to_json(manifest))
    storage.remove_temporaries(folder)


@torch.inference_mode()
def _encode(tokenizer: VQModel, pictures_BHWC: np.ndarray) -> np.ndarray:
    """uint8 pictures -> codes (B, L)."""
    device = next(tokenizer.parameters()).device
    return tokenizer.encode(as_tensor(pictures_BHWC, device)).cpu().numpy()
