"""Tables and figures as cells: names, order, and what decides a result."""

from pathlib import Path

import pytest

from ctf.common import storage
from ctf.common.errors import UserError
from ctf.reproduce import experiments
from ctf.reproduce.plan import FULL, PLANS, SMALL, Plan

COMMITTED = Path(__file__).parents[2] / "docs" / "results" / "full" / "cells"
PAPER = ("table1", "table2", "table3", "figure1", "figure2")
EXPERIMENTS = (*PAPER, "geometry", "fine", "passes")


@pytest.mark.parametrize("plan", [plan for each in PLANS.values() for plan in each.values()])
@pytest.mark.parametrize("what", [*EXPERIMENTS, "all"])
def test_every_cell_comes_after_what_it_needs(plan: Plan, what: str) -> None:
    seen: set[str] = set()
    for name, cell in experiments.select(plan, what).items():
        assert name == cell.name
        assert {needed.name for needed in cell.needs} <= seen
        seen.add(name)


def test_all_is_every_table_and_figure() -> None:
    each = {name for what in EXPERIMENTS for name in experiments.select(FULL, what)}
    assert experiments.select(FULL).keys() == each


def test_committed_results_are_of_these_cells() -> None:
    """A changed field of a cell, or of a configuration in it, would orphan results of hours."""
    cells = experiments.select(FULL)
    committed = {path.stem for path in COMMITTED.iterdir()}
    paper = [cell for what in PAPER for cell in experiments.select(FULL, what)]
    additions = {experiments.table2(FULL, parallel=True).name}
    assert {*paper} - additions <= committed <= cells.keys()
    for name in committed:
        asked = storage.load_object(COMMITTED / f"{name}.json")["asked"]
        assert asked == cells[name].to_json()


def test_a_cell_depends_on_all_that_it_needs() -> None:
    """By the hashes of what it needs, which depend on theirs in turn."""
    score = experiments.table1(FULL, 16384)[0].ctf
    small = experiments.table1(SMALL, 16384)[0].ctf
    assert score.needs == (score.coarse, score.fine, score.tuned)
    for needed, other in zip(score.needs, small.needs, strict=True):
        assert needed.name == other.name
        assert score.to_json()["needs"][needed.name] != small.to_json()["needs"][needed.name]


def test_one_cell_is_selected_by_its_name(plan: Plan) -> None:
    assert [*experiments.select(plan, "table1", "tokens-64")] == ["tokens-64"]
    with pytest.raises(UserError, match="unknown cell 'token-64': did you mean 'tokens-64'"):
        experiments.select(plan, "table1", "token-64")


def test_rows_of_table_3(plan: Plan) -> None:
    parts = experiments.table3(plan)
    assert [title[:2] for title in parts][:6] == ["a:", "b:", "c:", "d:", "e:", "f:"]
    rows = [row for part in parts.values() for row in part]
    assert {row.cell.name.split("-")[0] for row in rows} == {"table1", "table3"}
    names = [row.cell.name for row in rows if row.cell.name.startswith("table3")]
    assert len(names) == len({*names})


def test_claims_are_between_rows_of_table_3(plan: Plan) -> None:
    rows = [row for part in experiments.table3(plan).values() for row in part]
    for claim in experiments.claims(plan):
        assert claim.better in rows and claim.worse in rows and claim.better != claim.worse
