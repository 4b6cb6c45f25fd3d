"""`ctf bench tokens`: what reading and extracting tokens costs.

A cache of ImageNet's size is read beside a model that is trained on it, and extraction is compared
with LlamaGen's loop.

Shapes: B batch, L codes of an image, N images, C channels, H height, W width, K clusters.
"""

from __future__ import annotations

import copy
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike, NDArray

from ctf import kernels
from ctf.bench import harness, llamagen_reference
from ctf.bench.shapes import IMAGENET, Shapes
from ctf.common import memory, rng, storage
from ctf.common.config import to_json
from ctf.common.precision import Precision, supports_bf16
from ctf.data import shards
from ctf.data.extraction import TokensConfig, extract
from ctf.data.image_set import ImageSet, Splits
from ctf.data.images import open_images
from ctf.data.tokens import MANIFEST, Manifest, Shard, SplitManifest, Tokens
from ctf.data.transforms import PLAIN, VIEWS, View, as_tensor
from ctf.models.coarse import CoarseModel
from ctf.models.tokenizer import VQModel
from ctf.pipelines.folder import find_pipeline, load_tokenizer
from ctf.training import optim

IMAGENET_IMAGES = 1_281_167  # training images of ImageNet-1k


def measure(
    images: int = IMAGENET_IMAGES,
    size: str = "B",
    encoded: int = 4,
    rounds: int = 3,
    device: torch.device | str = "cpu",
    shapes: Shapes = IMAGENET,
) -> dict[str, Any]:
    """Measure the reader on a cache of random codes, and extraction.

    The cache is of `images` images, 512 bytes each, in a temporary folder. The reader is compared
    with the training of a coarse model of `size`. In each of `rounds` rounds `encoded` images are
    encoded, in two views each.

    Raises:
        UserError: A number is below 1.
    """
    harness.check_positive(images=images, pictures=encoded, rounds=rounds)
    device = torch.device(device)
    with tempfile.TemporaryDirectory() as folder:
        write_cache(Path(folder), images, shapes)
        reader = read(Path(folder))
    trained = codes_trained_on(size, shapes, device)
    extraction: dict[str, Any] = {}
    for precision in precisions(device):
        plain, ours = time_extraction(encoded, rounds, device, VQModel(shapes.tokenizer), precision)
        extraction[precision] = {
            "llamagen_seconds_per_view": statistics.median(plain),
            "seconds_per_view": statistics.median(ours),
            "ratios": [a / b for a, b in zip(plain, ours, strict=True)],
        }
    if "bf16" in extraction:
        extraction["bf16"]["equal_codes"] = equal_codes(device)
    return {
        "device": device.type,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "reader": reader,
        "model": {"size": size, "codes_per_second": trained},
        "reader_ratio": reader["codes_per_second"] / trained,
        "extraction": extraction,
        "extraction_ratio": {
            name: statistics.median(part["ratios"]) for name, part in extraction.items()
        },
    }


def rows(results: dict[str, Any]) -> list[tuple[str, str]]:
    """Return what was measured, as (what, value) for a table."""
    reader, model = results["reader"], results["model"]
    table = [
        (f"opening {reader['images']:,} images", f"{reader['open_seconds']:.2f} s"),
        ("the reader's own memory", f"{reader['private_megabytes']:.0f} MB"),
        ("with mapped files", f"{reader['resident_megabytes']:.0f} MB"),
        ("the reader", f"{reader['codes_per_second']:,.0f} codes/s"),
        (f"training size {model['size']}", f"{model['codes_per_second']:,.0f} codes/s"),
        ("the reader / the model", f"{results['reader_ratio']:,.0f} x"),
    ]
    for name, part in results["extraction"].items():
        low, high = min(part["ratios"]), max(part["ratios"])
        ratio = f"{results['extraction_ratio'][name]:.2f} x ({low:.2f} to {high:.2f})"
        plain, ours = part["llamagen_seconds_per_view"], part["seconds_per_view"]
        table += [
            ("LlamaGen's extraction, fp32", f"{plain:.3f} s a view"),
            (f"ours, {name}", f"{ours:.3f} s a view"),
            (f"LlamaGen's / ours, {name}", ratio),
        ]
        if "equal_codes" in part:
            share = f"{100 * part['equal_codes']:.1f} % of the shipped tokenizer's"
            table.append((f"codes in {name} that are equal in fp32", share))
    return table


# --- The reader -----------------------------------------------------------------------------------


def write_cache(
    folder: Path, count: int, shapes: Shapes = IMAGENET, shard_images: int = 4096
) -> None:
    """Write a folder of random tokens, one view of each image, as `extraction.extract` would.

    The first two codes of an image are its number: number % V and number // V.
    """

    def write(split: str, count: int) -> SplitManifest:
        starts = range(0, count, shard_images)
        files = tuple(
            Shard(f"{split}-{i:05d}.npy", (min(shard_images, count - start), 1, shapes.length))
            for i, start in enumerate(starts)
        )
        shards.save(folder / f"{split}-classes.npy", np.arange(count) % shapes.classes)
        for shard, start in zip(files, starts, strict=True):
            codes = rng.generator(0, start).integers(0, shapes.codes, shard.shape, np.uint16)
            numbers_N = np.arange(start, start + len(codes))
            codes[:, 0, 0], codes[:, 0, 1] = numbers_N % shapes.codes, numbers_N // shapes.codes
            shards.save(folder / shard.file, codes)
        return SplitManifest("random", "", "", count, (PLAIN,), files)

    names = tuple(str(number) for number in range(shapes.classes))
    train, val = write("train", count), write("val", 1)
    manifest = Manifest(
        "", shapes.codes, 256, shapes.length, "uint16", names, None, None, train, val
    )
    storage.save_json(folder / MANIFEST, to_json(manifest))


