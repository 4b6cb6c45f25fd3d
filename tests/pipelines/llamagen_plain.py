"""LlamaGen's forward passes, written plainly over its tensors by its names, for any shape.

Nothing of ctf is used. The formulas are those of arXiv 2406.06525 and of LlamaGen's gpt.py and
vq_model.py.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

Weights = Mapping[str, Tensor]


# --- Transformer ----------------------------------------------------------------------------------


class GPT(NamedTuple):
    width: int
    layers: int
    heads: int
    kv_heads: int
    hidden: int
    codes: int
    classes: int


def gpt_shapes(gpt: GPT) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "cls_embedding.embedding_table.weight": (gpt.classes + 1, gpt.width),
        "tok_embeddings.weight": (gpt.codes, gpt.width),
        "norm.weight": (gpt.width,),
        "output.weight": (gpt.codes, gpt.width),
    }
    head = gpt.width // gpt.heads
    for i in range(gpt.layers):
        shapes |= {
            f"layers.{i}.attention.wqkv.weight": (
                (gpt.heads + 2 * gpt.kv_heads) * head,
                gpt.width,
            ),
            f"layers.{i}.attention.wo.weight": (gpt.width, gpt.width),
            f"layers.{i}.feed_forward.w1.weight": (gpt.hidden, gpt.width),
            f"layers.{i}.feed_forward.w3.weight": (gpt.hidden, gpt.width),
            f"layers.{i}.feed_forward.w2.weight": (gpt.width, gpt.hidden),
            f"layers.{i}.attention_norm.weight": (gpt.width,),
            f"layers.{i}.ffn_norm.weight": (gpt.width,),
        }
    return shapes


def rope_table(grid: int, head: int, base: float = 10000.0) -> Tensor:
    """LlamaGen's freqs_cis: (1 + grid ** 2, head / 2, 2), zero for the class token."""
    table = torch.zeros(1 + grid * grid, head // 2, 2)
    quarter = head // 4
    for y in range(grid):
        for x in range(grid):
            for pair in range(head // 2):
                step, i = (y, pair) if pair < quarter else (x, pair - quarter)
                angle = step / base ** (2 * i / (head // 2))
                table[1 + y * grid + x, pair] = torch.tensor([math.cos(angle), math.sin(angle)])
    return table


def gpt_logits(weights: Weights, gpt: GPT, grid: int, labels: Tensor, tokens: Tensor) -> Tensor:
    """Teacher-forced logits (B, L, codes): the class token, then all tokens but the last."""
    classes = weights["cls_embedding.embedding_table.weight"][labels][:, None]
    x = torch.cat([classes, weights["tok_embeddings.weight"][tokens[:, :-1]]], dim=1)
    batch, length, width = x.shape
    head = width // gpt.heads
    cos, sin = rope_table(grid, head)[:length, None].unbind(-1)

    def norm(x: Tensor, name: str) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weights[f"{name}.weight"]

    def rotate(x: Tensor) -> Tensor:
        a, b = x[..., 0::2], x[..., 1::2]
        return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)

    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    for i in range(gpt.layers):
        layer = f"layers.{i}"
        qkv = norm(x, f"{layer}.attention_norm") @ weights[f"{layer}.attention.wqkv.weight"].T
        kv = gpt.kv_heads * head
        q = rotate(qkv[..., :width].view(batch, length, gpt.heads, head))
        k = rotate(qkv[..., width : width + kv].view(batch, length, gpt.kv_heads, head))
        v = qkv[..., width + kv :].view(batch, length, gpt.kv_heads, head)
        mixed = []
        for h in range(gpt.heads):
            shared = h * gpt.kv_heads // gpt.heads
            scores = q[:, :, h] @ k[:, :, shared].mT / math.sqrt(head)
            mixed.append(scores.masked_fill(future, -math.inf).softmax(-1) @ v[:, :, shared])
        x = x + torch.cat(mixed, dim=-1) @ weights[f"{layer}.attention.wo.weight"].T
        h = norm(x, f"{layer}.ffn_norm")
        gate = F.silu(h @ weights[f"{layer}.feed_forward.w1.weight"].T)
        h = gate * (h @ weights[f"{layer}.feed_forward.w3.weight"].T)
        x = x + h @ weights[f"{layer}.feed_forward.w2.weight"].T
    return norm(x, "norm") @ weights["output.weight"].T


# --- Tokenizer ------------------------------------------------------------------------------------


class VQ(NamedTuple):
    channels: int
    encoder: tuple[int, ...]
    decoder: tuple[int, ...]
    blocks: int
    latent: int
    codes: int
    code_dim: int
    attention: frozenset[int]  # levels, 0 being the largest
    middle: bool
    l2_norm: bool
    decoder_blocks: int


def vq_shapes(vq: VQ) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}

    def conv(name: str, fan_in: int, fan_out: int, kernel: int = 3) -> None:
        shapes[f"{name}.weight"] = (fan_out, fan_in, kernel, kernel)
        shapes[f"{name}.bias"] = (fan_out,)

    def norm(name: str, width: int) -> None:
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (width,)

    def residual(name: str, fan_in: int, fan_out: int) -> None:
        norm(f"{name}.norm1", fan_in)
        conv(f"{name}.conv1", fan_in, fan_out)
        norm(f"{name}.norm2", fan_out)
        conv(f"{name}.conv2", fan_out, fan_out)
        if fan_in != fan_out:
            conv(f"{name}.nin_shortcut", fan_in, fan_out, 1)

    def attention(name: str, width: int) -> None:
        norm(f"{name}.norm", width)
        for part in ("q", "k", "v", "proj_out"):
            conv(f"{name}.{part}", width, width, 1)

    def middle(name: str, width: int) -> None:
        residual(f"{name}.0", width, width)
        if vq.middle:
            attention(f"{name}.1", width)
        residual(f"{name}.{2 if vq.middle else 1}", width, width)

    def levels(coder: str, width: int, order: list[int], multipliers: tuple[int, ...]) -> int:
        for i, level in enumerate(order):
            name = f"{coder}.conv_blocks.{i}"
            for block in range(vq.blocks if coder == "encoder" else vq.decoder_blocks):
                residual(f"{name}.res.{block}", width, vq.channels * multipliers[level])
                width = vq.channels * multipliers[level]
                if level in vq.attention:
                    attention(f"{name}.attn.{block}", width)
            if i < len(order) - 1:
                conv(f"{name}.{'up' if coder == 'decoder' else 'down'}sample.conv", width, width)
        return width

    order = list(range(len(vq.encoder)))
    conv("encoder.conv_in", 3, vq.channels)
    width = levels("encoder", vq.channels, order, vq.encoder)
    middle("encoder.mid", width)
    norm("encoder.norm_out", width)
    conv("encoder.conv_out", width, vq.latent)
    width = vq.channels * vq.decoder[-1]
    conv("decoder.conv_in", vq.latent, width)
    middle("decoder.mid", width)
    width = levels("decoder", width, order[::-1], vq.decoder)
    norm("decoder.norm_out", width)
    conv("decoder.conv_out", width, 3)
    conv("quant_conv", vq.latent, vq.code_dim, 1)
    conv("post_quant_conv", vq.code_dim, vq.latent, 1)
    return shapes | {"quantize.embedding.weight": (vq.codes, vq.code_dim)}


class Network:
    """The modules of the tokenizer as functions."""

    def __init__(self, weights: Weights) -> None:
        self.weights = weights

    def conv(self, name: str, x: Tensor, **more: int) -> Tensor:
        return F.conv2d(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"], **more)

    def norm(self, name: str, x: Tensor) -> Tensor:
        weight, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        return F.group_norm(x, 32, weight, bias, eps=1e-6)

    def residual(self, name: str, x: Tensor) -> Tensor:
        h = self.conv(f"{name}.conv1", F.silu(self.norm(f"{name}.norm1", x)), padding=1)
        h = self.conv(f"{name}.conv2", F.silu(self.norm(f"{name}.norm2", h)), padding=1)
        if f"{name}.nin_shortcut.weight" in self.weights:
            x = self.conv(f"{name}.nin_shortcut", x)
        return x + h

    def attention(self, name: str, x: Tensor) -> Tensor:
        h = self.norm(f"{name}.norm", x)
        q, k, v = (self.conv(f"{name}.{part}", h).flatten(2) for part in "qkv")
        mix = (q.mT @ k / math.sqrt(x.shape[1])).softmax(-1)
        return x + self.conv(f"{name}.proj_out", (v @ mix.mT).view_as(x))

    def block(self, name: str, x: Tensor) -> Tensor:
        if f"{name}.conv1.weight" in self.weights:
            return self.residual(name, x)
        return self.attention(name, x) if f"{name}.q.weight" in self.weights else x

    def middle(self, name: str, x: Tensor) -> Tensor:
        for i in range(3):
            x = self.block(f"{name}.{i}", x)
        return x

    def levels(self, coder: str, x: Tensor, vq: VQ) -> Tensor:
        for i in range(len(vq.encoder)):
            name = f"{coder}.conv_blocks.{i}"
            for block in range(vq.blocks if coder == "encoder" else vq.decoder_blocks):
                x = self.block(f"{name}.res.{block}", x)
                x = self.block(f"{name}.attn.{block}", x)
            if f"{name}.downsample.conv.weight" in self.weights:
                x = self.conv(f"{name}.downsample.conv", F.pad(x, (0, 1, 0, 1)), stride=2)
            if f"{name}.upsample.conv.weight" in self.weights:
                x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
                x = self.conv(f"{name}.upsample.conv", x, padding=1)
        return x


def codebook(weights: Weights, vq: VQ) -> Tensor:
    vectors = weights["quantize.embedding.weight"]
    return F.normalize(vectors, dim=-1) if vq.l2_norm else vectors


def vq_distances(weights: Weights, vq: VQ, images: Tensor) -> Tensor:
    """Squared distances of the encoder's vectors to all codes: (B, L, codes)."""
    net = Network(weights)
    x = net.levels("encoder", net.conv("encoder.conv_in", images, padding=1), vq)
    x = F.silu(net.norm("encoder.norm_out", net.middle("encoder.mid", x)))
    x = net.conv("quant_conv", net.conv("encoder.conv_out", x, padding=1)).flatten(2).mT
    x = F.normalize(x, dim=-1) if vq.l2_norm else x
    return (x[:, :, None] - codebook(weights, vq)).square().sum(-1)


def vq_decode(weights: Weights, vq: VQ, codes: Tensor) -> Tensor:
    """Codes (B, L) -> images, not clamped."""
    net = Network(weights)
    side = math.isqrt(codes.shape[1])
    x = codebook(weights, vq)[codes].mT.unflatten(2, (side, side))
    x = net.conv("decoder.conv_in", net.conv("post_quant_conv", x), padding=1)
    x = net.levels("decoder", net.middle("decoder.mid", x), vq)
    return net.conv("decoder.conv_out", F.silu(net.norm("decoder.norm_out", x)), padding=1)


def random_weights(shapes: Mapping[str, tuple[int, ...]], seed: int = 0) -> dict[str, Tensor]:
    """Weights of about the scale of trained ones, so that every part matters to the outputs."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in shapes.items():
        values = torch.randn(shape, generator=generator)
        if "norm" in name:
            values = name.endswith("weight") + 0.1 * values
        elif len(shape) > 1 and "embedding" not in name:
            values = values / math.sqrt(math.prod(shape[1:]))
        weights[name] = values
    return weights
