"""Products with a weight matrix on a processor, by operators of oneDNN that are private to PyTorch.

Seen to work with PyTorch 2.13. Each has a check whether this build of PyTorch and this
processor have it; `linear` falls back to PyTorch's own, and the others are then not used.

Shapes: V rows of a matrix, D its columns.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROWS = 16  # that a packed layout is chosen for: 8 images and as many without their class


def linear(x: Tensor, weight_VD: Tensor) -> Tensor:
    """The product x @ weight.T for x of (..., D), in the precision of x."""
    weight_VD = weight_VD.to(x.dtype)
    if not has_linear(x.dtype):
        return F.linear(x, weight_VD)
    return _linear(x, weight_VD)


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


@functools.cache
def has_linear(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies matrices of this precision here."""
    ones = torch.ones(2, 16, dtype=dtype)
    return works(lambda: _linear(ones, ones))


class Packed(nn.Module):
    """A linear layer without bias in oneDNN's own layout, float32. Equal up to rounding."""

    def __init__(self, weight_VD: Tensor) -> None:
        super().__init__()
        weight_VD = weight_VD.detach().float().contiguous()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight_VD, ROWS)

    def forward(self, x: Tensor) -> Tensor:
        """The product x @ weight.T."""
        return _linear(x, self.packed)

    def weight(self) -> Tensor:
        """The matrix in its usual layout, exactly."""
        return self.packed.to_dense()

    def bytes(self) -> int:
        """Memory of the weights."""
        return int(4 * self.packed.numel())

    def __reduce__(self) -> Any:  # oneDNN's layout cannot be copied or pickled
        return Packed, (self.weight(),)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}weight"] = self.weight()


class Int8(nn.Module):
    """A linear layer without bias in int8 (dynamic quantization).

    Each row of the matrix has a scale, and each row of inputs one that is computed from it: it does
    not depend on its batch. PyTorch's own dynamic quantization has one scale for all of them.
    """

    def __init__(self, weight_VD: Tensor, scale_V: Tensor | None = None) -> None:
        super().__init__()
        weight_VD = weight_VD.detach().float().contiguous()
        if scale_V is None:
            scale_V = (weight_VD.abs().amax(1) / 127).clamp(min=1e-12).double()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch announces that quantization will move
            quantized = torch.quantize_per_channel(
                weight_VD, scale_V, torch.zeros(len(scale_V), dtype=torch.int64), 0, torch.qint8
            )
            self.packed = torch.ops.quantized.linear_prepack(quantized, None)
        self.shape = weight_VD.shape
        # Without VNNI, products of full range could overflow.
        self.levels = 127 if torch.cpu._is_vnni_supported() else 63

    def forward(self, x: Tensor) -> Tensor:
        """About the product x @ weight.T."""
        scale = x.abs().amax(-1, keepdim=True).clamp_(min=1e-30)
        multiply = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32
        y: Tensor = multiply(x / scale, 1 / self.levels, self.levels + 1, self.packed)
        return y.mul_(scale)

    def bytes(self) -> int:
        """Memory of the weights and scales, about."""
        return self.shape.numel() + 4 * self.shape[0]

    def __reduce__(self) -> Any:  # a packed matrix cannot be sent to another process
        quantized, _ = torch.ops.quantized.linear_unpack(self.packed)
        return _from_integers, (quantized.int_repr(), quantized.q_per_channel_scales())


def _from_integers(integers_VD: Tensor, scale_V: Tensor) -> Int8:
    """Return the layer whose matrix is integers times scales, which are its own to the last bit."""
    return Int8(integers_VD * scale_V[:, None], scale_V)


@functools.cache
def has_layer(kind: type[Packed | Int8]) -> bool:
    """Whether layers of this kind work here."""
    return works(lambda: kind(torch.ones(16, 16))(torch.ones(2, 16)))


def works(attempt: Callable[[], object]) -> bool:
    """Whether something can be computed here: each missing part raises an error of its own."""
    try:
        attempt()
    except Exception:
        return False
    return True
