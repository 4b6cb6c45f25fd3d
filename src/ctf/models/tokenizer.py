"""The VQ tokenizer: images <-> codes of a large codebook.

The convolutional architecture of LlamaGen's VQ-16 and VQ-8 (arXiv 2406.06525, section 2.1, after
VQGAN, arXiv 2012.09841), configurable down to a tiny one. Codes are looked up by cosine: both the
encoder's vectors and the codebook's are L2-normalized (ViT-VQGAN, arXiv 2110.04627), or by distance
in tokenizers that others trained so.

Shapes: B batch, C code dimension, H, W height and width, L codes of an image, N vectors, V codes of
the codebook.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ctf.common.config import OMIT_DEFAULT
from ctf.common.errors import UserError

LOOK_UP_ROWS = 4096  # vectors whose nearest codes are found at a time


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """The shape of a tokenizer. The defaults are LlamaGen's VQ-16.

    Args:
        image_size: Side of the images in pixels, a multiple of `factor`.
        codebook_size: V.
        code_dim: C.
        channels: Of the first level.
        multipliers: Of `channels`, one for each level. Each level but the last halves the sides.
        blocks: Residual blocks of a level in the encoder.
        latent_channels: Of the encoder's output.
        groups: Of group normalization; divides `channels`.
        decoder_multipliers: As `multipliers`, and in their order; by default the same.
        decoder_blocks: Residual blocks of a level in the decoder; by default `blocks` + 1.
        attention: Levels with attention after each residual block, 0 being that of the full
            resolution; by default the last.
        middle_attention: Whether there is attention between the encoder's last level and its
            output, and between the decoder's input and its first level.
        l2_norm: Look codes up by cosine, not by distance.

    Raises:
        UserError: A value is out of range.
    """

    image_size: int = 256
    codebook_size: int = 16384
    code_dim: int = 8
    channels: int = 128
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    blocks: int = 2
    latent_channels: int = 256
    groups: int = 32
    decoder_multipliers: tuple[int, ...] | None = dataclasses.field(
        default=None, metadata=OMIT_DEFAULT
    )
    decoder_blocks: int | None = dataclasses.field(default=None, metadata=OMIT_DEFAULT)
    attention: tuple[int, ...] | None = dataclasses.field(default=None, metadata=OMIT_DEFAULT)
    middle_attention: bool = dataclasses.field(default=True, metadata=OMIT_DEFAULT)
    l2_norm: bool = dataclasses.field(default=True, metadata=OMIT_DEFAULT)

    def __post_init__(self) -> None:
        sizes = ("codebook_size", "code_dim", "channels", "blocks", "latent_channels", "groups")
        for name in sizes:
            if getattr(self, name) < 1:
                raise UserError(f"{name}: got {getattr(self, name)}, expected 1 or more")
        if not self.multipliers or min(self.multipliers) < 1:
            raise UserError(f"multipliers: got {list(self.multipliers)}, expected 1 or more each")
        if self.channels % self.groups:
            raise UserError(
                f"channels: got {self.channels}, expected a multiple of groups {self.groups}"
            )
        decoder = self.decoder_multipliers
        if decoder is not None and (len(decoder) != len(self.multipliers) or min(decoder) < 1):
            raise UserError(
                f"decoder_multipliers: got {list(decoder)}, expected {len(self.multipliers)} of 1 "
                "or more, as many as multipliers"
            )
        if self.decoder_blocks is not None and self.decoder_blocks < 1:
            raise UserError(f"decoder_blocks: got {self.decoder_blocks}, expected 1 or more")
        levels = range(len(self.multipliers))
        if self.attention is not None and not set(self.attention) <= set(levels):
            raise UserError(
                f"attention: got levels {list(self.attention)}, expected some of {list(levels)}"
            )
        if self.image_size < 1 or self.image_size % self.factor:
            below = self.image_size // self.factor * self.factor
            near = f"{below} or {below + self.factor}" if below > 0 else str(self.factor)
            raise UserError(
                f"image size {self.image_size} is not divisible by the tokenizer's factor "
                f"{self.factor}; use {near}"
            )

    @property
    def factor(self) -> int:
        """Pixels per code along each side."""
        return 1 << len(self.multipliers) - 1

    @property
    def grid(self) -> int:
        """Codes along each side; L = grid ** 2."""
        return self.image_size // self.factor

    def has_attention(self, level: int) -> bool:
        """Whether each residual block of a level is followed by attention."""
        last = len(self.multipliers) - 1
        return level in ((last,) if self.attention is None else self.attention)


class Tokenizer(Protocol):
    """What sampling needs of a tokenizer: `VQModel`, or one of your own.

    Codes are the indices of code vectors (V, C) that can be decoded, and averaged over a cluster.
    """

    @property
    def image_size(self) -> int:
        """H = W, pixels."""

    @property
    def grid(self) -> int:
        """Codes along each side; L = grid ** 2."""

    def codebook(self) -> Tensor:
        """The code vectors: (V, C)."""

    def encode(self, images_BCHW: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> codes (B, L), int64, row by row."""

    def decode_vectors(self, vectors_BLC: Tensor) -> Tensor:
        """Code vectors (B, L, C) -> images (B, 3, H, W), about in [-1, 1] but not clamped."""


