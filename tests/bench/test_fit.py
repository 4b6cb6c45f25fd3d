"""`ctf bench fit`: points survive kills, can be added, and are shown with their intervals."""

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from ctf.bench import fit, fit_report, harness
from ctf.bench.fit import FitBenchmark, Point
from ctf.bench.fit_report import Result
from ctf.bench.ways import CtfFit, Trained
from ctf.bench.work import Machine
from ctf.common import config
from ctf.common.errors import UserError
from ctf.common.progress import OpenProgress, show_progress
from ctf.data import images
from ctf.data.image_set import Splits
from ctf.evaluation.intervals import Estimate
from ctf.evaluation.metrics import Accuracy
from ctf.training import recipes
from tests.conftest import SMALLER_RECIPE, Command, read_files

CPU = torch.device("cpu")
SAMPLES = 12


class Images(NamedTuple):
    images: list[Image.Image]


class Noise:
    """Samples images of noise."""

    class_names = ("blue", "green", "red")

    def sample(self, classes: Any, seed: Any = 0, **settings: Any) -> Images:
        random = np.random.default_rng(seed)
        pixels = random.integers(256, size=(len(classes), 32, 32, 3), dtype=np.uint8)
        return Images([Image.fromarray(each) for each in pixels])


@dataclasses.dataclass(frozen=True)
class Toy:
    """A way that takes no time; `trained` are the minutes of all trainings."""

    trained: list[float]
    killed: bool = False
    setting: int = 1
    name: str = "toy way"

    def describe(self, images: Splits) -> dict[str, Any]:
        return {"setting": self.setting}

    def train(
        self,
        images: Splits,
        folder: Path,
        minutes: float,
        device: torch.device,
        open_progress: OpenProgress,
    ) -> Trained:
        self.trained.append(minutes)
        if self.killed:
            raise KeyboardInterrupt
        return Trained(Noise(), 60 * minutes, {"one": 5, "other": 3000}, 4_400_000)


@pytest.fixture
def discs(splits: Splits, monkeypatch: pytest.MonkeyPatch) -> Splits:
    """Included images with as many held-out images as an evaluation needs."""
    monkeypatch.setattr(harness, "LIMIT_SIDE", 64)
    monkeypatch.setattr(harness, "LIMIT_NUMBERS", 2**12)
    splits = dataclasses.replace(splits, val=splits.train)
    monkeypatch.setitem(images.INCLUDED, "discs", lambda size: splits)
    return splits


@pytest.fixture
def measured(discs: Splits, tmp_path: Path) -> Callable[..., list[Result]]:
    def run(way: Toy, *minutes: float, samples: int = SAMPLES) -> list[Result]:
        points = [Point(discs, way, each, samples) for each in minutes]
        return fit.run(points, tmp_path, CPU, show_progress, lambda _: None)

    return run


def test_a_point_that_has_its_result_is_not_trained_again(
    measured: Callable[..., list[Result]], tmp_path: Path
) -> None:
    trained: list[float] = []
    (first,) = measured(Toy(trained), 2)
    before = read_files(tmp_path)
    assert measured(Toy(trained), 2) == [first]
    assert trained == [2] and read_files(tmp_path) == before
    assert (first.way, first.minutes, first.seconds, first.samples) == ("toy way", 2, 120, SAMPLES)
    assert first.where["threads"] == str(torch.get_num_threads()) and first.machine.fp32 > 0
    assert first.processor is not None and first.processor >= 0
    lite0, *others = first.columns
    assert lite0 is not None and lite0.low <= lite0.value <= lite0.high
    assert others == [None, None]  # the set has no classifier
    # Points can be added, and the files then show all of them.
    both = measured(Toy(trained), 0.5)
    assert trained == [2, 0.5] and [result.minutes for result in both] == [0.5, 2]
    assert fit_report.load(tmp_path / "bench-fit.json") == both
    assert "| 0.5 | toy way |" in (tmp_path / "bench-fit.md").read_text()
    assert Image.open(tmp_path / "bench-fit.png").size[0] > 1000


