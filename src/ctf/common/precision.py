"""Whether matrix products are computed in float32 or, on devices that support it, bfloat16."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Literal

import torch

from ctf.common.errors import UserError

Precision = Literal["auto", "fp32", "bf16"]


def supports_bf16(device: torch.device) -> bool:
    """Return whether a device has instructions for bfloat16 products, which are then faster."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type != "cpu":
        return False
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def uses_bf16(precision: Precision, device: torch.device) -> bool:
    """Return whether products on this device are computed in bfloat16.

    Raises:
        UserError: bf16 was requested on a device that does not support it.
    """
    supported = supports_bf16(device)
    if precision == "bf16" and not supported:
        raise UserError(
            f"precision bf16: this {device.type} has no bfloat16 products; "
            "use --precision fp32 or auto"
        )
    return supported and (precision == "bf16" or (precision, device.type) == ("auto", "cuda"))


def autocast(device: torch.device, enabled: bool) -> torch.autocast:
    """Convolutions in bfloat16, if enabled; weights, norms and losses stay in float32."""
    # Uncached on a processor, where threads would share the cache.
    cached = device.type != "cpu"
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled, cache_enabled=cached)


@contextlib.contextmanager
def without_tf32(device: torch.device) -> Iterator[None]:
    """Within the block, compute float32 products on a GPU as a processor does, up to rounding.

    By default, PyTorch's convolutions round their inputs to the 10 bits of TF32 there.
    """
    if device.type != "cuda":
        yield
        return
    convolutions, products = torch.backends.cudnn, torch.backends.cuda.matmul
    before = convolutions.allow_tf32, products.allow_tf32
    convolutions.allow_tf32 = products.allow_tf32 = False
    try:
        yield
    finally:
        convolutions.allow_tf32, products.allow_tf32 = before