class VQModel(nn.Module):
    """Encoder, quantizer and decoder."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.to_code = nn.Conv2d(config.latent_channels, config.code_dim, 1)
        self.embedding = nn.Embedding(config.codebook_size, config.code_dim)
        self.from_code = nn.Conv2d(config.code_dim, config.latent_channels, 1)
        self.decoder = Decoder(config)
        nn.init.normal_(self.embedding.weight)
        with torch.no_grad():
            self.embedding.weight.copy_(F.normalize(self.embedding.weight, dim=-1))

    @property
    def image_size(self) -> int:
        """Side of the images in pixels."""
        return self.config.image_size

    @property
    def grid(self) -> int:
        """Codes along each side; L = grid ** 2."""
        return self.config.grid

    def codebook(self) -> Tensor:
        """The code vectors as the quantizer compares them: (V, C), of length 1 with `l2_norm`."""
        return self._scale(self.embedding.weight)

    def encode(self, images_BCHW: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> codes (B, L), int64, row by row."""
        vectors_BLC = self.encode_vectors(images_BCHW)
        return self.nearest(vectors_BLC.flatten(0, 1)).view(vectors_BLC.shape[:2])

    def decode(self, codes_BL: Tensor) -> Tensor:
        """Codes (B, L) -> images (B, 3, H, W) in [-1, 1]."""
        return self.decode_vectors(self.codebook()[codes_BL]).clamp(-1, 1)

    def encode_vectors(self, images_BCHW: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> vectors to look up, scaled alike: (B, L, C)."""
        vectors_BCHW = self.to_code(self.encoder(images_BCHW))
        return self._scale(vectors_BCHW.flatten(2).transpose(1, 2))

    def decode_vectors(self, vectors_BLC: Tensor) -> Tensor:
        """Code vectors (B, L, C) -> images (B, 3, H, W), about in [-1, 1] but not clamped."""
        vectors_BCHW = vectors_BLC.transpose(1, 2).unflatten(2, (self.grid, self.grid))
        return self.decoder(self.from_code(vectors_BCHW))

    def nearest(self, vectors_NC: Tensor) -> Tensor:
        """Code whose vector is nearest to each of `encode_vectors`: (N,), int64."""
        return torch.cat([part_NV.argmax(-1) for part_NV in self.scores(vectors_NC, LOOK_UP_ROWS)])

    def scores(self, vectors_NC: Tensor, rows: int) -> Iterator[Tensor]:
        """Scores (N, V) of which the nearest code has the largest, for `rows` vectors at a time.

        In slices: the scores of a large batch would be the largest tensor of all.
        """
        codebook_CV = self.codebook().T
        # |z - c|^2 = |z|^2 - 2 (z c - |c|^2 / 2), and with vectors of length 1 only z c differs.
        half_squares_V = None if self.config.l2_norm else codebook_CV.square().sum(0) / 2
        for part_NC in vectors_NC.split(rows):
            products_NV = part_NC @ codebook_CV
            yield products_NV if half_squares_V is None else products_NV - half_squares_V

    def blocks(self) -> tuple[nn.Module, ...]:
        """The hidden layers: all but the first and the last of encoder and decoder."""
        return tuple(
            part for half in (self.encoder, self.decoder) for part in (half.levels, half.middle)
        )

    def _scale(self, vectors: Tensor) -> Tensor:
        return F.normalize(vectors, dim=-1) if self.config.l2_norm else vectors


class Encoder(nn.Module):
    """Images (B, 3, H, W) -> latents (B, latent_channels, H / factor, W / factor)."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        widths = [config.channels * m for m in config.multipliers]
        self.input = nn.Conv2d(3, config.channels, 3, padding=1)
        layers: list[nn.Module] = []
        width = config.channels
        for level, level_width in enumerate(widths):
            for _ in range(config.blocks):
                layers.append(ResidualBlock(width, level_width, config.groups))
                width = level_width
                if config.has_attention(level):
                    layers.append(AttentionBlock(width, config.groups))
            if level < len(widths) - 1:
                layers.append(Downsample(width))
        self.levels = nn.Sequential(*layers)
        self.middle = _middle(width, config)
        self.norm = _norm(width, config.groups)
        self.output = nn.Conv2d(width, config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Encode images."""
        x = self.middle(self.levels(self.input(x)))
        return self.output(F.silu(self.norm(x)))


class Decoder(nn.Module):
    """Latents (B, latent_channels, H / factor, W / factor) -> images (B, 3, H, W)."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        widths = [config.channels * m for m in config.decoder_multipliers or config.multipliers]
        width = widths[-1]
        self.input = nn.Conv2d(config.latent_channels, width, 3, padding=1)
        self.middle = _middle(width, config)
        layers: list[nn.Module] = []
        for level in reversed(range(len(widths))):
            for _ in range(config.decoder_blocks or config.blocks + 1):
                layers.append(ResidualBlock(width, widths[level], config.groups))
                width = widths[level]
                if config.has_attention(level):
                    layers.append(AttentionBlock(width, config.groups))
            if level:
                layers.append(Upsample(width))
        self.levels = nn.Sequential(*layers)
        self.norm = _norm(width, config.groups)
        self.output = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Decode latents."""
        x = self.levels(self.middle(self.input(x)))
        return self.output(F.silu(self.norm(x)))


def _norm(width: int, groups: int) -> nn.GroupNorm:
    return nn.GroupNorm(groups, width, eps=1e-6)


def _middle(width: int, config: TokenizerConfig) -> nn.Sequential:
    return nn.Sequential(
        ResidualBlock(width, width, config.groups),
        AttentionBlock(width, config.groups) if config.middle_attention else nn.Identity(),
        ResidualBlock(width, width, config.groups),
    )


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions, each after normalization and SiLU, beside a skip connection."""

    def __init__(self, width_in: int, width_out: int, groups: int) -> None:
        super().__init__()
        self.norm1 = _norm(width_in, groups)
        self.conv1 = nn.Conv2d(width_in, width_out, 3, padding=1)
        self.norm2 = _norm(width_out, groups)
        self.conv2 = nn.Conv2d(width_out, width_out, 3, padding=1)
        same = width_in == width_out
        self.skip: nn.Module = nn.Identity() if same else nn.Conv2d(width_in, width_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, width_in, H, W) -> (B, width_out, H, W)."""
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.skip(x) + h


class AttentionBlock(nn.Module):
    """Self-attention over all positions, with one head."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.norm = _norm(width, groups)
        self.query = nn.Conv2d(width, width, 1)
        self.key = nn.Conv2d(width, width, 1)
        self.value = nn.Conv2d(width, width, 1)
        self.output = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, width, H, W) -> (B, width, H, W)."""
        h = self.norm(x)
        # (B, D, H, W) -> (B, 1, H * W, D): one head
        q, k, v = (
            layer(h).flatten(2).transpose(1, 2).unsqueeze(1)
            for layer in (self.query, self.key, self.value)
        )
        h = F.scaled_dot_product_attention(q, k, v).squeeze(1).transpose(1, 2)
        return x + self.output(h.reshape(x.shape))


class Downsample(nn.Module):
    """Halve the sides; padded at the right and the bottom only, as in VQGAN."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, width, H, W) -> (B, width, H / 2, W / 2)."""
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double the sides: nearest neighbour, then a convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, width, H, W) -> (B, width, 2 H, 2 W)."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