def test_a_killed_point_is_resumed_and_finished_ones_are_kept(
    measured: Callable[..., list[Result]], tmp_path: Path
) -> None:
    trained: list[float] = []
    measured(Toy(trained), 1)
    with pytest.raises(KeyboardInterrupt):
        measured(Toy(trained, killed=True), 1, 2)
    assert trained == [1, 2]
    folder = tmp_path / "discs" / "toy-way-2min"
    assert {path.name for path in folder.iterdir()} == {"point.json", "clock.json"}
    spent = json.loads((folder / "clock.json").read_text())
    results = measured(Toy(trained), 1, 2)
    assert trained == [1, 2, 2] and [result.minutes for result in results] == [1, 2]
    assert json.loads((folder / "clock.json").read_text())["seconds"] > spent["seconds"]


def test_the_first_point_can_be_killed(
    measured: Callable[..., list[Result]], tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        measured(Toy([], killed=True), 1)
    assert len(measured(Toy([]), 1)) == 1


def test_what_is_not_comparable_is_refused_before_anything_is_trained(
    measured: Callable[..., list[Result]], tmp_path: Path
) -> None:
    trained: list[float] = []
    measured(Toy(trained), 2)
    before = read_files(tmp_path)
    for minutes in ((1, 2), (1,)):  # the same point, or another one in the folder
        with pytest.raises(UserError, match="samples was 12, now 15"):
            measured(Toy(trained), *minutes, samples=15)
    with pytest.raises(UserError, match=r"settings.setting was 1, now 2"):
        measured(Toy(trained, setting=2), 1, 2)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        with pytest.raises(UserError, match=rf'where.threads was "{threads}", now "{threads + 1}"'):
            measured(Toy(trained), 1, 2)
    finally:
        torch.set_num_threads(threads)
    assert trained == [2] and read_files(tmp_path) == before


def test_a_folder_of_something_else_is_refused(
    measured: Callable[..., list[Result]], tmp_path: Path
) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="is not a run of ctf bench fit"):
        measured(Toy([]), 2)
    assert read_files(tmp_path) == {"mine.txt": b"mine"}


def test_points_are_measured_in_turn_short_trainings_first(discs: Splits) -> None:
    benchmark = FitBenchmark(("discs",), (10, 2), ("small", "tiny"), (), SAMPLES)
    assert [point.name for point in fit.points(benchmark)] == [
        "discs, ctf small, 2 min",
        "discs, ctf tiny, 2 min",
        "discs, ctf small, 10 min",
        "discs, ctf tiny, 10 min",
    ]


