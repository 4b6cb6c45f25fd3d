"""The five lines at the top of a report follow from the numbers, or say what is missing."""

from typing import Any

import pytest

from ctf.common import storage
from ctf.reproduce import additions, experiments, report
from ctf.reproduce.cells import Workspace
from ctf.reproduce.conclusions import conclusions
from ctf.reproduce.sampling_cells import ScoreCell
from tests.reproduce.conftest import CODES, store


def set_score(space: Workspace, cell: ScoreCell, fid: float, accuracy: float) -> None:
    """Stores a score, and the models of it, like those of Table 1."""
    usual = experiments.table1(space.plan, CODES)[0].ctf
    assert usual.fine is not None
    for model, like in ((cell.coarse, usual.coarse), (cell.fine, usual.fine)):
        if model is not None and space.outcome(model) is None:
            store(space, model, like)
    outcome = space.outcome(usual)
    assert outcome is not None
    score = {"value": fid, "low": fid - 0.1, "high": fid + 0.1}
    known = {"value": accuracy, "low": accuracy - 0.01, "high": accuracy + 0.01}
    scores = {**outcome["scores"], "FID-fashion": score}
    store(space, cell, usual, scores=scores, accuracy=known)


def test_what_is_missing_is_named(space: Workspace) -> None:
    lines = conclusions(space)
    assert len(lines) == 5
    assert "(mean of 1 seed)" in lines[0]
    for line, missing in zip(lines[1:4], ("table1", "figure2", "fine"), strict=True):
        assert line.endswith(f"not computed yet (`{missing}`).")
    assert "Not compared yet: the baseline with IAR's cluster loss, the baseline that" in lines[4]


@pytest.mark.parametrize(
    ("fid", "accuracy", "advice"),
    [
        (5.0, 0.5, "take CTF."),
        (5.0, 0.3, "CTF is better by FID-fashion, the plain model by class accuracy."),
        (20.0, 0.7, "CTF is better by class accuracy, the plain model by FID-fashion."),
        (10.0, 0.5, "neither is better, and the plain model is simpler."),
        (20.0, 0.5, "take the plain model."),
    ],
)
def test_advice_follows_from_fid_and_class_accuracy(
    copied: Workspace, fid: float, accuracy: float, advice: str
) -> None:
    pair = experiments.table1(copied.plan, CODES)[0]
    set_score(copied, pair.ctf, fid, accuracy)
    set_score(copied, pair.baseline, 10.0, 0.5)
    line = conclusions(copied)[4]
    assert "(the baseline) has FID-fashion 10 and class accuracy 50.0%, the best CTF (CTF) " in line
    assert f"(CTF) FID-fashion {fid:.4g} and" in line
    assert f": {advice}" in line


def test_the_best_plain_model_is_compared_whatever_helps_it(copied: Workspace) -> None:
    pair = experiments.table1(copied.plan, CODES)[0]
    set_score(copied, pair.baseline, 10.0, 0.5)
    set_score(copied, pair.ctf, 8.0, 0.5)
    base, ctf, _ = additions.geometry(copied.plan).values()
    set_score(copied, base[1], 7.0, 0.5)
    line = conclusions(copied)[4]
    assert "(the baseline that knows the codebook) has FID-fashion 7 " in line
    assert ": take the plain model." in line
    set_score(copied, ctf[1], 6.0, 0.5)
    line = conclusions(copied)[4]
    assert "(CTF that knows the codebook) FID-fashion 6 " in line and ": take CTF." in line


def test_the_lead_over_training(copied: Workspace) -> None:
    short, full = experiments.figure2(copied.plan)
    for each, base, ctf in ((short, 40.0, 20.0), (full, 20.0, 15.0)):
        set_score(copied, each.baseline, base, 0.5)
        set_score(copied, each.ctf, ctf, 0.5)
    line = conclusions(copied)[2]
    assert f"50% lower after {short.steps} steps, 25% lower after {full.steps} steps" in line
    assert line.endswith("it is ahead at every length, and the lead shrinks.")


def test_what_the_fine_stage_recovers(copied: Workspace) -> None:
    count = copied.plan.fine_clusters[0]
    cells = additions.fine_stage(copied.plan)[count]
    values = {additions.TRUE: 10.0, additions.RANDOM: 20.0, "fine model, most likely": 14.0}
    for label, value in values.items():
        distance: dict[str, Any] = {"value": value, "low": value, "high": value, "count": 12}
        distance["without_group"] = [value] * 10
        found = {"psnr": 20.0, "uniform_loss": 1.0, "FID-fashion": distance}
        path = copied.results / "cells" / f"{cells[label].name}.json"
        stored = {"asked": cells[label].to_json(), "found": found, "seconds": 1, "where": {}}
        storage.save_json(path, stored)
    line = conclusions(copied)[3]
    assert f"(K = {count}, fine model, most likely) recovers 60% (60% to 60%)" in line
    assert "at least half" in line
    report.write(copied)
    text = (copied.results / "report.md").read_text()
    assert f"- {line}" in text
    assert "| random members | 20.00 dB | 20 (20 to 20) | 0% |" in text
