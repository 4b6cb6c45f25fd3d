"""Compiled transformers: blocks in training, single steps in sampling.

On a GPU it is the launch of many small kernels that takes the time.

Shapes: B batch, T positions, L labels of an image, D width, N heads, E head dim, P rotated pairs
of a head (E / 2), Z queries and keys.
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
    cos, sin = rotation_TP2[:, None, None].unbind(-1)
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
    """A backbone whose single steps of a whole batch are compiled, into CUDA graphs on a GPU.

    Every step attends to all positions and masks those to come: a fixed shape is worth more than
    the work that is saved.
    """

    def step(
        self, inputs_BT: Tensor, start: int, cache: KVCache, images: slice = slice(None)
    ) -> Tensor:
        """As `Backbone.step`."""
        batch, length = inputs_BT.shape
        if length > 1 or batch < len(cache.k[0]):
            return super().step(inputs_BT, start, cache, images)
        position = torch.tensor([start], device=inputs_BT.device)
        rotations = self.rotation(0, self.config.length)
        torch.compiler.cudagraph_mark_step_begin()
        return self._compiled(self.embed(inputs_BT, start), rotations, position, cache.k, cache.v)

    def __getstate__(self) -> dict[str, Any]:  # a copy compiles its own steps
        return {name: value for name, value in vars(self).items() if name != "_compiled"}

    @functools.cached_property
    def _compiled(self) -> Callable[..., Tensor]:
        graphs = self.label_embedding.weight.device.type == "cuda"
        mode = "reduce-overhead" if graphs else None
        return torch.compile(self._one_step, mode=mode, fullgraph=True, dynamic=False)

    def _one_step(
        self,
        x_B1D: Tensor,
        rotations_LP2: Tensor,
        position: Tensor,
        keys: list[Tensor],
        values: list[Tensor],
    ) -> Tensor:
        mask_L = torch.arange(self.config.length, device=position.device) <= position

        def attend(layer: int, q_BN1E: Tensor, k_BN1E: Tensor, v_BN1E: Tensor) -> Tensor:
            keys[layer].index_copy_(2, position, k_BN1E)
            values[layer].index_copy_(2, position, v_BN1E)
            return F.scaled_dot_product_attention(
                q_BN1E, keys[layer], values[layer], attn_mask=mask_L[None]
            )

        for i, layer in enumerate(self.layers):
            x_B1D = layer(x_B1D, rotations_LP2[position], functools.partial(attend, i))
        return self.norm(x_B1D)


@functools.cache
def compiles(device: str) -> bool:
    """Whether PyTorch finds what it needs to compile for a type of device: a compiler, Triton."""
    return works(lambda: torch.compile(torch.sin)(torch.zeros(8, device=device)))
