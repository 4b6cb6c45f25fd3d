"""In which precision products are computed: single, or bfloat16 where a device multiplies it."""

from __future__ import annotations

from typing import Literal

import torch

from ctf.common.errors import UserError

Precision = Literal["auto", "fp32", "bf16"]


def multiplies_bf16(device: torch.device) -> bool:
    """Whether a device has products in bfloat16 of its own, which are faster than others."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def uses_bf16(precision: Precision, device: torch.device) -> bool:
    """Whether products on this device are computed in bfloat16.

    Raises:
        UserError: they should be, and the device has no such products.
    """
    able = multiplies_bf16(device)
    if precision == "bf16" and not able:
        raise UserError(
            f"precision bf16: {device.type} does not multiply bfloat16 here; "
            "use --precision fp32, or auto"
        )
    return able and (precision == "bf16" or (precision, device.type) == ("auto", "cuda"))
