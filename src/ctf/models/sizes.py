"""Sizes: shapes for any image and any number of classes, those of the papers, and what they cost.

Parameters and FLOPs of a transformer are formulas here, and nowhere else. A multiplication and an
addition are two FLOPs; norms, activations, embeddings and the softmax count as none.

Shapes: T positions (labels and class token), L labels of an image, D width, F hidden width of
SwiGLU, V labels that a model reads.
"""

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


# --- Parameters and FLOPs of a transformer --------------------------------------------------------


def parameters(config: TransformerConfig, vocab_size: int, outputs: int) -> int:
    """Parameters of a coarse or a fine model.

    Args:
        vocab_size: V, rows of the label embedding.
        outputs: rows of the output layer: V of a coarse model, all codes of a fine model.
    """
    embeddings = config.classes + 1 + vocab_size
    norms = 2 * config.layers + 1
    blocks = config.layers * block_weights(config)
    return (embeddings + norms + outputs) * config.width + blocks


def block_weights(config: TransformerConfig) -> int:
    """Weights in the matrices of one block: 4 D^2 in attention and 3 D F in SwiGLU."""
    return 4 * config.width**2 + 3 * config.width * config.ffn_width


def block_flops(config: TransformerConfig, positions: int) -> int:
    """FLOPs of `positions` through the matrices of all blocks, without attention: 2 a weight."""
    return 2 * positions * config.layers * block_weights(config)


def attention_flops(config: TransformerConfig, queries: int, keys: int) -> int:
    """FLOPs of all blocks' attention of each query to each key: 2 D for its score, 2 D for its
    value.
    """
    return 4 * config.layers * config.width * queries * keys


def head_flops(config: TransformerConfig, tokens: int, outputs: int) -> int:
    """FLOPs of the logits of `tokens`, `outputs` for each."""
    return 2 * tokens * config.width * outputs


def forward_flops(config: TransformerConfig, positions: int, outputs: int) -> int:
    """FLOPs of one image's pass: T positions through all blocks, logits for L of them.

    Attention counts T^2 pairs, causal or not, as in PaLM (arXiv 2204.02311, appendix B).

    Args:
        positions: T, which is L in a coarse model and 1 + L in a fine model.
        outputs: logits of a label: V in a coarse model; in a fine model how many members a
            cluster has on average, or all codes with softmax "full".
    """
    return (
        block_flops(config, positions)
        + attention_flops(config, positions, positions)
        + head_flops(config, config.length, outputs)
    )


def training_flops(config: TransformerConfig, positions: int, outputs: int) -> int:
    """FLOPs of one image's forward and backward pass, which computes twice as much."""
    return 3 * forward_flops(config, positions, outputs)
