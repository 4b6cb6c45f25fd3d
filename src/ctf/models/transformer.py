"""The Llama-style transformer that the coarse and the fine model share.

Architecture as LlamaGen (arXiv 2406.06525, section 3.2): pre-norm blocks with RMSNorm, SwiGLU
and 2-D rotary position embedding, no biases, one class token in front of the labels.

Shapes: B batch, T positions given, L labels of an image (grid ** 2), D width, N heads,
E head width, P rotated pairs of a head (E / 2), K labels that there are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ctf.common.errors import UserError
from ctf.kernels import train_cpu

# Which positions see which is the caller's choice: (q, k, v), each (B, N, T, E), to (B, N, T, E).
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]

INITIAL_STD = 0.02


@dataclass(frozen=True)
class TransformerConfig:
    """The shape of a transformer.

    Args:
        width: D, a multiple of `heads`; each head's share is a multiple of 4 (the pairs of
            2-D RoPE: half by row, half by column).
        grid: side of the token grid; L = grid ** 2.
        classes: how many there are, without the "no class" of classifier-free guidance.
        dropout: of the embedded tokens, of attention's output and of SwiGLU's, as LlamaGen.
        ffn_multiple: the hidden width of SwiGLU is rounded up to a multiple of this.
        class_token_rope: "identity" does not rotate the class token. "zero" multiplies its
            query and key by zero, a quirk of LlamaGen that its released weights depend on.

    Raises:
        UserError: no such transformer can be built.
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

    def __post_init__(self) -> None:
        for name in ("width", "layers", "heads", "grid", "classes", "ffn_multiple"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}: got {getattr(self, name)}, expected 1 or more")
        if self.width % (4 * self.heads):
            raise UserError(
                f"width {self.width} with {self.heads} heads: "
                f"expected a multiple of 4 * heads = {4 * self.heads}"
            )
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout: got {self.dropout}, expected 0 <= dropout < 1")
        if not (self.rope_base > 0 and self.norm_eps > 0):
            raise UserError("rope_base and norm_eps: expected more than 0")

    @property
    def length(self) -> int:
        """L, the labels of one image."""
        return self.grid**2

    @property
    def head_width(self) -> int:
        """E."""
        return self.width // self.heads

    @property
    def ffn_width(self) -> int:
        """Hidden width of SwiGLU: two thirds of 4 * width, as three matrices share the work."""
        return -(-int(2 * 4 * self.width / 3) // self.ffn_multiple) * self.ffn_multiple


class Rope(nn.Module):
    """Holds the table of 2-D rotary position embedding (arXiv 2104.09864; in 2-D as LlamaGen).

    `table` is (1 + L, P, 2), the (cos, sin) of every pair's angle: the class token first, then
    the grid row by row. The first half of the pairs turns with the row, the other half with the
    column, by base ** (-2i / (E / 2)) radians a step for pair i of the half.
    """

    table: Tensor

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("table", self._compute(), persistent=False)

    def _compute(self, device: torch.device | None = None) -> Tensor:
        device = device or torch.get_default_device()
        grid, half = self.config.grid, self.config.head_width // 2
        if device.type == "meta":  # where there is no memory, there are no angles
            return torch.empty(1 + grid**2, half, 2, device=device)
        exponents = torch.arange(0, half, 2, device=device).float() / half
        steps = torch.arange(grid, device=device).float()
        angles = torch.outer(steps, 1.0 / self.config.rope_base**exponents)
        by_row = angles[:, None].expand(-1, grid, -1)
        by_column = angles[None].expand(grid, -1, -1)
        angles_LP = torch.cat([by_row, by_column], dim=-1).flatten(0, 1)
        cells = torch.stack([angles_LP.cos(), angles_LP.sin()], dim=-1)
        class_token = torch.zeros_like(cells[:1])
        if self.config.class_token_rope == "identity":
            class_token[..., 0] = 1
        return torch.cat([class_token, cells])

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Rope:
        # The table goes where the weights go, but not to their type: in half precision its
        # angles would be wrong. And to_empty(), which comes here too, leaves it unfilled.
        super()._apply(fn, recurse)
        self.table = self._compute(self.table.device)
        return self

    def forward(self, start: int, stop: int) -> Tensor:
        """Rotations of positions `start` to `stop` (0 is the class token): (T, P, 2)."""
        return self.table[start:stop]


def rotate(x_BTZNE: Tensor, rotation_TP2: Tensor) -> Tensor:
    """Turns neighbours (2i, 2i + 1) as one complex number; at least in float32.

    Args:
        x_BTZNE: queries and keys, stacked along Z.
        rotation_TP2: from `Rope`.
    """
    pairs = x_BTZNE.to(torch.promote_types(x_BTZNE.dtype, torch.float32)).unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():  # which knows real numbers only
        cos, sin = rotation_TP2[:, None, None].unbind(-1)
        x, y = pairs.unbind(-1)
        turned = torch.stack([x * cos - y * sin, x * sin + y * cos], dim=-1)
    else:
        rotation_TP = torch.view_as_complex(rotation_TP2)
        turned = torch.view_as_real(torch.view_as_complex(pairs) * rotation_TP[:, None, None])
    return turned.flatten(-2).type_as(x_BTZNE)


class KVCache:
    """Keys and values of the positions so far: for each layer (B, N, room, E), in `dtype`.

    The room grows by `BLOCK` positions at a time. A processor reads what lies together at about
    twice the speed of slices out of tensors of the full length, copying included. L positions are
    enough: the class token and all labels but the last, which nothing follows.
    """

    BLOCK = 32

    def __init__(
        self, config: TransformerConfig, batch: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.length = config.length
        empty = torch.empty(batch, config.heads, 0, config.head_width, device=device, dtype=dtype)
        self.k, self.v = [empty] * config.layers, [empty] * config.layers

    def attend(
        self, layer: int, start: int, images: slice, q_BNTE: Tensor, k_BNTE: Tensor, v_BNTE: Tensor
    ) -> Tensor:
        """Stores keys and values from position `start` on, of some of the images; attends to
        what is before each position and to itself.
        """
        end = start + q_BNTE.shape[2]
        if end > self.k[layer].shape[2]:
            for stored in (self.k, self.v):
                stored[layer] = self._grown(stored[layer], end)
        keys, values = self.k[layer][images], self.v[layer][images]
        keys[:, :, start:end] = k_BNTE
        values[:, :, start:end] = v_BNTE
        mixed_BNTE = self._attend(q_BNTE.to(keys.dtype), keys, values, start, end)
        return mixed_BNTE.to(q_BNTE.dtype)

    def _attend(self, q_BNTE: Tensor, keys: Tensor, values: Tensor, start: int, end: int) -> Tensor:
        count, width = q_BNTE.shape[2:]
        if count > 1 or q_BNTE.device.type != "cpu":
            seen = None
            if count > 1:
                seen = torch.ones(count, end, dtype=torch.bool, device=q_BNTE.device).tril(start)
            return F.scaled_dot_product_attention(
                q_BNTE, keys[:, :, :end], values[:, :, :end], attn_mask=seen
            )
        scores_BN1T = (q_BNTE * width**-0.5) @ keys.mT
        scores_BN1T[..., end:] = -torch.inf
        return scores_BN1T.softmax(-1) @ values

    def _grown(self, stored_BNTE: Tensor, end: int) -> Tensor:
        room = -(-end // self.BLOCK) * self.BLOCK
        batch, heads, before, width = stored_BNTE.shape
        grown = stored_BNTE.new_empty(batch, heads, min(room, self.length), width)
        grown[:, :, :before] = stored_BNTE
        grown[:, :, before:] = 0  # masked, but zero times anything must be zero
        return grown


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x^2) + eps) * weight, arXiv 1910.07467."""

    def forward(self, x_BTD: Tensor) -> Tensor:
        return (
            train_cpu.rms_norm(x_BTD, self)
            if train_cpu.able(x_BTD, self)
            else super().forward(x_BTD)
        )


class Dropout(nn.Dropout):
    """Dropout whose masks take a processor a tenth of the time: 16 random bits for each entry.

    Each is dropped with the nearest multiple of 2 ** -16 to the probability that was asked for.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or torch.compiler.is_compiling():
            return super().forward(x)
        dropped = round(self.p * 2**16)
        if not (self.training and dropped):
            return x
        words = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
        bits = words.view(torch.int16)[: x.numel()].view(x.shape)
        return (x * (2**16 / (2**16 - dropped))).masked_fill_(bits < dropped - 2**15, 0)


class Attention(nn.Module):
    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.out = nn.Linear(config.width, config.width, bias=False)
        self.dropout = Dropout(config.dropout)

    def forward(self, x_BTD: Tensor, rotation_TP2: Tensor, attend: Attend) -> Tensor:
        if train_cpu.able(x_BTD, self.qkv, self.out):
            heads_BNTE = train_cpu.heads(x_BTD, self.qkv.weight, rotation_TP2, self.heads)
            mixed_BNTE = attend(*heads_BNTE)
            out_BTD = train_cpu.linear(mixed_BNTE.transpose(1, 2).flatten(2), self.out.weight)
        else:
            qkv_BT3NE = self.qkv(x_BTD).unflatten(-1, (3, self.heads, -1))
            # Split, not sliced: the gradients of slices are each padded with zeros to the whole.
            qk_BT2NE, v_BT1NE = qkv_BT3NE.split((2, 1), dim=2)
            q_BTNE, k_BTNE = rotate(qk_BT2NE, rotation_TP2).unbind(2)
            v_BNTE = v_BT1NE.squeeze(2).transpose(1, 2)
            mixed_BNTE = attend(q_BTNE.transpose(1, 2), k_BTNE.transpose(1, 2), v_BNTE)
            out_BTD = self.out(mixed_BNTE.transpose(1, 2).flatten(2))
        dropped: Tensor = self.dropout(out_BTD)
        return dropped


class SwiGLU(nn.Module):
    """w2(silu(w1 x) * w3 x), arXiv 2002.05202; the matrices are named as Llama names them."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.width, config.ffn_width, bias=False)
        self.w3 = nn.Linear(config.width, config.ffn_width, bias=False)
        self.w2 = nn.Linear(config.ffn_width, config.width, bias=False)
        self.dropout = Dropout(config.dropout)

    def forward(self, x_BTD: Tensor) -> Tensor:
        if train_cpu.able(x_BTD, self.w1, self.w3, self.w2):
            mixed_BTD = train_cpu.swiglu(x_BTD, self.w1.weight, self.w3.weight, self.w2.weight)
        else:
            mixed_BTD = self.w2(F.silu(self.w1(x_BTD)) * self.w3(x_BTD))
        out: Tensor = self.dropout(mixed_BTD)
        return out


class Block(nn.Module):
    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.width, eps=config.norm_eps)
        self.attention = Attention(config)
        self.ffn_norm = RMSNorm(config.width, eps=config.norm_eps)
        self.ffn = SwiGLU(config)

    def forward(self, x_BTD: Tensor, rotation_TP2: Tensor, attend: Attend) -> Tensor:
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), rotation_TP2, attend)
        out: Tensor = x_BTD + self.ffn(self.ffn_norm(x_BTD))
        return out


class Trunk(nn.Module):
    """Class token and labels, embedded, through all blocks, to the vectors before the head.

    The class embedding has classes + 1 rows; the last stands for "no class". Weights are drawn
    from torch's global generator: normal, standard deviation 0.02, as LlamaGen.
    """

    def __init__(self, config: TransformerConfig, count: int) -> None:
        super().__init__()
        self.config = config
        self.cache_dtype: torch.dtype | None = None  # of keys and values; else that of the weights
        self.class_embedding = nn.Embedding(config.classes + 1, config.width)
        self.label_embedding = nn.Embedding(count, config.width)
        self.dropout = Dropout(config.dropout)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.width, eps=config.norm_eps)
        self.rope = Rope(config)
        self.apply(_initialise)

    def forward(self, labels_BT: Tensor, classes_B: Tensor, *, causal: bool) -> Tensor:
        """The vectors of the class token and of T <= L labels: (B, 1 + T, D)."""
        attend = partial(F.scaled_dot_product_attention, is_causal=causal)
        x_BTD = self._embed(torch.cat([classes_B[:, None], labels_BT], dim=1), 0)
        rotation_TP2 = self.rope(0, x_BTD.shape[1])
        for layer in self.layers:
            x_BTD = layer(x_BTD, rotation_TP2, attend)
        out: Tensor = self.norm(x_BTD)
        return out

    def cache(self, batch: int) -> KVCache:
        """An empty one, for `step`."""
        return KVCache(self.config, batch, *self.cached_as())

    def cached_as(self) -> tuple[torch.device, torch.dtype]:
        """Where keys and values are kept, and in which precision."""
        weight = self.label_embedding.weight
        return weight.device, self.cache_dtype or weight.dtype

    def step(
        self, inputs_BT: Tensor, start: int, cache: KVCache, images: slice = slice(None)
    ) -> Tensor:
        """The causal vectors of positions from `start` on, given `cache` of all before: (B, T, D).

        Args:
            inputs_BT: the class at position 0, label i at position i + 1.
            images: which of those in the cache these are.
        """
        x_BTD = self._embed(inputs_BT, start)
        rotation_TP2 = self.rope(start, start + inputs_BT.shape[1])
        for i, layer in enumerate(self.layers):
            x_BTD = layer(x_BTD, rotation_TP2, partial(cache.attend, i, start, images))
        out: Tensor = self.norm(x_BTD)
        return out

    def _embed(self, inputs_BT: Tensor, start: int) -> Tensor:
        if start > 0:
            x_BTD = self.label_embedding(inputs_BT)
        else:
            x_BTD = torch.cat(
                [self.class_embedding(inputs_BT[:, :1]), self.label_embedding(inputs_BT[:, 1:])],
                dim=1,
            )
        out: Tensor = self.dropout(x_BTD)
        return out


def _initialise(module: nn.Module) -> None:
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=INITIAL_STD)


def zero_head(width: int, count: int) -> nn.Linear:
    """An output layer that starts at zero, so that the first predictions are uniform."""
    head = nn.Linear(width, count, bias=False)
    nn.init.zeros_(head.weight)
    return head
