"""Extraction of tokens: encodes every image of a data set once, ahead of training.

Shape suffixes: B batch, C channels, H, W height and width, L codes of an image, N images.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from ctf import kernels
from ctf.common import claims, memory, signals, storage, threads
from ctf.common.config import from_json, to_json
from ctf.common.distributed import ALONE, World
from ctf.common.errors import Stopped, UserError
from ctf.common.precision import Precision, uses_bf16, without_tf32
from ctf.common.progress import Progress
from ctf.data import shards
from ctf.data.image_set import ImageSet, Splits
from ctf.data.tokens import MANIFEST, Manifest, Shard, Split, SplitManifest, is_damaged
from ctf.data.transforms import VIEWS, View, as_tensor
from ctf.models.tokenizer import VQModel

WHAT = "a folder of tokens"
SAVE_SECONDS = 20.0  # a kill loses about this much work


@dataclasses.dataclass(frozen=True)
class TokensConfig:
    """Which views of the training images are encoded, and how; held-out images have one view.

    Attributes:
        views: name in `VIEWS` of the views of each training image.
        batch_size: images encoded at a time.
        shard_images: images of a shard. Each shard is an open file of the reader.
        seed: of the selection of images if there is a limit.
    """

    views: Literal["plain", "flip", "five-crop", "ten-crop"] = "flip"
    batch_size: int = 64
    shard_images: int = 4096
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("batch_size", "shard_images"):
            if getattr(self, name) < 1:
                raise UserError(f"tokens.{name}: got {getattr(self, name)}, expected 1 or more")


@memory.keep_freed()
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
    """Encode every view of every image into `folder`; intact shards are kept.

    The files are the same to the bit, however often the extraction was killed and started again.
    The begun shard is saved as train-00000.begun.npy every `SAVE_SECONDS`, on Ctrl-C, and on
    SIGTERM, after which it stops. Several processes share the shards.

    Args:
        tokenizer: is left unchanged.
        tokenizer_hash: identifies the tokenizer in the manifest.
        images: training and held-out images.
        folder: the folder of tokens; created if it does not exist.
        config: views and sizes.
        limit: encode only that many images of each split, the first of `balanced_order`.
        precision: of the encoder's large convolutions. "bf16" is faster on devices that multiply
            bfloat16, and changes a few codes. "auto" is "fp32".
        progress: called with (encoded views, views of this process).
        world: the processes that take part.

    Raises:
        UserError: the folder holds something else, the tokenizer is for another image size,
            `limit` is below 1, or the device does not multiply bfloat16 as requested.
        Stopped: one of the processes got SIGTERM; what was encoded is saved.
    """
    size = tokenizer.config.image_size
    if images.train.image_size != size:
        raise UserError(
            f"got images of {images.train.image_size} pixels, but the tokenizer is for {size}; "
            f"open them with --image-size {size}"
        )
    if limit is not None and limit < 1:
        raise UserError(f"limit: got {limit}, expected 1 or more training images")
    images = images.as_recorded_in(folder / MANIFEST, "train", "fingerprint")
    if limit is not None and limit >= len(images.train):
        limit = None
    device = next(tokenizer.parameters()).device
    bf16 = precision == "bf16" and uses_bf16(precision, device)
    sets: dict[Split, ImageSet] = {"train": images.train, "val": images.val}
    order = {split: _select(image_set, limit, config.seed) for split, image_set in sets.items()}
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
        train=_split_manifest("train", images.train, order["train"], config, length),
        val=_split_manifest("val", images.val, order["val"], config, length),
        precision="bf16" if bf16 else "fp32",
        background="#{:02x}{:02x}{:02x}".format(*images.train.background),
    )
    with (
        claims.hold(folder, MANIFEST, what=WHAT, world=world),
        threads.team(threads.pays(device, world.size)),
    ):
        world.on_main(lambda: _claim(folder, manifest))
        _encode_all(tokenizer, images, folder, manifest, order, config.batch_size, progress, world)
    return manifest


def _encode_all(
    tokenizer: VQModel,
    images: Splits,
    folder: Path,
    manifest: Manifest,
    order: Mapping[Split, np.ndarray],
    batch_size: int,
    progress: Progress | None,
    world: World,
) -> None:
    """Encode this process's shards, and wait for all processes."""
    sets: dict[Split, ImageSet] = {"train": images.train, "val": images.val}
    total = sum(
        len(rows) * shard.shape[1]
        for split in sets
        for shard, rows in _shards(manifest.split(split), order[split], world)
    )
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, total)

    tokenizer = copy.deepcopy(tokenizer)
    bf16 = manifest.precision == "bf16"
    kernels.for_encoding(tokenizer, torch.bfloat16 if bf16 else torch.float32)
    complete = True
    with signals.termination_requested() as stop:
        encoder = _ShardEncoder(tokenizer, folder, manifest, batch_size, stop, advance)
        for split, image_set in sets.items():
            classes = manifest.classes(split)
            if world.is_main and is_damaged(folder, classes, manifest):
                classes_N = image_set.classes_N[order[split]].astype(np.int64)
                shards.save(folder / classes.file, classes_N)
            for shard, rows in _shards(manifest.split(split), order[split], world):
                complete &= encoder.encode(shard, image_set, rows, manifest.split(split).views)
        if world.any(not complete):
            message = f"{folder}: stopped and saved; run it again to resume"
            raise Stopped(message if world.is_main else "")


def _shards(
    part: SplitManifest, order: np.ndarray, world: World
) -> Iterator[tuple[Shard, np.ndarray]]:
    """Yield this process's shards of a split, with the numbers of their images."""
    starts = np.cumsum([0, *(shard.shape[0] for shard in part.shards)])
    for i in range(world.rank, len(part.shards), world.size):
        yield part.shards[i], order[starts[i] : starts[i + 1]]


