"""The report: what it says to people and to programs, and how two of them compare."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ctf.common import config
from ctf.common.errors import UserError
from ctf.evaluation import report
from ctf.evaluation.metrics import Accuracy, Estimate
from ctf.evaluation.report import Result, Source, Subject
from ctf.evaluation.sample_cache import Drawing
from tests.gallery import noise, of_pixels

FID = Estimate(5.4612, 5.2, 5.72, 0.11, 300)
DRAWING = Drawing(300, 7, settings={"guidance": 1.5, "top_k": 0})


def result(**changes: Any) -> Result:
    """A report of 300 samples of two classes."""
    accuracy = Accuracy(0.9, 0.86, 0.93, 300)
    whole = Result(
        subject=Subject("run", "aaa", DRAWING),
        search_samples=None,
        reference=Source("discs (all)", "bbb", 24, (32, 32)),
        features={"lite0": "ccc"},
        classifier="ddd",
        count=300,
        size=(32, 32),
        pictures="eee",
        scores={"FID-Lite0": config.to_json(FID), "precision-Lite0": {"value": 0.8125}},
        accuracy=accuracy,
        per_class={
            "a|b": {"mean distance-Lite0": 0.25, "accuracy": config.to_json(accuracy)},
            "empty": {},
        },
        device="cpu",
        versions=report.versions(),
    )
    return dataclasses.replace(whole, **changes)


def scored(**estimates: Estimate) -> dict[str, dict[str, float]]:
    return {name: config.to_json(estimate) for name, estimate in estimates.items()}


# --- for programs ---------------------------------------------------------------------------------


def test_it_comes_back(tmp_path: Path) -> None:
    pictures = of_pixels(noise(300, 0, 32))
    report.write(tmp_path, result(), pictures)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "report.json", "report.md", "samples.png"
    ]  # fmt: skip
    assert report.load(tmp_path / "report.json") == report.load(tmp_path) == result()
    stored = json.loads((tmp_path / "report.json").read_text())
    assert stored["subject"]["drawing"]["seed"] == 7
    assert {"ctf", "python", "torch", "numpy"} <= stored["versions"].keys()


@pytest.mark.parametrize("content", ["[]", "{}", '{"metrics": 1}', "no"])
def test_other_files_are_no_report(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(UserError, match=r"a\.json"):
        report.load(tmp_path / "a.json")
    with pytest.raises(UserError, match=r"report\.json: not found"):
        report.load(tmp_path)


# --- two reports ----------------------------------------------------------------------------------


def test_a_report_and_itself() -> None:
    (found,) = report.differences(result(), result()).values()
    assert found.value == 0 and not found.significant and found.low < 0 < found.high
    assert report.difference_rows(result(), result()) == [
        ("FID-Lite0", "+0.0000", "-0.3660 to +0.3660", "yes")
    ]


def test_a_difference_that_is_none_of_chance() -> None:
    better = result(scores=scored(**{"FID-Lite0": Estimate(4.0, 3.8, 4.2, 0.1, 300)}))
    assert report.difference_rows(better, result()) == [
        ("FID-Lite0", "-1.461", "-1.788 to -1.134", "no")
    ]


def test_scores_of_shared_features_alone() -> None:
    more = result(
        features={"fashion": "xxx", "lite0": "ccc"},
        scores=scored(**{"FID-fashion": FID, "FID-Lite0": FID}),
    )
    assert [*report.differences(more, result())] == [*report.differences(result(), more)]
    assert [*report.differences(more, result())] == ["FID-Lite0"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"reference": Source("discs (val)", "other", 24, (32, 32))},
            r"against another reference \(discs \(val\)\)",
        ),
        ({"features": {"fashion": "ccc"}}, r"by other features \(fashion\) than lite0"),
        ({"features": {"lite0": "other"}}, "or other weights of them: not comparable"),
        ({"count": 299}, "is of 299 pictures, this one of 300"),
        (
            {"subject": Subject("b", "f", Drawing(300, balance="uniform"))},
            "the report of b is of uniform classes, this one of balanced ones",
        ),
    ],
)
def test_reports_that_cannot_be_compared(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        report.differences(result(), result(**changes))
    assert len(str(error.value).splitlines()) <= 2
    report.differences(result(), result(subject=Subject("pictures", "f")))


# --- for people -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "score", "row"),
    [
        ("FID", 0.0, ("0.0000", "")),
        ("FID", 0.65, ("0.6500", "")),
        ("FID", 9.87654, ("9.877", "")),
        ("FID", 12.3456, ("12.35", "")),
        ("IS", 193.61, ("193.6", "")),
        ("FID", 1234.5, ("1234", "")),
        ("FID", 54321.0, ("54321", "")),
        ("recall-Lite0", 0.5, ("0.500", "")),
        ("density", 1.23456, ("1.235", "")),
        ("FID", Estimate(12.3456, 9.8, 14.9, 1, 9), ("12.35", "9.80 to 14.90")),
        ("KID", Estimate(0.0023456, -0.0001, 0.005, 1, 9), ("2.346", "-0.100 to 5.000")),
    ],
)
def test_numbers(name: str, score: Any, row: tuple[str, str]) -> None:
    stored = config.to_json(score) if isinstance(score, Estimate) else {"value": score}
    label = "KID x 1000" if name == "KID" else name
    assert report.rows(result(scores={name: stored}, accuracy=None)) == [(label, *row)]


def test_accuracy_is_a_share() -> None:
    assert report.rows(result(scores={})) == [("class accuracy", "90.0%", "86.0% to 93.0%")]


def test_what_it_says() -> None:
    said = report.markdown(result())
    assert said.startswith("# Evaluation of run\n\n300 pictures of 32 x 32 pixels, scored against ")
    for words in (
        "against discs (all), 24 pictures of 32 x 32 pixels.",
        "| FID-Lite0 | 5.461 | 5.200 to 5.720 | lower |",
        "| precision-Lite0 | 0.812 |  | higher |",
        "| class accuracy | 90.0% | 86.0% to 93.0% | higher |",
        "- sample i from seed 7 + i",
        "guidance 1.5, top_k 0",
        "| class | mean distance-Lite0 | accuracy |",
        "| a\\|b | 0.2500 | 90.0% (86.0% to 93.0%) |",
        "| empty |  |  |",
        *(f"`{digest}`" for digest in ("aaa", "bbb", "ccc", "ddd", "eee")),
    ):
        assert words in said, words
    assert "search" not in said
    tables = [line for line in said.replace("\\|", "").splitlines() if line.startswith("|")]
    assert {line.count("|") for line in tables} == {4, 5}


def test_what_it_says_of_less() -> None:
    """Of pictures that were there, against statistics, without a classifier or classes."""
    less = result(
        subject=Subject("a.npz", "aaa"),
        reference=Source("s.npz", "bbb", None, None),
        classifier=None,
        accuracy=None,
        per_class={"a": {}, "b": {}},
    )
    said = report.markdown(less)
    assert "scored against s.npz.\n" in said
    assert "seed" not in said and "Classes" not in said and "classifier" not in said


def test_a_search_is_told() -> None:
    said = report.markdown(result(search_samples=1000))
    assert "on 1000 other samples for each point" in said and "(search.png)" in said


# --- the sheet ------------------------------------------------------------------------------------


def tile(sheet: Image.Image, row: int, column: int, side: int, head: int = 20) -> np.ndarray:
    """The pixels of a picture on a sheet of tiles of that side, below names of `head` pixels."""
    x, y = 4 + column * (side + 4), 4 + head + row * (side + head + 4)
    return np.asarray(sheet)[y : y + side, x : x + side]


@pytest.mark.parametrize("named", [True, False])
def test_the_first_of_the_first_classes(named: bool) -> None:
    pixels, classes_N = noise(1000, 0, 64), np.random.default_rng(0).integers(25, size=1000)
    classes_N[classes_N == 3] = 4  # of which there are none
    names = tuple(f"kind {c}" for c in range(25)) if named else None
    sheet = report.samples_sheet(of_pixels(pixels, classes_N, names))
    assert sheet.size == (4 + 10 * 68, 4 + 10 * 88)
    for row, c in enumerate([0, 1, 2, 4, 5, 6, 7, 8, 9, 10]):
        for column in (0, 9):
            number = np.flatnonzero(classes_N == c)[column]
            assert np.array_equal(tile(sheet, row, column, 64), pixels[number])


def test_rows_that_are_not_full() -> None:
    pixels = noise(5, 0, 64)
    sheet = report.samples_sheet(of_pixels(pixels, np.array([1, 0, 0, 1, 0]), ("a", "b")))
    assert sheet.size == (4 + 3 * 68, 4 + 2 * 88)
    assert np.array_equal(tile(sheet, 1, 1, 64), pixels[3])
    assert (tile(sheet, 1, 2, 64) == 255).all()


@pytest.mark.parametrize(("count", "rows"), [(1, 1), (10, 1), (23, 3), (300, 10)])
def test_pictures_of_no_known_class(count: int, rows: int) -> None:
    pixels = noise(count, 0, 64)
    sheet = report.samples_sheet(of_pixels(pixels))
    assert sheet.size == (4 + min(count, 10) * 68, 4 + rows * 68)
    last = min(count, 100) - 1
    assert np.array_equal(tile(sheet, last // 10, last % 10, 64, head=0), pixels[last])


def test_large_pictures_are_made_smaller() -> None:
    sheet = report.samples_sheet(of_pixels(noise(20, 0, 512)))
    assert sheet.size == (4 + 10 * 132, 4 + 2 * 132)
