"""Cross-entropy of an output layer without the logits of all tokens at once.

For V = 16384 these are most of what a small model's training step would hold: of 8 images 134 MB
in single precision, and as much again for their logarithms and their gradient. Here the output
layer, the softmax and its gradient take some tokens at a time, so that there is one slice which
the processor's cache may hold. Since every token counts the same in the mean, its gradient is
known as soon as its logits are, and nothing is computed twice.

Shapes: B batch, L tokens of an image, T tokens of all images, D width, K outputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

SLICE = 2**24  # logits at a time


def cross_entropy(hidden_BLD: Tensor, weight_KD: Tensor, targets_BL: Tensor) -> Tensor:
    """Mean cross-entropy of a token in nats, a scalar: that of the logits hidden @ weight.T.

    Equal to F.cross_entropy of these up to rounding, and so are the gradients of `hidden_BLD` and
    `weight_KD`. Under autocast the products are taken in its precision, everything else in single.

    Args:
        targets_BL: int64 in [0, K).
    """
    kind = hidden_BLD.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight_KD.dtype
    loss: Tensor = _CrossEntropy.apply(
        hidden_BLD.flatten(0, -2), weight_KD, targets_BL.flatten(), dtype
    )
    return loss


class _CrossEntropy(torch.autograd.Function):
    """Both gradients are made in the forward pass; the backward pass scales them."""

    @staticmethod
    def forward(
        ctx: Any, hidden_TD: Tensor, weight_KD: Tensor, targets_T: Tensor, dtype: torch.dtype
    ) -> Tensor:
        tokens, outputs = len(hidden_TD), len(weight_KD)
        w_KD = weight_KD.to(dtype)
        wanted_hidden, wanted_weight = ctx.needs_input_grad[:2]
        grad_hidden_TD = torch.empty_like(hidden_TD) if wanted_hidden else None
        grad_weight_KD: Tensor | None = None
        each = max(1, SLICE // outputs)
        logs_TK = hidden_TD.new_empty(min(each, tokens), outputs, dtype=torch.float32)
        total = hidden_TD.new_zeros((), dtype=torch.float32)
        for start in range(0, tokens, each):
            part = slice(start, start + each)
            h_TD, t_T1 = hidden_TD[part].to(dtype), targets_T[part, None]
            logs = logs_TK[: len(h_TD)]
            if dtype == torch.float32:
                torch.mm(h_TD, w_KD.T, out=logs)
            else:
                logs.copy_(h_TD @ w_KD.T)
            torch.log_softmax(logs, -1, out=logs)
            total -= logs.gather(1, t_T1).sum()
            if not (wanted_hidden or wanted_weight):
                continue
            grads_TK = logs.exp_().scatter_add_(1, t_T1, logs.new_full(t_T1.shape, -1.0))
            grads_TK = grads_TK.div_(tokens).to(dtype)
            if grad_hidden_TD is not None:
                grad_hidden_TD[part] = grads_TK @ w_KD
            if not wanted_weight:
                continue
            if grad_weight_KD is None:
                grad_weight_KD = (grads_TK.T @ h_TD).to(weight_KD.dtype)
            elif dtype == weight_KD.dtype:
                grad_weight_KD.addmm_(grads_TK.T, h_TD)
            else:
                grad_weight_KD += grads_TK.T @ h_TD
        ctx.save_for_backward(grad_hidden_TD, grad_weight_KD)
        return total / tokens

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        hidden, weight = ctx.saved_tensors
        return _times(hidden, grad), _times(weight, grad), None, None


def _times(gradient: Tensor | None, factor: Tensor) -> Tensor | None:
    return None if gradient is None else gradient * factor
