"""PyTorch's default device and dtype: a caller may have set them, and our results are the same."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Generator, Iterator
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


@contextlib.contextmanager
def torch_defaults() -> Iterator[None]:
    """Create tensors on the CPU and in float32 within the block, unless it says otherwise."""
    dtype = torch.get_default_dtype()
    # Entered only where it is needed, since it slows down every operator.
    is_cpu = torch.get_default_device().type == "cpu"
    with contextlib.nullcontext() if is_cpu else torch.device("cpu"):
        if dtype == torch.float32:
            yield
            return
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)


def with_torch_defaults(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a function to run in `torch_defaults`."""

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch_defaults():
            return function(*args, **kwargs)

    return wrapper


def steps_with_torch_defaults(steps: Generator[R, None, None]) -> Generator[R, None, None]:
    """Yield what a generator yields; its own code, but not the caller's, is in `torch_defaults`."""
    with contextlib.closing(steps):
        while True:
            with torch_defaults():
                try:
                    item = next(steps)
                except StopIteration:
                    return
            yield item
