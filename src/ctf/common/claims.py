"""Is this folder mine? A folder belongs to whatever wrote its marker file; nothing else is touched.

Every command that writes into a folder of the user's choice asks here first. A folder is vacant if
it holds nothing, or nothing but what a killed process left half-written.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ctf.common import locks, storage
from ctf.common.distributed import ALONE, World
from ctf.common.errors import UserError

# Files that ctf writes into its folders, and keys that each of them has.
MARKERS = {
    "fit.json": ("asked", "plan"),
    "pipeline.json": ("class_names", "sampling"),
    "tokenizer/config.json": ("model",),
    "settings.json": ("classes", "count", "seed", "sampling"),  # samples
    "asked.json": ("subject", "reference", "features"),  # an evaluation
    "manifest.json": ("tokenizer", "codebook_size", "train", "val"),  # tokens
    "cell.json": ("job", "needs"),  # of ctf reproduce
    "sample.json": ("asked", "where", "groups"),  # a benchmark
    "train.json": ("asked", "where", "groups"),
}
FILES = (locks.NAME, "clusters.safetensors", "metrics.jsonl")  # that nothing else writes
MAX_MARKER_BYTES = 1 << 26


def is_ctf_folder(folder: Path) -> bool:
    """Return whether ctf wrote a folder: a run or a part of it, samples, an evaluation, results."""
    if any(os.path.isfile(folder / name) for name in FILES):
        return True
    for together in (("cells", "report.md"), ("shipped.png", "run/fit.json")):
        if all(os.path.exists(folder / name) for name in together):  # of ctf reproduce, of ctf demo
            return True
    return any(_has_keys(folder / name, keys) for name, keys in MARKERS.items())


def _has_keys(path: Path, keys: Sequence[str]) -> bool:
    """Return whether a file is a JSON object with these keys."""
    try:
        if not path.is_file() or path.stat().st_size > MAX_MARKER_BYTES:
            return False
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and all(key in content for key in keys)


def check_apart(out: Path, images: Path) -> None:
    """Check that a new folder is not the folder of the images, around it, or a folder of images.

    Raises:
        UserError: It is; a folder for `out` is suggested.
    """
    if not images.is_dir() or not out.is_dir() or is_ctf_folder(out):
        return
    new, source = out.resolve(), images.resolve()
    advice = f"choose another folder, e.g. {source.parent / f'{source.name}-run'}"
    if new == source:
        raise UserError(f"--out {out}: this is the folder of the images\n{advice}")
    if new in source.parents:
        raise UserError(f"--out {out}: the images {images} are inside this folder\n{advice}")
    if source in new.parents and not is_vacant(out):
        raise UserError(f"--out {out}: this is a folder of the images {images}\n{advice}")


@contextlib.contextmanager
def hold(folder: Path, *markers: str, what: str, world: World = ALONE) -> Iterator[None]:
    """Keep other processes out of a folder that is vacant or has one of the marker files.

    Raises:
        UserError: The folder holds something else, or another process works in it.
    """
    world.on_main(lambda: is_ours(folder, *markers, what=what))
    with locks.hold(folder, world):
        yield


def claim(
    folder: Path,
    config: Mapping[str, Any],
    *,
    marker: str = "config.json",
    what: str = "a training run",
    world: World = ALONE,
) -> None:
    """Make `folder` belong to `config`, or check that it already does.

    Args:
        folder: May be missing.
        config: Plain JSON values, stored as the marker.
        marker: Name of the file that says whose folder it is.
        what: What the folder then is, with an article, for error messages.
        world: The first process writes; an error is raised in all processes.

    Raises:
        UserError: The folder belongs to another configuration, or holds something else.
    """

    def claim_alone() -> None:
        if is_ours(folder, marker, what=what):
            check_same(folder, storage.load_json(folder / marker), config, what=what)
        else:
            storage.save_json(folder / marker, config)
        storage.remove_temporaries(folder)

    world.on_main(claim_alone)


def is_ours(folder: Path, *markers: str, what: str) -> bool:
    """Return True if `folder` has one of the marker files, False if it is vacant.

    Raises:
        UserError: The folder holds something else.
    """
    if any((folder / marker).is_file() for marker in markers):
        return True
    if not is_vacant(folder):
        raise UserError(
            f"{folder} exists, but is not {what} (no {markers[0]}); choose another folder"
        )
    return False


def is_vacant(folder: Path) -> bool:
    """Return whether there is nothing but what a killed process left half-written."""
    if not folder.is_dir():
        return not os.path.lexists(folder)
    return all(
        path.is_dir() or storage.is_temporary(path) or path.name == locks.NAME
        for path in folder.rglob("*")
    )


def check_same(folder: Path, stored: Any, config: Any, *, what: str) -> None:
    """Check that the folder's stored configuration equals `config`, both plain JSON values.

    Raises:
        UserError: They differ; names the first difference.
    """
    if difference := first_difference(stored, config):
        raise UserError(
            f"{folder} is {what} of another configuration: {difference}\n"
            "choose another folder to start anew, or the configuration from before to continue"
        )


def first_difference(stored: Any, config: Any, key: str = "") -> str | None:
    """Return the first value that differs, as "a.b was 1, now 2"; None if all are equal."""
    if stored == config:
        return None
    if isinstance(stored, Mapping) and isinstance(config, Mapping):
        for name in dict.fromkeys([*stored, *config]):
            inner = f"{key}.{name}".removeprefix(".")
            if difference := first_difference(stored.get(name), config.get(name), inner):
                return difference
    if isinstance(stored, list) and isinstance(config, list) and len(stored) == len(config):
        for i, (old, new) in enumerate(zip(stored, config, strict=True)):
            if difference := first_difference(old, new, f"{key}[{i}]"):
                return difference
    return f"{key or 'it'} was {_short(stored)}, now {_short(config)}"


def _short(value: Any) -> str:
    if isinstance(value, list):
        return f"a list of {len(value)}"
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:12]}..."
