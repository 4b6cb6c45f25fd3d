"""Runs seen from outside: the curves of their stages as a picture, and a table of how they stand.

Everything is read from config.json and metrics.jsonl of the stages, so it works while they train.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ctf.common import storage
from ctf.common.errors import UserError
from ctf.training import loop, metrics_log

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ORDER = ("tokenizer", "coarse", "fine")  # other trained folders come after these
MANY = 100  # values of a curve; with more, it is faint, and on it lies its mean over a fortieth


class Panel(NamedTuple):
    """One row of the picture; of the keys, a stage's first that it has values of."""

    train: tuple[str, ...]
    held_out: tuple[str, ...]
    log: bool


# The tokenizer's loss has parts that held-out pictures don't have: its reconstruction is compared.
LOSS = Panel(("reconstruction", "loss"), ("mse", "loss"), log=False)
GRADIENT = Panel(("gradient_norm",), (), log=True)
RATE = Panel(("learning_rate",), (), log=False)
SPEED = Panel(("tokens_per_second", "images_per_second"), (), log=False)
PANELS = (LOSS, GRADIENT, RATE, SPEED)
TITLES = {
    "reconstruction": "squared error", "gradient_norm": "gradient norm",
    "learning_rate": "learning rate", "tokens_per_second": "tokens / s",
    "images_per_second": "images / s",
}  # fmt: skip
COLUMNS = ("run", "stage", "steps", "loss", "held out", "speed", "seconds")


class Curve(NamedTuple):
    key: str
    steps: list[int]
    values: list[float]


@dataclasses.dataclass(frozen=True)
class Stage:
    """One trained stage of a run, as far as it has come."""

    run: str
    name: str
    steps: int  # that are planned
    lines: list[dict[str, Any]]  # of metrics.jsonl
    finished: bool

    def curve(self, split: str, keys: Sequence[str]) -> Curve | None:
        """What the lines of a split say of the first of `keys` that they know."""
        for key in keys:
            lines = [line for line in self.lines if line["split"] == split and key in line]
            if lines:
                return Curve(key, [line["step"] for line in lines], [line[key] for line in lines])
        return None

    def row(self) -> tuple[str, ...]:
        """Of the table, under `COLUMNS`."""
        loss, held_out = self.curve("train", LOSS.train), self.curve("val", LOSS.held_out)
        speed = self.curve("train", SPEED.train)
        done = max((line["step"] for line in self.lines), default=0)
        seconds = max((line["seconds"] for line in self.lines), default=0.0)
        return (
            self.run,
            self.name,
            f"{done}/{self.steps}",
            f"{loss.values[-1]:.4f}" if loss else "",
            f"{held_out.values[-1]:.4f}" if held_out else "",
            f"{speed.values[-1]:,.0f} {TITLES[speed.key].replace(' ', '')}" if speed else "",
            f"{seconds:,.0f}{'' if self.finished else '  not finished'}",
        )


def stages(run: Path) -> list[Stage]:
    """The trained stages of a run, or the one that the folder itself is, such as a classifier's.

    Raises:
        UserError: there is none, or no such folder.
    """
    if not (folders := trained(run)):
        raise UserError(f"{run}: no training has logged anything there (no metrics.jsonl)")
    return [_stage(run, folder) for folder in folders]


def trained(run: Path) -> list[Path]:
    """The folders of a run whose training has begun, in the order of the data.

    Raises:
        UserError: there is no such run.
    """
    if not run.is_dir():
        raise UserError(f"{run}: not found; expected the folder of a run")
    folders = [path.parent for path in (*run.glob("metrics.jsonl"), *run.glob("*/metrics.jsonl"))]
    known = {name: number for number, name in enumerate(ORDER)}
    return sorted(folders, key=lambda folder: (known.get(folder.name, len(known)), folder.name))


def _stage(run: Path, folder: Path) -> Stage:
    stored = storage.load_object(folder / "config.json")
    training = stored.get("training") or stored.get("config") or {}  # the latter a classifier's
    if "steps" not in training:
        raise UserError(f"{folder / 'config.json'}: not the configuration of a training")
    return Stage(
        run=run.resolve().name,
        name=folder.resolve().name,
        steps=training["steps"],
        lines=metrics_log.read_metrics(folder),
        finished=loop.is_finished(folder),
    )


def table(shown: Sequence[Sequence[Stage]]) -> str:
    """A line for each stage of each run; not broken, however narrow the terminal is."""
    rows = [COLUMNS, *(stage.row() for run in shown for stage in run)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def draw(shown: Sequence[Sequence[Stage]], path: Path) -> None:
    """Draws the curves of the stages of one or several runs, runs of equal stages into one panel.

    Args:
        shown: the stages of each run.
        path: of a PNG.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import LogLocator, NullFormatter

    names = list(dict.fromkeys(stage.name for run in shown for stage in run))
    size = (1.2 + 3.8 * len(names), 1.0 + 2.1 * len(PANELS))
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(PANELS), len(names), squeeze=False, sharex="col")
    for column, name in enumerate(names):
        grid[0, column].set_title(name, fontsize=11, fontweight="bold")
        grid[-1, column].set_xlabel("step", fontsize=9)
        for row, panel in enumerate(PANELS):
            axes = grid[row, column]
            axes.grid(alpha=0.25)
            axes.tick_params(labelsize=8)
            for number, run in enumerate(shown):
                for stage in run:
                    if stage.name == name:
                        _curves(axes, panel, stage, f"C{number % 10}")
            if panel is SPEED:
                axes.set_ylim(bottom=0)
            elif panel.log:
                axes.set_yscale("log")
                axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axes.yaxis.set_major_formatter("{x:g}")
                axes.yaxis.set_minor_formatter(NullFormatter())
    labels = [
        Line2D([], [], color=f"C{number % 10}", label=run[0].run)
        for number, run in enumerate(shown)
    ]
    grey = {"color": "0.3", "lw": 1.2}
    labels += [
        Line2D([], [], label="training", **grey),  # type: ignore[arg-type]
        Line2D([], [], ls="--", marker="o", ms=3.5, label="held out", **grey),  # type: ignore[arg-type]
    ]
    columns = min(len(labels), 1 + 2 * len(names))
    figure.legend(
        handles=labels, loc="outside upper center", ncols=columns, fontsize=9, frameon=False
    )
    with storage.atomic(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def _curves(axes: Axes, panel: Panel, stage: Stage, colour: str) -> None:
    train, held_out = stage.curve("train", panel.train), stage.curve("val", panel.held_out)
    if train:
        axes.set_ylabel(TITLES.get(train.key, train.key), fontsize=9)
        many = len(train.values) > MANY and panel is not RATE
        axes.plot(train.steps, train.values, color=colour, lw=1.2, alpha=0.25 if many else 1)
        if many:
            axes.plot(train.steps, _smooth(train.values), color=colour, lw=1.2)
    if held_out:
        axes.plot(held_out.steps, held_out.values, color=colour, lw=1, ls="--", marker="o", ms=3)


def _smooth(values: Sequence[float]) -> list[float]:
    """The mean of each value and its neighbours, equally many on either side."""
    reach = len(values) // 80
    sides = [min(reach, i, len(values) - 1 - i) for i in range(len(values))]
    return [sum(values[i - r : i + r + 1]) / (2 * r + 1) for i, r in enumerate(sides)]
