"""Transformers for sampling on a processor: packed matrices and a cache that grows.

Sampling multiplies a few rows with every matrix, again and again. oneDNN's packed layout is read
once and in order; in int8 it is a quarter of the bytes.

Shapes: B batch, T positions, N heads, L labels of an image, E head dim.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ctf.kernels.products import Int8, Packed
from ctf.models.transformer import KVCache, SwiGLU, TransformerConfig


def pack(module: nn.Module, kind: type[Packed | Int8]) -> None:
    """Replace all linear layers within a module, each old one freed at once."""
    for name, child in module.named_children():
        if isinstance(child, SwiGLU):
            setattr(module, name, PackedSwiGLU(child, kind))
        elif isinstance(child, nn.Linear):
            setattr(module, name, kind(child.weight))
        else:
            pack(child, kind)


class PackedSwiGLU(nn.Module):
    """`SwiGLU` whose first two matrices are one product."""

    def __init__(self, ffn: SwiGLU, kind: type[Packed | Int8]) -> None:
        super().__init__()
        # In a tuple, so that it is no part of the state, which has w1 and w3 as in `SwiGLU`.
        self.first = (kind(torch.cat([ffn.w1.weight, ffn.w3.weight])),)
        self.w2 = kind(ffn.w2.weight)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """As `SwiGLU.forward`, without dropout."""
        gate, value = self.first[0](x_BTD).chunk(2, -1)
        return self.w2(F.silu(gate) * value)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        if isinstance(self.first[0], Packed):  # Int8 no longer has the model's own weights
            w1, w3 = self.first[0].weight().chunk(2)
            destination[f"{prefix}w1.weight"], destination[f"{prefix}w3.weight"] = w1, w3


class GrowingCache(KVCache):
    """A cache whose room grows by `BLOCK` positions at a time.

    A processor reads contiguous memory at about twice the speed of slices out of full-length
    tensors, copying included.
    """

    BLOCK = 32

    def __init__(
        self, config: TransformerConfig, batch: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.length = config.length
        empty = torch.empty(batch, config.heads, 0, config.head_dim, device=device, dtype=dtype)
        self.k, self.v = [empty] * config.layers, [empty] * config.layers

    def attend(
        self,
        layer: int,
        start: int | Tensor,
        images: slice,
        q_BNTE: Tensor,
        k_BNTE: Tensor,
        v_BNTE: Tensor,
    ) -> Tensor:
        """As `KVCache.attend`; one query is two plain products over the whole room."""
        length, width = q_BNTE.shape[2:]
        end = length + (start if isinstance(start, int) else int(start.max()))
        if end > self.k[layer].shape[2]:
            for stored in (self.k, self.v):
                stored[layer] = self._grown(stored[layer], end)
        if length > 1 or not isinstance(start, int):
            return super().attend(layer, start, images, q_BNTE, k_BNTE, v_BNTE)
        keys, values = self.k[layer][images], self.v[layer][images]
        keys[:, :, start:end] = k_BNTE
        values[:, :, start:end] = v_BNTE
        scores_BN1T = (q_BNTE.to(keys.dtype) * width**-0.5) @ keys.mT
        scores_BN1T[..., end:] = -torch.inf
        mixed_BN1E: Tensor = scores_BN1T.softmax(-1) @ values
        return mixed_BN1E.to(q_BNTE.dtype)

    def _grown(self, stored_BNTE: Tensor, end: int) -> Tensor:
        room = -(-end // self.BLOCK) * self.BLOCK
        batch, heads, before, width = stored_BNTE.shape
        grown = stored_BNTE.new_empty(batch, heads, min(room, self.length), width)
        grown[:, :, :before] = stored_BNTE
        grown[:, :, before:] = 0  # masked, but zero times anything must be zero
        return grown
