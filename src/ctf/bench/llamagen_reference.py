"""LlamaGen's own way to sample, to train and to extract tokens: what `ctf bench` compares with.

Its algorithms (arXiv 2406.06525; autoregressive/models, autoregressive/train and tokenizer of its
repository), written plainly and on the weights of our models, in their precision: operators one by
one, keys and values repeated for their heads. When sampling, keys and values of the whole length in
the cache and a mask for what is not there yet, both halves of guidance at every step. Only the last
step from logits to labels is ours, so that equal logits give equal labels.

Shapes: B batch, with both halves of guidance, L labels of an image, T positions (of the cache when
sampling), D width, N heads, E head dim, P rotated pairs of a head, K labels of the output layer,
V codes, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ctf.data.image_set import ImageSet
from ctf.data.transforms import View, as_tensor
from ctf.models.coarse import CoarseModel
from ctf.models.noise import gumbel_noise
from ctf.models.sampling import Sampling, sample_logits
from ctf.models.tokenizer import AttentionBlock, ResidualBlock, VQModel
from ctf.models.transformer import Block, TransformerConfig

CLIP, CLASS_DROPOUT = 1.0, 0.1

# --- Sampling -------------------------------------------------------------------------------------


@torch.inference_mode()
def sample(model: CoarseModel, classes_B: Tensor, keys_BL: Tensor, settings: Sampling) -> Tensor:
    """Sample labels (B, L), int64, as `parallel.sample_coarse` does at constant guidance."""
    inputs_B = first_inputs(model, classes_B, settings)
    weight = model.head.weight
    caches, masks = make_caches(model.config, len(inputs_B), weight.device, weight.dtype)
    labels = []
    for i, keys_B in enumerate(keys_BL.to(weight.device).unbind(1)):
        noise_BK = gumbel_noise(keys_B, model.vocab_size)
        labels_B = sample_step(model, inputs_B, i, caches, masks, noise_BK, settings)
        labels.append(labels_B)
        inputs_B = labels_B.repeat(len(inputs_B) // len(labels_B))
    return torch.stack(labels, dim=1)


def first_inputs(model: CoarseModel, classes_B: Tensor, settings: Sampling) -> Tensor:
    """Return the classes, and under guidance as many times "no class"."""
    if settings.guidance == 1:
        return classes_B
    return torch.cat([classes_B, torch.full_like(classes_B, model.no_class)])


def make_caches(
    config: TransformerConfig,
    batch: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Return keys and values, (layers, 2, B, N, T, E), and masks, (B, T, T), of the full length."""
    length = -(-(1 + config.length) // 8) * 8  # LlamaGen rounds its caches up
    shape = (config.layers, 2, batch, config.heads, length, config.head_dim)
    masks = torch.tril(torch.ones(length, length, dtype=torch.bool, device=device))
    return torch.zeros(shape, device=device, dtype=dtype), masks.repeat(batch, 1, 1)


def sample_step(
    model: CoarseModel,
    inputs_B: Tensor,
    i: int,
    caches: Iterable[Tensor],
    masks: Tensor,
    noise_BK: Tensor,
    settings: Sampling,
) -> Tensor:
    """Sample label `i`; the inputs are classes at position 0, then the label before."""
    position = torch.arange(i, i + 1, device=inputs_B.device)
    embedding = model.backbone.class_embedding if i == 0 else model.backbone.label_embedding
    x_B1D = embedding(inputs_B)[:, None]
    mask_B11T = masks[:, None, position]
    rotation_1P2 = model.backbone.rotation(0, model.config.length)[position]
    for layer, (keys, values) in zip(model.backbone.layers, caches, strict=True):

        def attend(
            q: Tensor, k: Tensor, v: Tensor, keys: Tensor = keys, values: Tensor = values
        ) -> Tensor:
            keys[:, :, position] = k
            values[:, :, position] = v
            k, v = (part.repeat_interleave(1, dim=1) for part in (keys, values))
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask_B11T)

        x_B1D = _block(layer, x_B1D, rotation_1P2, attend)
    logits_BK = model.head(_norm(x_B1D, model.backbone.norm))[:, -1].float()
    if settings.guidance != 1:
        cond, uncond = logits_BK.chunk(2)
        logits_BK = uncond + (cond - uncond) * settings.guidance
    return sample_logits(logits_BK, noise_BK, settings.temperature, settings.top_k, settings.top_p)


# --- Training -------------------------------------------------------------------------------------


def train_step(
    model: CoarseModel,
    optimizer: torch.optim.Optimizer,
    labels_BL: Tensor,
    classes_B: Tensor,
    *,
    bf16: bool = False,
) -> Tensor:
    """Take one step and return the loss; everything but the optimiser is at LlamaGen's settings.

    The model is in training mode: dropout is that of its configuration.

    Args:
        model: Weights in single precision.
        optimizer: Of its weights.
        labels_BL: To predict.
        classes_B: Of the images.
        bf16: Whether products are in bfloat16, by autocast.
    """
    hidden_B = torch.rand(len(classes_B), device=classes_B.device) < CLASS_DROPOUT
    with torch.autocast(classes_B.device.type, torch.bfloat16, enabled=bf16):
        loss_ = loss(model, labels_BL, torch.where(hidden_B, model.no_class, classes_B))
    torch.autograd.backward(loss_)
    nn.utils.clip_grad_norm_(model.parameters(), CLIP)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss_.detach()


