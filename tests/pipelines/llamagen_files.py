"""Names and shapes of the tensors in LlamaGen's checkpoints, and files with such tensors.

They follow the constructors in tokenizer/tokenizer_image/vq_model.py and
autoregressive/models/gpt.py of its repository.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Shapes = dict[str, tuple[int, ...]]


def gpt_shapes(width: int, layers: int, codes: int = 16384, classes: int = 1000) -> Shapes:
    hidden = int(2 * 4 * width / 3)
    hidden += -hidden % 256
    shapes: Shapes = {
        "cls_embedding.embedding_table.weight": (classes + 1, width),
        "tok_embeddings.weight": (codes, width),
    }
    for i in range(layers):
        shapes |= {
            f"layers.{i}.attention.wqkv.weight": (3 * width, width),
            f"layers.{i}.attention.wo.weight": (width, width),
            f"layers.{i}.feed_forward.w1.weight": (hidden, width),
            f"layers.{i}.feed_forward.w3.weight": (hidden, width),
            f"layers.{i}.feed_forward.w2.weight": (width, hidden),
            f"layers.{i}.attention_norm.weight": (width,),
            f"layers.{i}.ffn_norm.weight": (width,),
        }
    return shapes | {"norm.weight": (width,), "output.weight": (codes, width)}


def vq_shapes(multipliers: Sequence[int] = (1, 1, 2, 2, 4), codes: int = 16384) -> Shapes:
    shapes: Shapes = {}

    def conv(name: str, fan_in: int, fan_out: int, kernel: int) -> None:
        shapes[f"{name}.weight"] = (fan_out, fan_in, kernel, kernel)
        shapes[f"{name}.bias"] = (fan_out,)

    def norm(name: str, width: int) -> None:
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (width,)

    def residual(name: str, fan_in: int, fan_out: int) -> None:
        norm(f"{name}.norm1", fan_in)
        conv(f"{name}.conv1", fan_in, fan_out, 3)
        norm(f"{name}.norm2", fan_out)
        conv(f"{name}.conv2", fan_out, fan_out, 3)
        if fan_in != fan_out:
            conv(f"{name}.nin_shortcut", fan_in, fan_out, 1)

    def attention(name: str, width: int) -> None:
        norm(f"{name}.norm", width)
        for part in ("q", "k", "v", "proj_out"):
            conv(f"{name}.{part}", width, width, 1)

    def middle(name: str, width: int) -> None:
        residual(f"{name}.0", width, width)
        attention(f"{name}.1", width)
        residual(f"{name}.2", width, width)

    last = len(multipliers) - 1
    width = 128
    conv("encoder.conv_in", 3, width, 3)
    for level, multiplier in enumerate(multipliers):
        name = f"encoder.conv_blocks.{level}"
        for block in range(2):
            residual(f"{name}.res.{block}", width, 128 * multiplier)
            width = 128 * multiplier
            if level == last:
                attention(f"{name}.attn.{block}", width)
        if level != last:
            conv(f"{name}.downsample.conv", width, width, 3)
    middle("encoder.mid", width)
    norm("encoder.norm_out", width)
    conv("encoder.conv_out", width, 256, 3)
    conv("decoder.conv_in", 256, width, 3)
    middle("decoder.mid", width)
    for i, level in enumerate(reversed(range(last + 1))):
        name = f"decoder.conv_blocks.{i}"
        for block in range(3):
            residual(f"{name}.res.{block}", width, 128 * multipliers[level])
            width = 128 * multipliers[level]
            if level == last:
                attention(f"{name}.attn.{block}", width)
        if level:
            conv(f"{name}.upsample.conv", width, width, 3)
    norm("decoder.norm_out", width)
    conv("decoder.conv_out", width, 3, 3)
    shapes["quantize.embedding.weight"] = (codes, 8)
    shapes["quantize.codebook_used"] = (65536,)
    conv("quant_conv", 256, 8, 1)
    conv("post_quant_conv", 8, 256, 1)
    return shapes


def random_weights(shapes: Shapes, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Small random weights, and ones for the normalisations."""
    generator = torch.Generator().manual_seed(0)

    def named_weights() -> Iterator[tuple[str, Tensor]]:
        for name, shape in shapes.items():
            if "norm" in name and name.endswith("weight"):
                yield name, torch.ones(shape, dtype=dtype)
            else:
                yield name, (torch.rand(shape, generator=generator) * 0.04 - 0.02).to(dtype)

    return dict(named_weights())


def save(path: Path, weights: dict[str, Tensor], **more: Any) -> Path:
    """Write a checkpoint as LlamaGen's training does."""
    torch.save({"model": weights, **more}, path)
    return path
