"""The transformer of a LlamaGen checkpoint: its shape, its heads, and its tensors by our names."""

from __future__ import annotations

import dataclasses
import math

import torch

from ctf.common.config import did_you_mean
from ctf.common.errors import UserError
from ctf.common.weights import init_empty_weights
from ctf.models.coarse import CoarseModel
from ctf.models.sizes import LLAMAGEN_SIZES, TransformerShape
from ctf.models.transformer import TransformerConfig, rotation_table
from ctf.pipelines.llamagen.checkpoint import EMBEDDING, Checkpoint, assign_weights

CLASSES = "cls_embedding.embedding_table.weight"
QKV = "layers.{}.attention.wqkv.weight"
HEAD_DIM = 64  # of LlamaGen's sizes, 3B and 7B apart
GPT_7B = TransformerShape(width=4096, layers=32, heads=32)  # in LlamaGen's code, not released

GPT_NAMES = {
    "head.": "output.", "backbone.": "", "ffn.": "feed_forward.",
    "class_embedding.": "cls_embedding.embedding_table.", "label_embedding.": "tok_embeddings.",
    "attention.qkv.": "attention.wqkv.", "attention.out.": "attention.wo.",
}  # fmt: skip


def gpt_name(name: str) -> str:
    """Return LlamaGen's name for a tensor of the coarse model."""
    for ours, theirs in GPT_NAMES.items():
        name = name.replace(ours, theirs)
    return name


def size_name(width: int, layers: int) -> str | None:
    """Return LlamaGen's name of a size; None if it is not one of the released."""
    shapes = ((name, (s.width, s.layers)) for name, s in LLAMAGEN_SIZES.items())
    return next((name for name, shape in shapes if shape == (width, layers)), None)


def transformer_shape(
    gpt: Checkpoint, heads: int | None = None, size: str | None = None
) -> tuple[TransformerConfig, str]:
    """Return the shape of a transformer, for a grid of one code, and its heads for people.

    Args:
        gpt: Its checkpoint.
        heads: Their number; by default that of the table of RoPE if the file has it, of the size in
            LlamaGen, or width / 64.
        size: A released size that it must have.

    Raises:
        UserError: It is none of LlamaGen's class-conditional transformers, `heads` or `size`
            contradict its tensors, or `heads` have to be given.
    """
    gpt.check_kind("transformer")
    _check_condition(gpt)
    (rows, width), layers = gpt.shape(CLASSES, 2), gpt.count("layers.")
    if size is not None:
        _check_size(gpt, size, width, layers)
    heads, note = _find_heads(gpt, width, layers, heads)
    if size is not None and heads != LLAMAGEN_SIZES[size].heads:
        raise UserError(
            f"{gpt.path}: got {heads} heads, expected {LLAMAGEN_SIZES[size].heads} in size {size}"
        )
    shape = TransformerConfig(
        width=width,
        layers=layers,
        heads=heads,
        grid=1,
        classes=rows - 1,  # the last row is "no class"
        class_token_rope="zero" if gpt.rope is None or not gpt.rope[0].any() else "identity",
    )
    ffn_width = gpt.shape("layers.0.feed_forward.w1.weight", 2)[0]
    if ffn_width != shape.ffn_width:
        shape = dataclasses.replace(shape, ffn_hidden=ffn_width)
    return shape, note


def _check_condition(gpt: Checkpoint) -> None:
    """Check that one class token, which may be "no class", is followed by a square of labels."""
    if CLASSES not in gpt.weights:
        others = [name for name in gpt.weights if name.startswith("cls_embedding.")]
        found = f" (but there is {others[0]!r})" if others else ""
        raise UserError(
            f"{gpt.path}: tensor {CLASSES!r} is missing{found}; only class-conditional "
            "transformers are supported, not those for text"
        )
    args, rows = gpt.training_args, gpt.shape(CLASSES, 2)[0]
    if rows == args.get("num_classes"):
        raise UserError(
            f"{gpt.path}: trained without class dropout: {CLASSES!r} has {rows} rows for {rows} "
            f"classes, expected {rows + 1}, the last for no class"
        )
    if (tokens := args.get("cls_token_num", 1)) != 1:
        raise UserError(f"{gpt.path}: trained with {tokens} class tokens, expected 1")
    if gpt.rope is not None:
        table = tuple(gpt.rope.shape)
        square = math.isqrt(table[0]) ** 2 if table else 0
        if table[:1] + table[2:] != (1 + square, 2) or 0 in (square, *table):
            raise UserError(
                f"{gpt.path}: got a table of RoPE of shape {table}, expected (1 + labels, pairs, "
                "2), for one class token and a square of labels"
            )