def read(folder: Path, batch: int = 256, steps: int = 2000) -> dict[str, float]:
    """Open a folder of tokens and read shuffled batches, as training does.

    Returns:
        Seconds to open it, codes read in a second, and the megabytes that this process grew by: of
        private memory, and with mapped files (Linux; else 0).
    """
    private, resident = memory.resident()
    cpu = torch.device("cpu")
    open_seconds, tokens = harness.timed(lambda: Tokens(folder, "train"), cpu)

    def read_all() -> None:
        for step in range(steps):
            tokens.codes(optim.batch_indices(len(tokens), batch, 0, step))

    seconds, _ = harness.timed(read_all, cpu)
    private_after, resident_after = memory.resident()
    return {
        "images": len(tokens),
        "open_seconds": open_seconds,
        "codes_per_second": steps * batch * tokens.manifest.length / seconds,
        "private_megabytes": private_after - private,
        "resident_megabytes": resident_after - resident,
    }


def codes_trained_on(size: str, shapes: Shapes, device: torch.device, batch: int = 4) -> float:
    """Codes a second of a coarse model's training: forward and backward pass, no optimiser."""
    model = CoarseModel(shapes.transformer(size), shapes.clusters).to(device)
    labels_BL = torch.randint(shapes.clusters, (batch, shapes.length), device=device)
    classes_B = torch.zeros(batch, dtype=torch.int64, device=device)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits_BLK = model(labels_BL, classes_B)
        loss = F.cross_entropy(logits_BLK.flatten(0, 1).float(), labels_BL.flatten())
        torch.autograd.backward(loss)

    seconds = harness.in_turn({"step": lambda _: step}, 2, device, warm_up=1)["step"]
    return labels_BL.numel() / min(seconds)


# --- Extraction -----------------------------------------------------------------------------------


class NoiseImages(ImageSet):
    """Random images in memory, so that reading costs neither way of extraction anything."""

    def __init__(self, count: int, size: int) -> None:
        names = ("noise",)
        super().__init__("noise", names, np.zeros(count, np.int64), size, f"{count} {size}")
        self._pixels = rng.generator(count).integers(0, 256, (count, size, size, 3), np.uint8)

    def read(self, indices: ArrayLike, view: View = PLAIN) -> NDArray[np.uint8]:
        """Read images, as `ImageSet.read`."""
        pixels = self._pixels[np.asarray(indices)]
        return np.ascontiguousarray(pixels[:, :, ::-1]) if view.flip else pixels


def precisions(device: torch.device) -> tuple[Precision, ...]:
    """The precisions in which the device can extract."""
    return ("fp32", "bf16") if supports_bf16(device) else ("fp32",)


@torch.inference_mode()
def equal_codes(device: torch.device, images: int = 1000) -> float:
    """The share of codes that are the same in bf16 and in fp32.

    By the shipped tokenizer, of the first held-out images of Fashion-MNIST.
    """
    tokenizer = load_tokenizer(find_pipeline("fashion-mnist") / "tokenizer", device)
    val = open_images("fashion-mnist", tokenizer.config.image_size).val
    pixels_BHWC = val.read(np.arange(min(images, len(val))))
    codes = []
    for dtype in (torch.float32, torch.bfloat16):
        own = copy.deepcopy(tokenizer)
        kernels.for_encoding(own, dtype)
        batches = [as_tensor(batch, device) for batch in np.array_split(pixels_BHWC, 20)]
        codes.append(torch.cat([own.encode(batch_BCHW) for batch_BCHW in batches]))
    return float((codes[0] == codes[1]).float().mean())


def time_extraction(
    images: int,
    rounds: int,
    device: torch.device,
    tokenizer: VQModel,
    precision: Precision = "fp32",
) -> tuple[list[float], list[float]]:
    """Return the seconds of a view by LlamaGen's loop and by `extraction.extract`, by round."""
    tokenizer = tokenizer.to(device).eval()
    size = tokenizer.config.image_size
    splits = Splits(NoiseImages(images, size), NoiseImages(1, size))
    batch = min(images, 64 if device.type == "cuda" else 4)
    config = TokensConfig(views="flip", batch_size=batch)
    with tempfile.TemporaryDirectory() as folder:

        def new_folder(name: str, number: int) -> Path:
            (path := Path(folder) / f"{name}-{number}").mkdir()
            return path

        def plain(number: int) -> Callable[[], None]:
            out, views = new_folder("plain", number), VIEWS["flip"]
            return lambda: llamagen_reference.extract(tokenizer, splits.train, out, views)

        def ours(number: int) -> Callable[[], Any]:
            out = new_folder("ours", number)
            return lambda: extract(tokenizer, "", splits, out, config, precision=precision)

        seconds = harness.in_turn({"plain": plain, "ours": ours}, rounds, device, warm_up=1)
    # Ours extracts one more image: the held-out one.
    return (
        [each / (2 * images) for each in seconds["plain"]],
        [each / (2 * images + 1) for each in seconds["ours"]],
    )
