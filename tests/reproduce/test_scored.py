"""Scores with what their models cost."""

from ctf.evaluation.extractors import open_extractor
from ctf.reproduce import experiments, scored, systems
from ctf.reproduce.cells import Workspace
from ctf.reproduce.plan import BUDGETS
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


def test_names_of_scores_are_those_of_the_networks() -> None:
    for name, suffix in scored.SUFFIXES.items():
        assert open_extractor(name).suffix == suffix
    assert {name for plan in BUDGETS.values() for name in plan.features} <= scored.SUFFIXES.keys()
