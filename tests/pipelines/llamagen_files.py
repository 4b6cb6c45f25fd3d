"""LlamaGen's checkpoints of the released kinds: shapes of their tensors, and files with such."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.pipelines import llamagen_plain as plain

Shapes = dict[str, tuple[int, ...]]


def gpt_shapes(width: int, layers: int, codes: int = 16384, classes: int = 1000) -> Shapes:
    hidden = int(2 * 4 * width / 3)
    hidden += -hidden % 256
    return plain.gpt_shapes(plain.GPT(width, layers, 1, 1, hidden, codes, classes))


def vq_shapes(multipliers: Sequence[int] = (1, 1, 2, 2, 4), codes: int = 16384) -> Shapes:
    levels, last = tuple(multipliers), frozenset([len(multipliers) - 1])
    vq = plain.VQ(
        128, levels, levels, 2, 256, codes, 8, last, middle=True, l2_norm=True, decoder_blocks=3
    )
    return plain.vq_shapes(vq) | {"quantize.codebook_used": (65536,)}


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
