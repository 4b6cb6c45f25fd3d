"""Guidance and temperatures for a pipeline, by a small search with the same budget for any other.

The first points are guidance scales at temperature 1. Then one setting after another is moved up
and down from the best point so far, and steps are halved when a round finds nothing better. Every
point tried counts, so a baseline, which has one setting less, has that setting's points for others.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np

from ctf import checkpoint, config
from ctf.collection import Collection, Statistics
from ctf.distances import frechet_distance
from ctf.drawing import BLOCK, Drawing, Sampler, draw_block
from ctf.errors import UserError
from ctf.extractors import Extractor
from ctf.metrics import PredictionStatistics
from ctf.progress import Reporter
from ctf.scores import Report, gather, look_at_reference

BUDGET = 16  # points
GUIDANCES = (1.0, 1.5, 2.0, 2.5, 3.0)
STEPS = {"guidance": 0.25, "temperature": 0.1, "fine_temperature": 0.1}
LEAST = {"guidance": 1.0, "temperature": 0.5, "fine_temperature": 0.5}
SMALLEST = 0.25  # of the first steps: then nothing is left to find
FAR = 2**40  # between the seeds of the search and those of the final figures

Values = dict[str, float]
Progress = Callable[[str], AbstractContextManager[Reporter]]


@dataclasses.dataclass(frozen=True)
class Point:
    """A setting that was tried. fid, inception: of the search's samples; NaN where there is none"""

    settings: Values
    fid: float
    inception: float | None


def search(
    pipe: Sampler,
    drawing: Drawing,
    reference: Collection | Statistics,
    extractor: Extractor,
    folder: Path,
    progress: Progress,
    *,
    has_fine: bool,
    budget: int = BUDGET,
) -> Values:
    """The settings of lowest FID; every point tried is in `folder`/search.json and search.png.

    Args:
        drawing: number of samples of each point, and the settings that are not searched.
        has_fine: whether there is a fine stage, whose temperature is searched, too.

    Raises:
        UserError: `folder` has points of another search.
    """
    with progress(f"{extractor.name}: reference") as report:
        known = look_at_reference(reference, extractor, report)
    asked = {
        "drawing": config.to_json(drawing),
        "reference": reference.fingerprint,
        "features": extractor.digest,
        "budget": budget,
    }
    path = folder / "search.json"
    points = _load(path, asked)
    names = [name for name in STEPS if has_fine or name != "fine_temperature"]

    def tried(settings: Values) -> Point:
        found = next((point for point in points if point.settings == settings), None)
        if found is None:
            with progress(f"search {len(points) + 1}/{budget}") as report:
                found = _try(pipe, drawing, settings, extractor, known.pooled, report)
            points.append(found)
            stored = {"asked": asked, "points": [config.to_json(point) for point in points]}
            checkpoint.save_json(path, stored)
        return found

    done: list[Point] = []
    for settings in _candidates(names, done, budget):
        done.append(tried(settings))
    best = min(done, key=lambda point: point.fid)
    _plot(done, best, extractor.suffix, folder / "search.png")
    return best.settings


def _candidates(names: Sequence[str], done: list[Point], budget: int) -> Iterator[Values]:
    """Settings to try, one after another; `done` has the points of those before."""
    seen: list[Values] = []

    def new(settings: Values) -> bool:
        if settings in seen or len(seen) >= budget:
            return False
        seen.append(settings)
        return True

    start = {name: 1.0 for name in names}
    for guidance in GUIDANCES:
        if new(settings := {**start, "guidance": guidance}):
            yield settings
    share = 1.0
    while len(seen) < budget and share >= SMALLEST:
        before = min(point.fid for point in done)
        for name in names:
            for sign in (1, -1):
                best = min(done, key=lambda point: point.fid).settings
                value = round(best[name] + sign * share * STEPS[name], 4)
                if value >= LEAST[name] and new(settings := {**best, name: value}):
                    yield settings
        if min(point.fid for point in done) >= before:
            share /= 2


def _try(
    pipe: Sampler,
    drawing: Drawing,
    settings: Values,
    extractor: Extractor,
    reference: Any,
    report: Report,
) -> Point:
    chosen = dataclasses.replace(
        drawing, seed=drawing.seed + FAR, settings={**drawing.settings, **settings}
    )
    classes_N = chosen.classes(len(pipe.class_names))

    def batches() -> Iterator[np.ndarray]:
        for start in range(0, len(classes_N), BLOCK):
            yield draw_block(pipe, chosen, classes_N, start)

    pictures = Collection("search", "", len(classes_N), (0, 0), batches)
    gathered = gather(extractor, pictures, seed=0, report=report)
    inception = None
    if gathered.predictions is not None:
        inception = PredictionStatistics.merged(gathered.predictions.parts).score
    fid = frechet_distance(gathered.pooled.merged().gaussian, reference)
    return Point(settings, fid, inception)


def _load(path: Path, asked: Mapping[str, Any]) -> list[Point]:
    if not path.is_file():
        return []
    stored = checkpoint.load_object(path)
    if stored.get("asked") != asked:
        raise UserError(f"{path}: points of another search; choose another --out")
    return [config.from_json(Point, point, str(path)) for point in stored["points"]]


def _plot(points: Sequence[Point], best: Point, suffix: str, path: Path) -> None:
    """FID against IS of all points; those of one temperature are joined, guidance beside them."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4.5), layout="constrained")
    axes = figure.subplots()
    lines: dict[tuple[float, ...], list[Point]] = {}
    for point in points:
        rest = tuple(v for name, v in point.settings.items() if name != "guidance")
        lines.setdefault(rest, []).append(point)
    for rest, of_line in sorted(lines.items()):
        of_line.sort(key=lambda point: point.settings["guidance"])
        values = [(p.inception or 0.0, p.fid) for p in of_line]
        label = "temperature " + ", ".join(f"{value:g}" for value in rest)
        axes.plot(*zip(*values, strict=True), marker="o", label=label)
        for point, where in zip(of_line, values, strict=True):
            axes.annotate(
                f"{point.settings['guidance']:g}", where, xytext=(4, 4), textcoords="offset points",
                fontsize=7,
            )  # fmt: skip
    axes.plot(best.inception or 0.0, best.fid, marker="*", markersize=16, color="black", zorder=0)
    axes.set_xlabel(f"IS{suffix} (higher is better)")
    axes.set_ylabel(f"FID{suffix} (lower is better)")
    axes.set_title("Every point tried; numbers are guidance scales, the star is the lowest FID")
    axes.title.set_fontsize(9)
    axes.legend(fontsize=7)
    with checkpoint.atomic(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
