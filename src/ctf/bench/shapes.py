"""The models that are timed: random weights in the paper's shapes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch

from ctf.models.clusters import Clusters
from ctf.models.sizes import SIZES, TOKENIZERS, TransformerShape
from ctf.models.tokenizer import TokenizerConfig
from ctf.models.transformer import TransformerConfig

# Fine models, by size: the recommended one, and the paper's.
RECOMMENDED, PAPER = "S", "L"


@dataclasses.dataclass(frozen=True)
class Shapes:
    """What the models are made for; by default ImageNet at 256 pixels, as in the paper."""

    codes: int = 16_384
    clusters: int = 512
    classes: int = 1000
    grid: int = 16
    sizes: Mapping[str, TransformerShape] = dataclasses.field(default_factory=lambda: SIZES)
    tokenizer: TokenizerConfig = TOKENIZERS["VQ-16"]

    @property
    def length(self) -> int:
        """Tokens of an image."""
        return self.grid**2

    @property
    def members(self) -> int:
        """Codes of each cluster."""
        return self.codes // self.clusters

    def transformer(self, size: str) -> TransformerConfig:
        """The transformer of a size."""
        return self.sizes[size].config(self.grid, self.classes)

    def make_clusters(self) -> Clusters:
        """Clusters of equal sizes."""
        return Clusters.from_labels(torch.arange(self.codes) % self.clusters)


IMAGENET = Shapes()
