"""Files that are either complete or absent: atomic writes, JSON, safetensors, hashes.

Tensors are stored as safetensors, everything else as JSON. The .pt files of others can be read, but
no pickle is ever executed.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import pickle
import re
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ctf.common.errors import UserError
from ctf.common.text import encodable

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL import Image

METADATA = "ctf"  # the entry of a safetensors file's metadata that holds ours, as JSON


# --- Writing --------------------------------------------------------------------------------------


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a temporary name next to `path`; on success, sync it and rename it to `path`.

    Whatever happens, `path` is either what it was before or the complete new file.

    Raises:
        UserError: The disk is full, or the folder cannot be written.
    """
    # Shortened, since names have 255 bytes at most.
    name = os.fsdecode(os.fsencode(path.name)[:200])
    temporary = path.with_name(f".{name}.{os.getpid()}.tmp")
    try:
        with user_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            with open(temporary, "rb+") as file:
                # safetensors creates files that only their owner may read.
                os.fchmod(file.fileno(), 0o666 & ~_umask())
                os.fsync(file.fileno())
            os.replace(temporary, path)
            sync_folder(path.parent)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def is_temporary(path: Path) -> bool:
    """Return whether `atomic` gave the file its name."""
    return re.fullmatch(r"\..+\.\d+\.tmp", path.name) is not None


def remove_temporaries(folder: Path) -> None:
    """Remove the half-written files of killed processes."""
    for path in folder.glob(".*.tmp"):
        if is_temporary(path):
            path.unlink(missing_ok=True)


def sync_folder(path: Path) -> None:
    """Make the names in a folder survive a crash of the machine."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


@contextlib.contextmanager
def user_errors(path: Path) -> Iterator[None]:
    """Turn errors of writing `path` into a UserError, where they are the user's to fix."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise write_error(path, error) from error


def write_error(path: Path, error: Exception) -> Exception:
    """Return the UserError for an error of writing `path`; return other errors as they are."""
    code = getattr(error, "errno", None)
    if code is None and (match := re.search(r"os error (\d+)", str(error))):  # from safetensors
        code = int(match[1])
    if code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return UserError(
            f"{path}: the disk is full; the previous file is unchanged\n"
            "free some space and run the same command again"
        )
    if code in (errno.EROFS, errno.EACCES, errno.EPERM):
        return UserError(
            f"{path}: cannot be written ({os.strerror(code)}); choose a folder you can write to"
        )
    if code in _IMPOSSIBLE:
        return UserError(f"{path}: cannot be written ({os.strerror(code)}); choose another folder")
    return error


# Errors of writing that another place does not have: /proc/x, a file as a folder, a name that is
# too long or that the file system does not take, a loop of links.
_IMPOSSIBLE = (
    errno.ENOENT, errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP,
    errno.EINVAL, errno.ENXIO, errno.ENODEV, errno.ENOTSUP, errno.EILSEQ, errno.ENOSYS,
)  # fmt: skip


def check_writable(path: Path) -> None:
    """Check, by trying, that a file or a folder can be made at `path`; nothing is left there.

    Nothing is tried in a folder that is not empty: finished work needs no writing.

    Raises:
        UserError: See `atomic`.
    """
    with user_errors(path):
        folder = next(folder for folder in (path, *path.parents) if _exists(folder))
        if folder == path and path.is_dir() and any(path.iterdir()):
            return
        if folder == path and not path.is_dir():
            folder = path.parent
        with tempfile.TemporaryDirectory(prefix=".", suffix=".tmp", dir=folder):
            pass


def _exists(path: Path) -> bool:
    """Return whether there is something; raise an OSError if there cannot be."""
    try:
        path.lstat()
    except FileNotFoundError:
        return False
    return True


def _not_found(path: Path) -> UserError:
    return UserError(f"{path}: not found; is {path.parent} a folder made by ctf?")


# --- Images, arrays, text and JSON ----------------------------------------------------------------


def save_png(path: Path, image: Image.Image) -> None:
    """Write an image as PNG. Raises UserError as `atomic`."""
    with atomic(path) as temporary:
        image.save(temporary, format="PNG")


