"""What reading and making tokens costs: a cache of ImageNet's size, and LlamaGen's extraction.

Shapes: B batch, L codes of an image, N pictures, C channels, H height, W width, D code dimension.
"""

from __future__ import annotations

import copy
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from ctf.common import memory, rng, storage
from ctf.common.config import to_json
from ctf.common.errors import UserError
from ctf.common.precision import Precision, supports_bf16
from ctf.data import shards
from ctf.data.extraction import TokensConfig, extract
from ctf.data.image_set import ImageSet, Splits
from ctf.data.images import open_images
from ctf.data.tokens import MANIFEST, Manifest, Shard, SplitManifest, Tokens
from ctf.data.transforms import PLAIN, VIEWS, View, as_tensor
from ctf.kernels import tokenizer_cpu
from ctf.models.coarse import CoarseModel
from ctf.models.sizes import SIZES, TOKENIZERS
from ctf.models.tokenizer import AttentionBlock, ResidualBlock, VQModel
from ctf.pipelines.pipeline import Pipeline
from ctf.training import optim

IMAGENET = 1_281_167  # training pictures of ImageNet-1k
LENGTH, CODEBOOK, CLASSES = 256, 16_384, 1000  # of VQ-16 at 256 pixels
CLUSTERS = 512  # the paper's
READER_GOAL, EXTRACT_GOAL = 20.0, 1.5  # times what the model eats, times LlamaGen's loop


