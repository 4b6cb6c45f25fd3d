"""The trainings of runs at a glance: a table of their stages, and their curves as an image.

Everything is read from config.json and metrics.jsonl of the stages, so it works while they train.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ctf.common import storage
from ctf.common.errors import UserError
from ctf.training import loop
from ctf.training.metrics_log import FILE, Split, read_metrics
from ctf.training.recipes import STAGES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SMOOTHED_FROM = 100  # values of a curve; it is then drawn faint, under its moving average


class Panel(NamedTuple):
    """One row of the image: the metrics it shows; of several, the first that a stage has."""

    train: tuple[str, ...]
    held_out: tuple[str, ...]
    log: bool


# The tokenizer's loss has parts that held-out images don't have: its squared error is compared.
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
    """The values of one metric."""

    name: str
    steps: list[int]
    values: list[float]


@dataclasses.dataclass(frozen=True)
class Training:
    """The training of one stage of a run, as far as it has come."""

    run: str
    stage: str
    steps: int  # planned
    lines: list[dict[str, Any]]  # of metrics.jsonl
    finished: bool

    def curve(self, split: Split, names: Sequence[str]) -> Curve | None:
        """Return the first of the metrics that has values in a split."""
        for name in names:
            lines = [line for line in self.lines if line["split"] == split and name in line]
            if lines:
                return Curve(name, [line["step"] for line in lines], [line[name] for line in lines])
        return None

    def row(self) -> tuple[str, ...]:
        """Return the cells of the table, under `COLUMNS`."""
        loss, held_out = self.curve("train", LOSS.train), self.curve("val", LOSS.held_out)
        speed = self.curve("train", SPEED.train)
        done = max((line["step"] for line in self.lines), default=0)
        seconds = max((line["seconds"] for line in self.lines), default=0.0)
        return (
            self.run,
            self.stage,
            f"{done}/{self.steps}",
            f"{loss.values[-1]:.4f}" if loss else "",
            f"{held_out.values[-1]:.4f}" if held_out else "",
            f"{speed.values[-1]:,.0f} {TITLES[speed.name].replace(' ', '')}" if speed else "",
            f"{seconds:,.0f}{'' if self.finished else '  not finished'}",
        )


def find_stages(run: Path) -> list[Path]:
    """Return the folders of a run whose training has begun, in the order of the stages.

    Raises:
        UserError: There is no such run.
    """
    if not run.is_dir():
        raise UserError(f"{run}: not found; expected the folder of a run")
    folders = [path.parent for path in (*run.glob(FILE), *run.glob(f"*/{FILE}"))]
    order: dict[str, int] = {name: number for number, name in enumerate(STAGES)}
    return sorted(folders, key=lambda folder: (order.get(folder.name, len(order)), folder.name))


def load_trainings(run: Path) -> list[Training]:
    """Return the trainings of a run, or the one of a stage's folder, such as a classifier's.

    Raises:
        UserError: There is no training, or no such folder.
    """
    if not (folders := find_stages(run)):
        raise UserError(f"{run}: no training has logged anything there (no {FILE})")
    return [_load_training(run, folder) for folder in folders]


def _load_training(run: Path, folder: Path) -> Training:
    stored = storage.load_object(folder / "config.json")
    training = stored.get("training") or stored.get("config") or {}  # the latter a classifier's
    if "steps" not in training:
        raise UserError(f"{folder / 'config.json'}: not the configuration of a training")
    return Training(
        run=run.resolve().name,
        stage=folder.resolve().name,
        steps=training["steps"],
        lines=read_metrics(folder),
        finished=loop.is_finished(folder),
    )


def table(runs: Sequence[Sequence[Training]]) -> str:
    """Return a line for each training; lines are not wrapped, however narrow the terminal is."""
    rows = [COLUMNS, *(training.row() for run in runs for training in run)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def plot(runs: Sequence[Sequence[Training]], path: Path) -> None:
    """Plot the trainings of runs as a PNG, with equal stages of all runs in one column."""
    from matplotlib.figure import Figure

    stages = list(dict.fromkeys(training.stage for run in runs for training in run))
    size = (1.2 + 3.8 * len(stages), 1.0 + 2.1 * len(PANELS))
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(PANELS), len(stages), squeeze=False, sharex="col")
    for column, stage in enumerate(stages):
        grid[0, column].set_title(stage, fontsize=11, fontweight="bold")
        grid[-1, column].set_xlabel("step", fontsize=9)
        for axes, panel in zip(grid[:, column], PANELS, strict=True):
            for number, run in enumerate(runs):
                for training in run:
                    if training.stage == stage:
                        _plot_curves(axes, panel, training, f"C{number % 10}")
            _set_axes(axes, panel)
    handles = _legend([run[0].run for run in runs])
    columns = min(len(handles), 1 + 2 * len(stages))
    figure.legend(
        handles=handles, loc="outside upper center", ncols=columns, fontsize=9, frameon=False
    )
    storage.save_plot(path, figure)


def _plot_curves(axes: Axes, panel: Panel, training: Training, color: str) -> None:
    train, held_out = training.curve("train", panel.train), training.curve("val", panel.held_out)
    if train:
        axes.set_ylabel(TITLES.get(train.name, train.name), fontsize=9)
        smoothed = len(train.values) > SMOOTHED_FROM and panel is not RATE
        axes.plot(train.steps, train.values, color=color, lw=1.2, alpha=0.25 if smoothed else 1)
        if smoothed:
            axes.plot(train.steps, smooth(train.values), color=color, lw=1.2)
    if held_out:
        axes.plot(held_out.steps, held_out.values, color=color, lw=1, ls="--", marker="o", ms=3)


def _set_axes(axes: Axes, panel: Panel) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    axes.grid(alpha=0.25)
    axes.tick_params(labelsize=8)
    if panel is SPEED:
        axes.set_ylim(bottom=0)
    elif panel.log:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())


def _legend(names: Sequence[str]) -> list[Any]:
    from matplotlib.lines import Line2D

    grey: dict[str, Any] = {"color": "0.3", "lw": 1.2}
    return [
        *(Line2D([], [], color=f"C{i % 10}", label=name) for i, name in enumerate(names)),
        Line2D([], [], label="training", **grey),
        Line2D([], [], ls="--", marker="o", ms=3.5, label="held out", **grey),
    ]


def smooth(values: Sequence[float]) -> list[float]:
    """Return the mean of each value and its neighbors: a fortieth of all, equally on both sides."""
    reach = len(values) // 80
    sides = [min(reach, i, len(values) - 1 - i) for i in range(len(values))]
    return [sum(values[i - r : i + r + 1]) / (2 * r + 1) for i, r in enumerate(sides)]
