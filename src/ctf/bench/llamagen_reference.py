"""The straightforward way to sample and to train a full-vocabulary transformer: what `ctf bench`
compares with.

LlamaGen's own algorithms (arXiv 2406.06525; autoregressive/models and autoregressive/train of its
repository), written plainly and on the weights of a `CoarseModel`: single precision, operators one
by one, keys and values repeated for their heads. When sampling, keys and values of the whole length
in the cache and a mask for what is not there yet, both halves of guidance at every step. Only the
draw is ours, so that equal logits give equal labels.

Shapes: B batch, with both halves of guidance, L labels of an image, T positions, when sampling of
the cache, D width, N heads, E head width, K labels that there are.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ctf.models.coarse import CoarseModel
from ctf.models.sampling import Sampling, choose
from ctf.models.transformer import Attention, Block, SwiGLU, TransformerConfig

CLIP, CLASS_DROPOUT = 1.0, 0.1  # LlamaGen's


@torch.inference_mode()
def sample(
    model: CoarseModel, classes_B: Tensor, uniforms_BL: Tensor, settings: Sampling
) -> Tensor:
    """Labels (B, L), int64, as `sampling.sample_coarse` draws them, at constant guidance."""
    guided = settings.guidance != 1
    inputs = torch.cat([classes_B, torch.full_like(classes_B, model.no_class)])
    if not guided:
        inputs = classes_B
    caches, masks = make_caches(model.config, len(inputs))
    labels = []
    for i in range(model.config.length):
        logits_BK = step(model, inputs, i, caches, masks)
        if guided:
            cond, uncond = logits_BK.chunk(2)
            logits_BK = uncond + (cond - uncond) * settings.guidance
        drawn_B = choose(
            logits_BK, uniforms_BL[:, i], settings.temperature, settings.top_k, settings.top_p
        )
        labels.append(drawn_B)
        inputs = torch.cat([drawn_B, drawn_B]) if guided else drawn_B
    return torch.stack(labels, dim=1)


def make_caches(shape: TransformerConfig, batch: int) -> tuple[Tensor, Tensor]:
    """Keys and values, (layers, 2, B, N, T, E), and masks, (B, T, T), of the full length."""
    length = -(-(1 + shape.length) // 8) * 8  # LlamaGen rounds its caches up
    caches = torch.zeros(shape.layers, 2, batch, shape.heads, length, shape.head_width)
    masks = torch.tril(torch.ones(length, length, dtype=torch.bool)).repeat(batch, 1, 1)
    return caches, masks


def step(
    model: CoarseModel, inputs_B: Tensor, i: int, caches: Iterable[Tensor], masks: Tensor
) -> Tensor:
    """Logits (B, K) after position `i`, whose inputs are classes at 0, then the label before."""
    position = torch.tensor([i])
    embedding = model.trunk.class_embedding if i == 0 else model.trunk.label_embedding
    x_B1D = embedding(inputs_B)[:, None]
    mask_B11T = masks[:, None, position]
    turn_1P2 = model.trunk.rope.table[position]
    for layer, cache in zip(model.trunk.layers, caches, strict=True):
        assert isinstance(layer, Block)
        normed = _norm(x_B1D, layer.attention_norm)
        x_B1D = x_B1D + _attention(normed, layer.attention, turn_1P2, position, mask_B11T, cache)
        x_B1D = x_B1D + _feed_forward(_norm(x_B1D, layer.ffn_norm), layer.ffn)
    logits_BK: Tensor = model.head(_norm(x_B1D, model.trunk.norm))[:, -1].float()
    return logits_BK


def train_step(
    model: CoarseModel, optimizer: torch.optim.Optimizer, labels_BL: Tensor, classes_B: Tensor
) -> Tensor:
    """One step at LlamaGen's settings but for the optimiser's; returns the loss. The model is in
    training mode, since dropout is that of its configuration.
    """
    hidden_B = torch.rand(len(classes_B)) < CLASS_DROPOUT
    loss_ = loss(model, labels_BL, torch.where(hidden_B, model.no_class, classes_B))
    loss_.backward()
    nn.utils.clip_grad_norm_(model.parameters(), CLIP)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss_.detach()


def loss(model: CoarseModel, labels_BL: Tensor, classes_B: Tensor) -> Tensor:
    """Mean cross-entropy of the next label, of logits (B, L, K) in single precision."""
    trunk = model.trunk
    inputs = trunk.class_embedding(classes_B)[:, None], trunk.label_embedding(labels_BL[:, :-1])
    x_BTD = _dropout(torch.cat(inputs, dim=1), model)
    turn_TP2 = trunk.rope.table[: labels_BL.shape[1]]
    for layer in trunk.layers:
        assert isinstance(layer, Block)
        normed = _norm(x_BTD, layer.attention_norm)
        x_BTD = x_BTD + _dropout(_causal_attention(normed, layer.attention, turn_TP2), model)
        mixed_BTD = _feed_forward(_norm(x_BTD, layer.ffn_norm), layer.ffn)
        x_BTD = x_BTD + _dropout(mixed_BTD, model)
    logits_BLK = model.head(_norm(x_BTD, trunk.norm)).float().contiguous()
    return F.cross_entropy(logits_BLK.view(-1, model.count), labels_BL.reshape(-1))


def _causal_attention(x_BTD: Tensor, attention: Attention, turn_TP2: Tensor) -> Tensor:
    batch, length, width = x_BTD.shape
    q, k, v = _heads(x_BTD, attention, turn_TP2)
    k, v = (part.repeat_interleave(1, dim=1) for part in (k, v))
    mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    mixed = mixed.transpose(1, 2).contiguous().view(batch, length, width)
    out: Tensor = attention.out(mixed)
    return out


def _dropout(x_BTD: Tensor, model: CoarseModel) -> Tensor:
    return F.dropout(x_BTD, model.config.dropout, model.training)


def _heads(x_BTD: Tensor, attention: Attention, turn_TP2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values (B, N, T, E), the first two turned."""
    batch, length, width = x_BTD.shape
    heads = (batch, length, attention.heads, -1)
    q, k, v = (part.view(heads) for part in attention.qkv(x_BTD).split(width, dim=-1))
    q, k = _rotate(q, turn_TP2), _rotate(k, turn_TP2)
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def _norm(x_BTD: Tensor, norm: nn.RMSNorm) -> Tensor:
    assert norm.eps is not None
    wide = x_BTD.float()
    wide = wide * torch.rsqrt(torch.mean(wide * wide, dim=-1, keepdim=True) + norm.eps)
    return wide.type_as(x_BTD) * norm.weight


