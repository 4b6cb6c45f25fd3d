"""The same mathematics as in `ctf.models`, faster; nothing in `ctf.models` knows of it.

A model is built plain, and one of these functions prepares it, in place, for what it is used for:

    for_training(model)                            forward and backward passes
    for_evaluation(model)                          losses and logits
    for_sampling(coarse, fine, tokenizer, engine)  all stages of sampling; see `coarse_sampler`
    for_encoding(tokenizer, dtype)                 images to codes

They replace classes of modules (`replace.py`), and leave plain what a machine has nothing for.
"""

from __future__ import annotations

import warnings
from typing import Literal

import torch
from torch import nn

from ctf.common.precision import supports_bf16
from ctf.kernels import bf16, compiled, tokenizer_cpu, train_cpu
from ctf.kernels.graphs import GraphedCoarseModel, coarse_sampler
from ctf.kernels.logits import BatchedFineModel, LeanCoarseModel, LeanFineModel
from ctf.kernels.products import Int8, Packed, has_layer
from ctf.kernels.replace import replace
from ctf.kernels.sampling_cpu import GrowingCache, pack
from ctf.models.coarse import CoarseModel
from ctf.models.fine import FineModel
from ctf.models.tokenizer import Upsample, VQModel
from ctf.models.transformer import Attention, Backbone

__all__ = [
    "Engine",
    "available",
    "coarse_sampler",
    "for_encoding",
    "for_evaluation",
    "for_sampling",
    "for_training",
    "is_exact",
    "spare_bytes",
]

Engine = Literal["auto", "eager", "compile", "int8", "bf16"]
Transformer = CoarseModel | FineModel


def for_evaluation(model: nn.Module) -> None:
    """Prepare a coarse model, a fine model or a tokenizer to be evaluated.

    Losses and logits take little memory, and a processor finds the nearest code faster.
    """
    on_cpu = _device(model).type == "cpu"
    fine = LeanFineModel if on_cpu else BatchedFineModel
    replace(model, {CoarseModel: LeanCoarseModel, FineModel: fine})
    if on_cpu:
        replace(model, {VQModel: tokenizer_cpu.CpuVQModel})


def for_training(model: Transformer | VQModel, *, compile: bool = False) -> None:
    """Prepare a coarse model, a fine model or a tokenizer to be trained on the device it is on.

    Args:
        model: Weights in float32.
        compile: Compile the blocks of a transformer, and on a GPU its loss; or the encoder and the
            decoder of a tokenizer.
    """
    for_evaluation(model)
    if isinstance(model, VQModel):
        if _device(model).type == "cpu":
            replace(model, {Upsample: tokenizer_cpu.TransposedUpsample})
        if compile:
            model.encoder.compile()
            model.decoder.compile()
        return
    backbone = model.backbone
    if compile:
        for layer in backbone.layers:
            replace(layer, {Attention: compiled.Attention})
            layer.forward = torch.compile(layer.forward)
        if _device(model).type != "cpu":
            replace(model, {LeanCoarseModel: compiled.CoarseModel})
    if _device(model).type == "cpu":
        # Compiled blocks stay as they are: the compiler fuses their operators itself.
        for part in (backbone.dropout, backbone.norm) if compile else (backbone,):
            replace(part, train_cpu.FASTER)


