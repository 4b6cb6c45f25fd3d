"""The search for guidance and temperatures: it finds them, with the same budget for everyone."""

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ctf.evaluation.distances import FeatureStatistics, Gaussian, frechet_distance
from ctf.evaluation.extractors import Extractor
from ctf.evaluation.sample_cache import GenerationConfig
from ctf.evaluation.scores import load_reference
from ctf.evaluation.search import (
    BUDGET,
    MINIMUM,
    SEED_OFFSET,
    STEPS,
    Point,
    Settings,
    best_point,
    proposals,
    search,
    searched_settings,
)
from ctf.models.noise import noise_keys
from ctf.pipelines.pipeline import Pipeline
from tests.evaluation.helpers import collection, colour_extractor, silent

SAMPLES = 30


def painted(classes: Sequence[int], seed: int, **values: float) -> np.ndarray:
    """Images of one colour with a little noise from the seed of each.

    Red, green and blue increase with guidance, temperature and the fine stage's temperature.
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
    """A pipeline whose images depend on its settings as in `painted`."""

    class_names = ("a", "b", "c")

    def __init__(self, has_fine: bool = True, killed_after: int = 10**9) -> None:
        self.fine = "a fine model" if has_fine else None
        self.seeds: list[int] = []
        self.killed_after = killed_after

    def sample(
        self, *, classes: Sequence[int], seed: int, top_k: int, **values: Any
    ) -> SimpleNamespace:
        assert top_k == 0  # settings that are not searched stay
        if len(self.seeds) + len(classes) > self.killed_after:
            raise KeyboardInterrupt
        self.seeds += range(seed, seed + len(classes))
        pixels = painted(classes, seed, **values)
        return SimpleNamespace(images=[Image.fromarray(p) for p in pixels])


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CTF_CACHE", str(tmp_path / "cache"))


def reference(extractor: Extractor, **values: float) -> Gaussian:
    """Statistics of images that are painted with the settings to be found."""
    pixels = painted(range(200), 10**6, **values)
    return load_reference(collection(pixels), extractor).pooled


def find(
    folder: Path,
    best: Settings,
    pipe: Painter | None = None,
    *,
    with_logits: bool = True,
    budget: int = BUDGET,
) -> Settings:
    extractor = colour_extractor(with_logits=with_logits)
    generation = GenerationConfig(SAMPLES, 5, settings={"fine_temperature": 1.0, "top_k": 0})
    known = reference(extractor, **{"fine_temperature": 1.0, **best})
    pipe = pipe or Painter()
    return search(pipe, generation, extractor, known, folder, silent, budget)


def tried_settings(folder: Path) -> list[Settings]:
    points: list[Any] = json.loads((folder / "search.json").read_text())["points"]
    return [point["settings"] for point in points]


# --- results --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "best",
    [
        {"guidance": 2.25, "temperature": 1.1, "fine_temperature": 0.9},
        {"guidance": 2.0, "temperature": 1.0, "fine_temperature": 1.0},
        {"guidance": 1.5, "temperature": 0.9, "fine_temperature": 1.1},
        {"guidance": 1.0, "temperature": 1.1, "fine_temperature": 1.1},
    ],
)
def test_search_finds_the_settings_of_the_reference(tmp_path: Path, best: Settings) -> None:
    assert find(tmp_path, best) == best


@pytest.mark.parametrize("has_fine", [True, False])
@pytest.mark.parametrize(("guidance", "temperature"), [(1.83, 0.93), (2.7, 1.07), (1.1, 1.04)])
def test_settings_between_the_steps_are_found_approximately(
    tmp_path: Path, guidance: float, temperature: float, has_fine: bool
) -> None:
    best = {"guidance": guidance, "temperature": temperature}
    found = find(tmp_path, best, Painter(has_fine))
    assert ("fine_temperature" in found) == has_fine
    assert abs(found["guidance"] - guidance) <= STEPS["guidance"]
    assert abs(found["temperature"] - temperature) <= STEPS["temperature"]


@pytest.mark.parametrize("has_fine", [True, False])
def test_distant_settings_are_reached_by_growing_steps(tmp_path: Path, has_fine: bool) -> None:
    """Those of a baseline can be far from the first points; steps of the usual length alone would
    take more points than this.
    """
    best = {"guidance": 4.5, "temperature": 0.3}
    points: list[Point] = []
    for values in proposals(searched_settings(Painter(has_fine)), points, 24):
        distance = sum(((values[name] - best[name]) / STEPS[name]) ** 2 for name in best)
        points.append(Point(values, distance, None))
    found = best_point(points).settings
    assert found["guidance"] == pytest.approx(best["guidance"], abs=STEPS["guidance"])
    assert found["temperature"] == pytest.approx(best["temperature"], abs=STEPS["temperature"])


def test_points_are_the_scores_of_samples_with_their_settings(
    pipe: Pipeline, tmp_path: Path
) -> None:
    extractor = colour_extractor()
    known = reference(extractor, guidance=2.0, temperature=1.0, fine_temperature=1.0)
    generation = GenerationConfig(6, seed=3, settings={"top_k": 5, "guidance": 9.0})
    best = search(pipe, generation, extractor, known, tmp_path, silent, budget=6)
    stored = json.loads((tmp_path / "search.json").read_text())
    assert stored["drawing"]["samples"] == 6 and stored["drawing"]["seed"] == 3 + SEED_OFFSET
    for point in stored["points"]:
        images = pipe.sample([0, 1, 2] * 2, 3 + SEED_OFFSET, top_k=5, **point["settings"]).images
        statistics = FeatureStatistics(6)
        statistics.add(extractor(np.stack([np.asarray(image) for image in images])).pooled_ND)
        assert point["fid"] == pytest.approx(frechet_distance(statistics.gaussian, known), rel=1e-6)
        assert point["inception"] >= 1
    assert best == min(stored["points"], key=lambda point: point["fid"])["settings"]


# --- budget ---------------------------------------------------------------------------------------

OPTIMA = st.fixed_dictionaries(
    {
        "guidance": st.floats(-1, 6),
        "temperature": st.floats(0, 3),
        "fine_temperature": st.floats(0, 3),
    }
)


@given(OPTIMA, st.booleans(), st.integers(1, 40), st.booleans())
def test_every_pipeline_has_the_same_number_of_points(
    best: Settings, has_fine: bool, budget: int, flat: bool
) -> None:
    """Wherever its optimum is, and for a flat objective: none twice, none out of bounds."""
    points: list[Point] = []
    names = searched_settings(Painter(has_fine))
    for values in proposals(names, points, budget):
        assert list(values) == names
        distance = sum((values[name] - best[name]) ** 2 for name in names)
        points.append(Point(values, 0.0 if flat else distance, None))
    assert len(points) == budget
    assert len({tuple(point.settings.values()) for point in points}) == budget
    assert all(point.settings[name] >= MINIMUM[name] for point in points for name in names)


@pytest.mark.parametrize("has_fine", [True, False])
def test_every_point_has_the_same_seeds_apart_from_the_final_ones(
    tmp_path: Path, has_fine: bool
) -> None:
    pipe = Painter(has_fine)
    find(tmp_path, {"guidance": 1.0, "temperature": 1.0}, pipe)
    assert len(tried_settings(tmp_path)) == BUDGET == 16
    assert pipe.seeds == list(range(5 + SEED_OFFSET, 5 + SEED_OFFSET + SAMPLES)) * BUDGET


def test_seed_offset_gives_other_random_numbers() -> None:
    seeds = [0, 5, 2**31 - 1, -3]
    assert not torch.equal(
        noise_keys(seeds, 4), noise_keys([seed + SEED_OFFSET for seed in seeds], 4)
    )


def test_the_first_of_equal_points_is_the_best() -> None:
    points = [Point({"guidance": float(i)}, fid, None) for i, fid in enumerate([2, 1, 1, 3])]
    assert best_point(points).settings == {"guidance": 1.0}


# --- interruption ---------------------------------------------------------------------------------


def test_interrupted_search_resumes_with_its_points(tmp_path: Path) -> None:
    best = {"guidance": 1.83, "temperature": 0.93}
    whole = find(tmp_path / "whole", best)
    for points in (0, 1, 4, 9, 15):
        folder = tmp_path / str(points)
        with pytest.raises(KeyboardInterrupt):
            find(folder, best, pipe=Painter(killed_after=points * SAMPLES + 10))
        assert not (folder / "search.png").exists()
        if points:
            assert len(tried_settings(folder)) == points
            # Interrupted again before anything new is done, it keeps its points.
            with pytest.raises(KeyboardInterrupt):
                find(folder, best, pipe=Painter(killed_after=0))
            assert len(tried_settings(folder)) == points
        pipe = Painter()
        assert find(folder, best, pipe=pipe) == whole
        assert len(pipe.seeds) == (BUDGET - points) * SAMPLES
        for name in ("search.json", "search.png"):
            assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    pipe = Painter()
    assert find(tmp_path / "whole", best, pipe=pipe) == whole and pipe.seeds == []


# --- plot -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_logits", [True, False])
@pytest.mark.parametrize("has_fine", [True, False])
def test_plot_is_not_empty(tmp_path: Path, with_logits: bool, has_fine: bool) -> None:
    best = {"guidance": 1.5, "temperature": 1.2}
    find(tmp_path, best, Painter(has_fine), with_logits=with_logits, budget=8)
    with Image.open(tmp_path / "search.png") as plot:
        assert plot.width > 600 and plot.height > 400
        assert len(plot.convert("RGB").getcolors(10**6)) > 50
    stored = json.loads((tmp_path / "search.json").read_text())
    assert all((point["inception"] is None) != with_logits for point in stored["points"])
