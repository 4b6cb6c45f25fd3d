"""Claims are judged by intervals, round by round, and against the paper's numbers."""

import pytest

from ctf.common import storage
from ctf.reproduce import experiments, report
from ctf.reproduce.cells import Workspace
from ctf.reproduce.findings import OVERLAP, findings
from tests.reproduce.conftest import CODES, store


def finding(space: Workspace, text: str) -> tuple[str, str, str]:
    return next(row for row in findings(space) if text in row[0])


@pytest.mark.parametrize(
    ("change", "holds"), [(100.0, "yes"), (-100.0, "no: the opposite"), (0.0, OVERLAP)]
)
def test_rows_are_compared_by_their_intervals(copied: Workspace, change: float, holds: str) -> None:
    usual = experiments.table1(copied.plan, CODES)[0].ctf
    outcome = copied.outcome(usual)
    assert outcome is not None
    score = {key: value + change for key, value in outcome["scores"]["FID-fashion"].items()}
    most_likely = experiments.table3(copied.plan)["d: top-k of the fine model"][0].cell
    store(copied, most_likely, usual, scores={**outcome["scores"], "FID-fashion": score})
    assert finding(copied, "sampling details beats")[2] == holds


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
    claim, here, judged = finding(copied, "FID-fashion is lower with CTF")
    assert claim.endswith("in the paper by 19% to 24%")
    assert here == f"{-lower:+.1%} (1 of 1 seeds)"
    assert judged == holds


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
    assert finding(copied, "sampling is no slower")[2] == holds
    report.write(copied)
    lines = (copied.results / "report.md").read_text().splitlines()
    speed = next(line for line in lines if line.startswith("| 64 | 64.00 (16.00 to 128.00) |"))
    ratios = sorted(a / b for a, b in zip(theirs, ours, strict=True))
    assert f"| {64 / sorted(ours)[1]:.2f}" in speed
    assert f"| {ratios[1]:.2f} ({ratios[0]:.2f} to {ratios[2]:.2f}) |" in speed
