"""LlamaGen checkpoints of any size -> full-vocabulary pipelines.

The format is that of FoundationVision/LlamaGen (MIT; arXiv 2406.06525): a .pt file whose state
dict is under "model" (its own training), "module" (DeepSpeed), "state_dict", "ema", or at the top
(FSDP), or a .safetensors file. Nothing in such a file is executed: it is read as tensors, plain
values and the `argparse.Namespace` that LlamaGen's training stores under "args".

Shapes follow from the tensors. What these do not tell, e.g. the number of heads, is in `Options`,
else in the arguments of the training, else as LlamaGen has it.
"""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path
from typing import Literal, TypedDict, Unpack

import torch
from torch import nn

from ctf.common import claims, config, storage
from ctf.common.errors import UserError
from ctf.common.weights import describe_parameters
from ctf.data.imagenet import imagenet_classes
from ctf.models import clusters
from ctf.models.coarse import CoarseModel
from ctf.models.sampling import Sampling
from ctf.models.tokenizer import TokenizerConfig, VQModel
from ctf.pipelines import folder
from ctf.pipelines.llamagen.checkpoint import Checkpoint, read
from ctf.pipelines.llamagen.tokenizer import load_tokenizer, tokenizer_shape, vq_name
from ctf.pipelines.llamagen.transformer import (
    gpt_name,
    load_transformer,
    size_name,
    transformer_shape,
)
from ctf.pipelines.pipeline import Pipeline

__all__ = ["Checkpoint", "Options", "convert", "gpt_name", "load", "read", "vq_name"]

IMAGE_SIZE = 256  # pixels per side in LlamaGen's training, if not chosen otherwise
# The guidance scale that LlamaGen's GETTING_STARTED.md uses for each size.
GUIDANCE = {"B": 2.0, "L": 2.0, "XL": 1.75, "XXL": 1.75, "3B": 1.65}


class Options(TypedDict, total=False):
    """What the tensors do not tell, and what they are checked against; None is not given.

    size: B, L, XL, XXL or 3B: the transformer has to be of this size of LlamaGen.
    heads: Of the transformer.
    image_size: Pixels per side of the images.
    grid: Codes per side of the images, instead of `image_size`.
    groups: Of the tokenizer's group normalization.
    codebook_norm: "l2" if codes are looked up by cosine, "none" if by distance.
    vq_weights: Which state dict of the tokenizer's file to read: "model", "ema", ...
    gpt_weights: Which one of the transformer's file.
    """

    size: str | None
    heads: int | None
    image_size: int | None
    grid: int | None
    groups: int | None
    codebook_norm: Literal["l2", "none"] | None
    vq_weights: str | None
    gpt_weights: str | None


def load(
    vq: str | Path,
    gpt: str | Path,
    *,
    device: torch.device | str = "cpu",
    **options: Unpack[Options],
) -> Pipeline:
    """Load a tokenizer and a class-conditional transformer of LlamaGen in float32.

    Args:
        vq: The tokenizer's file, e.g. vq_ds16_c2i.pt.
        gpt: The transformer's file, e.g. c2i_B_256.pt.
        device: Where to compute.
        options: See `Options`.

    Raises:
        UserError: A file is missing, truncated, contains code, or tensors that are not finite or
            have unexpected shapes; an option contradicts them, or is needed; tokenizer and
            transformer do not belong together.
    """
    tokenizer, coarse, _ = _load_models(Path(vq), Path(gpt), options)
    # Copies: memory-mapped weights would change with the file.
    for parameter in (*tokenizer.parameters(), *coarse.parameters()):
        parameter.data = parameter.to(torch.float32, copy=True)
    device = torch.device(device)
    return _pipeline(folder.to_channels_last(tokenizer, device), coarse.to(device))


