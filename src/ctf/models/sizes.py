"""Sizes of models: shapes for any image and any number of classes, and those of the papers.

Here are also the formulas of a transformer's parameters and FLOPs. A multiplication and an addition
are two FLOPs; norms, activations, embeddings and the softmax count as none.

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
    """A tokenizer for any image size: more levels for larger images.

    The other fields are those of `TokenizerConfig`.

    Args:
        multipliers: The last one is repeated for all further levels.
        smallest_factor: Fewest pixels per code along each side, a power of 2.
        largest_grid: Most codes along each side of an image.
    """

    codebook_size: int = 4096
    code_dim: int = 8
    channels: int = 16
    multipliers: tuple[int, ...] = (1, 2, 4)
    blocks: int = 1
    latent_channels: int = 64
    groups: int = 8
    smallest_factor: int = 4
    largest_grid: int = 8

    def __post_init__(self) -> None:
        if self.smallest_factor < 1 or self.smallest_factor.bit_count() != 1:
            raise UserError(f"smallest_factor: got {self.smallest_factor}, expected a power of 2")
        if self.largest_grid < 1:
            raise UserError(f"largest_grid: got {self.largest_grid}, expected 1 or more")

    def config(self, image_size: int) -> TokenizerConfig:
        """The tokenizer for images of this size.

        Raises:
            UserError: The image size is not divisible by the factor.
        """
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
    """A transformer for any grid and any number of classes; fields as in `TransformerConfig`."""

    width: int
    layers: int
    heads: int
    dropout: float = 0.0

    def config(self, grid: int, classes: int) -> TransformerConfig:
        """The transformer for this grid and number of classes."""
        return TransformerConfig(
            width=self.width,
            layers=self.layers,
            heads=self.heads,
            grid=grid,
            classes=classes,
            dropout=self.dropout,
        )


# The transformers of LlamaGen (arXiv 2406.06525, table 1) and of the paper, for the coarse model,
# the fine model or the full-vocabulary baseline. Parameters with 1000 classes and 16384 labels:
# 111, 343, 775, 1411 and 3097 M; with 512 labels 87, 310, 734, 1362 and 2995 M.
LLAMAGEN_SIZES = {
    "B": TransformerShape(width=768, layers=12, heads=12, dropout=0.1),
    "L": TransformerShape(width=1024, layers=24, heads=16, dropout=0.1),
    "XL": TransformerShape(width=1280, layers=36, heads=20, dropout=0.1),
    "XXL": TransformerShape(width=1536, layers=48, heads=24, dropout=0.1),
    "3B": TransformerShape(width=3200, layers=24, heads=32, dropout=0.1),
}

# S is the fine model that docs/benchmarks.md recommends: the paper's, of size L, takes more time
# than the smaller output layer of the coarse model saves.
SIZES = {"S": TransformerShape(width=384, layers=6, heads=6, dropout=0.1), **LLAMAGEN_SIZES}

# LlamaGen's tokenizers, named after their factor: 72 and 70 M parameters.
TOKENIZERS = {
    "VQ-16": TokenizerConfig(),
    "VQ-8": TokenizerConfig(multipliers=(1, 2, 2, 4)),
}


# --- Parameters and FLOPs of a transformer --------------------------------------------------------


def parameters(config: TransformerConfig, vocab_size: int, outputs: int) -> int:
    """Parameters of a coarse or a fine model.

    Args:
        config: Its shape.
        vocab_size: V, rows of the label embedding.
        outputs: Rows of the output layer: V of a coarse model, all codes of a fine model.
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
    """FLOPs of all blocks' attention: 2 D for the score and 2 D for the value of each pair."""
    return 4 * config.layers * config.width * queries * keys


def head_flops(config: TransformerConfig, tokens: int, outputs: int) -> int:
    """FLOPs of the logits of `tokens`, `outputs` for each."""
    return 2 * tokens * config.width * outputs


def forward_flops(config: TransformerConfig, positions: int, outputs: int) -> int:
    """FLOPs of one image's pass: T positions through all blocks, logits for L of them.

    Attention counts T^2 pairs, causal or not, as in PaLM (arXiv 2204.02311, appendix B).

    Args:
        config: Shape of the model.
        positions: T, which is L in a coarse model and 1 + L in a fine model.
        outputs: Logits of a label: V in a coarse model; in a fine model how many members a
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
