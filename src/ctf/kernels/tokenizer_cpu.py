"""The tokenizer on a processor: encoder and decoder without gradients, and the look-up of codes.

Residual blocks fill less memory, and doubling the sides multiplies less. In bfloat16, where the
processor multiplies it, convolutions take about half the time.

Shapes: N vectors, V codes, C code dimension, S codes of a block.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ctf.models.tokenizer import ResidualBlock, Upsample, VQModel

LOOK_UP_ROWS = 32  # vectors at a time: their products with 16384 codes are 2 MB, and stay in cache
LOOK_UP_BLOCK = 256  # codes at the most whose largest product is found before its index


class CpuVQModel(VQModel):
    """A tokenizer whose look-up is fast on a processor."""

    def nearest(self, vectors_NC: Tensor) -> Tensor:
        """As `VQModel.nearest`."""
        codebook_CV = self.codebook().T
        return torch.cat(
            [first_argmax(part @ codebook_CV) for part in vectors_NC.split(LOOK_UP_ROWS)]
        )


def first_argmax(products_NV: Tensor) -> Tensor:
    """Index of the first of the largest products.

    `argmax` takes an order of magnitude longer than `amax`, so it searches one block of codes only.
    """
    size = math.gcd(products_NV.shape[1], LOOK_UP_BLOCK)
    blocks_NBS = products_NV.unflatten(1, (-1, size))
    block_N = blocks_NBS.amax(-1).argmax(-1)
    rows_N = torch.arange(len(block_N), device=block_N.device)
    return block_N * size + blocks_NBS[rows_N, block_N].argmax(-1)


def prepare(tokenizer: VQModel, part: nn.Module, dtype: torch.dtype) -> None:
    """Prepare the encoder or the decoder of a tokenizer, in place.

    Args:
        tokenizer: on the device where it will compute.
        part: its encoder or decoder.
        dtype: of the 3x3 convolutions in residual blocks and of doublings. In float32 all is
            equal up to rounding.
    """
    tokenizer.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    _replace(part, dtype)


def _replace(module: nn.Module, dtype: torch.dtype) -> None:
    for name, child in module.named_children():
        if isinstance(child, ResidualBlock):
            setattr(module, name, PreparedResidual(child, dtype))
        elif isinstance(child, Upsample):
            setattr(module, name, PreparedUpsample(child, dtype))
        else:
            _replace(child, dtype)


class PreparedResidual(nn.Module):
    """`ResidualBlock` with less memory to fill, and its convolutions in `dtype`."""

    def __init__(self, block: ResidualBlock, dtype: torch.dtype) -> None:
        super().__init__()
        self.norm1, self.conv1 = block.norm1, block.conv1
        self.norm2, self.conv2 = block.norm2, block.conv2
        self.skip = block.skip
        self.kernels = [_as(conv.weight, dtype) for conv in (block.conv1, block.conv2)]

    def forward(self, x: Tensor) -> Tensor:
        """As `ResidualBlock.forward`."""
        h = F.silu(self.norm1(x), inplace=True)
        h = _convolve(h, self.kernels[0], self.conv1.bias)
        h = F.silu(self.norm2(h), inplace=True)
        h = _convolve(h, self.kernels[1], self.conv2.bias)
        return h.add_(self.skip(x))


class PreparedUpsample(nn.Module):
    """`Upsample` as one transposed convolution: 16 products for four pixels instead of 36.

    Of the three rows of a kernel two meet the same row of the small image, so their weights add
    up; columns alike.
    """

    def __init__(self, up: Upsample, dtype: torch.dtype) -> None:
        super().__init__()
        self.conv = up.conv
        kernel = up.conv.weight.detach().double()
        for dim in (2, 3):
            a, b, c = kernel.unbind(dim)
            kernel = torch.stack([c, b + c, a + b, a], dim)
        self.kernel = [_as(kernel.transpose(0, 1), dtype)]

    def forward(self, x: Tensor) -> Tensor:
        """As `Upsample.forward`."""
        kernel, bias = self.kernel[0], self.conv.bias
        assert bias is not None
        return F.conv_transpose2d(
            x.to(kernel.dtype), kernel, bias.to(kernel.dtype), stride=2, padding=1
        ).to(x.dtype)


def _as(kernel: Tensor, dtype: torch.dtype) -> Tensor:
    return kernel.detach().to(dtype).contiguous(memory_format=torch.channels_last)


def _convolve(x: Tensor, kernel: Tensor, bias: Tensor | None) -> Tensor:
    assert bias is not None
    out = F.conv2d(x.to(kernel.dtype), kernel, bias.to(kernel.dtype), padding=1)
    return out.to(x.dtype)
