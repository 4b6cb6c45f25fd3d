"""The search for guidance and temperatures: it finds them, with the same budget for everybody."""

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ctf.evaluation import search as searching
from ctf.evaluation.distances import FeatureStatistics, Gaussian, frechet_distance
from ctf.evaluation.extractors import Extractor
from ctf.evaluation.sample_cache import Drawing
from ctf.evaluation.scores import look_at_reference
from ctf.evaluation.search import BUDGET, FAR, LEAST, STEPS, Point, Values, search, searched
from ctf.models.sampling import uniforms
from ctf.pipelines.pipeline import Pipeline
from tests.gallery import colours, of_pixels

SAMPLES = 30


def painted(classes: Sequence[int], seed: int, **values: float) -> np.ndarray:
    """Pictures of one colour and a little noise, which is that of each one's seed.

    Red, green and blue go up with guidance, temperature and the fine stage's temperature.
    """
    levels = np.array(
        [60 * values["guidance"], 100 * values["temperature"], 100 * values["fine_temperature"]]
    )
    pixels = [
        levels.clip(10, 245) + np.random.default_rng(seed + i).uniform(-9, 9, (4, 4, 3))
        for i in range(len(classes))
    ]
    return np.stack(pixels).round().astype(np.uint8)


class Painter:
    """A pipeline whose pictures depend on its settings as `painted` says."""

    class_names = ("a", "b", "c")

    def __init__(self, dies_after: int = 10**9) -> None:
        self.seeds: list[int] = []
        self.dies_after = dies_after

    def sample(
        self, *, classes: Sequence[int], seed: int, top_k: int, **values: Any
    ) -> SimpleNamespace:
        assert top_k == 0  # what is not searched is as it was
        if len(self.seeds) + len(classes) > self.dies_after:
            raise KeyboardInterrupt
        self.seeds += range(seed, seed + len(classes))
        pixels = painted(classes, seed, **values)
        return SimpleNamespace(images=[Image.fromarray(p) for p in pixels])


@contextlib.contextmanager
def silent(name: str) -> Iterator[Any]:
    yield lambda done, total: None


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CTF_CACHE", str(tmp_path / "cache"))


def reference(extractor: Extractor, **values: float) -> Gaussian:
    """That of pictures which are painted with the settings that are to be found."""
    pixels = painted(range(200), 10**6, **values)
    return look_at_reference(of_pixels(pixels), extractor).pooled


def find(
    folder: Path, best: Values, *, has_fine: bool = True, pipe: Painter | None = None, **more: Any
) -> Values:
    extractor = colours(with_logits=more.pop("with_logits", True))
    asked = Drawing(SAMPLES, 5, settings={"fine_temperature": 1.0, "top_k": 0})
    known = reference(extractor, **{"fine_temperature": 1.0, **best})
    pipe = pipe or Painter()
    return search(pipe, asked, extractor, known, folder, silent, has_fine=has_fine, **more)


def tried(folder: Path) -> list[Values]:
    points: list[Any] = json.loads((folder / "search.json").read_text())["points"]
    return [point["settings"] for point in points]


# --- what it finds --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "best",
    [
        {"guidance": 2.25, "temperature": 1.1, "fine_temperature": 0.9},
        {"guidance": 2.0, "temperature": 1.0, "fine_temperature": 1.0},
        {"guidance": 1.5, "temperature": 0.9, "fine_temperature": 1.1},
        {"guidance": 1.0, "temperature": 1.1, "fine_temperature": 1.1},
    ],
)
def test_the_settings_of_the_reference(tmp_path: Path, best: Values) -> None:
    assert find(tmp_path, best) == best


@pytest.mark.parametrize("has_fine", [True, False])
@pytest.mark.parametrize(("guidance", "temperature"), [(1.83, 0.93), (2.7, 1.07), (1.1, 1.04)])
def test_those_between_the_steps_are_found_nearly(
    tmp_path: Path, guidance: float, temperature: float, has_fine: bool
) -> None:
    found = find(tmp_path, {"guidance": guidance, "temperature": temperature}, has_fine=has_fine)
    assert ("fine_temperature" in found) == has_fine
    assert abs(found["guidance"] - guidance) <= STEPS["guidance"]
    assert abs(found["temperature"] - temperature) <= STEPS["temperature"]


@pytest.mark.parametrize("has_fine", [True, False])
def test_what_is_far_away_is_reached_by_strides(tmp_path: Path, has_fine: bool) -> None:
    """As the baseline's, which can be far beyond the first guidance scales and below temperature 1:
    steps of the usual length alone would take more than so many points.
    """
    best = {"guidance": 4.5, "temperature": 0.3}
    points: list[Point] = []
    for values in searching._candidates(searched(has_fine), points, 24):
        distance = sum(((values[name] - best[name]) / STEPS[name]) ** 2 for name in best)
        points.append(Point(values, distance, None))
    found = searching._best(points).settings
    assert found["guidance"] == pytest.approx(best["guidance"], abs=STEPS["guidance"])
    assert found["temperature"] == pytest.approx(best["temperature"], abs=STEPS["temperature"])


