"""Experiments beyond the paper, with the cells of the paper as their controls."""

import dataclasses
import math
import shutil
from pathlib import Path

import pytest

from ctf.evaluation.classifier import ClassifierConfig
from ctf.models.sampling import Sampling
from ctf.reproduce import additions, experiments, report, runner, systems
from ctf.reproduce.cells import Workspace
from ctf.reproduce.plan import FULL
from ctf.reproduce.scored import columns, recovered, scored
from tests.reproduce.conftest import CLUSTERS, COARSE, CODES, STEPS, store


def test_models_with_geometry_differ_from_those_of_the_paper_in_nothing_else() -> None:
    """And each of the four is searched alike, with its own models."""
    for label, (without, with_it) in additions.geometry(FULL).items():
        models = (without.coarse, with_it.coarse), (without.fine, with_it.fine)
        for plain, knowing in models if without.fine is not None else models[:1]:
            assert plain is not None and knowing is not None
            assert not plain.geometry and knowing.geometry
            asked, other = plain.to_json(), knowing.to_json()
            assert other.pop("geometry") is True and asked == other
        one, other_search = without.tuned, with_it.tuned
        assert (one.points, one.samples) == (other_search.points, other_search.samples)
        assert other_search.coarse == with_it.coarse
        assert other_search.fine == with_it.fine
        assert without.settings == with_it.settings
        assert bool(without.settings) == ("random member" in label)


def test_geometry_is_computed_and_reported(copied: Workspace) -> None:
    """FLOPs: a function of the points for each row, once a step, in three passes."""
    plan = copied.plan
    runner.compute(copied, [*experiments.select(plan, "geometry").values()])
    base, ctf, member = additions.geometry(plan).values()
    for (without, with_it), rows in ((base, CODES), (ctf, CLUSTERS)):
        plain, knowing = copied.outcome(without.coarse), copied.outcome(with_it.coarse)
        assert plain is not None and knowing is not None
        products = 2 * rows * plan.tokenizer.code_dim * COARSE.width  # embedding, output layer
        assert knowing["flops"] - plain["flops"] == STEPS * 3 * 2 * products
        assert knowing["parameters"] == plain["parameters"]  # there is no trace in the weights
    scores = [scored(copied, cell) for cell in (*base, *ctf, *member)]
    losses = [score.loss for score in scores if score is not None]
    assert len({*losses[:4]}) == 4 and losses[4:] == [None, None]
    report.write(copied)
    lines = (copied.results / "report.md").read_text().splitlines()
    rows_of = (("baseline", "yes", losses[1]), ("CTF", "no", losses[2]), ("CTF", "yes", losses[3]))
    for label, known, loss in rows_of:
        (line,) = [line for line in lines if line.startswith(f"| {label} | {known} |")]
        assert line.endswith(f"| {loss:.3f} |")
        assert line.count("|") == len(columns(plan)) + 4
    (words,) = [line for line in lines if line.startswith("With knowledge of the codebook")]
    assert f"held-out loss {losses[0]:.3f} before, {losses[1]:.3f} after" in words


def test_the_fine_stage_alone(copied: Workspace) -> None:
    """Codes are of their labels' clusters; the settings are those of sampling."""
    plan = copied.plan
    rows = additions.fine_stage(plan)
    assert [*rows] == [*plan.fine_clusters]
    cells = rows[CLUSTERS]
    knowing = f"fine model that {additions.KNOWS}, most likely"
    computed = [additions.TRUE, additions.RANDOM, additions.NEAREST, "fine model, most likely"]
    runner.compute(copied, [cells[label] for label in (*computed, knowing)])
    outcomes = {label: copied.outcome(cells[label]) for label in (*computed, knowing)}
    true, random, nearest, plain, other = (o for o in outcomes.values() if o is not None)
    tokenizer = copied.outcome(systems.tokenizer(plan, CODES))
    assert tokenizer is not None
    assert true["psnr"] == pytest.approx(tokenizer["psnr"], abs=1e-3)
    assert true["FID-fashion"]["value"] == pytest.approx(
        tokenizer["rFID-fashion"]["value"], rel=1e-3
    )
    assert max(o["psnr"] for o in (random, nearest, plain, other)) < true["psnr"]
    # The centre has the least squared error of codes, which this tokenizer hardly decodes.
    assert nearest["psnr"] > random["psnr"] - 0.01
    assert len({o["FID-fashion"]["value"] for o in (true, random, nearest, plain)}) == 4
    sizes = copied.outcome(systems.clusters(plan, CODES))
    assert sizes is not None
    assert 0 < random["uniform_loss"] <= math.log(sizes["sizes"]["max"])
    # The tokenizer is too bad for random members to be worse: let them be.
    worse = {**true["FID-fashion"], "value": 2 * true["FID-fashion"]["value"]}
    worse["without_group"] = [2 * value for value in worse["without_group"]]
    store(copied, cells[additions.RANDOM], cells[additions.RANDOM], **{"FID-fashion": worse})
    report.write(copied)
    text = (copied.results / "report.md").read_text()
    assert f"| true codes | {true['psnr']:.2f} dB |" in text
    assert f"a uniform choice {random['uniform_loss']:.3f}, fine model" in text
    best = min((plain, other), key=lambda o: float(o["FID-fashion"]["value"]))
    part = recovered(true, {"FID-fashion": worse}, best, "FID-fashion")
    assert part is not None and part.low < part.value < part.high
    assert f"recovers {part.value:.0%} ({part.low:.0%} to {part.high:.0%}) by FID-fashion." in text


def test_fine_settings_are_fields_of_sampling() -> None:
    for short, settings in additions.FINE_SETTINGS.values():
        assert Sampling(**settings) == dataclasses.replace(Sampling(), **settings), short
        assert all(name.startswith("fine_") for name in settings)
    assert len({short for short, _ in additions.FINE_SETTINGS.values()}) == len(
        additions.FINE_SETTINGS
    )


def test_scores_by_a_classifier_of_the_plan(copied: Workspace, tmp_path: Path) -> None:
    """No model depends on it, so that they are computed once for all networks."""
    training = ClassifierConfig(width=16, steps=10, batch_size=8, warm_up=2)
    plan = dataclasses.replace(copied.plan, classifier=training)
    usual, cell = (experiments.table1(p, CODES)[0].ctf for p in (copied.plan, plan))
    assert (cell.coarse, cell.fine, cell.tuned) == (usual.coarse, usual.fine, usual.tuned)
    space = dataclasses.replace(copied, plan=plan, work=tmp_path / "work")
    ours = shutil.ignore_patterns("table*", ".*")
    shutil.copytree(copied.work, space.work, symlinks=True, ignore=ours)
    assert runner.compute(space, [cell]) == ["classifier", cell.name]
    outcome, before = space.outcome(cell), copied.outcome(usual)
    assert outcome is not None and before is None  # the same name, another cell
    assert {"FID-fashion", "FID-classifier", "IS-classifier"} <= outcome["scores"].keys()
    assert 0 <= outcome["accuracy"]["value"] <= 1
    classifier = systems.classifier(plan)
    assert classifier is not None
    trained = space.outcome(classifier)
    assert trained is not None and 0 <= trained["accuracy"] <= 1
