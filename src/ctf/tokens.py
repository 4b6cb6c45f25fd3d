"""Pictures -> codes, once, ahead of training: memory-mapped shards, a manifest, and their reader.

A folder of tokens holds manifest.json, the shards train-00000.npy, ... and val-00000.npy, ... of
shape (pictures, views, L), and the classes train-classes.npy and val-classes.npy.

Shapes: B batch, C channels, H, W height and width, L codes of an image, N pictures.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ctf import checkpoint
from ctf.config import from_json, to_json
from ctf.distributed import ALONE, World
from ctf.errors import UserError
from ctf.images import VIEWS, ImageSet, Splits, View, as_tensor
from ctf.tokenizer import VQModel

Split = Literal["train", "val"]
Report = Callable[[int, int], None]  # pictures encoded, pictures in all; each view counts as one

MANIFEST = "manifest.json"


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

    def split(self, split: Split) -> SplitManifest:
        return self.train if split == "train" else self.val


def extract(
    tokenizer: VQModel,
    tokenizer_hash: str,
    images: Splits,
    folder: Path,
    config: TokensConfig,
    *,
    limit: int | None = None,
    report: Report | None = None,
    world: World = ALONE,
) -> Manifest:
    """Encodes every view of every picture into `folder`; shards that are there are kept.

    Killed at any moment and called again, it ends with the same files to the bit; called on a
    complete folder, it encodes nothing. Of several processes each one encodes its share of the
    shards. `limit` takes only that many training pictures, the first of `balanced_order`, and no
    more held-out ones; these are seen in the plain view.

    Raises:
        UserError: the folder holds something else, the tokenizer is for another image size, or
            `limit` is below 1.
    """
    size = tokenizer.config.image_size
    if images.train.image_size != size:
        raise UserError(
            f"the pictures are {images.train.image_size} pixels wide, the tokenizer is for {size}; "
            f"open them at --image-size {size}"
        )
    if limit is not None and limit < 1:
        raise UserError(f"limit of training pictures is {limit}, expected 1 or more")
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
    )
    if world.main:
        _claim(folder, manifest)
    world.barrier()

    # A copy: the layout is for speed here, and the caller's model keeps its own.
    tokenizer = copy.deepcopy(tokenizer).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    total = sum(
        len(part.views) * shard.shape[0]
        for part in (manifest.train, manifest.val)
        for shard in part.shards[world.rank :: world.size]
    )
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if report is not None:
            report(done, total)

    for split, image_set in sets.items():
        classes_file = folder / f"{split}-classes.npy"
        classes_N = image_set.classes_N[chosen[split]].astype(np.int64)
        if world.main and not _is_whole(classes_file, classes_N.shape, "int64"):
            _save_array(classes_file, classes_N)
        part = manifest.split(split)
        start = 0
        for number, shard in enumerate(part.shards):
            numbers = chosen[split][start : start + shard.shape[0]]
            start += len(numbers)
            if number % world.size != world.rank:
                continue
            if _is_whole(folder / shard.file, shard.shape, manifest.dtype):
                advance(len(numbers) * len(part.views))
                continue
            codes = np.empty(shard.shape, manifest.dtype)
            # Batches begin with the shard, so a resumed run encodes the same batches.
            for at in range(0, len(numbers), config.batch_size):
                batch = slice(at, at + config.batch_size)
                for v, view in enumerate(part.views):
                    codes[batch, v] = _encode(tokenizer, image_set.read(numbers[batch], view))
                    advance(len(numbers[batch]))
            _save_array(folder / shard.file, codes)
    world.barrier()
    return manifest


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


class Tokens:
    """The codes of one split of a folder of tokens, read through memory maps.

    The maps are opened by each process that reads, when it first does: the reader can be pickled
    to data-loading workers without copying what it maps.

    Raises:
        UserError: the folder holds no tokens, was made by another tokenizer than
            `tokenizer_hash`, or is incomplete.
    """

    def __init__(self, folder: Path, split: Split, tokenizer_hash: str | None = None) -> None:
        manifest_file = folder / MANIFEST
        self.folder = folder
        self.split = split
        self.manifest = from_json(
            Manifest, checkpoint.load_json(manifest_file), where=str(manifest_file)
        )
        part = self.manifest.split(split)
        if tokenizer_hash is not None and self.manifest.tokenizer != tokenizer_hash:
            raise UserError(
                f"{folder}: made by tokenizer {self.manifest.tokenizer[:12]}, expected "
                f"{tokenizer_hash[:12]}: the tokenizer changed\n"
                "run ctf tokens extract again, into another folder or after deleting this one"
            )
        classes_file = f"{split}-classes.npy"
        broken = [
            shard.file
            for shard in (Shard(classes_file, (part.count,)), *part.shards)
            if not _is_whole(
                folder / shard.file,
                shard.shape,
                "int64" if shard.file == classes_file else self.manifest.dtype,
            )
        ]
        if broken:
            raise UserError(
                f"{folder}: incomplete: {broken[0]} is missing or damaged"
                + (f", and {len(broken) - 1} more" if len(broken) > 1 else "")
                + "\nrun ctf tokens extract again; it keeps what is whole"
            )
        self.classes_N: np.ndarray = np.load(folder / classes_file)
        self._maps: list[np.ndarray | None] = [None] * len(part.shards)

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
        """
        indices = np.asarray(indices, np.int64)
        views = np.broadcast_to(np.asarray(views, np.int64), indices.shape)
        for values, count, name in ((indices, len(self), "picture"), (views, self.views, "view")):
            outside = values[(values < 0) | (values >= count)]
            if len(outside):
                raise IndexError(f"{name} {outside[0]} of {count} in {self.folder}")
        codes_BL = np.empty((len(indices), self.manifest.length), np.int64)
        if len(indices):
            # All shards but the last are of the first one's size.
            shard_B, row_B = np.divmod(indices, self._map(0).shape[0])
            for shard in np.unique(shard_B):
                here = shard_B == shard
                codes_BL[here] = self._map(int(shard))[row_B[here], views[here]]
        return torch.from_numpy(codes_BL)

    def _map(self, shard: int) -> np.ndarray:
        mapped = self._maps[shard]
        if mapped is None:
            file = self.manifest.split(self.split).shards[shard].file
            mapped = self._maps[shard] = np.load(self.folder / file, mmap_mode="r")
        return mapped

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": [None] * len(self._maps)}  # a pickled map is a copy


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
    if path.exists():
        there = to_json(from_json(Manifest, checkpoint.load_json(path), where=str(path)))
        if difference := _difference(there, to_json(manifest)):
            raise UserError(
                f"{folder}: holds tokens of another run: {difference}\n"
                "choose another run, or delete this folder"
            )
    elif not checkpoint.is_vacant(folder):
        raise UserError(
            f"{folder}: is not empty and holds no {MANIFEST}, so it is not a folder of tokens\n"
            "choose another run"
        )
    else:
        checkpoint.save_json(path, to_json(manifest))
    checkpoint.remove_temporaries(folder)


