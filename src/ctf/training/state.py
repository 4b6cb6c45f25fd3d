"""The state of a training on disk: all that is needed to resume it, and never half of it.

FOLDER/step-00000020.safetensors  the state after 20 steps
FOLDER/step-00000040/             sharded: a folder, with a file of each process's shards
"""

from __future__ import annotations

import os
import re
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from ctf.common import storage
from ctf.common.distributed import ALONE, World, distribute_like, is_dtensor
from ctf.common.errors import UserError
from ctf.common.weights import load_strict

STATES_KEPT = 2  # if the newest turns out to be damaged, there is one before it


def save_state(
    folder: Path, step: int, tensors: Mapping[str, Tensor], world: World = ALONE
) -> None:
    """Write the state after `step` steps and remove all but the newest; called by all processes.

    Raises:
        UserError: It cannot be written; raised in all processes.
    """
    if any(is_dtensor(tensor) for tensor in tensors.values()):
        _save_sharded(folder / f"step-{step:08d}", tensors, world)
    else:
        path = folder / f"step-{step:08d}.safetensors"
        world.on_main(lambda: storage.save_tensors(path, tensors))
    if world.is_main:
        for old in _states(folder)[STATES_KEPT:]:
            _remove(old)


def _save_sharded(path: Path, tensors: Mapping[str, Tensor], world: World) -> None:
    from torch.distributed.checkpoint.api import CheckpointException  # takes a second to import
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    temporary = path.with_name(f".{path.name}.{world.broadcast(os.getpid())}.tmp")

    def begin() -> None:
        with storage.user_errors(path):
            for left_over in path.parent.glob(".step-*.tmp"):
                _remove(left_over)
            temporary.mkdir(parents=True)

    def end() -> None:
        with storage.user_errors(path):
            storage.sync_folder(temporary)
            shutil.rmtree(path, ignore_errors=True)
            os.replace(temporary, path)
            storage.sync_folder(path.parent)

    world.on_main(begin)
    try:
        # As safetensors: torch's own format would need a pickle.
        writer = HuggingFaceStorageWriter(str(temporary), save_distributed=True)
        save(dict(tensors), storage_writer=writer)
    except CheckpointException as error:  # all processes know which ones failed, and why
        if world.is_main:
            _remove(temporary)
        for cause, _ in error.failures.values():
            if isinstance(cause, OSError | SafetensorError):
                raise world.error(str(storage.write_error(path, cause))) from error
        raise
    world.on_main(end)


def load_state(
    folder: Path, step: int, like: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Read the state after `step` steps.

    Of tensors that are sharded in `like`, only this process's shards are read if the state was
    saved sharded; all others are full.

    Raises:
        UserError: The state is missing or damaged.
    """
    if not (path := folder / f"step-{step:08d}").is_dir():
        return storage.load_tensors(path.with_suffix(".safetensors"))[0]
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load

    sharded = {k: v for k, v in (like or {}).items() if is_dtensor(v)}
    try:
        reader = HuggingFaceStorageReader(str(path))
        tensors: dict[str, Any] = {}
        for name, stored in reader.read_metadata().state_dict_metadata.items():
            assert isinstance(stored, TensorStorageMetadata)
            empty = torch.empty(stored.size, dtype=stored.properties.dtype)
            tensors[name] = torch.empty_like(sharded[name]) if name in sharded else empty
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is ")  # each process for itself
            load(tensors, storage_reader=reader, no_dist=not sharded)
    except (CheckpointException, SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path}: damaged ({error})") from None
    return tensors


def latest_state(folder: Path) -> int:
    """Return the step of the newest complete state, 0 if there is none; remove damaged ones."""
    for path in _states(folder):
        files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
        try:
            if not files:
                raise UserError(f"{path}: empty")
            for file in files:
                storage.check_complete(file)
        except UserError as error:
            print(f"{error}\nresuming from the state before it", flush=True)
            _remove(path)
            continue
        return _step(path)
    return 0


def newest_step(folder: Path) -> int:
    """Return the step of the newest state, complete or not; 0 if there is none."""
    return max(map(_step, _states(folder)), default=0)


def _states(folder: Path) -> list[Path]:
    """Return the states in a folder, the newest first."""
    names = re.compile(r"step-\d+(\.safetensors)?")
    found = [path for path in folder.glob("step-*") if names.fullmatch(path.name)]
    return sorted(found, key=lambda path: path.stem, reverse=True)


def _step(path: Path) -> int:
    return int(path.stem.removeprefix("step-"))


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


# --- What a state consists of ---------------------------------------------------------------------


Part = nn.Module | torch.optim.Optimizer | Tensor


def collect(parts: Mapping[str, Part]) -> dict[str, Tensor]:
    """Return the tensors of the parts: "part.key" of modules and optimizers."""
    tensors: dict[str, Tensor] = {}
    for name, part in parts.items():
        if isinstance(part, Tensor):
            tensors[name] = part
            continue
        own = part.state_dict() if isinstance(part, nn.Module) else _optimizer_tensors(part)
        tensors |= {f"{name}.{key}": tensor for key, tensor in own.items()}
    return tensors


def restore(parts: Mapping[str, Part], tensors: Mapping[str, Tensor]) -> None:
    """Load into the parts what `collect` returned.

    Raises:
        UserError: A module's tensor is missing, unknown, or of another shape.
    """
    for name, part in parts.items():
        if isinstance(part, nn.Module):
            load_strict(part, without_prefix(tensors, f"{name}."), "state")
        elif isinstance(part, Tensor):
            part.copy_(tensors[name])
        else:
            _load_optimizer(part, without_prefix(tensors, f"{name}."))


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    state: dict[int, dict[str, Tensor]] = optimizer.state_dict()["state"]
    return {f"{i}.{key}": value for i, entry in state.items() for key, value in entry.items()}


def _load_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        index, key = name.split(".")
        parameter = parameters[int(index)]
        if value.shape == parameter.shape:
            # In the parameter's memory format: the fused kernels walk through both alike.
            value = torch.empty_like(parameter).copy_(distribute_like(value, parameter))
        state.setdefault(int(index), {})[key] = value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def without_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose names start with the prefix, by their names without it."""
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
