"""The fine model: class and all labels -> all codes in one pass (the paper's section 3.2, stage 2).

Shapes: B batch, L labels of an image, D width, V codes, K clusters, S members of the largest
cluster.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ctf.models.clusters import Clusters
from ctf.models.transformer import Backbone, TransformerConfig, zero_head

Softmax = Literal["members", "full"]


class FineModel(nn.Module):
    """A class-conditional transformer with full attention over the labels of an image.

    Args:
        config: Its shape.
        clusters: The partition that the labels belong to. It isn't stored with the weights.
        softmax: "members": each token chooses among the members of its cluster, since nothing
            else can be right. "full": among all codes, for comparison; a sampled code need not
            belong to its label then.
    """

    members_KS: Tensor
    slots_V: Tensor
    rows_V: Tensor

    def __init__(
        self, config: TransformerConfig, clusters: Clusters, softmax: Softmax = "members"
    ) -> None:
        super().__init__()
        self.config = config
        self.softmax = softmax
        self.backbone = Backbone(config, clusters.count)
        # A row for each code, cluster after cluster: the members of a cluster are one slice.
        self.head = zero_head(config.width, clusters.codebook_size)
        starts_K = clusters.sizes_K.cumsum(0) - clusters.sizes_K
        rows_V = starts_K[clusters.labels_V] + clusters.slots_V
        self.register_buffer("members_KS", clusters.members_KS, persistent=False)
        self.register_buffer("slots_V", clusters.slots_V, persistent=False)
        self.register_buffer("rows_V", rows_V, persistent=False)

    @property
    def no_class(self) -> int:
        """The class id that stands for "no class" in classifier-free guidance."""
        return self.config.classes

    def forward(self, labels_BL: Tensor, classes_B: Tensor) -> Tensor:
        """Logits of the choices of each token: (B, L, S), -inf beyond its cluster's size.

        Choice s of a token with label k is code members_KS[k, s]. With softmax "full" the logits
        are (B, L, V), and choice v is code v.

        Args:
            labels_BL: int64 in [0, K).
            classes_B: int64 in [0, classes], the last being `no_class`.
        """
        logits_BLV = F.linear(self.hidden(labels_BL, classes_B), self.code_rows())
        if self.softmax == "full":
            return logits_BLV
        members_BLS = self.members_KS[labels_BL]
        logits_BLS = logits_BLV.gather(-1, members_BLS.clamp(min=0))
        return logits_BLS.masked_fill(members_BLS < 0, -torch.inf)

    def hidden(self, labels_BL: Tensor, classes_B: Tensor) -> Tensor:
        """Input of the output layer for `forward`: (B, L, D)."""
        return self.backbone(labels_BL, classes_B, causal=False)[:, 1:]

    def code_rows(self) -> Tensor:
        """The output layer's rows in the order of the codes: (V, D)."""
        return self.head.weight[self.rows_V]

    def loss(self, labels_BL: Tensor, classes_B: Tensor, codes_BL: Tensor) -> Tensor:
        """Mean cross-entropy of the codes, -log p(v_i | y, k_1 ... k_L), in nats a token."""
        logits_TS = self(labels_BL, classes_B).flatten(0, 1)
        return F.cross_entropy(logits_TS, self.choices(codes_BL).flatten())

    def choices(self, codes_BL: Tensor) -> Tensor:
        """The choices that stand for codes: the targets of `forward`'s logits."""
        return codes_BL if self.softmax == "full" else self.slots_V[codes_BL]

    def candidates(self, labels_L: Tensor) -> Tensor:
        """The codes that the choices stand for, (L, S); any code beyond a cluster's size."""
        if self.softmax == "full":
            return torch.arange(len(self.slots_V), device=labels_L.device).expand(len(labels_L), -1)
        return self.members_KS[labels_L].clamp(min=0)

    def codes(self, labels_BL: Tensor, choices_BL: Tensor) -> Tensor:
        """The codes that choices of tokens with these labels stand for: inverse of `choices`."""
        return choices_BL if self.softmax == "full" else self.members_KS[labels_BL, choices_BL]
