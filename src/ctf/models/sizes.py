"""Shapes of models for any image and any number of classes, and the sizes of the papers."""

from __future__ import annotations

import dataclasses

from ctf.common.errors import UserError
from ctf.models.tokenizer import TokenizerConfig
from ctf.models.transformer import TransformerConfig


@dataclasses.dataclass(frozen=True)
class TokenizerShape:
    """A tokenizer for any image size: as many levels as the grid of codes asks for."""

    codebook_size: int = 4096
    code_dim: int = 8
    channels: int = 16
    multipliers: tuple[int, ...] = (1, 2, 4)  # the last one stands for all further levels
    blocks: int = 1
    latent_channels: int = 64
    groups: int = 8
    smallest_factor: int = 4  # pixels a code stands for, along each side, at the least
    largest_grid: int = 8  # codes along each side of an image, at the most

    def __post_init__(self) -> None:
        if self.smallest_factor < 1 or self.smallest_factor.bit_count() != 1:
            raise UserError(f"smallest_factor: got {self.smallest_factor}, expected a power of 2")
        if self.largest_grid < 1:
            raise UserError(f"largest_grid: got {self.largest_grid}, expected 1 or more")

    def config(self, image_size: int) -> TokenizerConfig:
        """Raises UserError where the image size is not divisible by the factor."""
        factor = self.smallest_factor
        while image_size / factor > self.largest_grid:
            factor *= 2
        levels = factor.bit_length()
        further = self.multipliers[-1:] * (levels - len(self.multipliers))
        return TokenizerConfig(
            image_size=image_size,
            codebook_size=self.codebook_size,
            code_dim=self.code_dim,
            channels=self.channels,
            multipliers=self.multipliers[:levels] + further,
            blocks=self.blocks,
            latent_channels=self.latent_channels,
            groups=self.groups,
        )


@dataclasses.dataclass(frozen=True)
class TransformerShape:
    """A transformer for any grid and any number of classes."""

    width: int
    layers: int
    heads: int
    dropout: float = 0.0

    def config(self, grid: int, classes: int) -> TransformerConfig:
        return TransformerConfig(
            width=self.width,
            layers=self.layers,
            heads=self.heads,
            grid=grid,
            classes=classes,
            dropout=self.dropout,
        )


# The transformers of LlamaGen (arXiv 2406.06525, table 1) and of the paper: each one the
# full-vocabulary baseline with K = V, the coarse model with K clusters, or the fine model.
# Parameters with 1000 classes and V = 16384: 111, 343, 775, 1411 and 3097 M; with K = 512 87, 310,
# 734, 1362 and 2995 M.
LLAMAGEN_SIZES = {
    "B": TransformerShape(width=768, layers=12, heads=12, dropout=0.1),
    "L": TransformerShape(width=1024, layers=24, heads=16, dropout=0.1),
    "XL": TransformerShape(width=1280, layers=36, heads=20, dropout=0.1),
    "XXL": TransformerShape(width=1536, layers=48, heads=24, dropout=0.1),
    "3B": TransformerShape(width=3200, layers=24, heads=32, dropout=0.1),
}


# S is the fine model that docs/benchmarks.md recommends: the paper's, of the shape of L, takes
# longer than what the smaller output layer of the coarse model saves.
SIZES = {"S": TransformerShape(width=384, layers=6, heads=6, dropout=0.1), **LLAMAGEN_SIZES}


# LlamaGen's tokenizers, named after the pixels that a code stands for along each side: 72 and 70 M.
TOKENIZERS = {
    "VQ-16": TokenizerConfig(),
    "VQ-8": TokenizerConfig(multipliers=(1, 2, 2, 4)),
}
