"""The least that a computation takes: operations, bytes, and the time of a machine for them.

Counted are products (a multiplication and an addition are two operations) and what has to be read
from memory: each weight once, and the keys and values that are attended to. Normalisation,
activations, random numbers and everything that is written count as nothing, so that the floor is
never too high.

Shapes: D width, F hidden width of SwiGLU, K labels of the output layer, L labels of an image.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ctf.models import sizes
from ctf.models.transformer import TransformerConfig


@dataclass(frozen=True)
class Machine:
    """What a machine reached in this run: operations a second by precision, and bytes a second."""

    fp32: float
    bf16: float
    int8: float
    bandwidth: float


@dataclass(frozen=True)
class Work:
    """Operations by precision, and bytes read."""

    fp32: float = 0.0
    bf16: float = 0.0
    int8: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(
            self.fp32 + other.fp32,
            self.bf16 + other.bf16,
            self.int8 + other.int8,
            self.bytes + other.bytes,
        )

    def times(self, count: float) -> Work:
        """The same work, `count` times."""
        return Work(count * self.fp32, count * self.bf16, count * self.int8, count * self.bytes)

    @property
    def operations(self) -> float:
        """Operations of all precisions."""
        return self.fp32 + self.bf16 + self.int8

    def floor(self, machine: Machine) -> float:
        """Seconds, if all products ran at the machine's peak while all bytes are read at its."""
        computing = self.fp32 / machine.fp32 + self.bf16 / machine.bf16 + self.int8 / machine.int8
        return max(computing, self.bytes / machine.bandwidth)


def coarse_step(
    config: TransformerConfig,
    labels: int,
    rows: int,
    position: int,
    *,
    int8: bool,
    cached: torch.dtype,
) -> Work:
    """One position of a coarse model, or of the full-vocabulary baseline, with a cache.

    Args:
        config: Shape of the transformer.
        labels: K.
        rows: Images, counting both halves of guidance.
        position: The number of positions in the cache.
        int8: Whether the matrices are in int8.
        cached: Precision of keys and values.
    """
    weights = config.layers * sizes.block_weights(config) + config.width * labels
    products = sizes.block_flops(config, rows) + sizes.head_flops(config, rows, labels)
    attention = sizes.attention_flops(config, rows, position + 1)
    keys_and_values = 2 * rows * config.layers * config.width * (position + 1)
    low = cached == torch.bfloat16
    return Work(
        fp32=(0 if low else attention) + (0 if int8 else products),
        bf16=attention if low else 0,
        int8=products if int8 else 0,
        bytes=weights * (1 if int8 else 4) + cached.itemsize * keys_and_values,
    )


def fine_pass(config: TransformerConfig, rows: int, members: int, *, int8: bool) -> Work:
    """One pass of the fine model over whole images.

    Args:
        config: Shape of the transformer.
        rows: Images, counting both halves of guidance.
        members: Size of a token's cluster, on average.
        int8: Whether the matrices of the blocks are in int8.
    """
    positions = 1 + config.length
    products = sizes.block_flops(config, rows * positions)
    attention = sizes.attention_flops(config, rows * positions, positions)
    head = sizes.head_flops(config, rows * config.length, members)
    return Work(
        fp32=attention + head + (0 if int8 else products),
        int8=products if int8 else 0,
        bytes=config.layers * sizes.block_weights(config) * (1 if int8 else 4),
    )