def _check_size(gpt: Checkpoint, size: str, width: int, layers: int) -> None:
    if size not in LLAMAGEN_SIZES:
        raise UserError(f"unknown size {size!r}{did_you_mean(size, LLAMAGEN_SIZES)}")
    expected, fitting = LLAMAGEN_SIZES[size], size_name(width, layers)
    hint = f"size {size}" + (f"; size {fitting} would fit" if fitting else "; omit the size")
    if width != expected.width:
        rows = len(gpt.weights[CLASSES])
        raise UserError(
            f"{gpt.path}: tensor {CLASSES!r} has shape ({rows}, {width}), "
            f"expected ({rows}, {expected.width}) in {hint}"
        )
    if layers != expected.layers:
        raise UserError(f"{gpt.path}: got {layers} layers, expected {expected.layers} in {hint}")


def _find_heads(gpt: Checkpoint, width: int, layers: int, chosen: int | None) -> tuple[int, str]:
    """Return the number of heads, and for people how it is known."""
    kv_width = _kv_width(gpt, width)
    if width % 4:
        raise UserError(f"{gpt.path}: got width {width}, expected a multiple of 4")
    # Half of a head's pairs rotate with the row, half with the column.
    possible = [
        heads
        for heads in range(1, width // 4 + 1)
        if width % (4 * heads) == 0 and kv_width % (width // heads) == 0
    ]
    likely = [heads for heads in possible if 16 <= width // heads <= 128] or possible
    sizes = (*LLAMAGEN_SIZES.values(), GPT_7B)
    same = [s.heads for s in sizes if (s.width, s.layers) == (width, layers)]
    by_rope = None if gpt.rope is None else width // (2 * gpt.rope.shape[1])
    if chosen is not None:
        heads, reason = chosen, "as chosen"
    elif by_rope is not None:
        heads, reason = by_rope, "by its table of RoPE"
    elif same:
        heads, reason = same[0], "as in LlamaGen"
    elif width % HEAD_DIM == 0:
        heads, reason = width // HEAD_DIM, f"width / {HEAD_DIM}; others with --heads"
    else:
        heads, reason = 0, ""
    if by_rope not in (None, heads):
        raise UserError(f"{gpt.path}: got {heads} heads, expected {by_rope} by its table of RoPE")
    if heads not in possible:
        got = f"got {heads} heads with" if reason else "the number of heads does not follow from"
        raise UserError(
            f"{gpt.path}: {got} width {width} and {layers} layers\n"
            f"expected --heads as in its training, e.g. {', '.join(map(str, likely))}"
        )
    kv_heads = kv_width * heads // width
    shared = f", of keys and values {kv_heads}" if kv_heads < heads else ""
    return heads, f"heads {heads}{shared} ({reason})"


def _kv_width(gpt: Checkpoint, width: int) -> int:
    """Return the width of the keys, which is less than `width` in grouped-query attention."""
    rows = gpt.shape(name := QKV.format(0), 2)[0]
    kv_width = (rows - width) // 2
    if kv_width < 1 or width % kv_width or rows != width + 2 * kv_width:
        raise UserError(
            f"{gpt.path}: tensor {name!r} has shape {tuple(gpt.weights[name].shape)}, "
            f"expected ({3 * width}, {width})"
        )
    return kv_width


def load_transformer(gpt: Checkpoint, shape: TransformerConfig) -> CoarseModel:
    """Return the transformer of a checkpoint, in the precision of the file.

    Raises:
        UserError: A tensor is missing, unknown, of another shape, or not finite; the table of RoPE
            is another one.
    """
    if gpt.rope is not None and gpt.rope.any():  # else it was never filled
        expected = rotation_table(shape, torch.device("cpu"))
        if not torch.allclose(gpt.rope.float(), expected, rtol=0, atol=0.01):
            raise UserError(
                f"{gpt.path}: its table of RoPE is not LlamaGen's of {shape.grid} x {shape.grid} "
                f"codes with base {shape.rope_base:g}, and no other is supported"
            )
    with init_empty_weights():
        model = CoarseModel(shape, gpt.shape(EMBEDDING, 2)[0])
    names = {name: gpt_name(name) for name in model.state_dict()}
    assign_weights(model, names, _repeat_keys_and_values(gpt, shape))
    return model


def _repeat_keys_and_values(gpt: Checkpoint, shape: TransformerConfig) -> Checkpoint:
    """Give every head its own keys and values, where heads share them: the model is the same."""
    width, kv_width = shape.width, _kv_width(gpt, shape.width)
    if kv_width == width:
        return gpt
    weights = dict(gpt.weights)
    for name in map(QKV.format, range(shape.layers)):
        if name in weights and weights[name].shape == (width + 2 * kv_width, width):
            q, *kv = weights[name].split([width, kv_width, kv_width])
            heads = (part.unflatten(0, (-1, shape.head_dim)) for part in kv)
            repeated = (
                part.repeat_interleave(width // kv_width, 0).flatten(0, 1) for part in heads
            )
            weights[name] = torch.cat([q, *repeated])
    return dataclasses.replace(gpt, weights=weights)
