"""Released LlamaGen checkpoints -> pipelines with identity clusters.

The format is that of FoundationVision/LlamaGen (MIT; arXiv 2406.06525): a .pt file whose state
dict stands under "model" (its trainings), "module" (deepspeed), "state_dict", or alone (FSDP).
Nothing in such a file is executed: it is read as tensors, plain values and the
`argparse.Namespace` that LlamaGen's trainings store under "args".

What no tensor tells is taken from the released sizes: heads by width and layers, 32 groups in the
tokenizer's normalisation, a look-up by cosine, and a class token whose RoPE entry is zero.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ctf.common import claims, config, storage
from ctf.common.config import did_you_mean
from ctf.common.errors import UserError
from ctf.common.weights import init_empty_weights
from ctf.data.imagenet import imagenet_classes
from ctf.models import clusters
from ctf.models.coarse import CoarseModel
from ctf.models.sampling import Sampling
from ctf.models.sizes import LLAMAGEN_SIZES, TransformerShape
from ctf.models.tokenizer import TokenizerConfig, VQModel
from ctf.pipelines.folder import (
    SETTINGS,
    PipelineSettings,
    load_settings,
    save,
    to_channels_last,
)
from ctf.pipelines.pipeline import Pipeline

IMAGE_SIZE = 256  # pixels a side, where nothing says otherwise
GROUPS = 32

# The guidance that LlamaGen's GETTING_STARTED.md samples each size with.
GUIDANCE = {"B": 2.0, "L": 2.0, "XL": 1.75, "XXL": 1.75, "3B": 1.65}

# Shapes that are known by their tensors: the released ones, and that of the parity tests.
FIXTURE = "fixture"
SHAPES = {**LLAMAGEN_SIZES, FIXTURE: TransformerShape(width=64, layers=2, heads=4)}
FIXTURE_IMAGE_SIZE = 8

CODEBOOK, EMBEDDING = "quantize.embedding.weight", "tok_embeddings.weight"
CLASSES = "cls_embedding.embedding_table.weight"
WRAPPERS = ("model", "module", "state_dict")
PREFIXES = ("module.", "_orig_mod.")  # of DDP and torch.compile
# Beside the weights: RoPE's table, what a sampling left behind, a count of the codes in use.
NOT_WEIGHTS = re.compile(r"freqs_cis|causal_mask|quantize\.codebook_used|.*\.kv_cache\.[kv]_cache")
# Beside a bare state dict.
NOT_TENSORS = ("optimizer", "steps", "args", "epoch", "epochs")


def load(
    vq: str | Path,
    gpt: str | Path,
    *,
    size: str | None = None,
    image_size: int | None = None,
    device: torch.device | str = "cpu",
) -> Pipeline:
    """The full-vocabulary pipeline of a released tokenizer and transformer, in float32.

    Args:
        vq: e.g. vq_ds16_c2i.pt.
        gpt: e.g. c2i_B_256.pt; class-conditional.
        size: B, L, XL, XXL or 3B; None: by the shapes of its tensors.
        image_size: pixels a side that `gpt` was trained for; None: what the file says, or 256.

    Raises:
        UserError: a file that is not there, truncated, holds code, or tensors of another shape or
            that are not finite; a tokenizer and a transformer that don't belong together.
    """
    pipe = _assemble(Path(vq), Path(gpt), size, image_size)
    place = torch.device(device)
    # Copied: what is read from the disk as it is needed would change with the file.
    for model in (pipe.tokenizer, pipe.coarse):
        for parameter in model.parameters():
            parameter.data = parameter.to(torch.float32, copy=True)
    pipe.tokenizer = to_channels_last(pipe.tokenizer, place)
    pipe.coarse.to(place)
    pipe.clusters = pipe.clusters.to(place)
    return pipe


def convert(
    vq: str | Path,
    gpt: str | Path | None,
    out: str | Path,
    *,
    size: str | None = None,
    image_size: int | None = None,
    dry_run: bool = False,
) -> str:
    """Writes what `load` gives into the folder `out`, the weights in the precision they came in.

    Args:
        gpt: None writes the tokenizer alone: a run whose next stage are tokens.
        dry_run: read and check everything, and write nothing.

    Returns:
        What was written, in a line.

    Raises:
        UserError: see `load`; `out` exists and holds something else.
    """
    vq, out = Path(vq), Path(out)
    if gpt is None:
        tokenizer = _tokenizer(read(vq), vq, image_size or IMAGE_SIZE)
        if not dry_run:
            _save_tokenizer(tokenizer, out)
        return f"{out / 'tokenizer'}: {_size_of(tokenizer)}"
    gpt = Path(gpt)
    pipe = _assemble(vq, gpt, size, image_size)
    pipe.origin["converted_from"] |= {
        kind: {"file": path.name, "sha256": storage.hash_file(path)}
        for kind, path in (("vq", vq), ("gpt", gpt))
    }
    _check_vacant(out, pipe)
    if not dry_run:
        save(pipe, out, dtype=None)
    return (
        f"{out}: tokenizer of {_size_of(pipe.tokenizer)}; transformer of {_millions(pipe.coarse)}, "
        f"{pipe.coarse.config.classes} classes, guidance {pipe.sampling.guidance}"
    )


def _size_of(tokenizer: VQModel) -> str:
    shape = tokenizer.config
    return (
        f"{_millions(tokenizer)}, {shape.image_size} pixels -> {shape.grid} x {shape.grid} "
        f"of {shape.codebook_size} codes"
    )


def _millions(model: nn.Module) -> str:
    return f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters"


def _check_vacant(out: Path, pipe: Pipeline) -> None:
    """What is there is only ever replaced by the same."""
    if claims.is_ours(out, SETTINGS, what="a pipeline"):
        stored = config.to_json(load_settings(out))
        settings = PipelineSettings(pipe.class_names, pipe.sampling, pipe.origin)
        claims.check_same(out, stored, config.to_json(settings), what="a pipeline")


def _save_tokenizer(tokenizer: VQModel, out: Path) -> None:
    folder = out / "tokenizer"
    stored = {"model": config.to_json(tokenizer.config)}
    if claims.is_ours(out, "tokenizer/config.json", what="a run of ctf"):
        claims.check_same(
            folder, storage.load_json(folder / "config.json"), stored, what="a tokenizer"
        )
    storage.save_json(folder / "config.json", stored)
    storage.save_tensors(folder / "model.safetensors", tokenizer.state_dict())


# --- Reading --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Stored:
    """A checkpoint's weights by LlamaGen's names, and what else of it is of use.

    rope: its table of RoPE, (1 + codes, pairs, 2), where the file has one.
    asked: the arguments of the training that wrote the file, where it has them.
    """

    weights: dict[str, Tensor]
    rope: Tensor | None
    asked: dict[str, Any]


def read(path: Path) -> Stored:
    """The weights in a LlamaGen checkpoint, mapped from the disk where its format allows it.

    Raises:
        UserError: not found, truncated, something else, or a pickle with code in it (not run).
    """
    content = storage.load_pt(path, [argparse.Namespace])
    return _stored(content, path)


def _stored(content: Any, path: Path) -> Stored:
    if not isinstance(content, Mapping):
        raise UserError(f"{path}: got {type(content).__name__}, expected a state dict of LlamaGen")
    inner = next((content[w] for w in WRAPPERS if isinstance(content.get(w), Mapping)), content)
    weights, rope = {}, None
    for name, value in inner.items():
        if not isinstance(name, str):
            raise UserError(f"{path}: key {name!r} of its state dict is not a name")
        while name.startswith(PREFIXES):
            name = name.partition(".")[2]
        if name == "freqs_cis" and isinstance(value, Tensor):
            rope = value
        if NOT_WEIGHTS.fullmatch(name) or (inner is content and name in NOT_TENSORS):
            continue
        if not (isinstance(value, Tensor) and value.is_floating_point()):
            raise UserError(
                f"{path}: {name!r} is {_describe(value)}, expected floating-point weights; "
                "is this a checkpoint of LlamaGen?"
            )
        weights[name] = value
    asked = content.get("args")
    return Stored(weights, rope, vars(asked) if isinstance(asked, argparse.Namespace) else {})


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of {str(value.dtype).removeprefix('torch.')}"
    return f"of type {type(value).__name__}"


def _fill(
    model: nn.Module, theirs: Mapping[str, str], stored: Stored, path: Path, hint: str
) -> None:
    """Gives a model on the meta device its weights; `theirs`: our names to LlamaGen's."""
    own = model.state_dict()
    for ours, name in theirs.items():
        expected = tuple(own[ours].shape)
        if name not in stored.weights:
            raise UserError(f"{path}: tensor {name!r} is missing, expected of {expected}{hint}")
        got = stored.weights[name]
        if tuple(got.shape) != expected:
            raise UserError(
                f"{path}: tensor {name!r} has shape {tuple(got.shape)}, expected {expected}{hint}"
            )
        # In one pass and without a copy; a NaN goes through.
        if not all(math.isfinite(float(bound)) for bound in got.aminmax()):
            raise UserError(f"{path}: tensor {name!r} has values that are not finite")
    if unknown := sorted(stored.weights.keys() - theirs.values()):
        raise UserError(
            f"{path}: unknown tensor {unknown[0]!r}"
            + (f" and {len(unknown) - 1} more" if len(unknown) > 1 else "")
            + hint
        )
    weights = {ours: stored.weights[name] for ours, name in theirs.items()}
    model.load_state_dict(weights, assign=True)
    model.eval().requires_grad_(False)


