"""The file metrics.jsonl of a stage: a line for some steps of training, or for an evaluation."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from ctf.common import storage
from ctf.common.distributed import World

FILE = "metrics.jsonl"
Split = Literal["train", "val"]


class MetricsLog:
    """Writes the file, in the first of several processes."""

    def __init__(self, folder: Path, world: World) -> None:
        self.path, self.world = folder / FILE, world

    def append(self, step: int, split: Split, metrics: Mapping[str, float], seconds: float) -> None:
        """Append a line: metrics after `step` steps and `seconds` of training."""
        line = {"step": step, "split": split, **metrics, "seconds": round(seconds, 3)}

        def write() -> None:
            with storage.user_errors(self.path):
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with open(self.path, "a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")

        self.world.on_main(write)

    def drop_after(self, step: int) -> float:
        """Drop the lines of steps that will be repeated; return the seconds up to `step`."""
        lines = [line for line in read_metrics(self.path.parent) if 0 < step >= line["step"]]

        def write() -> None:
            if self.path.is_file():
                text = "".join(json.dumps(line) + "\n" for line in lines)
                storage.save_text(self.path, text)

        self.world.on_main(write)
        return float(lines[-1]["seconds"]) if lines else 0.0


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
