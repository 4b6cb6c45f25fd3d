"""Former names of keyword arguments, which keep working."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def renamed_keywords(**renamed: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Accept keyword arguments under their former names too, with a DeprecationWarning.

    Args:
        renamed: The new name of each former one: `@renamed_keywords(former="new")`.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
            for former in renamed.keys() & kwargs.keys():
                new = renamed[former]
                if new in kwargs:
                    raise TypeError(f"{function.__name__}() got both {new!r} and {former!r}")
                warnings.warn(
                    f"{function.__name__}(): {former!r} is deprecated, use {new!r}",
                    DeprecationWarning,
                    stacklevel=2,
                )
                kwargs[new] = kwargs.pop(former)
            return function(*args, **kwargs)

        return wrapper

    return decorate
