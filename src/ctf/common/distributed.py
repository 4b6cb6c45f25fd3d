"""One process for each device, started by torchrun; without torchrun, a world of one process.

    torchrun --nproc-per-node 8 -m -- ctf train coarse run

Only the first process writes files. All processes read the same folders, so several machines need
a shared file system.
"""

from __future__ import annotations

import datetime
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ctf.common.errors import UserError

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # variables that it sets
# How long a process waits for the others, which may be evaluating or reading a large state.
TIMEOUT = datetime.timedelta(minutes=60)


@dataclass(frozen=True)
class World:
    """The processes that work together, and which one of them this is."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes files and prints."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait until all processes have reached this call."""
        if self.size > 1:
            dist.barrier()

    def sum(self, value: Tensor) -> Tensor:
        """Return the sum of `value` over all processes."""
        if self.size > 1:
            value = value.clone()
            dist.all_reduce(value)
        return value

    def mean(self, value: Tensor) -> Tensor:
        """Return the mean of `value` over all processes."""
        return self.sum(value) / self.size if self.size > 1 else value

    def any(self, condition: bool) -> bool:
        """Return whether the condition is true in any process."""
        if self.size == 1:
            return condition
        return bool(self.sum(torch.tensor(int(condition), device=self.device)))

    def gather(self, part: Tensor) -> Tensor:
        """Return the parts of all processes, of equal shapes, concatenated along the first axis."""
        if self.size == 1:
            return part
        parts = [torch.empty_like(part) for _ in range(self.size)]
        dist.all_gather(parts, part.contiguous())
        return torch.cat(parts)

    def broadcast(self, number: int) -> int:
        """Return the number that the first process passes."""
        if self.size == 1:
            return number
        tensor = torch.tensor(number, device=self.device)
        dist.broadcast(tensor, 0)
        return int(tensor)

    def broadcast_module(self, module: nn.Module) -> None:
        """Copy the weights of the first process to all others."""
        if self.size > 1:
            for tensor in module.state_dict().values():
                dist.broadcast(tensor, 0)

    def on_main(self, work: Callable[[], object]) -> None:
        """Run `work` in the first process while the others wait for it.

        Raises:
            UserError: `work` raised it; raised in all processes.
        """
        failed: UserError | None = None
        if self.is_main:
            try:
                work()
            except UserError as error:
                failed = error
        if self.broadcast(failed is not None):
            raise failed or self.error("")

    def error(self, message: str) -> UserError:
        """Return an error that all processes raise; only the first one's has the message."""
        return UserError(message if self.is_main else "")

    def share(self, count: int, what: str) -> slice:
        """Return this process's share of `count` items.

        Raises:
            UserError: `count` is no multiple of the number of processes.
        """
        if count % self.size:
            raise self.error(
                f"{what}: got {count}, expected a multiple of the {self.size} processes"
            )
        each = count // self.size
        return slice(self.rank * each, (self.rank + 1) * each)

    def wrap(self, module: nn.Module, *, unused: bool = False) -> nn.Module:
        """Return the module in DDP, so that a backward pass averages gradients over processes.

        Args:
            module: Has its weights already; DDP copies those of the first process to the others.
            unused: Whether some of the parameters may be unused in a pass.
        """
        if self.size == 1:
            return module
        return DistributedDataParallel(
            module, gradient_as_bucket_view=True, find_unused_parameters=unused
        )


ALONE = World()


class Vote:
    """Whether a condition is true in any process, asked again and again.

    On GPUs the answer would have to wait until all work before it is done. So there each call
    returns the answer to the one before, which is known by then; it is the same in all processes.

    Args:
        world: The processes.
        delayed: Whether answers come a call later; by default on several GPUs.
    """

    def __init__(self, world: World, *, delayed: bool | None = None) -> None:
        self.world = world
        several_gpus = world.size > 1 and world.device.type == "cuda"
        self.delayed = several_gpus if delayed is None else delayed
        self._before: tuple[Tensor, torch.cuda.Event | None] | None = None

    def __call__(self, condition: bool) -> bool:
        """Return the answer, or that of the call before; False at first."""
        if not self.delayed:
            return self.world.any(condition)
        device = self.world.device
        votes = self.world.sum(torch.full((), float(condition), device=device))
        copied = None
        if device.type == "cuda":
            votes = votes.to("cpu", non_blocking=True)
            copied = torch.cuda.Event()
            copied.record()
        before, self._before = self._before, (votes, copied)
        if before is None:
            return False
        votes, copied = before
        if copied is not None:
            copied.synchronize()
        return bool(votes)


def is_dtensor(tensor: Tensor) -> TypeGuard[DTensor]:
    """Return whether a tensor is sharded over processes."""
    # Importing the module takes half a second; before anybody has, there are no DTensors.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def distribute_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Return a full tensor sharded as `like` is; as it is if `like` is not sharded."""
    if not is_dtensor(like) or is_dtensor(tensor):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)


def full_tensor(tensor: Tensor) -> Tensor:
    """Return all of a tensor that may be sharded; a collective call, made by all processes."""
    return tensor.full_tensor() if is_dtensor(tensor) else tensor


def launched_size() -> int:
    """Return the number of processes that torchrun started; 1 without torchrun.

    Raises:
        UserError: Only some of torchrun's variables are set: with others' values, each process
            would take itself for the only one, and write into the same folder.
    """
    given = {name: os.environ.get(name, "") for name in TORCHRUN}
    if given["WORLD_SIZE"] in ("", "1") and given["RANK"] in ("", "0"):
        if given["RANK"] and not given["WORLD_SIZE"]:
            raise _half_launched("RANK", "WORLD_SIZE")
        return 1
    for name, value in given.items():
        if not value:
            raise _half_launched("WORLD_SIZE" if given["WORLD_SIZE"] else "RANK", name)
    for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"):
        if not given[name].isdecimal():
            raise UserError(f"environment: got {name}={given[name]}, expected a whole number")
    rank, size = int(given["RANK"]), int(given["WORLD_SIZE"])
    if rank >= size:
        raise UserError(f"environment: got RANK={rank} of WORLD_SIZE={size}, expected less")
    return size


def _half_launched(name: str, missing: str) -> UserError:
    return UserError(
        f"environment: got {name}={os.environ[name]}, but no {missing}\n"
        f"start several processes with torchrun, which sets both, or one after: unset {name}"
    )


@contextmanager
def init_world(device: torch.device) -> Iterator[World]:
    """Join the processes that torchrun started; without torchrun, yield a world of one process.

    Args:
        device: Where to compute; for "cuda", each process takes the GPU of its local rank.

    Raises:
        UserError: See `launched_size`.
    """
    if launched_size() == 1:
        yield World(device=device)
        return
    if device.type == "cuda":
        if "LOCAL_RANK" not in os.environ:
            raise _half_launched("WORLD_SIZE", "LOCAL_RANK")
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    nccl = device.type == "cuda"
    if not dist.is_initialized():
        dist.init_process_group("nccl" if nccl else "gloo", timeout=TIMEOUT)
    try:
        yield World(dist.get_rank(), dist.get_world_size(), device)
    finally:
        # A gloo group stays until the process ends. Python holds the GIL while it frees the last
        # reference to one, which waits for the group's threads; if one of these is about to free a
        # tensor, it waits for the GIL, and both wait forever (torch 2.13, with the reference of
        # DistributedDataParallel's reducer).
        if nccl:
            dist.destroy_process_group()
