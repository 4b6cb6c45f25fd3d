"""The report for programs and for people, and the comparison of two reports."""

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
from ctf.evaluation.intervals import Estimate
from ctf.evaluation.metrics import Accuracy
from ctf.evaluation.report import ReferenceInfo, Report, Subject
from ctf.evaluation.sample_cache import GenerationConfig
from tests.evaluation.helpers import collection, noise

FID = Estimate(5.4612, 5.2, 5.72, 0.11, 300)
GENERATION = GenerationConfig(300, 7, settings={"guidance": 1.5, "top_k": 0})


def make_report(**changes: Any) -> Report:
    """A report of 300 samples of two classes."""
    accuracy = Accuracy(0.9, 0.86, 0.93, 300)
    complete = Report(
        subject=Subject("run", "aaa", GENERATION),
        search_samples=None,
        reference=ReferenceInfo("discs (all)", "bbb", 24, (32, 32)),
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
    return dataclasses.replace(complete, **changes)


def as_scores(**estimates: Estimate) -> dict[str, dict[str, float]]:
    return {name: config.to_json(estimate) for name, estimate in estimates.items()}


# --- report.json ----------------------------------------------------------------------------------


def test_report_round_trips(tmp_path: Path) -> None:
    report.write(tmp_path, make_report(), collection(noise(300, 0, 32)))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "report.json", "report.md", "samples.png"
    ]  # fmt: skip
    assert report.load(tmp_path / "report.json") == report.load(tmp_path) == make_report()
    stored = json.loads((tmp_path / "report.json").read_text())
    assert stored["subject"]["drawing"]["seed"] == 7
    assert {"ctf", "python", "torch", "numpy"} <= stored["versions"].keys()


@pytest.mark.parametrize("content", ["[]", "{}", '{"metrics": 1}', "no"])
def test_other_files_are_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(UserError, match=r"a\.json"):
        report.load(tmp_path / "a.json")
    with pytest.raises(UserError, match=r"report\.json: not found"):
        report.load(tmp_path)


# --- two reports ----------------------------------------------------------------------------------


def test_a_report_does_not_differ_from_itself() -> None:
    (fid,) = report.differences(make_report(), make_report()).values()
    assert fid.value == 0 and not fid.significant and fid.low < 0 < fid.high
    assert report.difference_rows(make_report(), make_report()) == [
        ("FID-Lite0", "+0.0000", "-0.3660 to +0.3660", "yes")
    ]


def test_a_significant_difference() -> None:
    better = make_report(scores=as_scores(**{"FID-Lite0": Estimate(4.0, 3.8, 4.2, 0.1, 300)}))
    assert report.difference_rows(better, make_report()) == [
        ("FID-Lite0", "-1.461", "-1.788 to -1.134", "no")
    ]