def test_fit_is_trained_within_its_minutes(discs: Splits, tmp_path: Path) -> None:
    recipe = config.override(recipes.preset("tiny"), [*SMALLER_RECIPE, "tokens.views=plain"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(recipes.PRESETS, "toy", recipe)
        way = CtfFit("toy")
        trained = way.train(discs, tmp_path / "run", 0.02, CPU, show_progress)
        again = way.train(discs, tmp_path / "run", 0.02, CPU, show_progress)
    assert trained.steps.keys() == {"tokenizer", "coarse", "fine"}
    assert min(trained.steps.values()) >= 1 and trained.seconds > 0
    weights = 0
    for stage in ("tokenizer", "coarse", "fine"):
        assert (tmp_path / "run" / stage / "model.safetensors").is_file()
        weights += (tmp_path / "run" / stage / "model.safetensors").stat().st_size
    assert trained.parameters == pytest.approx(weights / 4, rel=0.2)
    assert again.steps == trained.steps and again.seconds == trained.seconds
    assert len(trained.model.sample([0, 1]).images) == 2


def estimate(value: float, low: float, high: float) -> dict[str, Any]:
    return config.to_json(Estimate(value, low, high, 1.0, 1000))


def result(way: str, minutes: float, **changes: Any) -> Result:
    scores = {
        "FID-Lite0": estimate(208.76, 200.0, 215.5),
        "IS-Lite0": estimate(3.0, 2.0, 4.0),
        "FID-fashion": estimate(20.0, 19.5, 20.5),
    }
    each = Result(
        "fashion-mnist", way, minutes, 118.0, 0.97, {"tokenizer": 1340, "coarse": 680}, 2_345_678,
        1000, scores, Accuracy(0.5, 0.47, 0.53, 1000), {"device": "cpu: a core", "threads": "1"},
        Machine(1.1e11, 2e11, 4e11, 1e10),
    )  # fmt: skip
    return dataclasses.replace(each, **changes)


def test_the_table_has_scores_with_their_intervals() -> None:
    bare = {"FID-Lite0": estimate(1.0, 0.5, 1.5)}
    results = [
        result("ctf small", 2),
        result("diffusers", 2, processor=None, scores=bare, accuracy=None),
    ]
    columns, rows = fit_report.table(results, "fashion-mnist")
    assert dict(zip(columns, rows[0], strict=True)) == {
        "minutes": "2",
        "": "ctf small",
        "FID-Lite0": "208.76 (200.00 to 215.50)",
        "FID, classifier": "20.00 (19.50 to 20.50)",
        "class accuracy": "50.0% (47.0% to 53.0%)",
        "trained, min": "2.0",
        "steps": "1,340 + 680",
        "parameters": "2.3 M",
        "processor": "97%",
        "10^9 operations/s": "110",
    }
    assert dict(zip(columns, rows[1], strict=True))["class accuracy"] == ""
    assert fit_report.table(results, "eurosat")[1] == []
    assert fit_report.scores_table(results, "fashion-mnist")[1] == [
        ("2", "ctf small", "208.76", "20.00", "50.0%"),
        ("2", "diffusers", "1.00", "", ""),
    ]


def test_files_show_all_sets_and_machines(tmp_path: Path) -> None:
    other = {"device": "cpu: another", "threads": "2"}
    results = [result("ctf small", 2), result("ctf small", 10, images="eurosat", where=other)]
    fit_report.write(tmp_path, results)
    text = (tmp_path / "bench-fit.md").read_text()
    assert "device cpu: a core, threads 1." in text and "device cpu: another, threads 2." in text
    assert text.index("### fashion-mnist") < text.index("### eurosat")
    assert "Scores are of 1000 samples" in text
    assert fit_report.load(tmp_path / "bench-fit.json") == results


def test_command(
    ctf: Command, discs: Splits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fit, "CtfFit", lambda preset: Toy([], name=f"ctf {preset}"))
    command = (
        "bench", "fit", "--images", "discs", "--minutes", "2,0.5", "--samples", SAMPLES,
        "--out", tmp_path / "out",
    )  # fmt: skip
    shown = ctf(*command, "--dry-run")
    assert shown.code == 0, shown.err
    assert "discs, ctf small, 0.5 min\ndiscs, ctf small, 2 min" in shown.out
    assert "2.5 minutes of training in all" in shown.out and not (tmp_path / "out").exists()
    done = ctf(*command)
    assert done.code == 0, done.err
    assert "point 2 of 2: discs, ctf small, 2 min" in done.out
    assert "out: bench-fit.md, bench-fit.png, bench-fit.json" in done.out
    shown = ctf(*command, "--dry-run")
    assert shown.out == "done\n0 minutes of training in all\n"


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (("--images", "my-folder"), "images: unknown 'my-folder'"),
        (("--images", ""), "expected at least one of each"),
        (("--preset", "tinny"), "unknown preset 'tinny': did you mean 'tiny'?"),
        (("--peers", "diffuser"), "peers: unknown 'diffuser': did you mean 'diffusers'?"),
        (("--minutes", "2,ten"), "minutes: got '2,ten', expected numbers, e.g. 2,10"),
        (("--minutes", "2,0"), "minutes: got 0, expected more than 0"),
        (("--minutes", "nan"), "minutes: got nan, expected more than 0"),
        (("--samples", 5), "samples: got 5, expected 10 or more"),
        (("--samples", 1001), "try 1010"),
    ],
)
def test_mistakes(ctf: Command, options: tuple[str, Any], error: str, tmp_path: Path) -> None:
    result = ctf("bench", "fit", *options, "--out", tmp_path / "out")
    assert result.code == 2 and error in result.err and not (tmp_path / "out").exists()


def test_a_peer_that_is_not_installed_is_named_with_its_extra(
    ctf: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    result = ctf("bench", "fit", "--peers", "diffusers", "--out", tmp_path / "out")
    assert result.code == 2 and not (tmp_path / "out").exists()
    assert result.err == "ctf: diffusers is not installed: pip install 'ctf[peers]'\n"
