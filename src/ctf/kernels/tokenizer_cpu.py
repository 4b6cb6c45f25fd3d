"""The tokenizer on a processor: encoder and decoder without gradients, and the look-up of codes.

Shapes: N vectors, V codes, C code dimension, S codes of a block.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ctf.kernels.replace import replace
from ctf.models.tokenizer import ResidualBlock, Upsample, VQModel

LOOK_UP_ROWS = 32  # vectors at a time: their scores for 16384 codes are 2 MB, and stay in cache
LOOK_UP_BLOCK = 256  # codes at the most whose largest product is found before its index


class CpuVQModel(VQModel):
    """A tokenizer whose look-up is fast on a processor."""

    def nearest(self, vectors_NC: Tensor) -> Tensor:
        """As `VQModel.nearest`."""
        return torch.cat(
            [first_argmax(part_NV) for part_NV in self.scores(vectors_NC, LOOK_UP_ROWS)]
        )


def first_argmax(scores_NV: Tensor) -> Tensor:
    """Index of the first of the largest scores of each row.

    `argmax` takes an order of magnitude longer than `amax`, so it searches one block of codes only.
    """
    size = math.gcd(scores_NV.shape[1], LOOK_UP_BLOCK)
    blocks_NBS: Tensor = scores_NV.unflatten(1, (-1, size))
    block_N = blocks_NBS.amax(-1).argmax(-1)
    rows_N = torch.arange(len(block_N), device=block_N.device)
    return block_N * size + blocks_NBS[rows_N, block_N].argmax(-1)


def prepare(part: nn.Module, dtype: torch.dtype) -> None:
    """Prepare the encoder or the decoder of a tokenizer to compute without gradients.

    Args:
        part: Changed in place, and to the channels-last format.
        dtype: Of the 3x3 convolutions in residual blocks and of doublings. In float32 all is equal
            up to rounding; in bfloat16, where the processor multiplies it, they take half the time.
    """
    part.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    replace(part, {ResidualBlock: FastResidualBlock, Upsample: FastUpsample})
    for module in part.modules():
        if isinstance(module, FastResidualBlock):
            module.conv1.to(dtype)
            module.conv2.to(dtype)
        elif isinstance(module, FastUpsample):
            module.kernel = transposed_kernel(module.conv.weight.detach(), dtype)


class FastResidualBlock(ResidualBlock):
    """A residual block that fills less memory, its convolutions in their own precision."""

    def forward(self, x: Tensor) -> Tensor:
        """As `ResidualBlock.forward`."""
        dtype = self.conv1.weight.dtype
        h = F.silu(self.norm1(x), inplace=True)
        h = self.conv1(h.to(dtype)).to(x.dtype)
        h = F.silu(self.norm2(h), inplace=True)
        h = self.conv2(h.to(dtype)).to(x.dtype)
        return h.add_(self.skip(x))


class TransposedUpsample(Upsample):
    """Doubling by one transposed convolution: 16 products for four pixels instead of 36."""

    def forward(self, x: Tensor) -> Tensor:
        """As `Upsample.forward`."""
        kernel = transposed_kernel(self.conv.weight, x.dtype)
        return F.conv_transpose2d(x, kernel, self.conv.bias, stride=2, padding=1)


class FastUpsample(Upsample):
    """As `TransposedUpsample`, with the kernel computed once, and in its own precision."""

    kernel: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """As `Upsample.forward`."""
        assert self.conv.bias is not None
        dtype = self.kernel.dtype
        out = F.conv_transpose2d(
            x.to(dtype), self.kernel, self.conv.bias.to(dtype), stride=2, padding=1
        )
        return out.to(x.dtype)


def transposed_kernel(kernel: Tensor, dtype: torch.dtype) -> Tensor:
    """The 4x4 kernel of a transposed convolution that is nearest-neighbour doubling, then `kernel`.

    Of the three rows of a 3x3 kernel two meet the same row of the small image, so their weights
    add up; columns alike.
    """
    kernel = kernel.double()
    for dim in (2, 3):
        a, b, c = kernel.unbind(dim)
        kernel = torch.stack([c, b + c, a + b, a], dim)
    return kernel.transpose(0, 1).to(dtype).contiguous(memory_format=torch.channels_last)
