"""The file metrics.jsonl of a stage: a line for some steps of training, or for an evaluation."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from ctf.common import storage

FILE = "metrics.jsonl"
Split = Literal["train", "val"]


def append_metrics(
    folder: Path, step: int, split: Split, metrics: Mapping[str, float], seconds: float
) -> None:
    """Append a line: metrics after `step` steps and `seconds` of training.

    Raises:
        UserError: The file cannot be written.
    """
    line = {"step": step, "split": split, **metrics, "seconds": round(seconds, 3)}
    with storage.user_errors(folder / FILE):
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / FILE, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def drop_metrics(folder: Path, step: int) -> None:
    """Drop the lines after `step` steps, which a resumed training repeats; all lines for step 0."""
    if (folder / FILE).is_file():
        lines = [line for line in read_metrics(folder) if 0 < step >= line["step"]]
        with storage.atomic(folder / FILE) as temporary:
            text = "".join(json.dumps(line) + "\n" for line in lines)
            temporary.write_text(text, encoding="utf-8")


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Return all lines of a stage's metrics; [] if there are none yet."""
    path = folder / FILE
    lines: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break  # the process was killed while it wrote this line
    return lines


def last_metrics(folder: Path, split: Split) -> dict[str, Any]:
    """Return the newest line of a split; {} if there is none yet."""
    return next((m for m in reversed(read_metrics(folder)) if m["split"] == split), {})
