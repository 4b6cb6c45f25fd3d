"""Experiments beyond the paper, with the cells of the paper as their controls."""

from ctf.reproduce import additions, experiments, report, runner
from ctf.reproduce.cells import Workspace
from ctf.reproduce.plan import FULL
from ctf.reproduce.scored import columns, scored
from tests.reproduce.conftest import CLUSTERS, COARSE, CODES, STEPS


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