def convert(
    vq: str | Path,
    gpt: str | Path | None,
    out: str | Path,
    *,
    dry_run: bool = False,
    **options: Unpack[Options],
) -> str:
    """Write what `load` returns, in the precision of the files; return what was understood.

    The arguments are those of `load`. Without `gpt`, the tokenizer alone is written, for a run
    whose next stage is tokens. With `dry_run`, everything is checked, and nothing is written.

    Raises:
        UserError: See `load`; `out` holds something else.
    """
    vq, out = Path(vq), Path(out)
    if gpt is None:
        return _convert_tokenizer(vq, out, dry_run, options)
    gpt = Path(gpt)
    tokenizer, coarse, notes = _load_models(vq, gpt, options)
    pipe = _pipeline(tokenizer, coarse)
    pipe.origin["converted_from"] |= {
        kind: {"file": path.name, "sha256": storage.hash_file(path)}
        for kind, path in (("vq", vq), ("gpt", gpt))
    }
    if claims.is_ours(out, folder.SETTINGS, what="a pipeline"):
        settings = folder.PipelineSettings(pipe.class_names, pipe.sampling, pipe.origin)
        stored = config.to_json(folder.load_settings(out))
        claims.check_same(out, stored, config.to_json(settings), what="a pipeline")
        _check_same_model(out / "tokenizer", tokenizer, "a tokenizer")
        _check_same_model(out / "coarse", coarse, "a transformer")
    if not dry_run:
        folder.save(pipe, out, dtype=None)
    summary = (
        f"{out}: tokenizer of {_describe(tokenizer)}; "
        f"transformer of {describe_parameters(coarse)}, {coarse.config.classes} classes, "
        f"guidance {pipe.sampling.guidance}"
    )
    return "\n  ".join([summary, *notes])


def _convert_tokenizer(path: Path, out: Path, dry_run: bool, options: Options) -> str:
    vq, shape = _read_tokenizer(path, options)
    args_size = vq.training_args.get("image_size")
    image_size, note = _chosen_image_size(shape.factor, options), "as chosen"
    if image_size is None and isinstance(args_size, int):
        image_size, note = args_size, "by the arguments of its training"
    elif image_size is None:
        image_size, note = IMAGE_SIZE, "others with --image-size"
    tokenizer = load_tokenizer(vq, dataclasses.replace(shape, image_size=image_size))
    if claims.is_ours(out, "tokenizer/config.json", what="a run of ctf"):
        _check_same_model(out / "tokenizer", tokenizer, "a tokenizer")
    if not dry_run:
        folder.save_model(tokenizer, out / "tokenizer")
    summary = f"{out / 'tokenizer'}: {_describe(tokenizer)}"
    return "\n  ".join([summary, f"images: {image_size} pixels, {note}", _details(vq, tokenizer)])


def _check_same_model(path: Path, model: VQModel | CoarseModel, what: str) -> None:
    """Check that the folder of a model, if there is one, holds the same model."""
    if (path / "config.json").is_file():
        stored = storage.load_object(path / "config.json").get("model")
        claims.check_same(path, stored, config.to_json(model.config), what=what)


def _describe(tokenizer: VQModel) -> str:
    size, grid = tokenizer.image_size, tokenizer.grid
    codes = f"{grid} x {grid} of {tokenizer.config.codebook_size} codes"
    return f"{describe_parameters(tokenizer)}, {size} pixels -> {codes}"


def _details(vq: Checkpoint, tokenizer: VQModel) -> str:
    shape = tokenizer.config
    multipliers = _listed(shape.multipliers)
    if shape.decoder_multipliers:
        multipliers += f" (decoder {_listed(shape.decoder_multipliers)})"
    blocks = f"{shape.blocks}, {shape.decoder_blocks or shape.blocks + 1}"
    return (
        f"tokenizer: channels {shape.channels} x {multipliers}; residual blocks {blocks}; "
        f"latent channels {shape.latent_channels}; "
        f"code dimension {shape.code_dim}, compared by "
        f"{'cosine' if shape.l2_norm else 'distance'}; {_precision(tokenizer)}{vq.source}"
    )


def _listed(values: tuple[int, ...]) -> str:
    return ", ".join(map(str, values))


def _precision(model: nn.Module) -> str:
    dtypes = {str(parameter.dtype).removeprefix("torch.") for parameter in model.parameters()}
    return " and ".join(sorted(dtypes))


# --- Both models ----------------------------------------------------------------------------------