def save_plot(path: Path, figure: Figure) -> None:
    """Write a plot as PNG; names in it are no formulas. Raises UserError as `atomic`."""
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        assert isinstance(text, Text)
        if (name := text.get_text()) and "\\mathdefault" not in name:  # as on logarithmic axes
            text.set_text(encodable(name))
            text.set_parse_math(False)
    with atomic(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def save_npz(path: Path, arrays: Mapping[str, Any]) -> None:
    """Write arrays as .npz. Raises UserError as `atomic`."""
    with atomic(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays)


def save_text(path: Path, text: str) -> None:
    """Write text as UTF-8; see `encodable`. Raises UserError as `atomic`."""
    with atomic(path) as temporary:
        temporary.write_text(encodable(text), encoding="utf-8")


def save_json(path: Path, content: Any) -> None:
    """Write plain values as indented JSON. Raises UserError as `atomic`."""
    save_text(path, json.dumps(content, indent=2) + "\n")


def load_json(path: Path) -> Any:
    """Read a JSON file. Raises UserError if it is missing, unreadable or not valid JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))  # some editors begin with a mark
    except FileNotFoundError:
        raise _not_found(path) from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None


def load_object(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises UserError if the file is missing or something else."""
    content = load_json(path)
    if not isinstance(content, dict):
        raise UserError(f"{path}: got {type(content).__name__}, expected an object with keys")
    return content


# --- Tensors --------------------------------------------------------------------------------------


def save_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors and metadata as safetensors; equal content gives equal bytes.

    Raises:
        UserError: See `atomic`.
    """
    # As one entry: safetensors writes several in any order.
    entries = {METADATA: json.dumps(dict(metadata))} if metadata else {}
    with atomic(path) as temporary:
        save_file(
            {k: v.detach().contiguous() for k, v in tensors.items()}, temporary, metadata=entries
        )


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the tensors, on the CPU and in memory of their own, and the metadata of a file.

    Raises:
        UserError: The file is missing, truncated, or not a safetensors file.
    """
    if not path.is_file():
        raise _not_found(path)
    with _safetensors_errors(path), _utf8(path) as name, safe_open(name, framework="pt") as file:
        # Cloned: a mapped file's tensors need not be aligned, and kernels may round differently on
        # unaligned memory; a resumed run must end with the same bits.
        tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
        entries = dict(file.metadata() or {})
        return tensors, json.loads(entries[METADATA]) if METADATA in entries else entries


def is_safetensors(path: Path) -> bool:
    """Return whether a file begins as safetensors do: the length of a JSON object, then that."""
    with contextlib.suppress(OSError), open(path, "rb") as file:
        return file.read(9)[8:] == b"{"
    return False


def check_complete(path: Path) -> None:
    """Check, without reading the tensors, that a safetensors file has its full length.

    Raises:
        UserError: The file is truncated, or not a safetensors file.
    """
    with _safetensors_errors(path), _utf8(path) as name, safe_open(name, framework="pt") as file:
        file.keys()


@contextlib.contextmanager
def _utf8(path: Path) -> Iterator[Path]:
    """Yield a path of the same file in UTF-8, which is all that safetensors can open."""
    if encodable(str(path)) == str(path):
        yield path
        return
    with open(path, "rb") as file:
        yield Path(f"/proc/self/fd/{file.fileno()}")


@contextlib.contextmanager
def _safetensors_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path}: truncated or not a safetensors file ({error})") from None


# What torch.load raises for a file that is truncated or something else.
_UNREADABLE = (
    RuntimeError, EOFError, ValueError, KeyError, IndexError, TypeError, AttributeError, OSError,
    zipfile.BadZipFile, pickle.UnpicklingError,
)  # fmt: skip


def load_pt(path: Path, classes: Sequence[type] = ()) -> Any:
    """Read a file of torch.save without executing code: tensors, plain values and `classes`.

    Tensors are on the CPU, mapped from the disk if the file's format allows it.

    Raises:
        UserError: The file is missing, truncated, something else, or contains code.
    """
    if not path.is_file():
        reason = "; it is a folder, expected a file" if path.is_dir() else ""
        raise UserError(f"{path}: not found{reason}")
    try:
        with torch.serialization.safe_globals(list(classes)):
            return torch.load(
                path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
            )
    except _UNREADABLE as error:
        if match := re.search(r"(?:GLOBAL|class|function) (\S+\.\S+)", str(error)):
            raise UserError(
                f"{path}: refused, since it contains {match[1]}, which is code and not weights; "
                "nothing was executed\n"
                "if you trust the program that wrote it, make it save the model's state dict alone"
            ) from None
        reason = str(error).strip().split("\n")[0][:100] or type(error).__name__
        raise UserError(
            f"{path}: truncated or not a PyTorch checkpoint ({reason}); download it again"
        ) from None


# --- Hashes ---------------------------------------------------------------------------------------


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file in hex digits. Raises UserError if it is missing."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        raise _not_found(path) from None


def hash_json(content: Any) -> str:
    """Return the SHA-256 of the canonical JSON text of plain values in hex digits."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