def _difference(there: Any, wanted: Any, key: str = "") -> str | None:
    """The first value that differs, in words; None where there is none."""
    pairs: list[tuple[str, Any, Any]] = []
    if isinstance(there, dict) and isinstance(wanted, dict):
        pairs = [(f"{key}.{k}".removeprefix("."), there[k], wanted[k]) for k in there]
    elif isinstance(there, list) and isinstance(wanted, list) and len(there) == len(wanted):
        pairs = [(f"{key}[{i}]", there[i], wanted[i]) for i in range(len(there))]
    for name, old, new in pairs:
        if difference := _difference(old, new, name):
            return difference
    return None if there == wanted else f"{key}: got {_short(there)}, expected {_short(wanted)}"


def _short(value: Any) -> str:
    text = f"a list of {len(value)}" if isinstance(value, list) else str(value)
    return text if len(text) <= 40 else f"{text[:12]}..."


def _is_whole(path: Path, shape: tuple[int, ...], dtype: str) -> bool:
    try:
        array = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError):  # not there; not an array, or cut off; empty
        return False
    return array.shape == shape and array.dtype == np.dtype(dtype)


def _save_array(path: Path, array: np.ndarray) -> None:
    buffer = io.BytesIO()  # numpy's own writing to a full disk fails without saying why
    np.save(buffer, array)
    with checkpoint.atomic(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


@torch.inference_mode()
def _encode(tokenizer: VQModel, pictures_BHWC: np.ndarray) -> np.ndarray:
    """uint8 pictures -> codes (B, L)."""
    device = next(tokenizer.parameters()).device
    return tokenizer.encode(as_tensor(pictures_BHWC, device)).cpu().numpy()