def _pipeline(tokenizer: VQModel, coarse: CoarseModel) -> Pipeline:
    shape = coarse.config
    size = size_name(shape.width, shape.layers)
    names = imagenet_classes().values() if shape.classes == 1000 else map(str, range(shape.classes))
    return Pipeline(
        tokenizer,
        clusters.identity(coarse.vocab_size).to(coarse.head.weight.device),
        coarse,
        None,
        tuple(names),
        Sampling(guidance=GUIDANCE.get(size or "", Sampling.guidance)),
        {"converted_from": {"project": "LlamaGen", "size": size}},
    )


def _read_tokenizer(path: Path, options: Options) -> tuple[Checkpoint, TokenizerConfig]:
    vq = read(path, options.get("vq_weights"))
    return vq, tokenizer_shape(vq, options.get("groups"), options.get("codebook_norm"))


def _load_models(
    vq_path: Path, gpt_path: Path, options: Options
) -> tuple[VQModel, CoarseModel, list[str]]:
    """Return both models, in the precision of the files, and what was understood, a line each."""
    vq, vq_shape = _read_tokenizer(vq_path, options)
    gpt = read(gpt_path, options.get("gpt_weights"))
    shape, heads = transformer_shape(gpt, options.get("heads"), options.get("size"))
    released = size_name(shape.width, shape.layers) is not None
    chosen = _chosen_image_size(vq_shape.factor, options)
    image_size, source = _find_image_size(vq, gpt, vq_shape.factor, chosen, released)
    tokenizer = load_tokenizer(vq, dataclasses.replace(vq_shape, image_size=image_size))
    coarse = load_transformer(gpt, dataclasses.replace(shape, grid=tokenizer.grid))
    if coarse.vocab_size != tokenizer.config.codebook_size:
        raise UserError(
            f"{gpt_path} predicts {coarse.vocab_size} codes, but {vq_path} has "
            f"{tokenizer.config.codebook_size}: they do not belong together"
        )
    if not source:  # last, since it is no mistake in the files
        raise UserError(
            f"{gpt_path}: does not tell the size of the images that it was trained on\n"
            "give --image-size, in pixels per side, or --grid, in codes per side"
        )
    notes = [
        f"images: {image_size} pixels, {source}",
        _details(vq, tokenizer),
        f"transformer: width {shape.width}; layers {shape.layers}; {heads}; "
        f"SwiGLU {shape.ffn_width}; {_precision(coarse)}{gpt.source}",
    ]
    return tokenizer, coarse, notes


def _chosen_image_size(factor: int, options: Options) -> int | None:
    image_size, grid = options.get("image_size"), options.get("grid")
    if grid is None:
        return image_size
    if grid < 1:
        raise UserError(f"grid: got {grid}, expected 1 or more codes per side")
    if image_size not in (None, grid * factor):
        raise UserError(
            f"got both --image-size {image_size} and --grid {grid}, which is {grid * factor} "
            f"pixels at {factor} per code: expected one of them"
        )
    return grid * factor


def _find_image_size(
    vq: Checkpoint, gpt: Checkpoint, factor: int, chosen: int | None, released: bool
) -> tuple[int, str]:
    """Return the pixels per side and for people how they are known; `factor` and "" if not.

    Args:
        vq: The tokenizer.
        gpt: The transformer.
        factor: Pixels per code and side.
        chosen: What the user chose.
        released: Whether the transformer is of a released size.
    """
    trained = gpt.training_args.get("downsample_size", factor)
    if trained != factor:
        raise UserError(
            f"{gpt.path}: trained with {trained} pixels per code and side, but {vq.path} has "
            f"{factor}: they do not belong together"
        )
    if gpt.rope is not None:
        side = math.isqrt(len(gpt.rope))
        if chosen is not None and chosen // factor != side:
            raise UserError(
                f"{gpt.path}: trained for {side} x {side} codes, expected {chosen // factor} x "
                f"{chosen // factor}; choose another --image-size"
            )
        return chosen or side * factor, "by its table of RoPE"
    if chosen is not None:
        return chosen, "as chosen"
    if isinstance(image_size := gpt.training_args.get("image_size"), int):
        return image_size, "by the arguments of its training"
    if match := re.fullmatch(r"c2i_\w+_(256|384|512)", gpt.path.stem):
        return int(match[1]), f"by the name {gpt.path.name}"
    if released:
        return IMAGE_SIZE, "LlamaGen's default; others with --image-size"
    return factor, ""