@dataclasses.dataclass(frozen=True)
class _ShardEncoder:
    tokenizer: VQModel
    folder: Path
    manifest: Manifest
    batch_size: int
    stop: threading.Event
    advance: Callable[[int], None]

    def encode(
        self, shard: Shard, image_set: ImageSet, rows: np.ndarray, views: tuple[View, ...]
    ) -> bool:
        """Encode one shard, unless the file is intact; return whether it is complete."""
        begun = (self.folder / shard.file).with_suffix(".begun.npy")
        if not is_damaged(self.folder, shard, self.manifest):
            begun.unlink(missing_ok=True)
            self.advance(len(rows) * len(views))
            return True
        codes = np.empty(shard.shape, self.manifest.dtype)
        encoded = _load_begun(begun, codes, self.manifest.codebook_size)
        if encoded:
            self.advance(encoded * len(views))
        saved, saved_at = encoded, time.monotonic()
        try:
            # Batches start with the shard, so that a resumed run encodes the same batches.
            while encoded < len(rows) and not self.stop.is_set():
                if time.monotonic() - saved_at > SAVE_SECONDS and saved < encoded:
                    shards.save(begun, codes[:encoded])
                    saved, saved_at = encoded, time.monotonic()
                batch = slice(encoded, encoded + self.batch_size)
                for v, pixels_BHWC in enumerate(image_set.read_views(rows[batch], views)):
                    codes[batch, v] = _encode(self.tokenizer, pixels_BHWC)
                    self.advance(len(pixels_BHWC))
                encoded += len(rows[batch])
        finally:  # stopped, interrupted, or an image that cannot be read any more
            if saved < encoded < len(rows):
                shards.save(begun, codes[:encoded])
        if encoded < len(rows):
            return False
        shards.save(self.folder / shard.file, codes)
        begun.unlink(missing_ok=True)
        return True


def _load_begun(path: Path, codes: np.ndarray, codebook_size: int) -> int:
    """Copy the images of a begun shard into `codes`, and return how many there are."""
    try:
        begun = np.load(path)
        shards.verify(path, (len(begun), *codes.shape[1:]), str(codes.dtype), codebook_size)
        codes[: len(begun)] = begun
    except (OSError, ValueError, EOFError, shards.DamagedFileError):  # no file, or of another shard
        return 0
    return len(begun)


@torch.inference_mode()
def _encode(tokenizer: VQModel, pixels_BHWC: np.ndarray) -> np.ndarray:
    """Encode uint8 pixels to codes (B, L)."""
    device = next(tokenizer.parameters()).device

    def encode(pixels_BHWC: np.ndarray) -> np.ndarray:
        return tokenizer.encode(as_tensor(pixels_BHWC, device)).cpu().numpy()

    with without_tf32(device):
        return np.concatenate(threads.over_parts(encode, pixels_BHWC))


def _select(image_set: ImageSet, limit: int | None, seed: int) -> np.ndarray:
    if limit is None:
        return np.arange(len(image_set), dtype=np.int64)
    return balanced_order(image_set.classes_N, seed)[:limit]


def balanced_order(classes_N: np.ndarray, seed: int) -> np.ndarray:
    """Return a random permutation of the images whose every prefix has balanced classes.

    Each class is shuffled, and dealt out in rounds of one image from each class that has any left:
    the counts of two classes differ by at most one until the smaller class is used up.

    Returns:
        Image numbers (N,), int64.
    """
    shuffled = np.random.default_rng(seed).permutation(len(classes_N))
    by_class = np.argsort(classes_N[shuffled], kind="stable")
    sizes = np.bincount(classes_N)
    first = np.cumsum(sizes) - sizes  # where each class begins in `by_class`
    round_N = np.empty(len(classes_N), np.int64)
    round_N[by_class] = np.arange(len(classes_N)) - first[classes_N[shuffled[by_class]]]
    return shuffled[np.argsort(round_N, kind="stable")].astype(np.int64)


def _split_manifest(
    split: Split, images: ImageSet, order: np.ndarray, config: TokensConfig, length: int
) -> SplitManifest:
    views = VIEWS[config.views if split == "train" else "plain"]
    starts = range(0, len(order), config.shard_images)
    return SplitManifest(
        images=images.name,
        fingerprint=images.fingerprint,
        order=hashlib.sha256(order.astype("<i8").tobytes()).hexdigest(),
        count=len(order),
        views=views,
        shards=tuple(
            Shard(
                f"{split}-{number:05d}.npy",
                (min(config.shard_images, len(order) - start), len(views), length),
            )
            for number, start in enumerate(starts)
        ),
    )


def _claim(folder: Path, manifest: Manifest) -> None:
    """Write the manifest, or check that the existing one is equal."""
    path = folder / MANIFEST
    if path.is_file():
        # Parsed first: manifests of earlier versions have no precision. Nor do they have a
        # background, which the fingerprints cover.
        stored = from_json(Manifest, storage.load_json(path), where=str(path))
        stored = dataclasses.replace(stored, background=manifest.background)
        before, now = to_json(_without_titles(stored)), to_json(_without_titles(manifest))
        claims.check_same(folder, before, now, what=WHAT)
    else:
        storage.save_json(path, to_json(manifest))
    storage.remove_temporaries(folder)


def _without_titles(manifest: Manifest) -> Manifest:
    """Return the manifest without the name of the images' folder, which may be renamed.

    It is also the name of the only class if there are no folders of classes.
    """
    return dataclasses.replace(
        manifest,
        class_names=manifest.class_names if len(manifest.class_names) > 1 else ("",),
        train=dataclasses.replace(manifest.train, images=""),
        val=dataclasses.replace(manifest.val, images=""),
    )
