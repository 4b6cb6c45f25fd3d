"""Loading a module's weights: exactly the tensors it has, and without initializing it first."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ctf.common.distributed import distribute_like
from ctf.common.errors import UserError


class _SkipInit(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.normalize or getattr(func, "__module__", None) == nn.init.__name__:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


@contextlib.contextmanager
def init_empty_weights() -> Iterator[None]:
    """Create modules on the meta device, without memory; `load_strict` then gives them weights.

    Initialization is skipped as well: even on the meta device it would make PyTorch import its
    compiler, which takes a second.
    """
    with torch.device("meta"), _SkipInit():
        yield


def load_strict(module: nn.Module, tensors: Mapping[str, Tensor], source: str | Path) -> None:
    """Copy `tensors` into `module`; names and shapes must match exactly.

    A module on the meta device takes the tensors themselves. A sharded one takes its shards.

    Args:
        module: Any module.
        tensors: Full tensors by the names of the module's state_dict.
        source: Where the tensors are from, for error messages.

    Raises:
        UserError: A tensor is missing, unknown, or of another shape; names the first.
    """
    # Folders and states written before the backbone got its name call it `trunk`.
    tensors = {re.sub(r"^trunk\.", "backbone.", name): value for name, value in tensors.items()}
    own = module.state_dict()
    for name in own:
        if name not in tensors:
            raise UserError(f"{source}: tensor {name!r} is missing")
    for name, value in tensors.items():
        if name not in own:
            raise UserError(f"{source}: unknown tensor {name!r}")
        if value.shape != own[name].shape:
            raise UserError(
                f"{source}: tensor {name!r} has shape {tuple(value.shape)}, "
                f"expected {tuple(own[name].shape)}"
            )
    empty = any(tensor.is_meta for tensor in own.values())
    sharded = {name: distribute_like(value, own[name]) for name, value in tensors.items()}
    module.load_state_dict(sharded, assign=empty)


def count_parameters(module: nn.Module) -> int:
    """Count the parameters of a module, also of layers that an engine has replaced.

    Such layers have none, but their state is the original's.
    """
    return sum(tensor.numel() for tensor in module.state_dict().values())


def describe_parameters(module: nn.Module) -> str:
    """Return the number of parameters for people."""
    return f"{count_parameters(module) / 1e6:.1f} M parameters"
