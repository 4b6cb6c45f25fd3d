"""The coarse model: class and labels so far -> next label (the paper's section 3.2, stage 1).

With identity clusters (K = V) it is the full-vocabulary baseline, LlamaGen's own model.

Shapes: B batch, L labels of an image, K clusters, D width.
"""

from __future__ import annotations

from torch import Tensor, nn

from ctf.models.transformer import KVCache, TransformerConfig, Trunk, zero_head


class CoarseModel(nn.Module):
    """A class-conditional causal transformer over the labels of an image, row by row.

    Args:
        count: K, the labels that there are.
    """

    def __init__(self, config: TransformerConfig, count: int) -> None:
        super().__init__()
        self.config = config
        self.count = count
        self.trunk = Trunk(config, count)
        self.head = zero_head(config.width, count)

    @property
    def no_class(self) -> int:
        """The class id that stands for "no class" in classifier-free guidance."""
        return self.config.classes

    def forward(self, labels_BL: Tensor, classes_B: Tensor) -> Tensor:
        """Teacher-forced logits (B, L, K): those of label i follow from the class and labels < i.

        Args:
            labels_BL: int64 in [0, K).
            classes_B: int64 in [0, classes], the last being `no_class`.
        """
        logits_BLK: Tensor = self.head(self.hidden(labels_BL, classes_B))
        return logits_BLK

    def hidden(self, labels_BL: Tensor, classes_B: Tensor) -> Tensor:
        """What the logits of `forward` are products of, with the head's rows: (B, L, D)."""
        hidden_BLD: Tensor = self.trunk(labels_BL[:, :-1], classes_B, causal=True)
        return hidden_BLD

    def step(
        self, inputs_BT: Tensor, start: int, cache: KVCache, images: slice = slice(None)
    ) -> Tensor:
        """Logits (B, K) of label `start` + T - 1, what came before the inputs being in `cache`.

        Args:
            inputs_BT: what stands at positions `start` to `start` + T - 1: the class at position 0,
                label i at position i + 1.
            images: which of those in the cache these are.
        """
        logits_BK: Tensor = self.head(self.trunk.step(inputs_BT, start, cache, images)[:, -1])
        return logits_BK
