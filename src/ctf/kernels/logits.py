"""Logits and losses of the output layer without a tensor of all tokens by all codes.

For V = 16384, the logits of 8 images are 134 MB in float32, and their logarithms and gradient as
much again: most of what a training step of a small model would hold. Here the loss is computed in
slices of tokens, and the fine model multiplies each token with the rows of its own cluster only:
on a processor with one product for each cluster, on a GPU with one for all.

Shapes: B batch, L tokens of an image, T tokens of all images, D width, V outputs, K clusters,
S members of the largest cluster, P blocks of tokens of one cluster, M tokens of a block.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ctf.models.coarse import CoarseModel
from ctf.models.fine import FineModel

SLICE = 2**24  # logits at a time; on a GPU SLICE_GPU, as each slice is some launches
SLICE_GPU = 2**27
BLOCK = 64  # tokens that are multiplied with the same rows on a GPU

# Of a slice: inputs (T, D) and rows (V, D) in the precision of products, targets (T, 1), the number
# of all tokens, and whether to differentiate. Returns the sum of the losses in float32, and the
# gradient of the mean with respect to the logits, (T, V) in the precision of products.
SliceLoss = Callable[[Tensor, Tensor, Tensor, int, bool], tuple[Tensor, Tensor | None]]


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
        # Under autocast too: the products are small, and logits deserve the weights' precision.
        with torch.autocast(hidden_TD.device.type, enabled=False):
            weight_VD = self.head.weight
            logits_TS = self.products(hidden_TD.to(weight_VD.dtype), weight_VD, labels_BL.flatten())
        return logits_TS.view(*labels_BL.shape, -1)

    def products(self, hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor) -> Tensor:
        """Products of each token with the rows of its own cluster: (T, S), then -inf."""
        return members_logits(hidden_TD, weight_VD, labels_T, self.sizes)

    def loss(self, labels_BL: Tensor, classes_B: Tensor, codes_BL: Tensor) -> Tensor:
        """As `FineModel.loss`."""
        if self.softmax == "members":
            return super().loss(labels_BL, classes_B, codes_BL)
        return cross_entropy(self.hidden(labels_BL, classes_B), self.code_rows(), codes_BL)


class BatchedFineModel(LeanFineModel):
    """A fine model with one batched product for all clusters."""

    @functools.cached_property
    def rows_KS(self) -> Tensor:
        """The output layer's rows of each cluster, its last one again beyond its size."""
        sizes_K = (self.members_KS >= 0).sum(1)
        slots_S = torch.arange(self.members_KS.shape[1], device=sizes_K.device)
        starts_K = sizes_K.cumsum(0) - sizes_K
        return starts_K[:, None] + torch.minimum(slots_S, sizes_K[:, None] - 1)

    def products(self, hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor) -> Tensor:
        """As `LeanFineModel.products`."""
        logits_TS = batched_members_logits(hidden_TD, weight_VD, labels_T, self.rows_KS)
        return logits_TS.masked_fill(self.members_KS[labels_T] < 0, -torch.inf)


