"""Results that are expensive to compute, as arrays in the user's cache folder.

The folder is $CTF_CACHE, else $XDG_CACHE_HOME/ctf, else ~/.cache/ctf. It may be deleted at any
time. If it cannot be written, or there is no home, everything works without it.
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
    """Return the arrays saved under a name; None if there are none or the file is damaged."""
    try:
        with np.load(_path(name), allow_pickle=False) as stored:
            return dict(stored)
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, UserError):
        return None


def save(name: str, arrays: Mapping[str, Any]) -> None:
    """Save arrays under a name such as "references/1.npz", if the folder can be written."""
    with contextlib.suppress(UserError, OSError):
        storage.save_npz(_path(name), arrays)


def from_texts(texts: Sequence[str]) -> NDArray[np.uint8]:
    """Pack file names and the like, which contain no zero bytes, into one array."""
    return np.frombuffer(b"\0".join(os.fsencode(text) for text in texts), np.uint8)


def to_texts(array: NDArray[np.uint8], count: int) -> list[str]:
    """Unpack the `count` texts that `from_texts` packed."""
    return os.fsdecode(array.tobytes()).split("\0") if count else []


def _path(name: str) -> Path:
    """Return the file of a name. Raises a UserError if there is no cache folder."""
    if folder := os.environ.get("CTF_CACHE"):
        return Path(folder) / name
    try:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError:  # neither $HOME nor an entry in the list of users
        raise UserError("no home directory; set CTF_CACHE to a folder") from None
    return Path(home) / "ctf" / name
