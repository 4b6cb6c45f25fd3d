"""What is kept so that it need not be computed again: arrays in the user's cache folder.

$CTF_CACHE, else $XDG_CACHE_HOME/ctf, else ~/.cache/ctf. It can be deleted at any time, and where it
cannot be written, everything works without it.
"""

from __future__ import annotations

import contextlib
import os
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ctf.common import storage
from ctf.common.errors import UserError


def load(name: str) -> dict[str, Any] | None:
    """The arrays of that name; None where there are none, or where they are damaged."""
    try:
        with np.load(_path(name), allow_pickle=False) as stored:
            return dict(stored)
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile):
        return None


def save(name: str, arrays: Mapping[str, Any]) -> None:
    """Keeps arrays under a name like "references/1.npz", if that is possible."""
    with (
        contextlib.suppress(UserError, OSError),
        storage.atomic(_path(name)) as temporary,
        open(temporary, "wb") as file,
    ):
        np.savez(file, **arrays)


def from_texts(texts: Sequence[str]) -> NDArray[np.uint8]:
    """Names of files and the like, none with a zero byte in it, as one array."""
    return np.frombuffer(b"\0".join(os.fsencode(text) for text in texts), np.uint8)


def to_texts(array: NDArray[np.uint8], count: int) -> list[str]:
    """The inverse of `from_texts`, for that many of them."""
    return os.fsdecode(array.tobytes()).split("\0") if count else []


def _path(name: str) -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("CTF_CACHE") or Path(home) / "ctf") / name
