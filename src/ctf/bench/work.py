"""What a computation takes at the least: operations, bytes, and the time of a machine for them.

Counted are products (a multiplication and an addition are two operations) and what must be read
from memory: each weight once, and the keys and values that are attended to. Normalisation,
activations, draws and all that is written count as nothing, so a floor is never too high by them.

Shapes: D width, F hidden width of SwiGLU, K labels of the output layer, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ctf.models.tokenizer import VQModel
from ctf.models.transformer import TransformerConfig


@dataclass(frozen=True)
class Machine:
    """What a machine reached in the same run: operations and bytes per second."""

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
        return Work(count * self.fp32, count * self.bf16, count * self.int8, count * self.bytes)

    @property
    def operations(self) -> float:
        return self.fp32 + self.bf16 + self.int8

    def floor(self, machine: Machine) -> float:
        """Seconds, were all products at the machine's peak while all bytes are read at its own."""
        computing = self.fp32 / machine.fp32 + self.bf16 / machine.bf16 + self.int8 / machine.int8
        return max(computing, self.bytes / machine.bandwidth)


def block_weights(config: TransformerConfig) -> int:
    """Numbers in the matrices of all blocks: layers (4 D^2 + 3 D F)."""
    d = config.width
    return config.layers * (4 * d * d + 3 * d * config.ffn_width)


def step(
    config: TransformerConfig,
    labels: int,
    rows: int,
    position: int,
    int8: bool,
    cached: torch.dtype,
) -> Work:
    """One position of a coarse model, or of the full-vocabulary baseline, with a cache.

    Args:
        labels: K, rows of the output layer.
        rows: images, with both halves of guidance.
        position: how many positions are in the cache.
        int8: whether the matrices are. cached: precision of keys and values.
    """
    weights = block_weights(config) + config.width * labels
    products = 2.0 * rows * weights
    seen = rows * config.layers * config.width * (position + 1)  # numbers in keys, and in values
    low = cached == torch.bfloat16
    return Work(
        fp32=(0.0 if low else 4.0 * seen) + (0.0 if int8 else products),
        bf16=4.0 * seen if low else 0.0,
        int8=products if int8 else 0.0,
        bytes=weights * (1 if int8 else 4) + 2.0 * cached.itemsize * seen,
    )


def steps(
    config: TransformerConfig, labels: int, rows: int, int8: bool, cached: torch.dtype
) -> list[Work]:
    """Every position of an image; the floor of a run is the sum of theirs."""
    return [step(config, labels, rows, i, int8, cached) for i in range(config.length)]


def fine(config: TransformerConfig, rows: int, members: float, int8: bool) -> Work:
    """One pass of the fine model over whole images.

    Args:
        rows: images, with both halves of guidance.
        members: those of a token's cluster, on average.
    """
    tokens = rows * (1 + config.length)
    products = 2.0 * tokens * block_weights(config)
    attention = 4.0 * tokens * (1 + config.length) * config.layers * config.width
    head = 2.0 * rows * config.length * config.width * members
    return Work(
        fp32=attention + head + (0.0 if int8 else products),
        int8=products if int8 else 0.0,
        bytes=block_weights(config) * (1.0 if int8 else 4.0),
    )


def decoding(tokenizer: VQModel) -> float:
    """Operations of decoding one image, as the tokenizer's own layers do it."""
    with torch.device("meta"):
        model = VQModel(tokenizer.config)
        codes_BL = torch.zeros(1, model.grid**2, dtype=torch.int64)
    plainly = sdpa_kernel(SDPBackend.MATH)  # products within other kernels are not counted
    with FlopCounterMode(display=False) as counter, torch.no_grad(), plainly:
        model.decode(codes_BL)
    return float(counter.get_total_flops())