def _assemble(vq: Path, gpt: Path, size: str | None, image_size: int | None) -> Pipeline:
    """The pipeline as it is stored: weights of any precision, mapped from the disk."""
    stored_vq, stored_gpt = read(vq), read(gpt)
    for stored, path, key, name in (
        (stored_vq, vq, CODEBOOK, "tokenizer (--vq)"),
        (stored_gpt, gpt, EMBEDDING, "transformer (--gpt)"),
    ):
        _check_kind(stored, path, key, name)
    found = _size(stored_gpt, gpt, size)
    image_size = image_size or _image_size(stored_vq, stored_gpt, found)
    tokenizer = _tokenizer(stored_vq, vq, image_size)
    coarse = _transformer(stored_gpt, gpt, found, tokenizer.grid)
    if coarse.vocab_size != tokenizer.config.codebook_size:
        raise UserError(
            f"{gpt} predicts {coarse.vocab_size} codes, but {vq} has "
            f"{tokenizer.config.codebook_size}: they don't belong together"
        )
    return Pipeline(
        tokenizer,
        clusters.identity(coarse.vocab_size),
        coarse,
        None,
        _class_names(coarse.config.classes),
        Sampling(guidance=GUIDANCE.get(found, Sampling.guidance)),
        {"converted_from": {"project": "LlamaGen", "size": found}},
    )


