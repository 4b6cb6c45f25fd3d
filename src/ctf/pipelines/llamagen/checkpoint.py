"""Reading a LlamaGen checkpoint, whatever wrote it, and making its tensors a model's weights."""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ctf.common import storage
from ctf.common.errors import UserError

CODEBOOK, EMBEDDING = "quantize.embedding.weight", "tok_embeddings.weight"
KINDS = {"tokenizer": CODEBOOK, "transformer": EMBEDDING}  # and a tensor that the other has not
STATE_DICTS = ("model", "module", "state_dict", "model_state_dict", "ema")
# Parts of names that DDP, torch.compile, FSDP and activation checkpointing add.
WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
# Last parts of the names of what is not weights.
ROPE = "freqs_cis"
BUFFERS = {ROPE, "causal_mask", "codebook_used", "k_cache", "v_cache", "num_batches_tracked"}
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A LlamaGen checkpoint.

    path: Of the file.
    weights: By LlamaGen's names.
    rope: The table of RoPE, (1 + L, pairs, 2), if the file has it.
    training_args: The arguments of LlamaGen's training script, if the file has them.
    source: Which of several state dicts of the file this is, for people.
    """

    path: Path
    weights: dict[str, Tensor]
    rope: Tensor | None
    training_args: dict[str, Any]
    source: str

    def count(self, prefix: str) -> int:
        """Return how many numbered modules there are: prefix0., prefix1., ..."""
        names = (name.removeprefix(prefix) for name in self.weights if name.startswith(prefix))
        return len({name.partition(".")[0] for name in names})

    def shape(self, name: str, dimensions: int) -> tuple[int, ...]:
        """Return the shape of a tensor of so many dimensions. Raises UserError if it has others."""
        if name not in self.weights:
            raise UserError(f"{self.path}: tensor {name!r} is missing")
        shape = tuple(self.weights[name].shape)
        if len(shape) != dimensions or 0 in shape:
            raise UserError(
                f"{self.path}: tensor {name!r} has shape {shape}, expected {dimensions} dimensions"
            )
        return shape

    def check_kind(self, kind: str) -> None:
        """Raise a UserError unless this is a "tokenizer" or a "transformer"."""
        if KINDS[kind] not in self.weights:
            others = [other for other, tensor in KINDS.items() if tensor in self.weights]
            reason = f"it is a {others[0]}" if others else f"it has no tensor {KINDS[kind]!r}"
            raise UserError(f"{self.path}: not a LlamaGen {kind}: {reason}")


def read(path: Path, entry: str | None = None) -> Checkpoint:
    """Read a checkpoint; its weights are memory-mapped if the format of the file allows it.

    Args:
        path: A .pt or .safetensors file, whatever its name.
        entry: Which state dict of the file; by default the first of `STATE_DICTS` that it has, as
            in LlamaGen's sampling and extraction of codes.

    Raises:
        UserError: The file is missing, truncated, something else, or a pickle that contains code,
            which is not executed.
    """
    content = _read_content(path)
    entries = [name for name in STATE_DICTS if isinstance(content.get(name), Mapping)]
    if entry is not None and entry not in entries:
        expected = " or ".join(entries) or "no name, since they are not under one"
        raise UserError(f"{path}: got weights {entry!r}, expected {expected}")
    entry = entry or next(iter(entries), None)
    weights, rope = {}, None
    for key, value in (content if entry is None else content[entry]).items():
        if not isinstance(key, str):
            raise UserError(f"{path}: key {key!r} of its state dict is not a string")
        name = ".".join(part for part in key.split(".") if part not in WRAPPERS)
        last = name.rpartition(".")[2]
        if last == ROPE and isinstance(value, Tensor):
            rope = value
        # At the top there are steps, the optimizer's state and the like, too.
        if last in BUFFERS or (entry is None and not isinstance(value, Tensor)):
            continue
        weights[name] = _check_weight(path, key, value)
    # The model may have been a part of another module, e.g. "gpt.".
    while len(weights) > 1 and len({name.split(".")[0] for name in weights}) == 1:
        weights = {name.partition(".")[2]: value for name, value in weights.items()}
    args, others = content.get("args"), [name for name in entries if name != entry]
    if not isinstance(args, (argparse.Namespace, Mapping)):
        args = {}
    return Checkpoint(
        path,
        weights,
        rope,
        dict(vars(args) if isinstance(args, argparse.Namespace) else args),
        f", weights {entry!r} (the file has {', '.join(others)}, too)" if others else "",
    )


def _check_weight(path: Path, name: str, value: object) -> Tensor:
    """Return a tensor of floating-point numbers; raise a UserError if it is something else."""
    if not isinstance(value, Tensor):
        kind = type(value).__name__
    elif value.dtype in FLOATS and value.layout == torch.strided and not value.is_meta:
        if value.numel():
            return value.detach()
        raise UserError(
            f"{path}: tensor {name!r} is empty; if ZeRO 3 of DeepSpeed has split the weights, "
            "make one file of them first (zero_to_fp32.py)"
        )
    else:
        kind = f"{value.dtype} ({str(value.layout).removeprefix('torch.')}, {value.device})"
    raise UserError(
        f"{path}: {name!r} is of type {kind}, expected floating-point weights; "
        "is this a checkpoint of LlamaGen?"
    )


def _read_content(path: Path) -> Mapping[Any, Any]:
    if storage.is_safetensors(path):
        tensors, metadata = storage.load_tensors(path)
        # save_model of safetensors writes tied weights under one of their names.
        return {name: tensors[kept] for name, kept in metadata.items() if kept in tensors} | tensors
    content = storage.load_pt(path, [argparse.Namespace])
    if not isinstance(content, Mapping):
        raise UserError(f"{path}: got {type(content).__name__}, expected a state dict of LlamaGen")
    return content


def assign_weights(model: nn.Module, names: Mapping[str, str], checkpoint: Checkpoint) -> None:
    """Make a checkpoint's tensors the weights of a model; `names` are LlamaGen's, by ours."""
    path, weights = checkpoint.path, checkpoint.weights
    for ours, expected in model.state_dict().items():
        name, shape = names[ours], tuple(expected.shape)
        if name not in weights:
            raise UserError(f"{path}: tensor {name!r} of shape {shape} is missing")
        if (got := tuple(weights[name].shape)) != shape:
            raise UserError(f"{path}: tensor {name!r} has shape {got}, expected {shape}")
        # One pass and no copy; aminmax passes NaN on.
        if not all(math.isfinite(float(bound)) for bound in weights[name].aminmax()):
            raise UserError(f"{path}: tensor {name!r} has values that are not finite")
    if unknown := sorted(weights.keys() - names.values()):
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise UserError(f"{path}: unknown tensor {unknown[0]!r}{more}")
    own: dict[str, Tensor] = {}
    memory: set[int] = set()
    for ours, name in names.items():
        address = weights[name].untyped_storage().data_ptr()
        # Tied weights are two here, and safetensors takes no memory that is shared.
        own[ours] = weights[name].clone() if address in memory else weights[name]
        memory.add(address)
    model.load_state_dict(own, assign=True)
    model.eval().requires_grad_(False)