def measure(
    images: int = IMAGENET,
    size: str = "B",
    pictures: int = 4,
    rounds: int = 3,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """The reader on a cache of random codes, and extraction beside LlamaGen's, on this machine.

    Args:
        images: how many pictures the cache has; 512 bytes each, in a temporary folder.
        size: of the coarse model, `presets.SIZES`, whose training step tells what it eats.
        pictures: of 256 pixels, two views each, encoded in each of `rounds` rounds, in turn.
    """
    for name, value in (("images", images), ("pictures", pictures), ("rounds", rounds)):
        if value < 1:
            raise UserError(f"{name}: got {value}, expected 1 or more")
    device = torch.device(device)
    with tempfile.TemporaryDirectory() as temporary:
        write_cache(Path(temporary), images)
        reader = read(Path(temporary))
    eaten = codes_eaten(size, device)
    made: dict[str, Any] = {}
    for precision in precisions(device):
        plain, ours = extraction(pictures, rounds, device, precision=precision)
        made[precision] = {
            "llamagen_seconds_per_view": statistics.median(plain),
            "seconds_per_view": statistics.median(ours),
            "ratios": [a / b for a, b in zip(plain, ours, strict=True)],
        }
    if "bf16" in made:
        made["bf16"]["equal_codes"] = equal_codes(device)
    return {
        "device": device.type,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "reader": reader,
        "model": {"size": size, "codes_per_second": eaten},
        "reader_ratio": reader["codes_per_second"] / eaten,
        "extraction": made,
        "extraction_ratio": {
            name: statistics.median(part["ratios"]) for name, part in made.items()
        },
    }


def rows(found: dict[str, Any]) -> list[tuple[str, str, str]]:
    """What was measured, as (what, value, goal) for a table."""
    reader, model = found["reader"], found["model"]
    table = [
        (f"opening {reader['images']:,} pictures", f"{reader['open_seconds']:.2f} s", "< 1 s"),
        ("the reader's own memory", f"{reader['private_megabytes']:.0f} MB", "< 200 MB"),
        ("with files mapped", f"{reader['resident_megabytes']:.0f} MB", ""),
        ("the reader", f"{reader['codes_per_second']:,.0f} codes/s", ""),
        (f"training size {model['size']} eats", f"{model['codes_per_second']:,.0f} codes/s", ""),
        ("the reader / the model", f"{found['reader_ratio']:,.0f} x", f">= {READER_GOAL:g} x"),
    ]
    for name, made in found["extraction"].items():
        spread = f"{min(made['ratios']):.2f} to {max(made['ratios']):.2f}"
        ratio = f"{found['extraction_ratio'][name]:.2f} x ({spread})"
        table += [
            (
                "LlamaGen's extraction, fp32",
                f"{made['llamagen_seconds_per_view']:.3f} s a view",
                "",
            ),
            (f"ours, {name}", f"{made['seconds_per_view']:.3f} s a view", ""),
            (f"LlamaGen's / ours, {name}", ratio, f">= {EXTRACT_GOAL:g} x"),
        ]
        if "equal_codes" in made:
            share = f"{100 * made['equal_codes']:.1f} % of the shipped tokenizer's"
            table.append((f"codes in {name} that are fp32's", share, ""))
    return table


# --- The reader -----------------------------------------------------------------------------------


def write_cache(
    folder: Path,
    count: int,
    codebook: int = CODEBOOK,
    length: int = LENGTH,
    classes: int = CLASSES,
    shard_images: int = 4096,
) -> None:
    """Writes a folder of random tokens, one view of each picture, as `extraction.extract` would.

    The first two codes of a picture are its number: number % codebook and number // codebook.
    """

    def part(split: str, count: int) -> SplitManifest:
        starts = range(0, count, shard_images)
        files = tuple(
            Shard(f"{split}-{i:05d}.npy", (min(shard_images, count - start), 1, length))
            for i, start in enumerate(starts)
        )
        classes_N = np.arange(count) % classes
        shards.save(folder / f"{split}-classes.npy", classes_N)
        for shard, start in zip(files, starts, strict=True):
            codes = rng.generator(0, start).integers(0, codebook, shard.shape, np.uint16)
            numbers_N = np.arange(start, start + len(codes))
            codes[:, 0, 0], codes[:, 0, 1] = numbers_N % codebook, numbers_N // codebook
            shards.save(folder / shard.file, codes)
        return SplitManifest("random", "", "", count, (PLAIN,), files)

    names = tuple(str(c) for c in range(classes))
    manifest = Manifest(
        "", codebook, 256, length, "uint16", names, None, None, part("train", count), part("val", 1)
    )
    storage.save_json(folder / MANIFEST, to_json(manifest))


def read(folder: Path, batch: int = 256, steps: int = 2000) -> dict[str, float]:
    """Opens a folder of tokens and reads shuffled batches, as a training does.

    Returns:
        seconds to open it, codes read in a second, and the megabytes that this process grew by: in
        memory of its own, and with maps of files (Linux; else 0).
    """
    private, resident = memory.resident()
    began = time.perf_counter()
    tokens = Tokens(folder, "train")
    opened = time.perf_counter()
    for step in range(steps):
        tokens.codes(optim.batch_indices(len(tokens), batch, 0, step))
    seconds = time.perf_counter() - opened
    private_after, resident_after = memory.resident()
    return {
        "images": len(tokens),
        "open_seconds": opened - began,
        "codes_per_second": steps * batch * tokens.manifest.length / seconds,
        "private_megabytes": private_after - private,
        "resident_megabytes": resident_after - resident,
    }


def codes_eaten(size: str, device: torch.device, batch: int = 4, timed: int = 2) -> float:
    """Codes a second that training a coarse model takes: forward and backward, no optimiser."""
    model = CoarseModel(SIZES[size].config(round(LENGTH**0.5), CLASSES), CLUSTERS).to(device)
    labels_BL = torch.randint(CLUSTERS, (batch, LENGTH), device=device)
    classes_B = torch.zeros(batch, dtype=torch.int64, device=device)
    seconds = []
    for _ in range(1 + timed):
        began = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits_BLK = model(labels_BL, classes_B)
        F.cross_entropy(logits_BLK.flatten(0, 1).float(), labels_BL.flatten()).backward()
        float(next(model.parameters()).grad.sum())  # type: ignore[union-attr]  # waits for a GPU
        seconds.append(time.perf_counter() - began)
    return labels_BL.numel() / min(seconds[1:])


# --- Extraction -----------------------------------------------------------------------------------


class _Noise(ImageSet):
    """Random pictures in memory, so that both ways of encoding read at no cost."""

    def __init__(self, count: int, size: int) -> None:
        names = ("noise",)
        super().__init__("noise", names, np.zeros(count, np.int64), size, f"{count} {size}")
        self._pixels = rng.generator(count).integers(0, 256, (count, size, size, 3), np.uint8)

    def read(self, indices: ArrayLike, view: View = PLAIN) -> NDArray[np.uint8]:
        pixels = self._pixels[np.asarray(indices)]
        return np.ascontiguousarray(pixels[:, :, ::-1]) if view.flip else pixels


def precisions(device: torch.device) -> tuple[Precision, ...]:
    """Those that the device can extract in."""
    return ("fp32", "bf16") if supports_bf16(device) else ("fp32",)


@torch.inference_mode()
def equal_codes(device: torch.device, pictures: int = 1000) -> float:
    """The share of codes that are the same in bf16 as in fp32, by the shipped tokenizer, of the
    first held-out pictures of Fashion-MNIST.
    """
    tokenizer = Pipeline.from_pretrained("fashion-mnist", device=device, engine="eager").tokenizer
    images = open_images("fashion-mnist", tokenizer.config.image_size).val
    pixels_BHWC = images.read(np.arange(min(pictures, len(images))))
    codes = []
    for dtype in (torch.float32, torch.bfloat16):
        ready = copy.deepcopy(tokenizer)
        tokenizer_cpu.prepare(ready, "encoder", dtype)
        parts = [as_tensor(part, device) for part in np.array_split(pixels_BHWC, 20)]
        codes.append(torch.cat([ready.encode(part_BCHW) for part_BCHW in parts]))
    return float((codes[0] == codes[1]).float().mean())


def extraction(
    pictures: int,
    rounds: int,
    device: torch.device,
    tokenizer: VQModel | None = None,
    precision: Precision = "fp32",
) -> tuple[list[float], list[float]]:
    """Seconds of a view by LlamaGen's loop and by `extraction.extract`, of each round, in turn.

    Args:
        tokenizer: one of random weights in the shape of VQ-16 by default.
    """
    tokenizer = tokenizer or VQModel(TOKENIZERS["VQ-16"])
    tokenizer = tokenizer.to(device).eval()
    size = tokenizer.config.image_size
    images = Splits(_Noise(pictures, size), _Noise(1, size))
    config = TokensConfig(
        views="flip", batch_size=min(pictures, 64 if device.type == "cuda" else 4)
    )
    plain, ours = [], []
    for number in range(-1, rounds):  # the first one is not counted
        with tempfile.TemporaryDirectory() as temporary:
            began = time.perf_counter()
            plain_extract(tokenizer, images.train, Path(temporary), VIEWS["flip"])
            middle = time.perf_counter()
            extract(tokenizer, "", images, Path(temporary) / "tokens", config, precision=precision)
            end = time.perf_counter()
        if number >= 0:
            plain.append((middle - began) / (2 * pictures))
            ours.append((end - middle) / (2 * pictures + 1))
    return plain, ours


@torch.no_grad()
def plain_extract(
    tokenizer: VQModel, images: ImageSet, folder: Path, views: Sequence[View]
) -> None:
    """LlamaGen's loop (autoregressive/train/extract_codes_c2i.py): the views of one picture at a
    time, channels first in memory, and a file for the codes and one for the class of each picture.
    """
    device = next(tokenizer.parameters()).device
    for i in range(len(images)):
        parts = [as_tensor(images.read([i], view), device).contiguous() for view in views]
        codes_BL = plain_encode(tokenizer, torch.cat(parts))
        np.save(folder / f"{i}.npy", codes_BL[None].cpu().numpy())
        np.save(folder / f"{i}-label.npy", images.classes_N[[i]])


def plain_encode(tokenizer: VQModel, images_BCHW: Tensor) -> Tensor:
    """Codes (B, L) by the operators of LlamaGen's tokenizer_image/vq_model.py, one by one."""

    def swish(x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)

    def apply(layer: nn.Module, x: Tensor) -> Tensor:
        if isinstance(layer, ResidualBlock):
            h = layer.conv1(swish(layer.norm1(x)))
            h = layer.conv2(swish(layer.norm2(h)))
            return layer.skip(x) + h
        if isinstance(layer, AttentionBlock):
            h = layer.norm(x)
            q, k, v = (part(h).flatten(2) for part in (layer.query, layer.key, layer.value))
            weights = F.softmax(torch.bmm(q.transpose(1, 2), k) * q.shape[1] ** -0.5, dim=2)
            return x + layer.output(torch.bmm(v, weights.transpose(1, 2)).view(x.shape))
        return layer(x)

    encoder = tokenizer.encoder
    h = encoder.input(images_BCHW)
    for layer in (*encoder.levels, *encoder.middle):
        h = apply(layer, h)
    z_BCHW = tokenizer.to_code(encoder.output(swish(encoder.norm(h))))
    z_ND = F.normalize(z_BCHW.permute(0, 2, 3, 1).contiguous().flatten(0, 2), dim=-1)
    codebook_VD = tokenizer.codebook()
    squares = (z_ND**2).sum(1, keepdim=True) + (codebook_VD**2).sum(1)
    indices_N = (squares - 2 * z_ND @ codebook_VD.T).argmin(1)
    return indices_N.view(len(images_BCHW), -1)
