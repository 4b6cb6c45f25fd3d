"""Transformers in bfloat16, for sampling on a GPU: half the bytes, and its fastest products."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ctf.kernels.replace import replace
from ctf.models.transformer import Backbone


class WideNorm(nn.RMSNorm):
    """The last norm of a backbone in bfloat16: from here on, to the logits, all is in float32."""

    def forward(self, x: Tensor) -> Tensor:
        """As `nn.RMSNorm.forward`."""
        return super().forward(x.float())


def convert(backbone: Backbone) -> None:
    """Convert the weights of a backbone, and so its cache, in place; its last norm stays."""
    for part in (backbone.class_embedding, backbone.label_embedding, backbone.layers):
        part.to(torch.bfloat16)
    replace(backbone.norm, {nn.RMSNorm: WideNorm})
