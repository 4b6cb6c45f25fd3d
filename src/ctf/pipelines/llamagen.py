"""Released LlamaGen checkpoints -> full-vocabulary pipelines.

The format is that of FoundationVision/LlamaGen (MIT; arXiv 2406.06525): a .pt file whose state
dict is under "model" (its own training), "module" (DeepSpeed), "state_dict", or at the top (FSDP).
Nothing in such a file is executed: it is read as tensors, plain values and the
`argparse.Namespace` that LlamaGen's training stores under "args".

What the tensors do not tell is that of the released models: the number of heads for each width and
number of layers, 32 groups in the tokenizer's normalisation, code look-up by cosine similarity, and
a class token whose RoPE entry is zero.
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
from ctf.common.weights import describe_parameters, init_empty_weights
from ctf.data.imagenet import imagenet_classes
from ctf.models import clusters
from ctf.models.coarse import CoarseModel
from ctf.models.sampling import Sampling
from ctf.models.sizes import LLAMAGEN_SIZES
from ctf.models.tokenizer import TokenizerConfig, VQModel
from ctf.pipelines import folder
from ctf.pipelines.pipeline import Pipeline

IMAGE_SIZE = 256  # pixels per side, if the file does not tell
# The guidance scale that LlamaGen's GETTING_STARTED.md uses for each size.
GUIDANCE = {"B": 2.0, "L": 2.0, "XL": 1.75, "XXL": 1.75, "3B": 1.65}

CODEBOOK, EMBEDDING = "quantize.embedding.weight", "tok_embeddings.weight"
KINDS = {"tokenizer": CODEBOOK, "transformer": EMBEDDING}  # and a tensor that the other has not
CLASSES = "cls_embedding.embedding_table.weight"
WRAPPERS = ("model", "module", "state_dict")
PREFIXES = ("module.", "_orig_mod.")  # of DDP and torch.compile
# Entries of a state dict that are not weights, and what a state dict at the top has beside it.
BUFFERS = re.compile(r"freqs_cis|causal_mask|quantize\.codebook_used|.*\.kv_cache\.[kv]_cache")
EXTRAS = ("optimizer", "steps", "args", "epoch", "epochs")


def load(
    vq: str | Path,
    gpt: str | Path,
    *,
    size: str | None = None,
    image_size: int | None = None,
    device: torch.device | str = "cpu",
) -> Pipeline:
    """Load a released tokenizer and transformer in float32.

    Args:
        vq: The tokenizer's file, e.g. vq_ds16_c2i.pt.
        gpt: The file of a class-conditional transformer, e.g. c2i_B_256.pt.
        size: B, L, XL, XXL or 3B; by default the one that the shapes of the tensors match.
        image_size: Pixels per side that `gpt` was trained for; by default what the file says, or
            256.
        device: Where to compute.

    Raises:
        UserError: A file is missing, truncated, contains code, or tensors that are not finite or
            have unexpected shapes; tokenizer and transformer do not belong together.
    """
    tokenizer, coarse, name = _load_models(read(Path(vq)), read(Path(gpt)), size, image_size)
    # Copies: memory-mapped weights would change with the file.
    for parameter in (*tokenizer.parameters(), *coarse.parameters()):
        parameter.data = parameter.to(torch.float32, copy=True)
    device = torch.device(device)
    return _pipeline(folder.to_channels_last(tokenizer, device), coarse.to(device), name)


def convert(
    vq: str | Path,
    gpt: str | Path | None,
    out: str | Path,
    *,
    size: str | None = None,
    image_size: int | None = None,
    dry_run: bool = False,
) -> str:
    """Write what `load` returns, in the precision of the files; return a line for the user.

    The arguments are those of `load`. Without `gpt`, the tokenizer alone is written, for a run
    whose next stage is tokens. With `dry_run`, everything is checked, and nothing is written.

    Raises:
        UserError: See `load`; `out` holds something else.
    """
    vq_checkpoint, out = read(Path(vq)), Path(out)
    if gpt is None:
        tokenizer = _load_tokenizer(vq_checkpoint, image_size or IMAGE_SIZE)
        if not dry_run:
            _save_tokenizer(tokenizer, out)
        return f"{out / 'tokenizer'}: {_describe(tokenizer)}"
    tokenizer, coarse, name = _load_models(vq_checkpoint, read(Path(gpt)), size, image_size)
    pipe = _pipeline(tokenizer, coarse, name)
    pipe.origin["converted_from"] |= {
        kind: {"file": path.name, "sha256": storage.hash_file(path)}
        for kind, path in (("vq", Path(vq)), ("gpt", Path(gpt)))
    }
    if claims.is_ours(out, folder.SETTINGS, what="a pipeline"):
        settings = folder.PipelineSettings(pipe.class_names, pipe.sampling, pipe.origin)
        stored = config.to_json(folder.load_settings(out))
        claims.check_same(out, stored, config.to_json(settings), what="a pipeline")
    if not dry_run:
        folder.save(pipe, out, dtype=None)
    return (
        f"{out}: tokenizer of {_describe(tokenizer)}; "
        f"transformer of {describe_parameters(coarse)}, {coarse.config.classes} classes, "
        f"guidance {pipe.sampling.guidance}"
    )


def _save_tokenizer(tokenizer: VQModel, out: Path) -> None:
    path = out / "tokenizer" / "config.json"
    if claims.is_ours(out, "tokenizer/config.json", what="a run of ctf"):
        content = {"model": config.to_json(tokenizer.config)}
        claims.check_same(path.parent, storage.load_json(path), content, what="a tokenizer")
    folder.save_model(tokenizer, path.parent)


def _describe(tokenizer: VQModel) -> str:
    size, grid = tokenizer.image_size, tokenizer.grid
    codes = f"{grid} x {grid} of {tokenizer.config.codebook_size} codes"
    return f"{describe_parameters(tokenizer)}, {size} pixels -> {codes}"


# --- Reading --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A LlamaGen checkpoint.

    path: Of the file.
    weights: By LlamaGen's names.
    rope: The table of RoPE, (1 + L, pairs, 2), if the file has it.
    training_args: The arguments of LlamaGen's training script, if the file has them.
    """

    path: Path
    weights: dict[str, Tensor]
    rope: Tensor | None
    training_args: dict[str, Any]

    def count(self, prefix: str) -> int:
        """Return how many numbered modules there are: prefix0., prefix1., ..."""
        names = (name.removeprefix(prefix) for name in self.weights if name.startswith(prefix))
        return len({name.partition(".")[0] for name in names})

    def check_kind(self, kind: str) -> None:
        """Raise a UserError unless this is a "tokenizer" or a "transformer"."""
        if KINDS[kind] not in self.weights:
            others = [other for other, tensor in KINDS.items() if tensor in self.weights]
            reason = f"it is a {others[0]}" if others else f"it has no tensor {KINDS[kind]!r}"
            raise UserError(f"{self.path}: not a LlamaGen {kind}: {reason}")


