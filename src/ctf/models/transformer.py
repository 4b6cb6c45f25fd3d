"""The Llama-style transformer that the coarse and the fine model share.

Architecture as LlamaGen (arXiv 2406.06525, section 3.2): pre-norm blocks with RMSNorm, SwiGLU
and 2-D rotary position embedding, no biases, one class token in front of the labels.

All of it is plain PyTorch. `ctf.kernels` replaces modules by others that compute the same faster.

Shapes: B batch, T positions, L labels of an image (grid ** 2), D width, N heads, E head dim,
P rotated pairs of a head (E / 2).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ctf.common.config import OMIT_DEFAULT
from ctf.common.errors import UserError

# (q, k, v), each (B, N, T, E), to (B, N, T, E): causal, full, or with a cache.
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]

INITIAL_STD = 0.02


@dataclass(frozen=True)
class TransformerConfig:
    """The shape of a transformer.

    Args:
        width: D, a multiple of 4 * `heads`: half of a head's pairs rotate with the row, half with
            the column.
        layers: Number of blocks.
        heads: N.
        grid: Side of the token grid; L = grid ** 2.
        classes: Number of classes, without the "no class" of classifier-free guidance.
        dropout: Of embedded tokens, attention outputs and SwiGLU outputs, as in LlamaGen.
        ffn_multiple: The hidden width of SwiGLU is rounded up to a multiple of this.
        rope_base: Base of the frequencies of RoPE.
        norm_eps: Epsilon of RMSNorm.
        class_token_rope: "identity" does not rotate the class token. "zero" multiplies its
            query and key by zero, a quirk of LlamaGen that its released weights depend on.
        ffn_hidden: Hidden width of SwiGLU; by default 2/3 of 4 * `width`, rounded up.

    Raises:
        UserError: A value is out of range.
    """

    width: int
    layers: int
    heads: int
    grid: int
    classes: int
    dropout: float = 0.1
    ffn_multiple: int = 256
    rope_base: float = 10000.0
    norm_eps: float = 1e-5
    class_token_rope: Literal["identity", "zero"] = "identity"
    ffn_hidden: int | None = field(default=None, metadata=OMIT_DEFAULT)

    def __post_init__(self) -> None:
        for name in ("width", "layers", "heads", "grid", "classes", "ffn_multiple"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}: got {getattr(self, name)}, expected 1 or more")
        if self.ffn_hidden is not None and self.ffn_hidden < 1:
            raise UserError(f"ffn_hidden: got {self.ffn_hidden}, expected 1 or more")
        if self.width % (4 * self.heads):
            raise UserError(
                f"width {self.width} with {self.heads} heads: "
                f"expected a multiple of 4 * heads = {4 * self.heads}"
            )
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout: got {self.dropout}, expected 0 <= dropout < 1")
        for name in ("rope_base", "norm_eps"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name}: got {getattr(self, name)}, expected more than 0")

    @property
    def length(self) -> int:
        """Labels of one image, L."""
        return self.grid**2

    @property
    def head_dim(self) -> int:
        """Width of one head, E."""
        return self.width // self.heads

    @property
    def ffn_width(self) -> int:
        """Hidden width of SwiGLU: 2/3 of the usual 4 * width, since it has three matrices."""
        if self.ffn_hidden is not None:
            return self.ffn_hidden
        return -(-int(2 * 4 * self.width / 3) // self.ffn_multiple) * self.ffn_multiple


@lru_cache
@torch.inference_mode(False)  # one table serves training and sampling
def rotation_table(config: TransformerConfig, device: torch.device) -> Tensor:
    """Angles of 2-D rotary position embedding as (cos, sin): float32 (1 + L, P, 2).

    The class token is first, then the grid row by row. The first half of the pairs rotates with
    the row, the other half with the column, by base ** (-2i / (E / 2)) radians a step for pair i
    of the half (arXiv 2104.09864; in 2-D as LlamaGen).
    """
    grid, half = config.grid, config.head_dim // 2
    exponents = torch.arange(0, half, 2, device=device).float() / half
    steps = torch.arange(grid, device=device).float()
    angles = torch.outer(steps, 1.0 / config.rope_base**exponents)
    by_row = angles[:, None].expand(-1, grid, -1)
    by_column = angles[None].expand(grid, -1, -1)
    angles_LP = torch.cat([by_row, by_column], dim=-1).flatten(0, 1)
    cells = torch.stack([angles_LP.cos(), angles_LP.sin()], dim=-1)
    class_token = torch.zeros_like(cells[:1])
    if config.class_token_rope == "identity":
        class_token[..., 0] = 1
    return torch.cat([class_token, cells])


def rotate(x_BTZNE: Tensor, rotation_TP2: Tensor) -> Tensor:
    """Rotate each pair (2i, 2i + 1) as a complex number, at least in float32.

    Args:
        x_BTZNE: Queries and keys, stacked along Z.
        rotation_TP2: Rows of `rotation_table`; or those of each image, (B, T, P, 2).
    """
    pairs = x_BTZNE.to(torch.promote_types(x_BTZNE.dtype, torch.float32)).unflatten(-1, (-1, 2))
    rotation_TP = torch.view_as_complex(rotation_TP2)
    rotated = torch.view_as_complex(pairs) * rotation_TP[..., None, None, :]
    return torch.view_as_real(rotated).flatten(-2).type_as(x_BTZNE)


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def causal_mask(start: int, length: int, device: torch.device) -> Tensor | None:
    """What queries from position `start` on see of all up to the last: bool (T, start + T)."""
    if length == 1:
        return None  # everything
    return torch.ones(length, start + length, dtype=torch.bool, device=device).tril(start)


def window_positions(start: int | Tensor, length: int, device: torch.device) -> Tensor:
    """Positions from `start` on: (T,), or (B, T) if each image has a start of its own."""
    if isinstance(start, int):
        return torch.arange(start, start + length, device=device)
    return start[:, None] + torch.arange(length, device=device)


class KVCache:
    """Keys and values of all layers, each (B, N, L, E).

    L positions are enough: the class token and all labels but the last, which nothing follows.
    Positions may be stored again, with those after them: a query sees none beyond its own.
    """

    def __init__(
        self, config: TransformerConfig, batch: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        shape = (batch, config.heads, config.length, config.head_dim)
        self.k = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.layers)]
        self.v = [torch.zeros_like(k) for k in self.k]

    def attend(
        self,
        layer: int,
        start: int | Tensor,
        images: slice,
        q_BNTE: Tensor,
        k_BNTE: Tensor,
        v_BNTE: Tensor,
    ) -> Tensor:
        """Store T keys and values from position `start` on, and attend causally to all so far.

        Args:
            layer: Index of the layer.
            start: Position of the first query, or that of each image, int64 (B,); all before it
                are in the cache.
            images: Rows of the cache that the queries belong to.
            q_BNTE: Queries.
            k_BNTE: Keys.
            v_BNTE: Values.
        """
        length, keys, values = q_BNTE.shape[2], self.k[layer][images], self.v[layer][images]
        if isinstance(start, int):
            keys, values = keys[:, :, : start + length], values[:, :, : start + length]
            keys[:, :, start:] = k_BNTE
            values[:, :, start:] = v_BNTE
            mask = causal_mask(start, length, keys.device)
        else:
            positions_B1T1 = window_positions(start, length, keys.device)[:, None, :, None]
            index_BNTE = positions_B1T1.expand_as(k_BNTE)
            keys.scatter_(2, index_BNTE, k_BNTE.to(keys.dtype))
            values.scatter_(2, index_BNTE, v_BNTE.to(values.dtype))
            mask = torch.arange(keys.shape[2], device=keys.device) <= positions_B1T1
        mixed = F.scaled_dot_product_attention(q_BNTE.to(keys.dtype), keys, values, attn_mask=mask)
        return mixed.to(q_BNTE.dtype)

    def select(self, rows: Sequence[int]) -> None:
        """Keep some rows of the batch alone."""
        for stored in (self.k, self.v):
            for layer, tensor in enumerate(stored):
                stored[layer] = tensor[rows]


class Attention(nn.Module):
    """Multi-head self-attention; which positions see which is the caller's choice."""

    rotate = staticmethod(rotate)  # a compiler without complex numbers has another one

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.out = nn.Linear(config.width, config.width, bias=False)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x_BTD: Tensor, rotation_TP2: Tensor, attend: Attend) -> Tensor:
        """Attention's contribution to the residual stream: (B, T, D)."""
        mixed_BNTE = attend(*self.rotated_heads(x_BTD, rotation_TP2))
        x_BTD = self.out(mixed_BNTE.transpose(1, 2).flatten(2))
        return self.dropout(x_BTD)

    def rotated_heads(self, x_BTD: Tensor, rotation_TP2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys, both rotated, and values: each (B, N, T, E)."""
        qkv_BT3NE = self.qkv(x_BTD).unflatten(-1, (3, self.heads, -1))
        # Split, not sliced: autograd pads the gradient of each slice to the full size.
        qk_BT2NE, v_BT1NE = qkv_BT3NE.split((2, 1), dim=2)
        q_BTNE, k_BTNE = self.rotate(qk_BT2NE, rotation_TP2).unbind(2)
        v_BTNE = v_BT1NE.squeeze(2)
        return q_BTNE.transpose(1, 2), k_BTNE.transpose(1, 2), v_BTNE.transpose(1, 2)


class SwiGLU(nn.Module):
    """w2(silu(w1 x) * w3 x), arXiv 2002.05202; the matrices have Llama's names."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.width, config.ffn_width, bias=False)
        self.w3 = nn.Linear(config.width, config.ffn_width, bias=False)
        self.w2 = nn.Linear(config.ffn_width, config.width, bias=False)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """The feed-forward contribution to the residual stream: (B, T, D)."""
        x_BTD = self.w2(F.silu(self.w1(x_BTD)) * self.w3(x_BTD))
        return self.dropout(x_BTD)


class Block(nn.Module):
    """Attention, then SwiGLU, each on normalized inputs and added to the residual stream."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.attention = Attention(config)
        self.ffn_norm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.ffn = SwiGLU(config)

    def forward(self, x_BTD: Tensor, rotation_TP2: Tensor, attend: Attend) -> Tensor:
        """The residual stream after this block: (B, T, D)."""
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), rotation_TP2, attend)
        return x_BTD + self.ffn(self.ffn_norm(x_BTD))


class Backbone(nn.Module):
    """Everything but the output layer: class and labels -> hidden vectors.

    The class embedding has classes + 1 rows; the last stands for "no class". Weights are
    initialized from torch's global generator: normal, standard deviation 0.02, as in LlamaGen.
    """

    cache_class: type[KVCache] = KVCache
    cache_dtype: torch.dtype | None = None  # of keys and values; None: that of the weights
    windows: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)  # positions of steps that are worth trying
    fixed_batch = False  # whether batches of another size take long to prepare for

    def __init__(self, config: TransformerConfig, vocab_size: int) -> None:
        super().__init__()
        self.config = config
        self.class_embedding = nn.Embedding(config.classes + 1, config.width)
        self.label_embedding = nn.Embedding(vocab_size, config.width)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.apply(_initialize)

    def forward(self, labels_BT: Tensor, classes_B: Tensor, *, causal: bool) -> Tensor:
        """Hidden vectors of the class token and of T <= L labels: (B, 1 + T, D)."""
        attend = partial(F.scaled_dot_product_attention, is_causal=causal)
        x_BTD = self.embed(torch.cat([classes_B[:, None], labels_BT], dim=1), 0)
        rotation_TP2 = self.rotation(0, x_BTD.shape[1])
        for layer in self.layers:
            x_BTD = layer(x_BTD, rotation_TP2, attend)
        return self.norm(x_BTD)

    def step(
        self,
        inputs_BT: Tensor,
        start: int | Tensor,
        cache: KVCache,
        images: slice = slice(None),
    ) -> Tensor:
        """Causal hidden vectors of T positions from `start` on: (B, T, D).

        Args:
            inputs_BT: The class at position 0, label i at position i + 1.
            start: Position of the first input; or that of each image, int64 (B,), none of them 0.
            cache: Keys and values of all positions before; those of the inputs are stored.
            images: Rows of the cache that the inputs belong to.
        """
        x_BTD = self.embed(inputs_BT, start)
        rotation_TP2 = self.rotation(start, inputs_BT.shape[1])
        for i, layer in enumerate(self.layers):
            x_BTD = layer(x_BTD, rotation_TP2, partial(cache.attend, i, start, images))
        return self.norm(x_BTD)

    def cache(self, batch: int) -> KVCache:
        """An empty cache for `step`."""
        weight = self.label_embedding.weight
        dtype = self.cache_dtype or weight.dtype
        return self.cache_class(self.config, batch, weight.device, dtype)

    def cache_bytes(self) -> int:
        """Memory of one image's keys and values."""
        dtype = self.cache_dtype or self.label_embedding.weight.dtype
        config = self.config
        return 2 * config.layers * config.length * config.width * dtype.itemsize

    def embed(self, inputs_BT: Tensor, start: int | Tensor) -> Tensor:
        """Embedded inputs of positions from `start` on: (B, T, D); position 0 is the class."""
        if isinstance(start, Tensor) or start > 0:
            x_BTD = self.label_embedding(inputs_BT)
        else:
            class_B1D = self.class_embedding(inputs_BT[:, :1])
            x_BTD = torch.cat([class_B1D, self.label_embedding(inputs_BT[:, 1:])], dim=1)
        return self.dropout(x_BTD)

    def rotation(self, start: int | Tensor, length: int) -> Tensor:
        """Rotations of positions from `start` on: (T, P, 2), or of each image, (B, T, P, 2)."""
        table = rotation_table(self.config, self.norm.weight.device)
        if isinstance(start, int):
            return table[start : start + length]
        return table[window_positions(start, length, table.device)]


def _initialize(module: nn.Module) -> None:
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=INITIAL_STD)


def zero_head(width: int, outputs: int) -> nn.Linear:
    """An output layer that starts at zero, so that the first predictions are uniform."""
    head = nn.Linear(width, outputs, bias=False)
    nn.init.zeros_(head.weight)
    return head
