"""Scores with what their models cost."""

import dataclasses
from typing import Any

import pytest

from ctf.evaluation.classifier import ClassifierConfig
from ctf.evaluation.extractors import open_extractor
from ctf.reproduce import experiments, scored, systems
from ctf.reproduce.cells import Workspace
from ctf.reproduce.plan import PLANS
from ctf.reproduce.systems import Choice
from tests.reproduce.conftest import CODES, store


def row(space: Workspace, label: str) -> Choice:
    rows = [row for part in experiments.table3(space.plan).values() for row in part]
    return next(row for row in rows if label in row.label)


def test_a_random_member_costs_no_fine_model(copied: Workspace) -> None:
    usual, member = experiments.table1(copied.plan, CODES)[0].ctf, row(copied, "MASC").cell
    settings = {"fine_temperature": systems.UNIFORM}
    store(copied, member, usual, settings=settings)
    score, coarse = scored.scored(copied, member), copied.outcome(usual.coarse)
    assert score is not None and coarse is not None
    assert score.parameters == coarse["parameters"]
    assert score.flops == coarse["flops"]


def test_a_model_costs_also_the_training_of_the_one_it_started_from(copied: Workspace) -> None:
    pair, warm = experiments.table1(copied.plan, CODES)[0], row(copied, "started from").cell
    store(copied, warm, pair.ctf)
    assert scored.scored(copied, warm) is None  # its coarse model is not computed yet
    store(copied, warm.coarse, pair.ctf.coarse)
    score, ctf, start = (scored.scored(copied, cell) for cell in (warm, pair.ctf, pair.baseline))
    assert score is not None and ctf is not None and start is not None
    assert score.flops == ctf.flops + start.flops
    assert score.seconds == ctf.seconds + start.seconds
    assert score.parameters == ctf.parameters


def test_names_of_scores_are_those_of_the_networks(space: Workspace) -> None:
    for plans in PLANS.values():
        for plan in plans.values():
            suffixes = [open_extractor(name).suffix for name in plan.features]
            suffixes += [] if plan.classifier is None else ["-classifier"]
            assert scored.score_names(plan, "") == suffixes
    assert scored.score_names(space.plan, "FID", "IS") == ["FID-fashion", "IS-fashion"]
    plan = dataclasses.replace(space.plan, classifier=ClassifierConfig())
    assert scored.score_names(plan, "FID") == ["FID-fashion", "FID-classifier"]


def test_what_is_recovered_is_between_random_members_and_true_codes() -> None:
    """The interval is that of the ratio: where all groups agree, there is none."""

    def outcome(value: float, *without: float) -> dict[str, Any]:
        return {"FID": {"value": value, "without_group": without, "count": 100}}

    true, random = outcome(10.0, 9.0, 11.0), outcome(20.0, 19.0, 21.0)
    for chosen, expected in ((true, 1.0), (random, 0.0), (outcome(15.0, 14.0, 16.0), 0.5)):
        part = scored.recovered(true, random, chosen, "FID")
        assert part is not None
        assert (part.low, part.value, part.high) == (expected,) * 3
    part = scored.recovered(true, random, outcome(15.0, 15.0, 15.0), "FID")
    assert part is not None
    assert part.value == 0.5
    # Without a group 0.4 or 0.6, so an error of 0.1 times the root of G - 1; t of one degree.
    assert part.high - part.value == pytest.approx(12.7062 * 0.1, rel=1e-4)
    assert scored.recovered(random, true, true, "FID") is None
