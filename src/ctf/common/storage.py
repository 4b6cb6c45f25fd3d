"""Files that are either whole or not there: atomic writes, strict loads, the latest state.

Tensors are stored as safetensors, everything else as JSON. Others' .pt files can be read; no pickle
is ever executed.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import pickle
import re
import shutil
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ctf.common.distributed import ALONE, World, is_cut, laid_out
from ctf.common.errors import UserError

METADATA = "ctf"  # the entry of a safetensors file's metadata that holds ours, as JSON


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yields a temporary name next to `path`; on success it is synced and renamed to `path`.

    Whatever happens, `path` is either what it was before or the whole new file.

    Raises:
        UserError: the disk is full, or the folder cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            with open(temporary, "rb+") as file:
                os.fchmod(file.fileno(), 0o666 & ~_umask())  # safetensors: for the owner alone
                os.fsync(file.fileno())
            os.replace(temporary, path)
            _sync_folder(path.parent)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Says in a UserError that `path` could not be written, and why."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise _write_error(path, error) from error


def remove_temporaries(folder: Path) -> None:
    """Removes the half-written files of runs that were killed."""
    for left_over in folder.glob(".*.tmp"):
        if is_temporary(left_over):
            left_over.unlink(missing_ok=True)


def is_temporary(path: Path) -> bool:
    """Return whether `atomic` gave the file its name."""
    return re.fullmatch(r"\..+\.\d+\.tmp", path.name) is not None


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write_error(path: Path, error: Exception) -> Exception:
    code = getattr(error, "errno", None)
    if code is None and (found := re.search(r"os error (\d+)", str(error))):  # safetensors' own
        code = int(found[1])
    if code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return UserError(
            f"{path}: the disk is full; what was there before is untouched\n"
            "make room and run the same command again"
        )
    if code in (errno.EROFS, errno.EACCES, errno.EPERM):
        return UserError(
            f"{path}: cannot be written ({os.strerror(code)}); "
            "choose a folder that you may write to"
        )
    if code in (errno.ENOTDIR, errno.EEXIST, errno.EISDIR):
        return UserError(f"{path}: cannot be written ({os.strerror(code)}); choose another folder")
    return error


def save_json(path: Path, content: Any) -> None:
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def load_json(path: Path) -> Any:
    """Raises UserError where the file is not there or is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: not found; is {path.parent} a folder made by ctf?") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None


def load_object(path: Path) -> dict[str, Any]:
    """Raises UserError where the file is not there or is not a JSON object."""
    content = load_json(path)
    if not isinstance(content, dict):
        raise UserError(f"{path}: got {type(content).__name__}, expected an object with keys")
    return content


