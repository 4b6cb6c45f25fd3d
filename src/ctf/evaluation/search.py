"""Guidance and temperatures for a pipeline, by a small search with the same budget for any other.

The first points are guidance scales at temperature 1. Then one setting after another is moved up
and down from the best point so far. After such a round the best point is moved as far again as the
round has brought it, as long as that pays; where a round finds nothing better, steps are halved
(Hooke and Jeeves, "Direct search", 1961). Every pipeline has the same number of points; a baseline,
which has one setting less, has that setting's points for the others.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

from ctf.common import config, storage
from ctf.common.progress import OpenProgress, Progress
from ctf.evaluation.distances import FeatureStatistics, Gaussian, frechet_distance
from ctf.evaluation.extractors import Extractor
from ctf.evaluation.metrics import PredictionStatistics
from ctf.evaluation.sample_cache import Drawing, Sampler, draw_blocks

BUDGET = 16  # points
GUIDANCES = (1.0, 1.5, 2.0, 2.5, 3.0)
STEPS = {"guidance": 0.25, "temperature": 0.1, "fine_temperature": 0.1}
LEAST = {"guidance": 1.0, "temperature": 0.1, "fine_temperature": 0.1}
# From the seeds of the final figures to those of the search: a generator takes them modulo 2**32.
FAR = 2**31

Values = dict[str, float]


@dataclasses.dataclass(frozen=True)
class Point:
    """Settings that were tried, and what their samples scored.

    inception: Inception Score of all of them at once; None where the network knows no classes.
    """

    settings: Values
    fid: float
    inception: float | None


def search(
    pipe: Sampler,
    drawing: Drawing,
    extractor: Extractor,
    reference: Gaussian,
    folder: Path,
    open_progress: OpenProgress,
    *,
    has_fine: bool,
    budget: int = BUDGET,
) -> Values:
    """The settings of lowest FID; every point tried is in `folder`/search.json and search.png.

    Killed, it goes on with the points that are there.

    Args:
        drawing: number of samples of each point, and the settings that are not searched.
        reference: the extractor's features of the reference.
        has_fine: whether there is a fine stage, whose temperature is searched, too.
    """
    drawing = dataclasses.replace(drawing, seed=drawing.seed + FAR)
    path = folder / "search.json"
    described = {"features": extractor.name, "drawing": config.to_json(drawing)}
    known = _load(path)
    points: list[Point] = []
    for settings in _candidates(searched(has_fine), points, budget):
        point = next((point for point in known if point.settings == settings), None)
        if point is None:
            chosen = dataclasses.replace(drawing, settings={**drawing.settings, **settings})
            with open_progress(f"search {len(points) + 1}/{budget}") as progress:
                point = _try(pipe, chosen, settings, extractor, reference, progress)
            stored = [config.to_json(point) for point in (*points, point)]
            storage.save_json(path, {**described, "points": stored})
        points.append(point)
    best = _best(points)
    _plot(points, best, extractor.suffix, folder / "search.png")
    return best.settings


def searched(has_fine: bool) -> list[str]:
    """The settings that are searched."""
    return [name for name in STEPS if has_fine or name != "fine_temperature"]


def _best(points: Sequence[Point]) -> Point:
    """The earliest one of those with the lowest FID."""
    return min(points, key=lambda point: point.fid)


def _candidates(names: Sequence[str], points: Sequence[Point], budget: int) -> Iterator[Values]:
    """Settings to try, `budget` different ones; `points` are those of the ones before.

    It comes to an end, for any budget of use: a round with halved steps has values that no point
    had before it, until after some 25 halvings they are lost in rounding.
    """
    seen: list[Values] = []
    for settings in _proposals(names, points):
        if settings not in seen:
            seen.append(settings)
            yield settings
        if len(seen) == budget:
            return


def _proposals(names: Sequence[str], points: Sequence[Point]) -> Iterator[Values]:
    """Settings to try, some of them again, without end."""
    yield from _round(names, points, 1.0)
    share = 1.0
    while True:
        before = _best(points).settings
        yield from _round(names, points, share)
        best = _best(points).settings
        if best == before:
            share /= 2
        while best != before:
            ahead = {
                name: max(round(2 * best[name] - before[name], 9), LEAST[name]) for name in names
            }
            yield ahead
            before, best = best, _best(points).settings


def _round(names: Sequence[str], points: Sequence[Point], share: float) -> Iterator[Values]:
    """One step up and down of each setting from the best point at the time; or the first points."""
    if not points:
        for guidance in GUIDANCES:
            yield {**dict.fromkeys(names, 1.0), "guidance": guidance}
        return
    for name in names:
        for sign in (1, -1):
            best = _best(points).settings
            # Rounded, since 1.1 + 0.1 is another 1.2.
            value = round(best[name] + sign * share * STEPS[name], 9)
            if value >= LEAST[name]:
                yield {**best, name: value}


def _try(
    pipe: Sampler,
    drawing: Drawing,
    settings: Values,
    extractor: Extractor,
    reference: Gaussian,
    progress: Progress,
) -> Point:
    pooled = FeatureStatistics(len(reference.mean_D))
    predictions: PredictionStatistics | None = None
    for block in draw_blocks(pipe, drawing):
        features = extractor(block)
        pooled.add(features.pooled_ND)
        if features.logits_NK is not None:
            predictions = predictions or PredictionStatistics(features.logits_NK.shape[1])
            predictions.add(features.logits_NK)
        progress(pooled.count, drawing.samples)
    fid = frechet_distance(pooled.gaussian, reference)
    return Point(settings, fid, None if predictions is None else predictions.score)


def _load(path: Path) -> list[Point]:
    if not path.is_file():
        return []
    stored = storage.load_object(path).get("points", [])
    return [config.from_json(Point, point, str(path)) for point in stored]


def _plot(points: Sequence[Point], best: Point, suffix: str, path: Path) -> None:
    """FID against IS, guidance beside each point, those of equal temperatures joined.

    Without an Inception Score: FID against guidance.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    axes = figure.subplots()
    has_score = best.inception is not None

    def place(point: Point) -> tuple[float, float]:
        return (
            point.settings["guidance"] if point.inception is None else point.inception,
            point.fid,
        )

    lines: dict[str, list[Point]] = {}
    for point in sorted(points, key=lambda point: tuple(reversed(point.settings.values()))):
        values = point.settings
        fine = f", fine {values['fine_temperature']:g}" if "fine_temperature" in values else ""
        lines.setdefault(f"{values['temperature']:g}{fine}", []).append(point)
    for number, (label, of_line) in enumerate(lines.items()):
        marker = "os^Dv<>PX"[number % 9]
        axes.plot(*zip(*map(place, of_line), strict=True), marker=marker, lw=0.8, label=label)
        for point in of_line if has_score else []:
            axes.annotate(
                f"{point.settings['guidance']:g}", place(point), textcoords="offset points",
                xytext=(5, (3, -9)[number % 2]), fontsize=7, color=f"C{number % 10}",
            )  # fmt: skip
    axes.plot(
        *place(best), marker="o", ms=13, mfc="none", mec="black", ls="none", label="lowest FID"
    )
    axes.set_xlabel(f"IS{suffix}, higher is better" if has_score else "guidance scale")
    axes.set_ylabel(f"FID{suffix}, lower is better")
    if has_score:
        axes.set_title("the number at a point is its guidance scale", fontsize=9)
    figure.legend(loc="outside right upper", fontsize=7, title="temperature", title_fontsize=8)
    with storage.atomic(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