def test_only_scores_of_shared_features_are_compared() -> None:
    more = make_report(
        features={"fashion": "xxx", "lite0": "ccc"},
        scores=as_scores(**{"FID-fashion": FID, "FID-Lite0": FID}),
    )
    assert [*report.differences(more, make_report())] == [*report.differences(make_report(), more)]
    assert [*report.differences(more, make_report())] == ["FID-Lite0"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"reference": ReferenceInfo("discs (val)", "other", 24, (32, 32))},
            r"it has another reference \(discs \(val\)\)",
        ),
        ({"features": {"fashion": "ccc"}}, "it has the features fashion, here lite0"),
        ({"features": {"lite0": "other"}}, "or other weights of them"),
        ({"count": 299}, "it is of 299 images, this one of 300"),
        (
            {"subject": Subject("b", "f", GenerationConfig(300, balance="uniform"))},
            "report of b: its classes are uniform, here balanced",
        ),
    ],
)
def test_reports_that_are_not_comparable(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        report.differences(make_report(), make_report(**changes))
    assert len(str(error.value).splitlines()) <= 2
    report.differences(make_report(), make_report(subject=Subject("pictures", "f")))


# --- tables ---------------------------------------------------------------------------------------


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
def test_number_format(name: str, score: Any, row: tuple[str, str]) -> None:
    stored = config.to_json(score) if isinstance(score, Estimate) else {"value": score}
    label = "KID x 1000" if name == "KID" else name
    assert report.score_rows(make_report(scores={name: stored}, accuracy=None)) == [(label, *row)]


def test_accuracy_is_a_percentage() -> None:
    assert report.score_rows(make_report(scores={})) == [
        ("class accuracy", "90.0%", "86.0% to 93.0%")
    ]


def test_markdown_of_a_complete_report() -> None:
    text = report.markdown(make_report())
    assert text.startswith("# Evaluation of run\n\n300 images of 32 x 32 pixels, scored against ")
    for words in (
        "against discs (all), 24 images of 32 x 32 pixels.",
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
        assert words in text, words
    assert "search" not in text
    tables = [line for line in text.replace("\\|", "").splitlines() if line.startswith("|")]
    assert {line.count("|") for line in tables} == {4, 5}


def test_markdown_of_images_against_statistics() -> None:
    """Without a pipeline, a classifier and classes."""
    less = make_report(
        subject=Subject("a.npz", "aaa"),
        reference=ReferenceInfo("s.npz", "bbb", None, None),
        classifier=None,
        accuracy=None,
        per_class={"a": {}, "b": {}},
    )
    text = report.markdown(less)
    assert "scored against s.npz.\n" in text
    assert "seed" not in text and "Classes" not in text and "classifier" not in text


def test_markdown_mentions_a_search() -> None:
    text = report.markdown(make_report(search_samples=1000))
    assert "on 1000 other samples per point" in text and "(search.png)" in text


# --- samples.png ----------------------------------------------------------------------------------


def tile(sheet: Image.Image, row: int, column: int, side: int, head: int = 20) -> np.ndarray:
    """Pixels of an image on a sheet of tiles of size `side`, below names of `head` pixels."""
    x, y = 4 + column * (side + 4), 4 + head + row * (side + head + 4)
    return np.asarray(sheet)[y : y + side, x : x + side]


@pytest.mark.parametrize("named", [True, False])
def test_sheet_shows_the_first_images_of_the_first_classes(named: bool) -> None:
    pixels, classes_N = noise(1000, 0, 64), np.random.default_rng(0).integers(25, size=1000)
    classes_N[classes_N == 3] = 4  # no images of class 3
    names = tuple(f"kind {c}" for c in range(25)) if named else None
    sheet = report.samples_sheet(collection(pixels, classes_N, names))
    assert sheet.size == (4 + 10 * 68, 4 + 10 * 88)
    for row, c in enumerate([0, 1, 2, 4, 5, 6, 7, 8, 9, 10]):
        for column in (0, 9):
            number = np.flatnonzero(classes_N == c)[column]
            assert np.array_equal(tile(sheet, row, column, 64), pixels[number])


def test_sheet_with_incomplete_rows() -> None:
    pixels = noise(5, 0, 64)
    sheet = report.samples_sheet(collection(pixels, np.array([1, 0, 0, 1, 0]), ("a", "b")))
    assert sheet.size == (4 + 3 * 68, 4 + 2 * 88)
    assert np.array_equal(tile(sheet, 1, 1, 64), pixels[3])
    assert (tile(sheet, 1, 2, 64) == 255).all()


@pytest.mark.parametrize(("count", "rows"), [(1, 1), (10, 1), (23, 3), (300, 10)])
def test_sheet_of_images_without_classes(count: int, rows: int) -> None:
    pixels = noise(count, 0, 64)
    sheet = report.samples_sheet(collection(pixels))
    assert sheet.size == (4 + min(count, 10) * 68, 4 + rows * 68)
    last = min(count, 100) - 1
    assert np.array_equal(tile(sheet, last // 10, last % 10, 64, head=0), pixels[last])


def test_sheet_shrinks_large_images() -> None:
    sheet = report.samples_sheet(collection(noise(20, 0, 512)))
    assert sheet.size == (4 + 10 * 132, 4 + 2 * 132)