def save_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    # As one entry: safetensors writes several in any order, and equal content is to be equal bytes.
    entries = {METADATA: json.dumps(dict(metadata))} if metadata else {}
    with atomic(path) as temporary:
        save_file(
            {k: v.detach().contiguous() for k, v in tensors.items()}, temporary, metadata=entries
        )


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file, on the CPU, in memory of their own.

    Raises:
        UserError: the file is not there, is truncated, or is something else.
    """
    if not path.is_file():
        raise UserError(f"{path}: not found; is {path.parent} a folder made by ctf?")
    try:
        with safe_open(path, framework="pt") as file:
            # Cloned: a mapped file's tensors need not be aligned, and kernels may round
            # differently on unaligned memory; a resumed run must end with the same bits.
            tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
            entries = dict(file.metadata() or {})
            return tensors, json.loads(entries[METADATA]) if METADATA in entries else entries
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path}: truncated or not a safetensors file ({error})") from None


# What torch.load raises for a file that is truncated, or is something else.
_UNREADABLE = (
    RuntimeError, EOFError, ValueError, KeyError, IndexError, TypeError, AttributeError, OSError,
    zipfile.BadZipFile, pickle.UnpicklingError,
)  # fmt: skip


def load_pt(path: Path, classes: Sequence[type] = ()) -> Any:
    """What a file of torch.save holds: tensors, plain values and `classes`; no code is ever run.

    Tensors are on the CPU, mapped from the disk where the file's format allows it.

    Raises:
        UserError: not found, truncated, something else, or with code in it.
    """
    if not path.is_file():
        raise UserError(f"{path}: not found")
    try:
        with torch.serialization.safe_globals(list(classes)):
            return torch.load(
                path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
            )
    except _UNREADABLE as error:
        if found := re.search(r"(?:GLOBAL|class|function) (\S+\.\S+)", str(error)):
            raise UserError(
                f"{path}: refused, since it holds {found[1]}, which is code and not weights; "
                "nothing was run"
            ) from None
        reason = str(error).strip().split("\n")[0][:100] or type(error).__name__
        raise UserError(
            f"{path}: truncated, or not a checkpoint of PyTorch ({reason}); download it again"
        ) from None


class _NothingDrawn(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.normalize or getattr(func, "__module__", None) == nn.init.__name__:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


@contextlib.contextmanager
def without_weights() -> Iterator[None]:
    """Modules that are made in here have no memory yet: their weights come by `load_strict`.

    Nothing is drawn or normalised for them: even without memory, that makes PyTorch import its
    compiler, which takes a second.
    """
    with torch.device("meta"), _NothingDrawn():
        yield


def load_strict(module: nn.Module, tensors: Mapping[str, Tensor], where: str | Path) -> None:
    """Copies `tensors` into `module`; names and shapes must match exactly.

    A module on the meta device, which has no memory yet, takes the tensors themselves. One that is
    cut into parts among processes takes its part of each.

    Raises:
        UserError: names the first tensor that is missing, unknown, or of another shape.
    """
    own = module.state_dict()
    for name in own:
        if name not in tensors:
            raise UserError(f"{where}: tensor {name!r} is missing")
    for name, value in tensors.items():
        if name not in own:
            raise UserError(f"{where}: unknown tensor {name!r}")
        if value.shape != own[name].shape:
            raise UserError(
                f"{where}: tensor {name!r} has shape {tuple(value.shape)}, "
                f"expected {tuple(own[name].shape)}"
            )
    empty = any(tensor.is_meta for tensor in own.values())
    parts = {name: laid_out(value, own[name]) for name, value in tensors.items()}
    module.load_state_dict(parts, assign=empty)


def hash_file(path: Path) -> str:
    """SHA-256 of a file, as hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_json(content: Any) -> str:
    """SHA-256 of the canonical JSON text of `content`, as hex digits."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


# --- The state of a training ----------------------------------------------------------------------

STATES_KEPT = 2  # if the newest turns out to be damaged, there is one before it


def save_state(
    folder: Path, step: int, tensors: Mapping[str, Tensor], world: World = ALONE
) -> None:
    """Stores everything a training needs to go on after `step` steps; drops all but the newest.

    A state is a file. Where tensors are cut into parts among processes, it is a folder, in which
    each process writes a file with its parts. All processes must call this.

    Raises:
        UserError: it cannot be written; in all processes.
    """
    if any(is_cut(tensor) for tensor in tensors.values()):
        _save_parts(folder / f"step-{step:08d}", tensors, world)
    else:
        path = folder / f"step-{step:08d}.safetensors"
        world.first(lambda: save_tensors(path, tensors))
    if world.main:
        for old in _states(folder)[STATES_KEPT:]:
            _remove(old)


def _save_parts(path: Path, tensors: Mapping[str, Tensor], world: World) -> None:
    from torch.distributed.checkpoint.api import CheckpointException  # takes a second to import
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    temporary = path.with_name(f".{path.name}.{world.told(os.getpid())}.tmp")

    def begin() -> None:
        with writing(path):
            for left_over in path.parent.glob(".step-*.tmp"):
                _remove(left_over)
            temporary.mkdir(parents=True)

    def end() -> None:
        with writing(path):
            _sync_folder(temporary)
            shutil.rmtree(path, ignore_errors=True)
            os.replace(temporary, path)
            _sync_folder(path.parent)

    world.first(begin)
    try:
        # As safetensors: torch's own format would need a pickle.
        writer = HuggingFaceStorageWriter(str(temporary), save_distributed=True)
        save(dict(tensors), storage_writer=writer)
    except CheckpointException as error:  # all processes know who failed, and how
        if world.main:
            _remove(temporary)
        for cause, _ in error.failures.values():
            if isinstance(cause, OSError | SafetensorError):
                raise world.error(str(_write_error(path, cause))) from error
        raise
    world.first(end)


def load_state(
    folder: Path, step: int, like: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """The state after that many steps, in whole tensors.

    Args:
        like: tensors of the same names that are cut into parts among processes; what is read of
            these are the parts of this process, if the state was stored in parts.

    Raises:
        UserError: it cannot be read.
    """
    if not (path := folder / f"step-{step:08d}").is_dir():
        return load_tensors(path.with_suffix(".safetensors"))[0]
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load

    parts = {k: v for k, v in (like or {}).items() if is_cut(v)}
    try:
        reader = HuggingFaceStorageReader(str(path))
        tensors: dict[str, Any] = {}
        for name, stored in reader.read_metadata().state_dict_metadata.items():
            assert isinstance(stored, TensorStorageMetadata)
            empty = torch.empty(stored.size, dtype=stored.properties.dtype)
            tensors[name] = torch.empty_like(parts[name]) if name in parts else empty
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is ")  # each process for itself
            load(tensors, storage_reader=reader, no_dist=not parts)
    except (CheckpointException, SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path}: damaged ({error})") from None
    return tensors


def latest_state(folder: Path) -> int:
    """The steps that the newest whole state is after, 0 where there is none; drops damaged ones."""
    for path in _states(folder):
        files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
        try:
            if not files:
                raise UserError(f"{path}: empty")
            for file in files:
                _check_whole(file)
        except UserError as error:
            print(f"{error}\ngoing on from the state before it", flush=True)
            _remove(path)
            continue
        return int(path.stem.removeprefix("step-"))
    return 0


def _check_whole(path: Path) -> None:
    """Raises UserError where a safetensors file is not as long as it says, or is something else."""
    try:
        with safe_open(path, framework="pt") as file:
            file.keys()
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path}: truncated or not a safetensors file ({error})") from None


def _states(folder: Path) -> list[Path]:
    """The newest first."""
    found = [p for p in folder.glob("step-*") if re.fullmatch(r"step-\d+(\.safetensors)?", p.name)]
    return sorted(found, key=lambda path: path.stem, reverse=True)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