def test_a_point_is_what_a_pipeline_draws_with_its_settings(pipe: Pipeline, tmp_path: Path) -> None:
    extractor = colours()
    known = reference(extractor, guidance=2.0, temperature=1.0, fine_temperature=1.0)
    asked = Drawing(6, seed=3, settings={"top_k": 5, "guidance": 9.0})
    best = search(pipe, asked, extractor, known, tmp_path, silent, has_fine=True, budget=6)
    stored = json.loads((tmp_path / "search.json").read_text())
    assert stored["drawing"]["samples"] == 6 and stored["drawing"]["seed"] == 3 + FAR
    for point in stored["points"]:
        images = pipe.sample([0, 1, 2] * 2, 3 + FAR, top_k=5, **point["settings"]).images
        drawn = FeatureStatistics(6)
        drawn.add(extractor(np.stack([np.asarray(image) for image in images])).pooled_ND)
        assert point["fid"] == pytest.approx(frechet_distance(drawn.gaussian, known), rel=1e-6)
        assert point["inception"] >= 1
    assert best == min(stored["points"], key=lambda point: point["fid"])["settings"]


# --- its budget -----------------------------------------------------------------------------------

OPTIMA = st.fixed_dictionaries(
    {
        "guidance": st.floats(-1, 6),
        "temperature": st.floats(0, 3),
        "fine_temperature": st.floats(0, 3),
    }
)


@settings(deadline=None)
@given(OPTIMA, st.booleans(), st.integers(1, 40), st.booleans())
def test_every_pipeline_has_as_many_points(
    best: Values, has_fine: bool, budget: int, flat: bool
) -> None:
    """Wherever its best settings are, and if all are alike: none twice, none out of bounds."""
    points: list[Point] = []
    names = searched(has_fine)
    for values in searching._candidates(names, points, budget):
        assert list(values) == names
        distance = sum((values[name] - best[name]) ** 2 for name in names)
        points.append(Point(values, 0.0 if flat else distance, None))
    assert len(points) == budget
    assert len({tuple(point.settings.values()) for point in points}) == budget
    assert all(point.settings[name] >= LEAST[name] for point in points for name in names)


@pytest.mark.parametrize("has_fine", [True, False])
def test_as_many_samples_and_on_seeds_of_their_own(tmp_path: Path, has_fine: bool) -> None:
    pipe = Painter()
    find(tmp_path, {"guidance": 1.0, "temperature": 1.0}, has_fine=has_fine, pipe=pipe)
    assert len(tried(tmp_path)) == BUDGET == 16
    assert pipe.seeds == list(range(5 + FAR, 5 + FAR + SAMPLES)) * BUDGET


def test_those_seeds_are_others_to_a_generator() -> None:
    """Which takes them modulo 2**32."""
    seeds = [0, 5, 2**31 - 1, -3]
    assert not torch.equal(uniforms(seeds, 4), uniforms([seed + FAR for seed in seeds], 4))
    assert torch.equal(uniforms([0], 4), uniforms([2**32], 4))


def test_of_equal_points_it_takes_the_first() -> None:
    points = [Point({"guidance": float(i)}, fid, None) for i, fid in enumerate([2, 1, 1, 3])]
    assert searching._best(points).settings == {"guidance": 1.0}


# --- killed ---------------------------------------------------------------------------------------


def test_killed_it_goes_on_with_the_points_that_are_there(tmp_path: Path) -> None:
    best = {"guidance": 1.83, "temperature": 0.93}
    whole = find(tmp_path / "whole", best)
    for points in (0, 1, 4, 9, 15):
        folder = tmp_path / str(points)
        with pytest.raises(KeyboardInterrupt):
            find(folder, best, pipe=Painter(dies_after=points * SAMPLES + 10))
        assert not (folder / "search.png").exists()
        if points:
            assert len(tried(folder)) == points
            # Killed again where nothing new is done yet, it has not lost what it had.
            with pytest.raises(KeyboardInterrupt):
                find(folder, best, pipe=Painter(dies_after=0))
            assert len(tried(folder)) == points
        pipe = Painter()
        assert find(folder, best, pipe=pipe) == whole
        assert len(pipe.seeds) == (BUDGET - points) * SAMPLES
        for name in ("search.json", "search.png"):
            assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    pipe = Painter()
    assert find(tmp_path / "whole", best, pipe=pipe) == whole and pipe.seeds == []


# --- the plot -------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_logits", [True, False])
@pytest.mark.parametrize("has_fine", [True, False])
def test_a_plot(tmp_path: Path, with_logits: bool, has_fine: bool) -> None:
    best = {"guidance": 1.5, "temperature": 1.2}
    find(tmp_path, best, has_fine=has_fine, with_logits=with_logits, budget=8)
    with Image.open(tmp_path / "search.png") as plot:
        assert plot.width > 600 and plot.height > 400
        assert len(plot.convert("RGB").getcolors(10**6)) > 50
    stored = json.loads((tmp_path / "search.json").read_text())
    assert all((point["inception"] is None) != with_logits for point in stored["points"])