def loss(model: CoarseModel, labels_BL: Tensor, classes_B: Tensor) -> Tensor:
    """Mean cross-entropy of the next label, of logits (B, L, K) in single precision."""
    backbone, dropout = model.backbone, model.config.dropout if model.training else 0.0
    inputs = (
        backbone.class_embedding(classes_B)[:, None],
        backbone.label_embedding(labels_BL[:, :-1]),
    )
    x_BTD = F.dropout(torch.cat(inputs, dim=1), dropout)
    rotation_TP2 = backbone.rotation(0, labels_BL.shape[1])

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (part.repeat_interleave(1, dim=1) for part in (k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    for layer in backbone.layers:
        x_BTD = _block(layer, x_BTD, rotation_TP2, attend, dropout)
    logits_BLK = model.head(_norm(x_BTD, backbone.norm)).float().contiguous()
    return F.cross_entropy(logits_BLK.view(-1, model.vocab_size), labels_BL.reshape(-1))


# --- The transformer ------------------------------------------------------------------------------


def _block(
    layer: nn.Module,
    x_BTD: Tensor,
    rotation_TP2: Tensor,
    attend: Callable[[Tensor, Tensor, Tensor], Tensor],
    dropout: float = 0.0,
) -> Tensor:
    """One block; `attend` takes queries, keys and values (B, N, T, E) and returns the first."""
    assert isinstance(layer, Block)

    def drop(x: Tensor) -> Tensor:
        return F.dropout(x, dropout) if dropout else x

    attention, ffn = layer.attention, layer.ffn
    heads = (*x_BTD.shape[:2], attention.heads, -1)
    qkv_BTW = attention.qkv(_norm(x_BTD, layer.attention_norm))
    q, k, v = (part.view(heads) for part in qkv_BTW.split(x_BTD.shape[-1], dim=-1))
    q, k = _rotate(q, rotation_TP2), _rotate(k, rotation_TP2)
    mixed_BNTE = attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    mixed_BTD = mixed_BNTE.transpose(1, 2).contiguous().view(x_BTD.shape)
    x_BTD = x_BTD + drop(attention.out(mixed_BTD))
    normed_BTD = _norm(x_BTD, layer.ffn_norm)
    return x_BTD + drop(ffn.w2(F.silu(ffn.w1(normed_BTD)) * ffn.w3(normed_BTD)))


def _norm(x_BTD: Tensor, norm: nn.RMSNorm) -> Tensor:
    assert norm.eps is not None
    wide = x_BTD.float()
    wide = wide * torch.rsqrt(torch.mean(wide * wide, dim=-1, keepdim=True) + norm.eps)
    return wide.type_as(x_BTD) * norm.weight


def _rotate(x_BTNE: Tensor, rotation_TP2: Tensor) -> Tensor:
    pairs = x_BTNE.float().reshape(*x_BTNE.shape[:-1], -1, 2)
    cos, sin = rotation_TP2[None, :, None].unbind(-1)
    real, imaginary = pairs.unbind(-1)
    rotated = torch.stack([real * cos - imaginary * sin, imaginary * cos + real * sin], dim=-1)
    return rotated.flatten(3).type_as(x_BTNE)


# --- Extracting tokens ----------------------------------------------------------------------------


@torch.no_grad()
def extract(tokenizer: VQModel, images: ImageSet, folder: Path, views: Sequence[View]) -> None:
    """Extract tokens in LlamaGen's loop (autoregressive/train/extract_codes_c2i.py).

    The views of one image at a time, channels first in memory, and a file for the codes and one for
    the class of each image.
    """
    device = next(tokenizer.parameters()).device
    for i in range(len(images)):
        parts = [as_tensor(images.read([i], view), device).contiguous() for view in views]
        codes_BL = encode(tokenizer, torch.cat(parts))
        np.save(folder / f"{i}.npy", codes_BL[None].cpu().numpy())
        np.save(folder / f"{i}-label.npy", images.classes_N[[i]])


def encode(tokenizer: VQModel, images_BCHW: Tensor) -> Tensor:
    """Codes (B, L) by the operators of LlamaGen's tokenizer_image/vq_model.py, one by one."""
    encoder = tokenizer.encoder
    h = encoder.input(images_BCHW)
    for layer in (*encoder.levels, *encoder.middle):
        h = _layer(layer, h)
    z_BCHW = tokenizer.to_code(encoder.output(_swish(encoder.norm(h))))
    z_NC = F.normalize(z_BCHW.permute(0, 2, 3, 1).contiguous().flatten(0, 2), dim=-1)
    codebook_VC = tokenizer.codebook()
    squares = (z_NC**2).sum(1, keepdim=True) + (codebook_VC**2).sum(1)
    indices_N = (squares - 2 * z_NC @ codebook_VC.T).argmin(1)
    return indices_N.view(len(images_BCHW), -1)


def _layer(layer: nn.Module, x: Tensor) -> Tensor:
    out: Tensor
    if isinstance(layer, ResidualBlock):
        h = layer.conv1(_swish(layer.norm1(x)))
        out = layer.skip(x) + layer.conv2(_swish(layer.norm2(h)))
    elif isinstance(layer, AttentionBlock):
        h = layer.norm(x)
        q, k, v = (part(h).flatten(2) for part in (layer.query, layer.key, layer.value))
        weights = F.softmax(torch.bmm(q.transpose(1, 2), k) * q.shape[1] ** -0.5, dim=2)
        out = x + layer.output(torch.bmm(v, weights.transpose(1, 2)).view(x.shape))
    else:
        out = layer(x)
    return out


def _swish(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)
