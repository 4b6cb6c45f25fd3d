"""Search for guidance and temperatures, with the same budget for every pipeline.

A pattern search (Hooke and Jeeves, "Direct search", 1961). The first points are guidance scales at
temperature 1. Then each setting in turn is moved up and down from the best point so far. After such
a round, the best point is moved again by as much as the round has moved it, as long as that is an
improvement; after a round without one, the steps are halved. Every pipeline has the same number of
points; a baseline, which has no fine stage, has those of the third setting for the other two.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

from ctf.common import config, memory, storage
from ctf.common.progress import OpenProgress, Progress
from ctf.evaluation.distances import FeatureStatistics, Gaussian, frechet_distance
from ctf.evaluation.extractors import Extractor
from ctf.evaluation.metrics import PredictionStatistics
from ctf.evaluation.sample_cache import GenerationConfig, generate
from ctf.pipelines.pipeline import Pipeline

BUDGET = 16  # points
GUIDANCES = (1.0, 1.5, 2.0, 2.5, 3.0)
STEPS = {"guidance": 0.25, "temperature": 0.1, "fine_temperature": 0.1}
MINIMUM = {"guidance": 1.0, "temperature": 0.1, "fine_temperature": 0.1}
# Added to the seeds of the final samples; a generator takes seeds modulo 2**32.
SEED_OFFSET = 2**31

Settings = dict[str, float]


@dataclasses.dataclass(frozen=True)
class Point:
    """Settings that were tried, and the scores of their samples.

    inception: Inception Score of all samples at once; None if the network has no classes.
    """

    settings: Settings
    fid: float
    inception: float | None


def search(
    pipe: Pipeline,
    generation: GenerationConfig,
    extractor: Extractor,
    reference: Gaussian,
    folder: Path,
    open_progress: OpenProgress,
    budget: int = BUDGET,
) -> Settings:
    """Find the settings of lowest FID, and write all points to search.json and search.png.

    An interrupted search resumes with the points in `folder`/search.json.

    Args:
        pipe: the pipeline to tune; the temperature of its fine stage is searched if it has one.
        generation: number of samples of each point, and the settings that are not searched.
        extractor: computes the features.
        reference: the extractor's features of the reference.
        folder: where to write.
        open_progress: opens the progress of a point.
        budget: number of points.
    """
    generation = dataclasses.replace(generation, seed=generation.seed + SEED_OFFSET)
    path = folder / "search.json"
    header = {"features": extractor.name, "drawing": config.to_json(generation)}
    stored = _load_points(path)
    points: list[Point] = []
    for settings in proposals(searched_settings(pipe), points, budget):
        point = next((point for point in stored if point.settings == settings), None)
        if point is None:
            merged = {**generation.settings, **settings}
            with open_progress(f"search {len(points) + 1}/{budget}") as progress:
                point = _evaluate_point(
                    pipe, dataclasses.replace(generation, settings=merged), settings, extractor,
                    reference, progress,
                )  # fmt: skip
            written = [config.to_json(each) for each in (*points, point)]
            storage.save_json(path, {**header, "points": written})
        points.append(point)
    best = best_point(points)
    _plot(points, best, extractor.suffix, folder / "search.png")
    return best.settings


def searched_settings(pipe: Pipeline) -> list[str]:
    """Return the names of the settings that are searched."""
    return [name for name in STEPS if name != "fine_temperature" or pipe.fine is not None]


def best_point(points: Sequence[Point]) -> Point:
    """Return the point of lowest FID, the earliest of several."""
    return min(points, key=lambda point: point.fid)


def proposals(names: Sequence[str], points: Sequence[Point], budget: int) -> Iterator[Settings]:
    """Propose `budget` different settings to try.

    Terminates for any practical budget: a round with halved steps has new values, until after some
    25 halvings they vanish in rounding.

    Args:
        names: the settings that are searched.
        points: the caller appends the point of each proposal before it takes the next.
        budget: number of proposals.
    """
    seen: list[Settings] = []
    for settings in _pattern_search(names, points):
        if settings not in seen:
            seen.append(settings)
            yield settings
        if len(seen) == budget:
            return


def _pattern_search(names: Sequence[str], points: Sequence[Point]) -> Iterator[Settings]:
    """Endless proposals, with repetitions."""
    for guidance in GUIDANCES:
        yield {**dict.fromkeys(names, 1.0), "guidance": guidance}
    scale = 1.0
    while True:
        before = best_point(points).settings
        yield from _steps_around_best(names, points, scale)
        best = best_point(points).settings
        if best == before:
            scale /= 2
        while best != before:
            yield {
                name: max(round(2 * best[name] - before[name], 9), MINIMUM[name]) for name in names
            }
            before, best = best, best_point(points).settings


def _steps_around_best(
    names: Sequence[str], points: Sequence[Point], scale: float
) -> Iterator[Settings]:
    """One step up and one down of each setting, from the best point at the time."""
    for name in names:
        for sign in (1, -1):
            best = best_point(points).settings
            # Rounded, since 1.1 + 0.1 is not 1.2.
            value = round(best[name] + sign * scale * STEPS[name], 9)
            if value >= MINIMUM[name]:
                yield {**best, name: value}


def _evaluate_point(
    pipe: Pipeline,
    generation: GenerationConfig,
    settings: Settings,
    extractor: Extractor,
    reference: Gaussian,
    progress: Progress,
) -> Point:
    pooled = FeatureStatistics(len(reference.mean_D))
    predictions: PredictionStatistics | None = None
    for batch in generate(pipe, generation):
        with memory.keep_freed():
            features = extractor(batch)
        pooled.add(features.pooled_ND)
        if features.logits_NK is not None:
            predictions = predictions or PredictionStatistics(features.logits_NK.shape[1])
            predictions.add(features.logits_NK)
        progress(pooled.count, generation.samples)
    fid = frechet_distance(pooled.gaussian, reference)
    return Point(settings, fid, None if predictions is None else predictions.score)


def _load_points(path: Path) -> list[Point]:
    if not path.is_file():
        return []
    points = storage.load_object(path).get("points", [])
    return [config.from_json(Point, point, str(path)) for point in points]


def _plot(points: Sequence[Point], best: Point, suffix: str, path: Path) -> None:
    """Plot FID over IS with the guidance scale at each point, a line for equal temperatures.

    Without an Inception Score: FID over guidance.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    axes = figure.subplots()
    has_score = best.inception is not None

    def position(point: Point) -> tuple[float, float]:
        return (
            point.settings["guidance"] if point.inception is None else point.inception,
            point.fid,
        )

    lines: dict[str, list[Point]] = {}
    for point in sorted(points, key=lambda point: tuple(reversed(point.settings.values()))):
        values = point.settings
        fine = f", fine {values['fine_temperature']:g}" if "fine_temperature" in values else ""
        lines.setdefault(f"{values['temperature']:g}{fine}", []).append(point)
    for number, (label, line) in enumerate(lines.items()):
        marker = "os^Dv<>PX"[number % 9]
        axes.plot(*zip(*map(position, line), strict=True), marker=marker, lw=0.8, label=label)
        for point in line if has_score else []:
            axes.annotate(
                f"{point.settings['guidance']:g}", position(point), textcoords="offset points",
                xytext=(5, (3, -9)[number % 2]), fontsize=7, color=f"C{number % 10}",
            )  # fmt: skip
    axes.plot(
        *position(best), marker="o", ms=13, mfc="none", mec="black", ls="none", label="lowest FID"
    )
    axes.set_xlabel(f"IS{suffix}, higher is better" if has_score else "guidance scale")
    axes.set_ylabel(f"FID{suffix}, lower is better")
    if has_score:
        axes.set_title("the number at a point is its guidance scale", fontsize=9)
    figure.legend(loc="outside right upper", fontsize=7, title="temperature", title_fontsize=8)
    storage.save_plot(path, figure)
