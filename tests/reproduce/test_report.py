"""The report shows the results that are stored, and says what is missing."""

from ctf.reproduce import experiments
from ctf.reproduce.cells import Workspace
from ctf.reproduce.scored import MISSING, scored
from tests.reproduce.conftest import CODES


def test_a_report_has_the_scores_that_are_computed(space: Workspace) -> None:
    (pair,) = experiments.table1(space.plan, CODES)
    text = (space.results / "report.md").read_text()
    for cell in (pair.baseline, pair.ctf):
        score = scored(space, cell)
        assert score is not None
        low, high = score.interval("FID-fashion")
        assert low < score.value("FID-fashion") < high
        assert score.outcome["samples"] == space.plan.samples
        assert f"{score.value('FID-fashion'):.4g} ({low:.4g} to {high:.4g})" in text
    assert MISSING in text  # the other tables
    assert (space.results / "table1.png").read_bytes().startswith(b"\x89PNG")
    search = space.outcome(pair.ctf.tuned)
    assert search is not None
    assert search["best"].keys() == {"guidance", "temperature", "fine_temperature"}
    for value in search["best"].values():
        assert f"| {value:g}, found by the search |" in text  # a row of Table 3