def _check_kind(stored: Stored, path: Path, key: str, name: str) -> None:
    if key in stored.weights:
        return
    others = {CODEBOOK: "tokenizer", EMBEDDING: "transformer"}
    other = next((kind for k, kind in others.items() if k in stored.weights), None)
    reason = f"it is a {other}" if other else f"there is no tensor {key!r}"
    raise UserError(f"{path}: not a LlamaGen {name}: {reason}")


def _class_names(count: int) -> tuple[str, ...]:
    if count == 1000:
        return tuple(imagenet_classes().values())
    return tuple(map(str, range(count)))


# --- The transformer ------------------------------------------------------------------------------


def _size(stored: Stored, path: Path, asked: str | None) -> str:
    """The name of the size: what was asked for, or what width and layers are those of."""
    if asked is not None:
        if asked not in SHAPES:
            raise UserError(f"unknown size {asked!r}{did_you_mean(asked, LLAMAGEN_SIZES)}")
        return asked
    found = _fitting(stored)
    if found is None:
        width, layers = _width_layers(stored)
        sizes = ", ".join(f"{n} ({s.width}, {s.layers})" for n, s in LLAMAGEN_SIZES.items())
        raise UserError(
            f"{path}: width {width} and {layers} layers are those of no released size: {sizes}"
        )
    return found


def _width_layers(stored: Stored) -> tuple[int, int]:
    numbers = [re.match(r"layers\.(\d+)\.", name) for name in stored.weights]
    layers = 1 + max((int(n[1]) for n in numbers if n), default=-1)
    return stored.weights[EMBEDDING].shape[-1], layers


def _fitting(stored: Stored) -> str | None:
    got = _width_layers(stored)
    return next((name for name, s in SHAPES.items() if (s.width, s.layers) == got), None)


def _image_size(vq: Stored, gpt: Stored, size: str) -> int:
    """Pixels a side, from RoPE's table or the training's arguments, where the file has them."""
    if gpt.rope is not None:
        return math.isqrt(len(gpt.rope)) * 2 ** (_levels(vq) - 1)
    asked = gpt.asked.get("image_size")
    if isinstance(asked, int):
        return asked
    return FIXTURE_IMAGE_SIZE if size == FIXTURE else IMAGE_SIZE


