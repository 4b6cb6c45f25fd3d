"""Several cores of a processor: threads that each compute a part of a batch.

PyTorch divides every operator among threads that wait for each other at its end, and spin while
they wait. Where an operator takes a tenth of a millisecond, two threads are hardly faster than one,
and far slower as soon as other work takes time from one of them. Here the batch is divided instead:
each thread computes all operators of its part alone, and waits once. Operators release Python's
lock, and a backward pass runs in the thread that starts it.

    with threads.team():
        outputs = torch.cat(threads.over_parts(network, images_BCHW))

The number of threads is PyTorch's: the cores that the process may use, or OMP_NUM_THREADS.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any, TypeVar

import torch

MOST = 1024  # threads of all teams together; each is started when it is needed

Result = TypeVar("Result")


class _State(threading.local):
    """Of each thread: whether it has a team, and whether it computes a part now."""

    in_team = False
    in_part = False


_state = _State()
_lock = threading.Lock()
_open = 0  # teams of all threads
_threads = 1  # PyTorch's outside of teams


@contextlib.contextmanager
def team(enabled: bool = True) -> Iterator[None]:
    """Within the block, PyTorch's operators take one thread, and `over_parts` takes all.

    Does nothing if it is not enabled, or within another team.
    """
    global _open, _threads
    if not enabled or _state.in_part or _state.in_team:
        yield
        return
    with _lock:
        if not _open:  # the number is partly that of the process: in another's team it is 1
            _threads = torch.get_num_threads()
        _open += 1
        torch.set_num_threads(1)
    _state.in_team = True
    try:
        yield
    finally:
        _state.in_team = False
        with _lock:
            _open -= 1
            torch.set_num_threads(_threads)


@functools.cache
def _pool() -> ThreadPoolExecutor:
    """The threads of all teams; they stay, and with them the memory that malloc holds for each."""
    return ThreadPoolExecutor(MOST, "part", lambda: torch.set_num_threads(1))


if hasattr(os, "register_at_fork"):  # a forked process has none of the threads
    os.register_at_fork(after_in_child=_pool.cache_clear)


def pays(device: torch.device, processes: int = 1) -> bool:
    """Whether a team computes faster: on a processor, unless each core has a process."""
    return device.type == "cpu" and processes == 1


def parts(count: int, smallest: int = 1) -> list[slice]:
    """Return the parts of `count` items, one or more: about equal, and as many as threads at most.

    Args:
        count: Number of items.
        smallest: Items that a part has at least, if there are several parts.
    """
    threads = _threads if _state.in_team and not _state.in_part else 1
    number = max(1, min(threads, count // smallest))
    edges = [count * i // number for i in range(number + 1)]
    return [slice(*pair) for pair in itertools.pairwise(edges)]


def over_parts(function: Callable[..., Result], *batch: Any, smallest: int = 1) -> list[Result]:
    """Call a function with each part of a batch, each in a thread of its own.

    It computes in the caller's grad mode, inference mode and autocast. It must not draw from
    PyTorch's global generator, in which the threads would take turns by chance.

    Args:
        function: Takes the part's slice of each item of `batch`.
        batch: Tensors, arrays or lists of equal length.
        smallest: See `parts`.

    Returns:
        The results, in the order of the parts.

    Raises:
        Exception: The function raised it. All parts have ended; if several raised, the first's.
    """
    slices = parts(len(batch[0]), smallest)
    first, *others = ([item[part] for item in batch] for part in slices)
    if not others:
        return [function(*first)]
    modes = _modes()

    def compute(part: list[Any]) -> Result:
        _state.in_part = True
        with modes():
            return function(*part)

    futures = [_pool().submit(compute, part) for part in others]
    _state.in_part = True
    try:
        result = function(*first)
    finally:
        wait(futures)  # on Ctrl-C, too: nothing computes on when the caller goes on
        _state.in_part = False
    return [result, *(future.result() for future in futures)]


def _modes() -> Callable[[], contextlib.AbstractContextManager[None]]:
    """Return a function that enters, in another thread, the modes of this one."""
    inference, grad = torch.is_inference_mode_enabled(), torch.is_grad_enabled()
    dtype, autocast = torch.get_autocast_dtype("cpu"), torch.is_autocast_enabled("cpu")
    cached = torch.is_autocast_cache_enabled()

    @contextlib.contextmanager
    def enter() -> Iterator[None]:
        with (
            torch.inference_mode(inference),
            torch.set_grad_enabled(grad),
            torch.autocast("cpu", dtype, autocast, cached),
        ):
            yield

    return enter
