"""Is this folder mine? A folder belongs to the configuration that made it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ctf.common import storage
from ctf.common.distributed import ALONE, World
from ctf.common.errors import UserError


def claim(folder: Path, config: Mapping[str, Any], world: World = ALONE) -> None:
    """Makes `folder` belong to a training of `config`, or checks that it already does.

    Raises:
        UserError: the folder holds a run made by another configuration, or something else.
    """
    world.first(lambda: _claim(folder, config))


def _claim(folder: Path, config: Mapping[str, Any]) -> None:
    path = folder / "config.json"
    if path.is_file():
        stored = storage.load_json(path)
        if stored != config:
            raise UserError(
                f"{folder} was made by another configuration: {first_difference(stored, config)}\n"
                "choose another folder, or delete this one to start again"
            )
    elif not storage.is_vacant(folder):
        raise UserError(
            f"{folder} exists and holds no run of ctf (no config.json); choose another folder"
        )
    else:
        storage.save_json(path, config)
    storage.remove_temporaries(folder)
    if (folder / "model.safetensors").is_file():
        shutil.rmtree(folder / "state", ignore_errors=True)  # where a kill came just before


def first_difference(stored: Any, wanted: Any, path: str = "") -> str:
    if isinstance(stored, dict) and isinstance(wanted, dict):
        for key in sorted({*stored, *wanted}):
            if stored.get(key) != wanted.get(key):
                return first_difference(stored.get(key), wanted.get(key), f"{path}.{key}")
    return f"{path.removeprefix('.')} was {json.dumps(stored)}, now {json.dumps(wanted)}"
