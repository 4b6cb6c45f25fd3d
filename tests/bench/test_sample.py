"""`ctf bench sample` at toy shapes: what it measures adds up."""

from pathlib import Path

import pytest
import torch

from ctf.bench import sample, sample_report, windows
from ctf.bench.sample import SampleBenchmark
from ctf.bench.shapes import Shapes
from tests.bench.test_harness import silent
from tests.conftest import Command

CPU = torch.device("cpu")
SMALL = SampleBenchmark(sizes=("B",), batches=(1, 3), rounds=2)


@pytest.mark.usefixtures("small_cache")
def test_every_sampler_has_its_stages_and_adds_up(
    shapes: Shapes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sample, "START_SCRIPT", "print(0.1, 0.2, 0.3)")
    monkeypatch.setattr(windows, "WINDOWS", (1, 16))
    monkeypatch.setattr(windows, "BATCHES", (1,))
    monkeypatch.setattr(windows, "WHOLE", 1)
    monkeypatch.setattr(windows, "SINGLE", 1)
    results = sample.run(SMALL, tmp_path, CPU, silent, shapes)
    names = [
        "start",
        "decode",
        "windows",
        "fine 1",
        "fine 3",
        "passes B",
        "greedy B",
        "coarse B 1",
        "coarse B 3",
    ]
    assert [*results.groups] == names == [*sample.jobs(SMALL, CPU, shapes)]
    assert all(seconds > 0 for seconds in results.groups["start"].facts.values())
    for group in results.groups.values():
        for timing in group.timings:
            assert len(timing.seconds) == 2 and min(timing.seconds) > 0
            assert timing.floor > 0 and timing.weights > 0
    facts = results.groups["windows"].facts
    assert facts["auto 1 1 passes"] == 64 and facts["auto 1 16 passes"] < 30
    assert facts["auto 1 16 seconds"] > 0
    assert 4 <= facts["auto 1 auto passes"] <= 64 and facts["auto 1 auto-first seconds"] > 0
    assert "int8 1 auto seconds" not in facts
    assert {*results.groups["passes B"].facts} == {
        f"{engine} 1 {window} seconds" for engine in SMALL.engines for window in (1, 16)
    }
    assert min(results.groups["passes B"].facts.values()) > 0
    facts = results.groups["greedy B"].facts
    assert facts["equal"] == facts["labels"] == 2 * 16
    assert results.groups["decode"].facts["auto difference"] < 0.01
    samplers = sample_report.samplers(results, "B", 3)
    assert len(samplers) == 1 + 2 * 5 and samplers[0].engine is None
    for each in samplers:
        stages = each.coarse.median + each.fine.median + each.decode.median
        assert each.seconds == pytest.approx(stages)
    one = results.groups["decode"].timing("plain")
    assert samplers[0].decode.median == pytest.approx(3 * one.median)
    assert samplers[0].decode.floor == pytest.approx(3 * one.floor)
    sample_report.write(results, tmp_path)
    assert (tmp_path / "sample.png").read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / "sample.md").read_text()
    assert all(each.label in text for each in samplers)
    assert "### Windows: time of a pass" in text and "| B | auto | 1 | 16 |" in text


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (("--sizes", "B,Q"), "unknown size 'Q', expected some of S, B, L, XL, XXL, 3B"),
        (("--batches", "1,x"), "batches: got '1,x', expected numbers, e.g. 1,8,32"),
        (("--batches", "0"), "batches: got 0, expected 1 to 1024 images"),
        (("--engines", "auto,in8"), "unknown engine 'in8': did you mean 'int8'?"),
        (("--rounds", "0"), "rounds: got 0, expected 1 or more"),
    ],
)
def test_mistakes(ctf: Command, options: tuple[str, ...], error: str, tmp_path: Path) -> None:
    result = ctf("bench", "sample", *options, "--out", tmp_path / "out")
    assert result.code == 2 and error in result.err
    assert not (tmp_path / "out").exists()


def test_a_dry_run_lists_what_would_be_measured(ctf: Command, tmp_path: Path) -> None:
    result = ctf("bench", "sample", "--sizes", "B", "--dry-run", "--out", tmp_path / "out")
    assert result.code == 0 and "coarse B 32" in result.out
    assert not (tmp_path / "out").exists()
