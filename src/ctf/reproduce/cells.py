"""Cells: everything that `ctf reproduce` computes, each thing once.

A cell is data. Its fields decide its result: configurations, numbers, and the cells that it reads.
The kinds of cells are in `training_cells` and `sampling_cells`; `runner` computes them.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar

import torch

from ctf.common import config, storage
from ctf.common.progress import OpenProgress
from ctf.data.image_set import ImageSet, Splits
from ctf.evaluation import reference_sets
from ctf.evaluation.image_collection import ImageCollection
from ctf.reproduce.plan import Plan

Outcome = dict[str, Any]  # the numbers that a cell stores


@dataclasses.dataclass(frozen=True)
class Workspace:
    """What the cells of a plan read, and the folders for their files and their results.

    Attributes:
        images: To train on, without the reserved ones, and held out.
        reserved: Training images that only searches read.
    """

    plan: Plan
    images: Splits
    reserved: ImageSet
    work: Path
    results: Path
    device: torch.device
    open_progress: OpenProgress

    def run(self, cell: Cell) -> Path:
        """The folder for what a cell makes, in the form of any run of `ctf`."""
        return self.work / cell.name / "run"

    def result(self, cell: Cell) -> dict[str, Any] | None:
        """Return the stored result of a cell; None if there is none, or one of another plan."""
        path = self.results / "cells" / f"{cell.name}.json"
        if not path.is_file():
            return None
        stored = storage.load_object(path)
        return stored if stored.get("asked") == cell.to_json() else None

    def outcome(self, cell: Cell) -> Outcome | None:
        """The numbers of a stored result."""
        result = self.result(cell)
        return None if result is None else result["found"]

    def held_out(self) -> ImageCollection:
        """The images that scores are computed against."""
        size = self.images.val.image_size
        images = reference_sets.open_reference(
            self.plan.source, size, "val", background="white", skip_bad=False
        )
        assert isinstance(images, ImageCollection)
        return images


@dataclasses.dataclass(frozen=True)
class Cell:
    """A computation with a unique name, which also names its folder."""

    name: str
    has_files: ClassVar[bool] = True  # besides its result, for the cells that need it

    @property
    def needs(self) -> tuple[Cell, ...]:
        """The cells among the fields: those that are computed before this one."""
        values = [getattr(self, field.name) for field in dataclasses.fields(self)]
        each = [item for v in values for item in (v if isinstance(v, tuple) else (v,))]
        return tuple(item for item in each if isinstance(item, Cell))

    def to_json(self) -> dict[str, Any]:
        """Everything that decides the result, as cell.json holds it; other cells by a hash.

        A field of `config.OMIT_DEFAULT` is left out while it has its default.
        """
        fields = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            omitted = field.metadata.get("omit_default") and value == field.default
            if field.name != "name" and not omitted:
                fields[field.metadata.get("key", field.name)] = value
        plain = json.loads(json.dumps(fields, default=_to_json))
        needs = {cell.name: storage.hash_json(cell.to_json())[:16] for cell in self.needs}
        return {"job": type(self).__name__.replace("Cell", "Job"), **plain, "needs": needs}

    def compute(self, space: Workspace) -> Outcome:
        """Compute the cell, or continue, in its folder; the cells that it needs are done."""
        raise NotImplementedError


def _to_json(value: Any) -> Any:
    return value.name if isinstance(value, Cell) else config.to_json(value)


def stored_as(key: str) -> Any:
    """A field of a cell that cell.json stores under another name."""
    return dataclasses.field(metadata={"key": key})


def with_needs(cells: Iterable[Cell]) -> dict[str, Cell]:
    """Return the cells and all that they need, by name, each after those that it needs.

    Raises:
        ValueError: Two different cells have the same name.
    """
    ordered: dict[str, Cell] = {}

    def add(cell: Cell) -> None:
        if cell.name not in ordered:
            for needed in cell.needs:
                add(needed)
        if ordered.setdefault(cell.name, cell) != cell:
            raise ValueError(f"two different cells are called {cell.name}")

    for cell in cells:
        add(cell)
    return ordered


def link(run: Path, other: Path, *stages: str) -> None:
    """Make `run` a run with stages of another one; all cells can be moved together."""
    run.mkdir(parents=True, exist_ok=True)
    for name in stages:
        path, stage = run / name, other / name
        if not path.is_symlink():
            path.symlink_to(os.path.relpath(stage, run), target_is_directory=stage.is_dir())