def _transformer(stored: Stored, path: Path, size: str, grid: int) -> CoarseModel:
    vocab_size = len(stored.weights[EMBEDDING])
    classes = stored.weights.get(CLASSES)
    if classes is None:
        raise UserError(
            f"{path}: tensor {CLASSES!r} is missing; only class-conditional transformers can be "
            "used, not those for text"
        )
    # The last row stands for "no class".
    shape = SHAPES[size].config(grid, len(classes) - 1)
    shape = dataclasses.replace(shape, class_token_rope="zero")
    fits = _fitting(stored)
    hint = f" in size {size}" + (f"; size {fits} would fit" if fits not in (None, size) else "")
    if stored.rope is not None and len(stored.rope) != 1 + shape.length:
        side = math.isqrt(len(stored.rope))
        raise UserError(
            f"{path}: trained for {side} x {side} codes, expected {grid} x {grid}; "
            "choose another --image-size"
        )
    with init_empty_weights():
        model = CoarseModel(shape, vocab_size)
    _fill(model, {ours: _gpt_name(ours) for ours in model.state_dict()}, stored, path, hint)
    return model


GPT_NAMES = (
    ("head.", "output."),
    ("backbone.", ""),
    ("class_embedding.", "cls_embedding.embedding_table."),
    ("label_embedding.", "tok_embeddings."),
    ("attention.qkv.", "attention.wqkv."),
    ("attention.out.", "attention.wo."),
    ("ffn.", "feed_forward."),
)


def _gpt_name(ours: str) -> str:
    """LlamaGen's name of one of our tensors."""
    for prefix, theirs in GPT_NAMES:
        ours = ours.replace(prefix, theirs)
    return ours


# --- The tokenizer --------------------------------------------------------------------------------


def _tokenizer(stored: Stored, path: Path, image_size: int) -> VQModel:
    """The tokenizer, all of whose sizes but that of the pictures are told by its tensors."""
    _check_kind(stored, path, CODEBOOK, "tokenizer (--vq)")
    weights = stored.weights
    try:
        channels = len(weights["encoder.conv_in.weight"])
        levels = _levels(stored)
        widths = [
            len(weights[f"encoder.conv_blocks.{level}.res.0.conv2.weight"])
            for level in range(levels)
        ]
        codes, code_dim = weights[CODEBOOK].shape
        latent = len(weights["encoder.conv_out.weight"])
    except (KeyError, ValueError) as error:
        raise UserError(f"{path}: not a LlamaGen tokenizer: tensor {error} is missing") from None
    blocks = sum(
        re.fullmatch(r"encoder\.conv_blocks\.0\.res\.\d+\.conv1\.weight", name) is not None
        for name in weights
    )
    shape = TokenizerConfig(
        image_size=image_size,
        codebook_size=codes,
        code_dim=code_dim,
        channels=channels,
        multipliers=tuple(width // channels for width in widths),
        blocks=blocks,
        latent_channels=latent,
        groups=GROUPS,
    )
    with init_empty_weights():
        model = VQModel(shape)
    _fill(model, {ours: _vq_name(ours, shape) for ours in model.state_dict()}, stored, path, "")
    return model


def _levels(vq: Stored) -> int:
    numbers = [re.match(r"encoder\.conv_blocks\.(\d+)\.", name) for name in vq.weights]
    return 1 + max((int(n[1]) for n in numbers if n), default=-1)


VQ_NAMES = {
    "to_code": "quant_conv", "from_code": "post_quant_conv", "embedding": "quantize.embedding",
    "input": "conv_in", "norm": "norm_out", "output": "conv_out",
}  # fmt: skip
VQ_BLOCK_NAMES = {
    "skip": "nin_shortcut", "query": "q", "key": "k", "value": "v", "output": "proj_out",
}  # fmt: skip


def _vq_name(ours: str, shape: TokenizerConfig) -> str:
    """LlamaGen's name of one of our tensors."""
    path, _, kind = ours.rpartition(".")
    coder, *inner = path.split(".")
    if not inner:
        return f"{VQ_NAMES[coder]}.{kind}"
    if len(inner) == 1:
        return f"{coder}.{VQ_NAMES[inner[0]]}.{kind}"
    place, number, part = inner
    block = f"mid.{number}" if place == "middle" else _blocks(coder, shape)[int(number)]
    return f"{coder}.{block}.{VQ_BLOCK_NAMES.get(part, part)}.{kind}"


def _blocks(coder: str, shape: TokenizerConfig) -> list[str]:
    """LlamaGen's names of what is one sequence here: it keeps the residual blocks and the attention
    of each level in two lists, and what halves or doubles the sides beside them.
    """
    encodes = coder == "encoder"
    last = len(shape.multipliers) - 1
    names = []
    for level in range(last + 1):
        for block in range(shape.blocks + (not encodes)):
            names.append(f"conv_blocks.{level}.res.{block}")
            if level == (last if encodes else 0):  # the decoder begins with the smallest maps
                names.append(f"conv_blocks.{level}.attn.{block}")
        if level < last:
            names.append(f"conv_blocks.{level}.{'downsample' if encodes else 'upsample'}")
    return names
