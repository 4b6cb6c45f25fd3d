"""One process for each device, started by torchrun; without it, a world of one process.

    torchrun --nproc-per-node 8 -m -- ctf train coarse run

Files are written by the first process alone; all of them read the same folders, so several
machines need a file system that they share.
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

# How long a process waits for the others, which may be evaluating or reading a large state.
PATIENCE = datetime.timedelta(minutes=60)


@dataclass(frozen=True)
class World:
    """The processes that work together, and which one this is."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def main(self) -> bool:
        """Whether this is the process that writes files and speaks to the user."""
        return self.rank == 0

    def barrier(self) -> None:
        """Waits until all have come here."""
        if self.size > 1:
            dist.barrier()

    def sum(self, value: Tensor) -> Tensor:
        """The sum of what all processes have, known to all."""
        if self.size > 1:
            value = value.clone()
            dist.all_reduce(value)
        return value

    def mean(self, value: Tensor) -> Tensor:
        """The mean over all processes, known to all."""
        return self.sum(value) / self.size if self.size > 1 else value

    def gather(self, part: Tensor) -> Tensor:
        """The parts of all processes, of one shape each, one after another along the first axis."""
        if self.size == 1:
            return part
        parts = [torch.empty_like(part) for _ in range(self.size)]
        dist.all_gather(parts, part.contiguous())
        return torch.cat(parts)

    def any(self, here: bool) -> bool:
        """Whether it is so in any process, known to all."""
        if self.size == 1:
            return here
        return bool(self.sum(torch.tensor(int(here), device=self.device)))

    def first(self, work: Callable[[], object]) -> None:
        """Lets the first process do something, and the others wait for it.

        Raises:
            UserError: where the first process could not; in all of them.
        """
        failed: UserError | None = None
        if self.main:
            try:
                work()
            except UserError as error:
                failed = error
        if self.told(failed is not None):
            raise failed or self.error("")

    def error(self, message: str) -> UserError:
        """A mistake that all processes have found: the first one speaks for them."""
        return UserError(message if self.main else "")

    def wrap(self, module: nn.Module, *, unused: bool = False) -> nn.Module:
        """The module, such that a backward pass through it averages gradients over processes.

        Args:
            unused: some of its parameters may not be used in a pass.
        """
        if self.size == 1:
            return module
        return DistributedDataParallel(
            module, gradient_as_bucket_view=True, find_unused_parameters=unused
        )

    def told(self, number: int) -> int:
        """The number that the first process has, known to all."""
        if self.size == 1:
            return number
        told = torch.tensor(number, device=self.device)
        dist.broadcast(told, 0)
        return int(told)

    def share(self, count: int, what: str) -> slice:
        """This process's part of `count` things, all parts of one size.

        Raises:
            UserError: they cannot be shared equally.
        """
        if count % self.size:
            raise self.error(
                f"{what}: got {count}, expected a multiple of the {self.size} processes"
            )
        each = count // self.size
        return slice(self.rank * each, (self.rank + 1) * each)

    def give(self, module: nn.Module) -> None:
        """Gives all processes the weights that the first one has."""
        if self.size > 1:
            for tensor in module.state_dict().values():
                dist.broadcast(tensor, 0)


ALONE = World()


def is_cut(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether a tensor is cut into parts among processes."""
    # Nothing is cut yet where its module was not loaded, which takes half a second.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def laid_out(whole: Tensor, like: Tensor) -> Tensor:
    """`whole`, cut into parts among processes where `like` is."""
    if not is_cut(like) or is_cut(whole):
        return whole
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements)


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that may be cut into parts among processes; all of these must ask for it."""
    return tensor.full_tensor() if is_cut(tensor) else tensor


@contextmanager
def joined(device: torch.device) -> Iterator[World]:
    """The world that torchrun made, for as long as it is needed; by itself, a world of one.

    Args:
        device: where to compute; of "cuda", each process takes the one of its local rank.
    """
    if "RANK" not in os.environ or int(os.environ["WORLD_SIZE"]) == 1:
        yield World(device=device)
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    nccl = device.type == "cuda"
    if not dist.is_initialized():
        dist.init_process_group("nccl" if nccl else "gloo", timeout=PATIENCE)
    try:
        yield World(dist.get_rank(), dist.get_world_size(), device)
    finally:
        # A group of gloo stays until the process ends. Python holds its lock where it frees the
        # last reference to one, which waits for the group's threads; where one of these is just
        # about to free a tensor, it waits for the lock, and both wait forever (torch 2.13; seen
        # with the reference of DistributedDataParallel's reducer).
        if nccl:
            dist.destroy_process_group()