def cross_entropy(
    hidden_BLD: Tensor,
    weight_VD: Tensor,
    targets_BL: Tensor,
    slice_loss: SliceLoss | None = None,
) -> Tensor:
    """Mean cross-entropy of the logits hidden @ weight.T, in nats a token: a scalar.

    Equal to `F.cross_entropy` of these logits up to rounding, and so are the gradients. Under
    autocast, products are in its precision and all else is in float32.

    Args:
        hidden_BLD: Inputs of the output layer.
        weight_VD: Its rows.
        targets_BL: int64 in [0, V).
        slice_loss: By default in place.
    """
    device = hidden_BLD.device.type
    autocast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else weight_VD.dtype
    hidden_TD, targets_T = hidden_BLD.flatten(0, -2), targets_BL.flatten()
    each = max(1, (SLICE if device == "cpu" else SLICE_GPU) // len(weight_VD))
    return _CrossEntropy.apply(
        hidden_TD, weight_VD, targets_T, dtype, each, slice_loss or _InPlace()
    )


class _InPlace:
    """A `SliceLoss` that computes in one buffer, as large as the first slice."""

    buffer_TV: Tensor | None = None

    def __call__(
        self, h_TD: Tensor, w_VD: Tensor, t_T1: Tensor, tokens: int, differentiate: bool
    ) -> tuple[Tensor, Tensor | None]:
        if self.buffer_TV is None:
            self.buffer_TV = h_TD.new_empty(len(h_TD), len(w_VD), dtype=torch.float32)
        logp_TV = self.buffer_TV[: len(h_TD)]
        if h_TD.dtype == torch.float32:
            torch.mm(h_TD, w_VD.T, out=logp_TV)
        else:
            logp_TV.copy_(h_TD @ w_VD.T)
        torch.log_softmax(logp_TV, -1, out=logp_TV)
        total = -logp_TV.gather(1, t_T1).sum()
        if not differentiate:
            return total, None
        grad_TV = logp_TV.exp_().scatter_add_(1, t_T1, logp_TV.new_full(t_T1.shape, -1.0))
        return total, grad_TV.div_(tokens).to(h_TD.dtype)


class _CrossEntropy(torch.autograd.Function):
    """Output layer, softmax and its gradient in slices that the processor's cache may hold.

    In a mean every token has the same weight, so its gradient is known along with its logits. Both
    gradients are computed in the forward pass; the backward pass only scales them.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        targets_T: Tensor,
        dtype: torch.dtype,
        each: int,
        slice_loss: SliceLoss,
    ) -> Tensor:
        tokens = len(hidden_TD)
        w_VD = weight_VD.to(dtype)
        differentiate = any(ctx.needs_input_grad)
        grad_hidden_TD = torch.empty_like(hidden_TD) if differentiate else None
        grad_weight_VD = None
        total = hidden_TD.new_zeros((), dtype=torch.float32)
        for start in range(0, tokens, each):
            part = slice(start, start + each)
            h_TD = hidden_TD[part].to(dtype)
            loss, grad_TV = slice_loss(h_TD, w_VD, targets_T[part, None], tokens, differentiate)
            total += loss
            if grad_hidden_TD is None or grad_TV is None:
                continue
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
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden_TD, grad_weight_VD = ctx.saved_tensors
        return grad * grad_hidden_TD, grad * grad_weight_VD, None, None, None, None


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


def batched_members_logits(
    hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, rows_KS: Tensor, block: int = BLOCK
) -> Tensor:
    """Products of each token with as many rows as the largest cluster has: (T, S).

    All are one batched product: the tokens of each cluster are padded to blocks. How many blocks
    there are at the most is known in advance, so that nothing waits for a GPU to count them.

    Args:
        hidden_TD: Inputs of the output layer.
        weight_VD: Its rows.
        labels_T: The cluster of each token.
        rows_KS: The rows of each cluster.
        block: M, tokens.
    """
    tokens, clusters, device = len(labels_T), len(rows_KS), labels_T.device
    blocks = tokens // block + min(tokens, clusters)
    sorted_T, order_T = labels_T.sort(stable=True)
    # Where the tokens of each cluster start, then where the last ones end.
    starts = torch.searchsorted(sorted_T, torch.arange(clusters + 1, device=device))
    # The last block of each cluster, and the first.
    ends_K = ((starts.diff() + block - 1) // block).cumsum(0)
    firsts_K = torch.cat([torch.zeros_like(ends_K[:1]), ends_K[:-1]])
    ranks_T = torch.arange(tokens, device=device) - starts[sorted_T]
    places_T = torch.empty_like(order_T)
    places_T[order_T] = firsts_K[sorted_T] * block + ranks_T
    clusters_P = torch.searchsorted(ends_K, torch.arange(blocks, device=device), right=True)
    rows_PS = rows_KS[clusters_P.clamp(max=clusters - 1)]  # of blocks that are empty: any

    padded_XD = hidden_TD.new_zeros(blocks * block, hidden_TD.shape[1])
    x_PMD = padded_XD.index_copy(0, places_T, hidden_TD).view(blocks, block, -1)
    # An embedding: on a GPU its gradient sums equal rows fast, and in the same order every time.
    w_PSD = F.embedding(rows_PS, weight_VD)
    return torch.bmm(x_PMD, w_PSD.mT).flatten(0, 1).index_select(0, places_T)


def _unsort(sorted_T: Tensor, order_T: Tensor) -> Tensor:
    unsorted_T = torch.empty_like(sorted_T)
    unsorted_T[order_T] = sorted_T
    return unsorted_T
