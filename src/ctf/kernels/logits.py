"""Logits and losses of the output layer without a tensor of all tokens by all codes.

For V = 16384, the logits of 8 images are 134 MB in float32, and their logarithms and gradient as
much again: most of what a training step of a small model would hold. Here the loss is computed in
slices of tokens, and the fine model multiplies each token with the rows of its own cluster only.

Shapes: B batch, L tokens of an image, T tokens of all images, D width, V outputs, K clusters,
S members of the largest cluster.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ctf.models.coarse import CoarseModel
from ctf.models.fine import FineModel

SLICE = 2**24  # logits at a time


class LeanCoarseModel(CoarseModel):
    """A coarse model whose loss is computed in slices."""

    def loss(self, labels_BL: Tensor, classes_B: Tensor) -> Tensor:
        """As `CoarseModel.loss`."""
        return cross_entropy(self.hidden(labels_BL, classes_B), self.head.weight, labels_BL)


class LeanFineModel(FineModel):
    """A fine model with one small product for each cluster, or a full softmax in slices."""

    @functools.cached_property
    def sizes(self) -> list[int]:
        """Members of each cluster."""
        return [int(size) for size in (self.members_KS >= 0).sum(1).tolist()]

    def forward(self, labels_BL: Tensor, classes_B: Tensor) -> Tensor:
        """As `FineModel.forward`."""
        if self.softmax == "full":
            return super().forward(labels_BL, classes_B)
        hidden_TD = self.hidden(labels_BL, classes_B).flatten(0, 1)
        logits_TS = members_logits(hidden_TD, self.head.weight, labels_BL.flatten(), self.sizes)
        return logits_TS.view(*labels_BL.shape, -1)

    def loss(self, labels_BL: Tensor, classes_B: Tensor, codes_BL: Tensor) -> Tensor:
        """As `FineModel.loss`."""
        if self.softmax == "members":
            return super().loss(labels_BL, classes_B, codes_BL)
        return cross_entropy(self.hidden(labels_BL, classes_B), self.code_rows(), codes_BL)


def cross_entropy(hidden_BLD: Tensor, weight_VD: Tensor, targets_BL: Tensor) -> Tensor:
    """Mean cross-entropy of the logits hidden @ weight.T, in nats a token: a scalar.

    Equal to `F.cross_entropy` of these logits up to rounding, and so are the gradients. Under
    autocast, products are in its precision and all else is in float32.

    Args:
        hidden_BLD: Inputs of the output layer.
        weight_VD: Its rows.
        targets_BL: int64 in [0, V).
    """
    device = hidden_BLD.device.type
    autocast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else weight_VD.dtype
    hidden_TD, targets_T = hidden_BLD.flatten(0, -2), targets_BL.flatten()
    return _CrossEntropy.apply(hidden_TD, weight_VD, targets_T, dtype)


class _CrossEntropy(torch.autograd.Function):
    """Output layer, softmax and its gradient in slices that the processor's cache may hold.

    In a mean every token has the same weight, so its gradient is known along with its logits. Both
    gradients are computed in the forward pass; the backward pass only scales them.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, dtype: torch.dtype
    ) -> Tensor:
        tokens, outputs = len(hidden_TD), len(weight_VD)
        w_VD = weight_VD.to(dtype)
        differentiate = any(ctx.needs_input_grad)
        grad_hidden_TD = torch.empty_like(hidden_TD) if differentiate else None
        grad_weight_VD = None
        each = max(1, SLICE // outputs)
        buffer_TV = hidden_TD.new_empty(min(each, tokens), outputs, dtype=torch.float32)
        total = hidden_TD.new_zeros((), dtype=torch.float32)
        for start in range(0, tokens, each):
            part = slice(start, start + each)
            h_TD, t_T1 = hidden_TD[part].to(dtype), targets_T[part, None]
            logp_TV = buffer_TV[: len(h_TD)]
            if dtype == torch.float32:
                torch.mm(h_TD, w_VD.T, out=logp_TV)
            else:
                logp_TV.copy_(h_TD @ w_VD.T)
            torch.log_softmax(logp_TV, -1, out=logp_TV)
            total -= logp_TV.gather(1, t_T1).sum()
            if grad_hidden_TD is None:
                continue
            grad_TV = logp_TV.exp_().scatter_add_(1, t_T1, logp_TV.new_full(t_T1.shape, -1.0))
            grad_TV = grad_TV.div_(tokens).to(dtype)
            grad_hidden_TD[part] = grad_TV @ w_VD
            if grad_weight_VD is None:
                grad_weight_VD = (grad_TV.T @ h_TD).to(weight_VD.dtype)
            elif dtype == weight_VD.dtype:
                grad_weight_VD.addmm_(grad_TV.T, h_TD)
            else:
                grad_weight_VD += grad_TV.T @ h_TD
        ctx.save_for_backward(grad_hidden_TD, grad_weight_VD)
        return total / tokens

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        grad_hidden_TD, grad_weight_VD = ctx.saved_tensors
        return grad * grad_hidden_TD, grad * grad_weight_VD, None, None


def members_logits(
    hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, sizes: Sequence[int]
) -> Tensor:
    """Products of each token with the rows of its own cluster: (T, S), then -inf.

    Args:
        hidden_TD: Inputs of the output layer.
        weight_VD: The rows of cluster 0, then those of cluster 1, ...
        labels_T: The cluster of each token.
        sizes: Number of rows of each cluster.
    """
    # Under autocast too: the products are small, and logits deserve the weights' precision.
    with torch.autocast(hidden_TD.device.type, enabled=False):
        hidden_TD = hidden_TD.to(weight_VD.dtype)
        logits_TS: Tensor = _MembersLogits.apply(hidden_TD, weight_VD, labels_T, sizes)
    return logits_TS


class _MembersLogits(torch.autograd.Function):
    """Tokens sorted by cluster, and one small product for each cluster that is present.

    Autograd's own graph of this would hold thousands of nodes and as many full-size gradients of
    the weight; here each gradient is written once, into its slice.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, sizes: Sequence[int]
    ) -> Tensor:
        order_T = labels_T.argsort(stable=True)
        counts: list[int] = torch.bincount(labels_T, minlength=len(sizes)).tolist()
        sorted_TD = hidden_TD[order_T]
        logits_TS = hidden_TD.new_full((len(hidden_TD), max(sizes)), -torch.inf)
        splits = (
            sorted_TD.split(counts), weight_VD.t().split(sizes, 1), logits_TS.split(counts), sizes,
        )  # fmt: skip
        for x, w, out, size in zip(*splits, strict=True):
            if len(x):
                torch.mm(x, w, out=out[:, :size])
        ctx.save_for_backward(sorted_TD, weight_VD, order_T)
        ctx.counts, ctx.sizes = counts, sizes
        return _unsort(logits_TS, order_T)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TS: Tensor) -> tuple[Tensor, Tensor, None, None]:
        sorted_TD, weight_VD, order_T = ctx.saved_tensors
        counts, sizes = ctx.counts, ctx.sizes
        grad_hidden_TD = torch.empty_like(sorted_TD)
        grad_weight_VD = torch.zeros_like(weight_VD)
        splits = (
            sorted_TD.split(counts), weight_VD.split(sizes), grad_TS[order_T].split(counts),
            grad_hidden_TD.split(counts), grad_weight_VD.split(sizes), sizes,
        )  # fmt: skip
        for x, w, grad, grad_x, grad_w, size in zip(*splits, strict=True):
            if len(x):
                torch.mm(grad[:, :size], w, out=grad_x)
                torch.mm(grad[:, :size].t(), x, out=grad_w)
        return _unsort(grad_hidden_TD, order_T), grad_weight_VD, None, None


def _unsort(sorted_T: Tensor, order_T: Tensor) -> Tensor:
    unsorted_T = torch.empty_like(sorted_T)
    unsorted_T[order_T] = sorted_T
    return unsorted_T
