"""The coarse model: class and labels so far -> next label (the paper's section 3.2, stage 1).

With identity clusters (K = V) it is the full-vocabulary baseline, LlamaGen's own model.

Shapes: B batch, T positions, L labels of an image, K clusters, D width.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ctf.models.drafts import Drafts
from ctf.models.transformer import Backbone, KVCache, TransformerConfig, zero_head


class CoarseModel(nn.Module):
    """A class-conditional causal transformer over the labels of an image, row by row.

    Args:
        config: Its shape.
        vocab_size: K, the number of labels.

    Attributes:
        drafts: Guesses of labels, for exact parallel sampling; None for copies of labels nearby.
    """

    drafts: Drafts | None

    def __init__(self, config: TransformerConfig, vocab_size: int) -> None:
        super().__init__()
        self.config = config
        self.vocab_size = vocab_size
        self.backbone = Backbone(config, vocab_size)
        self.head = zero_head(config.width, vocab_size)
        self.drafts = None

    @property
    def no_class(self) -> int:
        """The class id that stands for "no class" in classifier-free guidance."""
        return self.config.classes

    def forward(self, labels_BL: Tensor, classes_B: Tensor) -> Tensor:
        """Teacher-forced logits (B, L, K): those of label i depend on the class and labels < i.

        Args:
            labels_BL: int64 in [0, K).
            classes_B: int64 in [0, classes], the last being `no_class`.
        """
        return self.head(self.hidden(labels_BL, classes_B))

    def hidden(self, labels_BL: Tensor, classes_B: Tensor) -> Tensor:
        """Input of the output layer for `forward`: (B, L, D)."""
        return self.backbone(labels_BL[:, :-1], classes_B, causal=True)

    def loss(self, labels_BL: Tensor, classes_B: Tensor) -> Tensor:
        """Mean cross-entropy of the labels, -log p(k_i | y, k_1 ... k_(i-1)), in nats a token."""
        return F.cross_entropy(self(labels_BL, classes_B).flatten(0, 1), labels_BL.flatten())

    def step(
        self, inputs_BT: Tensor, start: int, cache: KVCache, images: slice = slice(None)
    ) -> Tensor:
        """Logits (B, K) of label `start` + T - 1; arguments as in `Backbone.step`."""
        return self.head(self.backbone.step(inputs_BT, start, cache, images)[:, -1])