def read(path: Path) -> Checkpoint:
    """Read a checkpoint; its weights are memory-mapped if the format of the file allows it.

    Raises:
        UserError: The file is missing, truncated, something else, or a pickle that contains code,
            which is not executed.
    """
    content = storage.load_pt(path, [argparse.Namespace])
    if not isinstance(content, Mapping):
        raise UserError(f"{path}: got {type(content).__name__}, expected a state dict of LlamaGen")
    state = next((content[w] for w in WRAPPERS if isinstance(content.get(w), Mapping)), content)
    weights, rope = {}, None
    for name, value in state.items():
        if not isinstance(name, str):
            raise UserError(f"{path}: key {name!r} of its state dict is not a string")
        while name.startswith(PREFIXES):
            name = name.partition(".")[2]
        if name == "freqs_cis" and isinstance(value, Tensor):
            rope = value
        if BUFFERS.fullmatch(name) or (state is content and name in EXTRAS):
            continue
        if not (isinstance(value, Tensor) and value.is_floating_point()):
            kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise UserError(
                f"{path}: {name!r} is of type {kind}, expected floating-point weights; "
                "is this a checkpoint of LlamaGen?"
            )
        weights[name] = value
    args = content.get("args")
    return Checkpoint(
        path, weights, rope, vars(args) if isinstance(args, argparse.Namespace) else {}
    )


