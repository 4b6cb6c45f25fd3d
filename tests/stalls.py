"""Finds operators that would wait for a GPU, without one."""

import contextlib
from collections.abc import Iterator

from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Their result, or its shape, is needed on the processor.
STALLING = {
    "_local_scalar_dense", "nonzero", "bincount", "masked_select", "_unique2", "unique_dim",
    "unique_consecutive", "equal", "is_nonzero",
}  # fmt: skip
READING = (Tensor.tolist, Tensor.numpy, Tensor.item, Tensor.cpu)


class _Operators(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        masks = any(isinstance(x, Tensor) and x.dtype.itemsize == 1 for x in tree_leaves(args[1:2]))
        if name in STALLING or (name in ("index", "index_put_", "index_put") and masks):
            raise AssertionError(f"{func} would wait for a GPU")
        return func(*args, **(kwargs or {}))


class _Methods(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in READING:
            raise AssertionError(f"{func.__name__} would wait for a GPU")
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def no_stalls() -> Iterator[None]:
    """Within it, what would wait for a GPU fails."""
    with _Methods(), _Operators():
        yield
