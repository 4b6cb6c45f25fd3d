"""The fine model: class and all labels -> a member of each label's cluster, in one pass
(the paper's section 3.2, stage 2).

Shapes: B batch, L labels of an image, T labels of all images together, D width, V codes,
K clusters, S members of the largest cluster.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ctf.models.clusters import Clusters
from ctf.models.transformer import TransformerConfig, Trunk, zero_head


class FineModel(nn.Module):
    """A class-conditional transformer with full attention over the labels of an image.

    Args:
        clusters: what the labels stand for. It isn't stored with the weights.
        softmax: "members": each token chooses among the members of its cluster, since nothing
            else can be right. "full": among all codes, for comparison; what is drawn then
            need not belong to the label.
    """

    members_KS: Tensor
    slots_V: Tensor
    rows_V: Tensor

    def __init__(
        self,
        config: TransformerConfig,
        clusters: Clusters,
        softmax: Literal["members", "full"] = "members",
    ) -> None:
        super().__init__()
        self.config = config
        self.softmax = softmax
        self.sizes: list[int] = clusters.sizes_K.tolist()
        self.trunk = Trunk(config, clusters.count)
        # One row per code, cluster after cluster: the members of a cluster are one slice.
        self.head = zero_head(config.width, clusters.codebook_size)
        starts_K = clusters.sizes_K.cumsum(0) - clusters.sizes_K
        self.register_buffer("members_KS", clusters.members_KS, persistent=False)
        self.register_buffer("slots_V", clusters.slots_V, persistent=False)
        self.register_buffer(
            "rows_V", starts_K[clusters.labels_V] + clusters.slots_V, persistent=False
        )

    @property
    def no_class(self) -> int:
        """The class id that stands for "no class" in classifier-free guidance."""
        return self.config.classes

    def forward(self, labels_BL: Tensor, classes_B: Tensor) -> Tensor:
        """Logits of the choices of each token: (B, L, S), -inf beyond its cluster's size.

        Choice s of a token with label k is `clusters.members_KS[k, s]`. With softmax "full",
        (B, L, V): choice v is code v.

        Args:
            labels_BL: int64 in [0, K).
            classes_B: int64 in [0, classes], the last being `no_class`.
        """
        hidden_BLD = self.hidden(labels_BL, classes_B)
        if self.softmax == "full":
            return F.linear(hidden_BLD, self.head.weight[self.rows_V])
        logits_TS = members_logits(
            hidden_BLD.flatten(0, 1), self.head.weight, labels_BL.flatten(), self.sizes
        )
        return logits_TS.view(*labels_BL.shape, -1)

    def hidden(self, labels_BL: Tensor, classes_B: Tensor) -> Tensor:
        """What the logits of `forward` are products of, with the head's rows: (B, L, D)."""
        hidden_BLD: Tensor = self.trunk(labels_BL, classes_B, causal=False)[:, 1:]
        return hidden_BLD

    def choices(self, codes_BL: Tensor) -> Tensor:
        """The choices that are the given codes: what `forward`'s logits are to predict."""
        return codes_BL if self.softmax == "full" else self.slots_V[codes_BL]

    def codes(self, labels_BL: Tensor, choices_BL: Tensor) -> Tensor:
        """The codes that are chosen for the given labels; the inverse of `choices`."""
        return choices_BL if self.softmax == "full" else self.members_KS[labels_BL, choices_BL]


def members_logits(
    hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, sizes: Sequence[int]
) -> Tensor:
    """Products of each token with the rows of its own cluster: (T, S), then -inf.

    Args:
        weight_VD: the rows of cluster 0, then those of cluster 1, ...
        sizes: how many rows each cluster has.
    """
    # Also under autocast: the products are small, and logits deserve the weights' precision.
    with torch.autocast(hidden_TD.device.type, enabled=False):
        logits_TS: Tensor = _MembersLogits.apply(
            hidden_TD.to(weight_VD.dtype), weight_VD, labels_T, sizes
        )
    return logits_TS


class _MembersLogits(torch.autograd.Function):
    """Tokens sorted by cluster; one small product for each cluster that is present.

    Autograd's own graph of the same would hold thousands of nodes and as many full-size
    gradients of the weight; by hand, each gradient is written once, into its slice.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, sizes: Sequence[int]
    ) -> Tensor:
        order_T = labels_T.argsort(stable=True)
        counts: list[int] = torch.bincount(labels_T, minlength=len(sizes)).tolist()
        sorted_TD = hidden_TD[order_T]
        logits_TS = hidden_TD.new_full((len(hidden_TD), max(sizes)), -torch.inf)
        for x, w, out, size in zip(
            sorted_TD.split(counts),
            weight_VD.t().split(sizes, 1),
            logits_TS.split(counts),
            sizes,
            strict=True,
        ):
            if len(x):
                torch.mm(x, w, out=out[:, :size])
        ctx.save_for_backward(sorted_TD, weight_VD, order_T)
        ctx.counts, ctx.sizes = counts, sizes
        return _unsort(logits_TS, order_T)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TS: Tensor) -> tuple[Tensor, Tensor, None, None]:
        sorted_TD, weight_VD, order_T = ctx.saved_tensors
        grad_hidden_TD = torch.empty_like(sorted_TD)
        grad_weight_VD = torch.zeros_like(weight_VD)
        for x, w, grad, grad_x, grad_w, size in zip(
            sorted_TD.split(ctx.counts),
            weight_VD.split(ctx.sizes),
            grad_TS[order_T].split(ctx.counts),
            grad_hidden_TD.split(ctx.counts),
            grad_weight_VD.split(ctx.sizes),
            ctx.sizes,
            strict=True,
        ):
            if len(x):
                grad = grad[:, :size]
                torch.mm(grad, w, out=grad_x)
                torch.mm(grad.t(), x, out=grad_w)
        return _unsort(grad_hidden_TD, order_T), grad_weight_VD, None, None


def _unsort(sorted_T: Tensor, order_T: Tensor) -> Tensor:
    unsorted_T = torch.empty_like(sorted_T)
    unsorted_T[order_T] = sorted_T
    return unsorted_T