# --- Models ---------------------------------------------------------------------------------------


def _pipeline(tokenizer: VQModel, coarse: CoarseModel, size: str) -> Pipeline:
    classes = coarse.config.classes
    names = imagenet_classes().values() if classes == 1000 else map(str, range(classes))
    return Pipeline(
        tokenizer,
        clusters.identity(coarse.vocab_size).to(coarse.head.weight.device),
        coarse,
        None,
        tuple(names),
        Sampling(guidance=GUIDANCE.get(size, Sampling.guidance)),
        {"converted_from": {"project": "LlamaGen", "size": size}},
    )


def _load_models(
    vq: Checkpoint, gpt: Checkpoint, size: str | None, image_size: int | None
) -> tuple[VQModel, CoarseModel, str]:
    """Return both models, in the precision of the files, and the transformer's size."""
    vq.check_kind("tokenizer")
    gpt.check_kind("transformer")
    size = _check_size(gpt, size)
    tokenizer = _load_tokenizer(vq, image_size or _find_image_size(vq, gpt))
    coarse = _load_transformer(gpt, size, tokenizer.grid)
    if coarse.vocab_size != tokenizer.config.codebook_size:
        raise UserError(
            f"{gpt.path} predicts {coarse.vocab_size} codes, but {vq.path} has "
            f"{tokenizer.config.codebook_size}: they do not belong together"
        )
    return tokenizer, coarse, size


def _assign_weights(
    model: nn.Module, names: Mapping[str, str], checkpoint: Checkpoint, hint: str = ""
) -> None:
    """Make a checkpoint's tensors the weights of a model; `names` are LlamaGen's, by ours."""
    path, weights = checkpoint.path, checkpoint.weights
    for ours, expected in model.state_dict().items():
        name, shape = names[ours], tuple(expected.shape)
        if name not in weights:
            raise UserError(f"{path}: tensor {name!r} of shape {shape} is missing{hint}")
        if (got := tuple(weights[name].shape)) != shape:
            raise UserError(f"{path}: tensor {name!r} has shape {got}, expected {shape}{hint}")
        # One pass and no copy; aminmax passes NaN on.
        if not all(math.isfinite(float(bound)) for bound in weights[name].aminmax()):
            raise UserError(f"{path}: tensor {name!r} has values that are not finite")
    if unknown := sorted(weights.keys() - names.values()):
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise UserError(f"{path}: unknown tensor {unknown[0]!r}{more}{hint}")
    model.load_state_dict({ours: weights[name] for ours, name in names.items()}, assign=True)
    model.eval().requires_grad_(False)


# --- The transformer ------------------------------------------------------------------------------

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


def _width_and_layers(gpt: Checkpoint) -> tuple[int, int]:
    return gpt.weights[EMBEDDING].shape[-1], gpt.count("layers.")


def _matching_size(gpt: Checkpoint) -> str | None:
    """Return the released size of the checkpoint's width and number of layers."""
    shape = _width_and_layers(gpt)
    return next((n for n, s in LLAMAGEN_SIZES.items() if (s.width, s.layers) == shape), None)


def _check_size(gpt: Checkpoint, size: str | None) -> str:
    if size is not None and size not in LLAMAGEN_SIZES:
        raise UserError(f"unknown size {size!r}{did_you_mean(size, LLAMAGEN_SIZES)}")
    found = size or _matching_size(gpt)
    if found is None:
        width, layers = _width_and_layers(gpt)
        sizes = ", ".join(f"{n} ({s.width}, {s.layers})" for n, s in LLAMAGEN_SIZES.items())
        raise UserError(
            f"{gpt.path}: width {width} and {layers} layers match no released size: {sizes}"
        )
    return found


def _find_image_size(vq: Checkpoint, gpt: Checkpoint) -> int:
    """Return the pixels per side by RoPE's table, the training's arguments, or the default."""
    if gpt.rope is not None:
        factor = 2 ** (vq.count("encoder.conv_blocks.") - 1)
        return int(math.isqrt(len(gpt.rope)) * factor)
    image_size = gpt.training_args.get("image_size")
    return image_size if isinstance(image_size, int) else IMAGE_SIZE


