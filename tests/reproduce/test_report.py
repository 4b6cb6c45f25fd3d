"""The report of results: rows, costs, and what holds."""

import pytest

from ctf.common import storage
from ctf.evaluation.extractors import open_extractor
from ctf.reproduce import experiments, report
from ctf.reproduce.cells import Workspace
from ctf.reproduce.experiments import Choice
from ctf.reproduce.plan import BUDGETS
from tests.reproduce.conftest import CODES, store


def row(space: Workspace, label: str) -> Choice:
    rows = [row for part in experiments.table3(space.plan).values() for row in part]
    return next(row for row in rows if label in row.label)


def line(space: Workspace, text: str) -> str:
    report.write(space)
    lines = (space.results / "report.md").read_text().splitlines()
    return next(line for line in lines if text in line)


def test_a_report_has_the_scores_that_are_computed(space: Workspace) -> None:
    (pair,) = experiments.table1(space.plan, CODES)
    text = (space.results / "report.md").read_text()
    for cell in (pair.baseline, pair.ctf):
        score = report.scored(space, cell)
        assert score is not None
        low, high = score.interval("FID-fashion")
        assert low < score.value("FID-fashion") < high
        assert score.outcome["samples"] == space.plan.samples
        assert f"{score.value('FID-fashion'):.4g} ({low:.4g} to {high:.4g})" in text
    assert report.MISSING in text  # the other tables
    assert (space.results / "table1.png").read_bytes().startswith(b"\x89PNG")
    search = space.outcome(pair.ctf.tuned)
    assert search is not None
    assert search["best"].keys() == {"guidance", "temperature", "fine_temperature"}
    for value in search["best"].values():
        assert f"| {value:g}, found by the search |" in text  # a row of Table 3


def test_a_random_member_costs_no_fine_model(copied: Workspace) -> None:
    usual, member = experiments.table1(copied.plan, CODES)[0].ctf, row(copied, "MASC").cell
    settings = {"fine_temperature": experiments.UNIFORM}
    store(copied, member, usual, settings=settings)
    score, coarse = report.scored(copied, member), copied.outcome(usual.coarse)
    assert score is not None and coarse is not None
    assert score.parameters == coarse["parameters"]
    assert score.flops == coarse["flops"]


def test_a_model_costs_also_the_training_of_the_one_it_started_from(copied: Workspace) -> None:
    pair, warm = experiments.table1(copied.plan, CODES)[0], row(copied, "started from").cell
    store(copied, warm, pair.ctf)
    assert report.scored(copied, warm) is None  # its coarse model is not computed yet
    store(copied, warm.coarse, pair.ctf.coarse)
    score, ctf, start = (report.scored(copied, cell) for cell in (warm, pair.ctf, pair.baseline))
    assert score is not None and ctf is not None and start is not None
    assert score.flops == ctf.flops + start.flops
    assert score.seconds == ctf.seconds + start.seconds
    assert score.parameters == ctf.parameters


@pytest.mark.parametrize(
    ("change", "holds"), [(100.0, "yes"), (-100.0, "no: the opposite"), (0.0, report.OVERLAP)]
)
def test_rows_are_compared_by_their_intervals(copied: Workspace, change: float, holds: str) -> None:
    usual = experiments.table1(copied.plan, CODES)[0].ctf
    outcome = copied.outcome(usual)
    assert outcome is not None
    score = {key: value + change for key, value in outcome["scores"]["FID-fashion"].items()}
    most_likely = experiments.table3(copied.plan)["d: top-k of the fine model"][0].cell
    store(copied, most_likely, usual, scores={**outcome["scores"], "FID-fashion": score})
    assert line(copied, "sampling details beats").endswith(f"| {holds} |")


@pytest.mark.parametrize(
    ("lower", "holds"),
    [
        (0.5, "yes"),
        (0.05, "yes, but by less than in the paper"),
        (-0.5, "no: the intervals of a pair overlap, or the baseline is better"),
    ],
)
def test_ctf_is_compared_with_the_baseline(copied: Workspace, lower: float, holds: str) -> None:
    pair = experiments.table1(copied.plan, CODES)[0]
    for cell, value in ((pair.baseline, 10.0), (pair.ctf, 10.0 * (1 - lower))):
        outcome = copied.outcome(cell)
        assert outcome is not None
        score = {"value": value, "low": value - 0.1, "high": value + 0.1}
        store(copied, cell, cell, scores={**outcome["scores"], "FID-fashion": score})
    claim = line(copied, "FID-fashion is lower with CTF")
    assert "in the paper by 19% to 24%" in claim and f"| {-lower:+.1%} (1 of 1 seeds) |" in claim
    assert claim.endswith(f"| {holds} |")


@pytest.mark.parametrize(("ours", "holds"), [([2.0, 1.0, 0.5], "no"), ([1.0, 1.0, 4.0], "yes")])
def test_speeds_are_compared_round_by_round(
    copied: Workspace, ours: list[float], holds: str
) -> None:
    """The machine may slow down between rounds: the baseline's median is 1.0 both times."""
    cell, theirs = experiments.table2(copied.plan), [1.0, 0.5, 4.0]
    batches = ("1", "64")
    times = {"baseline": dict.fromkeys(batches, theirs), "CTF": dict.fromkeys(batches, ours)}
    storage.save_json(
        copied.results / "cells" / f"{cell.name}.json",
        {"asked": cell.to_json(), "found": {"seconds": times}, "seconds": 1, "where": {}},
    )
    assert line(copied, "sampling is no slower").endswith(f"| {holds} |")
    speed = line(copied, "| 64 | 64.00 (16.00 to 128.00) |")
    ratios = sorted(a / b for a, b in zip(theirs, ours, strict=True))
    assert f"| {64 / sorted(ours)[1]:.2f}" in speed
    assert f"| {ratios[1]:.2f} ({ratios[0]:.2f} to {ratios[2]:.2f}) |" in speed


def test_names_of_scores_are_those_of_the_networks() -> None:
    for name, suffix in report.SUFFIXES.items():
        assert open_extractor(name).suffix == suffix
    assert {name for plan in BUDGETS.values() for name in plan.features} <= report.SUFFIXES.keys()