def for_sampling(
    coarse: CoarseModel | None,
    fine: FineModel | None,
    tokenizer: object,
    engine: Engine = "auto",
) -> None:
    """Prepare the models of a pipeline to sample; each replaced layer is freed at once.

    Warns where the machine lacks what `engine` needs.

    Args:
        coarse: In evaluation mode, as the others.
        fine: None if each cluster has one member.
        tokenizer: Not changed unless it is a `VQModel`.
        engine: "eager" computes with PyTorch's own layers. "auto" computes the same, up to
            rounding, as fast as is known: packed on a processor, "compile" on a GPU.
            "compile" compiles the steps of the coarse model; on a GPU each is one CUDA graph, of
            compiled layers where there is a compiler. "int8" computes nearly the same on a
            processor: transformers in 8-bit integers and, where it multiplies bfloat16, the cached
            keys and values and the decoder's convolutions in that. "bf16" does so on a GPU: as
            "compile", with transformers, cached keys and values and the decoder's convolutions in
            bfloat16, logits in float32.
    """
    models = [model for model in (coarse, fine, tokenizer) if isinstance(model, nn.Module)]
    for model in models:
        for_evaluation(model)
    device = _device(models[0])
    engine = _usable(engine, device)
    if engine == "bf16":
        _convert(coarse, fine, tokenizer)
    if engine in ("compile", "bf16"):
        _compile_steps(coarse, device)
        return
    if coarse is not None and device.type == "cpu":
        coarse.backbone.cache_class = GrowingCache
    if engine != "eager":
        _pack(coarse, fine, tokenizer, engine)


def _pack(
    coarse: CoarseModel | None, fine: FineModel | None, tokenizer: object, engine: Engine
) -> None:
    kind = Int8 if engine == "int8" else Packed
    low = torch.bfloat16 if engine == "int8" and supports_bf16(torch.device("cpu")) else None
    if coarse is not None:
        pack(coarse, kind)
        coarse.backbone.cache_dtype = low
    if fine is not None:
        pack(fine.backbone, kind)  # its head is read in slices, by cluster
    if isinstance(tokenizer, VQModel):
        tokenizer_cpu.prepare(tokenizer.decoder, low or torch.float32)


def _convert(coarse: CoarseModel | None, fine: FineModel | None, tokenizer: object) -> None:
    if coarse is not None:
        bf16.convert(coarse.backbone)
    if fine is not None:
        bf16.convert(fine.backbone)
    if isinstance(tokenizer, VQModel):
        tokenizer_cpu.prepare(tokenizer.decoder, torch.bfloat16)


def _compile_steps(coarse: CoarseModel | None, device: torch.device) -> None:
    if coarse is None:
        return
    replace(coarse.backbone, {Attention: compiled.Attention})
    if device.type != "cuda":
        replace(coarse.backbone, {Backbone: compiled.CompiledBackbone})
        return
    replace(coarse, {LeanCoarseModel: GraphedCoarseModel})
    if isinstance(coarse, GraphedCoarseModel):
        coarse.compile_layers = compiled.compiles(device.type)


def for_encoding(tokenizer: VQModel, dtype: torch.dtype = torch.float32) -> None:
    """Prepare the encoder of a tokenizer.

    Args:
        tokenizer: In evaluation mode.
        dtype: Of the convolutions in residual blocks. In float32 all is equal up to rounding.
    """
    for_evaluation(tokenizer)
    tokenizer_cpu.prepare(tokenizer.encoder, dtype)


def available(engine: Engine, device: torch.device) -> bool:
    """Whether this machine has what `engine` needs on `device`."""
    match engine:
        case "eager":
            return True
        case "compile":
            return device.type == "cuda" or compiled.compiles(device.type)
        case "auto":
            return device.type == "cpu" and has_layer(Packed)
        case "bf16":
            return device.type == "cuda" and supports_bf16(device)
        case "int8":
            return device.type == "cpu" and has_layer(Int8)


def _usable(engine: Engine, device: torch.device) -> Engine:
    """What can be used of an engine; warns where that is another one than was requested."""
    if engine == "auto" and device.type == "cuda":
        return "compile"
    if available(engine, device):
        return engine
    if engine != "auto":
        text = f"engine {engine} is not available on this {device.type}; using eager instead"
        warnings.warn(text, stacklevel=3)
    return "eager"


def is_exact(model: nn.Module) -> bool:
    """Whether a model still has the weights that it was loaded with, so that it can be saved."""
    return not any(isinstance(part, (Int8, bf16.WideNorm)) for part in model.modules())


def spare_bytes(model: nn.Module) -> int:
    """Memory that a model holds for its next batch, which takes it up."""
    return model.spare_bytes() if isinstance(model, GraphedCoarseModel) else 0


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
