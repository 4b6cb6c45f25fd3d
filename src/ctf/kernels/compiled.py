"""Compiled transformers: blocks in training, single steps in sampling on a processor.

Shapes: B batch, T positions, W those of a window, L labels of an image, D width, N heads, E head
dim, P rotated pairs of a head (E / 2), Z queries and keys.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ctf.kernels.logits import LeanCoarseModel, cross_entropy
from ctf.kernels.products import works
from ctf.models import transformer
from ctf.models.transformer import Backbone, KVCache


def rotate(x_BTZNE: Tensor, rotation_TP2: Tensor) -> Tensor:
    """As `transformer.rotate`, in real numbers: the compiler has no complex ones."""
    pairs = x_BTZNE.to(torch.promote_types(x_BTZNE.dtype, torch.float32)).unflatten(-1, (-1, 2))
    cos, sin = rotation_TP2[..., None, None, :, :].unbind(-1)
    x, y = pairs.unbind(-1)
    rotated = torch.stack([x * cos - y * sin, x * sin + y * cos], dim=-1)
    return rotated.flatten(-2).type_as(x_BTZNE)


class Attention(transformer.Attention):
    """Attention that can be compiled."""

    rotate = staticmethod(rotate)


class CoarseModel(LeanCoarseModel):
    """A coarse model whose loss goes through the logits of a slice twice, not five times."""

    def loss(self, labels_BL: Tensor, classes_B: Tensor) -> Tensor:
        """As `CoarseModel.loss`."""
        hidden_BLD = self.hidden(labels_BL, classes_B)
        return cross_entropy(hidden_BLD, self.head.weight, labels_BL, slice_loss)


def slice_loss(
    h_TD: Tensor, w_VD: Tensor, t_T1: Tensor, tokens: int, differentiate: bool
) -> tuple[Tensor, Tensor | None]:
    """A `logits.SliceLoss` whose part between the products is compiled."""
    loss, grad_TV = _softmax_loss()(h_TD @ w_VD.T, t_T1, tokens)
    return loss, grad_TV if differentiate else None


def softmax_loss(logits_TV: Tensor, t_T1: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """The sum of the losses of logits, and the gradient of the mean over all tokens."""
    logp_TV = logits_TV.float().log_softmax(-1)
    is_target_TV = torch.arange(logits_TV.shape[1], device=t_T1.device) == t_T1
    grad_TV = (logp_TV.exp() - is_target_TV.float()) / tokens
    return -logp_TV.gather(1, t_T1).sum(), grad_TV.to(logits_TV.dtype)


@functools.cache
def _softmax_loss() -> Callable[..., tuple[Tensor, Tensor]]:
    return torch.compile(softmax_loss)


class CompiledBackbone(Backbone):
    """A backbone whose steps of a whole batch are compiled; on a GPU see `ctf.kernels.graphs`.

    Compiled are steps over as many positions as in `windows`. Every step attends to all positions
    and masks those to come: a fixed shape is worth more than the work that is saved.
    """

    windows = (1, 4, 16)  # few: each takes long to compile
    fixed_batch = True

    def step(
        self,
        inputs_BT: Tensor,
        start: int | Tensor,
        cache: KVCache,
        images: slice = slice(None),
    ) -> Tensor:
        """As `Backbone.step`."""
        batch, length = inputs_BT.shape
        if length not in self.windows or batch < len(cache.k[0]):
            return super().step(inputs_BT, start, cache, images)
        x_BWD = self.embed(inputs_BT, start)
        positions = transformer.window_positions(start, length, x_BWD.device)
        positions_BW = positions.expand(batch, length).contiguous()
        rotations = self.rotation(0, self.config.length)
        return self._compiled(x_BWD, rotations, positions_BW, cache.k, cache.v)

    def __getstate__(self) -> dict[str, Any]:  # a copy compiles its own steps
        return {name: value for name, value in vars(self).items() if name != "_compiled"}

    @functools.cached_property
    def _compiled(self) -> Callable[..., Tensor]:
        return torch.compile(self._window_step, fullgraph=True, dynamic=False)

    def _window_step(
        self,
        x_BWD: Tensor,
        rotations_LP2: Tensor,
        positions_BW: Tensor,
        keys: list[Tensor],
        values: list[Tensor],
    ) -> Tensor:
        stored_B1W1 = positions_BW[:, None, :, None]
        mask_B1WL = torch.arange(self.config.length, device=x_BWD.device) <= stored_B1W1

        def attend(layer: int, q_BNWE: Tensor, k_BNWE: Tensor, v_BNWE: Tensor) -> Tensor:
            index_BNWE = stored_B1W1.expand_as(k_BNWE)
            keys[layer].scatter_(2, index_BNWE, k_BNWE)
            values[layer].scatter_(2, index_BNWE, v_BNWE)
            return F.scaled_dot_product_attention(
                q_BNWE, keys[layer], values[layer], attn_mask=mask_B1WL
            )

        rotation_BWP2 = rotations_LP2[positions_BW]
        for i, layer in enumerate(self.layers):
            x_BWD = layer(x_BWD, rotation_BWP2, functools.partial(attend, i))
        return self.norm(x_BWD)


@functools.cache
def compiles(device: str) -> bool:
    """Whether PyTorch finds what it needs to compile for a type of device: a compiler, Triton."""
    return works(lambda: torch.compile(torch.sin)(torch.zeros(8, device=device)))
