"""Show the results of `ctf bench fit`: bench-fit.json, bench-fit.md and bench-fit.png."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ctf.bench.tables import Table, listed
from ctf.bench.work import Machine
from ctf.common import config, storage
from ctf.common.markdown import markdown_table
from ctf.evaluation.intervals import Estimate
from ctf.evaluation.metrics import Accuracy

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FILE, TABLE, PLOT = "bench-fit.json", "bench-fit.md", "bench-fit.png"
LITE0 = "FID-Lite0"
SCORES = (LITE0, "FID, classifier", "class accuracy")
COLOURS = ("#35618f", "#d98b2b", "#5b8c5a", "#9a5b8c", "#9aa5ad")


@dataclasses.dataclass(frozen=True)
class Result:
    """What a way achieved on a set of images.

    Attributes:
        minutes: Requested.
        seconds: Of training, as the way counts them, without interruptions.
        processor: Processor time of each thread in training, of its time: near 1 on quiet cores.
        steps: Of each network.
        parameters: Of all networks.
        scores: As in the report of an evaluation: of the samples, against the held-out images.
        accuracy: Of the classifier of the set, where it has one.
        where: The machine and the software.
        machine: What the machine reached just before the training, or before it was continued.
    """

    images: str
    way: str
    minutes: float
    seconds: float
    processor: float | None
    steps: dict[str, int]
    parameters: int
    samples: int
    scores: dict[str, dict[str, Any]]
    accuracy: Accuracy | None
    where: dict[str, str]
    machine: Machine

    @property
    def columns(self) -> tuple[Estimate | Accuracy | None, ...]:
        """The scores of `SCORES`; None where the set has no classifier."""
        by_classifier = next((n for n in self.scores if n.startswith("FID-") and n != LITE0), None)
        return self._estimate(LITE0), self._estimate(by_classifier), self.accuracy

    def _estimate(self, name: str | None) -> Estimate | None:
        return None if name is None else config.from_json(Estimate, self.scores[name], name)


def load(path: Path) -> list[Result]:
    """Load the results in a bench-fit.json.

    Raises:
        UserError: The file is missing, damaged, or something else.
    """
    points = storage.load_object(path)["points"]
    return [config.from_json(Result, point, str(path)) for point in points]


def write(folder: Path, results: Sequence[Result]) -> None:
    """Write bench-fit.json, and the other two if there are results."""
    storage.save_json(folder / FILE, {"points": [config.to_json(result) for result in results]})
    if results:
        storage.save_text(folder / TABLE, markdown(results))
        _plot(results, folder / PLOT)


def sets(results: Sequence[Result]) -> list[str]:
    """Return the names of the sets of images."""
    return list(dict.fromkeys(result.images for result in results))


def scores_table(results: Sequence[Result], images: str) -> Table:
    """Return the scores of a set of images, narrow enough for a terminal."""
    return ("minutes", "", *SCORES), [
        (f"{result.minutes:g}", result.way, *(_value(score) for score in result.columns))
        for result in results
        if result.images == images
    ]


def table(results: Sequence[Result], images: str) -> Table:
    """Return all that was measured on a set of images."""
    rows = [
        (
            f"{result.minutes:g}",
            result.way,
            *(_value(score) + _interval(score) for score in result.columns),
            f"{result.seconds / 60:.1f}",
            " + ".join(f"{steps:,}" for steps in result.steps.values()),
            f"{result.parameters / 1e6:.1f} M",
            "" if result.processor is None else f"{result.processor:.0%}",
            f"{result.machine.fp32 / 1e9:,.0f}",
        )
        for result in results
        if result.images == images
    ]
    columns = (
        "minutes", "", *SCORES, "trained, min", "steps", "parameters", "processor",
        "10^9 operations/s",
    )  # fmt: skip
    return columns, rows


def markdown(results: Sequence[Result]) -> str:
    """Return all tables, and how to read them."""
    samples = " or ".join(str(n) for n in sorted({result.samples for result in results}))
    parts = [
        f"Scores are of {samples} samples against the held-out images, in brackets their 95 % "
        "intervals. Minutes are those of training alone. Steps are those of the tokenizer, the "
        "coarse and the fine model, or of the one network. Processor is the share of the time in "
        "which each thread had a core, and the last column what the machine reached before the "
        "training, in float32: both are lower if other work ran beside it.",
        *dict.fromkeys(f"{listed(result.where)}." for result in results),
    ]
    for images in sets(results):
        parts += [f"### {images}", markdown_table(*table(results, images))]
    return "\n\n".join(parts) + "\n"


def _value(score: Estimate | Accuracy | None) -> str:
    if score is None:
        return ""
    return f"{score.value:.1%}" if isinstance(score, Accuracy) else f"{score.value:.2f}"


def _interval(score: Estimate | Accuracy | None) -> str:
    if score is None:
        return ""
    if isinstance(score, Accuracy):
        return f" ({score.low:.1%} to {score.high:.1%})"
    return f" ({score.low:.2f} to {score.high:.2f})"


def _plot(results: Sequence[Result], path: Path) -> None:
    """A row for each set of images, a panel for each score, a line for each way."""
    from matplotlib.figure import Figure

    rows = sets(results)
    figure = Figure(figsize=(12, 3.4 * len(rows) + 0.4), layout="constrained")
    panels = figure.subplots(len(rows), 3, squeeze=False)
    ways = list(dict.fromkeys(result.way for result in results))
    for line, images in zip(panels, rows, strict=True):
        of_set = [result for result in results if result.images == images]
        for number, (axes, title) in enumerate(zip(line, SCORES, strict=True)):
            for way, colour in zip(ways, itertools.cycle(COLOURS)):
                _line(axes, [r for r in of_set if r.way == way], number, colour)
            if not axes.lines:
                axes.set_axis_off()
                continue
            axes.set_title(f"{images}: {title}", fontsize=10)
            axes.set_xscale("log")
            ticks = sorted({result.minutes for result in of_set})
            axes.set_xticks(ticks, [f"{minutes:g}" for minutes in ticks], minor=False)
            axes.set_xticks([], minor=True)
            axes.set_xlabel("minutes of training", fontsize=8)
            axes.set_ylim(bottom=0, top=1 if title == SCORES[-1] else None)
            axes.tick_params(labelsize=8)
            axes.grid(alpha=0.3)
            axes.spines[["top", "right"]].set_visible(False)
    shown = {
        label: handle
        for axes in figure.axes
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend([*shown.values()], [*shown], loc="outside lower center", ncols=4, frameon=False)
    storage.save_plot(path, figure)


def _line(axes: Axes, results: Sequence[Result], score: int, colour: str) -> None:
    """Add a way's score of that column after each number of minutes, with its interval."""
    found = [(r.minutes, each) for r in results if (each := r.columns[score]) is not None]
    if found:
        values = [each.value for _, each in found]
        below = [max(0.0, each.value - each.low) for _, each in found]
        above = [max(0.0, each.high - each.value) for _, each in found]
        axes.errorbar(
            [minutes for minutes, _ in found], values, [below, above],
            color=colour, marker="o", capsize=3, label=results[0].way,
        )  # fmt: skip