def _load_transformer(gpt: Checkpoint, size: str, grid: int) -> CoarseModel:
    if CLASSES not in gpt.weights:
        raise UserError(
            f"{gpt.path}: tensor {CLASSES!r} is missing; only class-conditional transformers are "
            "supported, not those for text"
        )
    classes = len(gpt.weights[CLASSES]) - 1  # the last row is "no class"
    shape = LLAMAGEN_SIZES[size].config(grid, classes)
    if gpt.rope is not None and len(gpt.rope) != 1 + shape.length:
        side = math.isqrt(len(gpt.rope))
        raise UserError(
            f"{gpt.path}: trained for {side} x {side} codes, expected {grid} x {grid}; "
            "choose another --image-size"
        )
    with init_empty_weights():
        model = CoarseModel(
            dataclasses.replace(shape, class_token_rope="zero"), len(gpt.weights[EMBEDDING])
        )
    match = _matching_size(gpt)
    hint = f" in size {size}" + (f"; size {match} would fit" if match not in (None, size) else "")
    _assign_weights(model, {name: gpt_name(name) for name in model.state_dict()}, gpt, hint)
    return model


# --- The tokenizer --------------------------------------------------------------------------------

VQ_NAMES = {
    "to_code": "quant_conv", "from_code": "post_quant_conv", "embedding": "quantize.embedding",
    "input": "conv_in", "norm": "norm_out", "output": "conv_out",
}  # fmt: skip
VQ_BLOCK_NAMES = {
    "skip": "nin_shortcut", "query": "q", "key": "k", "value": "v", "output": "proj_out",
}  # fmt: skip


def vq_name(name: str, shape: TokenizerConfig) -> str:
    """Return LlamaGen's name for a tensor of the tokenizer."""
    path, _, kind = name.rpartition(".")
    coder, *inner = path.split(".")
    if not inner:
        return f"{VQ_NAMES[coder]}.{kind}"
    if len(inner) == 1:
        return f"{coder}.{VQ_NAMES[inner[0]]}.{kind}"
    stack, number, part = inner
    block = f"mid.{number}" if stack == "middle" else _block_names(coder, shape)[int(number)]
    return f"{coder}.{block}.{VQ_BLOCK_NAMES.get(part, part)}.{kind}"


def _block_names(coder: str, shape: TokenizerConfig) -> list[str]:
    """Return LlamaGen's names for the modules of our `levels`.

    LlamaGen has two lists for each level, of residual and of attention blocks, and a resampling.
    """
    is_encoder = coder == "encoder"
    last = len(shape.multipliers) - 1
    smallest = last if is_encoder else 0  # the level with attention: the decoder starts there
    names = []
    for level in range(last + 1):
        for block in range(shape.blocks if is_encoder else shape.blocks + 1):
            names.append(f"conv_blocks.{level}.res.{block}")
            if level == smallest:
                names.append(f"conv_blocks.{level}.attn.{block}")
        if level < last:
            names.append(f"conv_blocks.{level}.{'downsample' if is_encoder else 'upsample'}")
    return names


def _load_tokenizer(vq: Checkpoint, image_size: int) -> VQModel:
    """Load the tokenizer; all of its shape but the image size follows from its tensors."""
    vq.check_kind("tokenizer")
    weights, levels = vq.weights, "encoder.conv_blocks."
    try:
        channels = len(weights["encoder.conv_in.weight"])
        widths = [
            len(weights[f"{levels}{level}.res.0.conv2.weight"]) for level in range(vq.count(levels))
        ]
        latent_channels = len(weights["encoder.conv_out.weight"])
        codebook_size, code_dim = weights[CODEBOOK].shape
    except (KeyError, ValueError) as error:
        raise UserError(f"{vq.path}: not a LlamaGen tokenizer: {error} is missing") from None
    shape = TokenizerConfig(
        image_size=image_size,
        codebook_size=codebook_size,
        code_dim=code_dim,
        channels=channels,
        multipliers=tuple(width // channels for width in widths),
        blocks=vq.count(f"{levels}0.res."),
        latent_channels=latent_channels,
    )
    with init_empty_weights():
        model = VQModel(shape)
    _assign_weights(model, {name: vq_name(name, shape) for name in model.state_dict()}, vq)
    return model