def _attention(
    x_B1D: Tensor,
    attention: Attention,
    turn_1P2: Tensor,
    position: Tensor,
    mask_B11T: Tensor,
    cache_2BNTE: Tensor,
) -> Tensor:
    batch, _, width = x_B1D.shape
    q, k, v = _heads(x_B1D, attention, turn_1P2)
    keys, values = cache_2BNTE
    keys[:, :, position] = k
    values[:, :, position] = v
    keys, values = (part.repeat_interleave(1, dim=1) for part in (keys, values))
    mixed = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask_B11T)
    out: Tensor = attention.out(mixed.transpose(1, 2).contiguous().view(batch, 1, width))
    return out


def _rotate(x_BTNE: Tensor, turn_TP2: Tensor) -> Tensor:
    pairs = x_BTNE.float().reshape(*x_BTNE.shape[:-1], -1, 2)
    cos, sin = turn_TP2[None, :, None].unbind(-1)
    real, imaginary = pairs.unbind(-1)
    turned = torch.stack([real * cos - imaginary * sin, imaginary * cos + real * sin], dim=-1)
    return turned.flatten(3).type_as(x_BTNE)


def _feed_forward(x_BTD: Tensor, ffn: SwiGLU) -> Tensor:
    out: Tensor = ffn.w2(F.silu(ffn.w1(x_BTD)) * ffn.w3(x_BTD))
    return out
