"""`ctf bench sample` at toy shapes: both ways compute the same, and what it measures adds up."""

from pathlib import Path

import pytest
import torch

from ctf import kernels
from ctf.bench import sample, sample_report
from ctf.bench.sample import SampleBenchmark
from ctf.bench.shapes import Shapes
from ctf.kernels.sampling_cpu import GrowingCache
from ctf.models.coarse import CoarseModel
from ctf.models.transformer import TransformerConfig
from tests.bench.test_harness import silent
from tests.conftest import Command

CPU = torch.device("cpu")
SMALL = SampleBenchmark(sizes=("B",), batches=(1, 3), rounds=2)


@pytest.fixture
def small_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GrowingCache, "BLOCK", 8)


@pytest.mark.usefixtures("small_cache")
def test_every_sampler_has_its_stages_and_adds_up(
    shapes: Shapes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sample, "START_SCRIPT", "print(0.1, 0.2, 0.3)")
    results = sample.run(SMALL, tmp_path, CPU, silent, shapes)
    names = ["start", "decode", "fine 1", "fine 3", "greedy B", "coarse B 1", "coarse B 3"]
    assert [*results.groups] == names == [*sample.jobs(SMALL, CPU, shapes)]
    assert all(seconds > 0 for seconds in results.groups["start"].facts.values())
    for group in results.groups.values():
        for timing in group.timings:
            assert len(timing.seconds) == 2 and min(timing.seconds) > 0
            assert timing.floor > 0 and timing.weights > 0
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


@pytest.mark.usefixtures("small_cache")
def test_steps_of_both_ways_compute_the_same(shapes: Shapes) -> None:
    """What is timed, at any position, is what samples: with equal caches, equal labels."""
    torch.manual_seed(0)
    model = CoarseModel(shapes.transformer("B"), 64).eval().requires_grad_(False)
    torch.nn.init.normal_(model.head.weight)
    classes_B, labels_BL = torch.randint(5, (3,)), torch.randint(64, (3, 16))
    inputs = (2.0, classes_B, labels_BL, torch.rand(3, dtype=torch.float64))
    for position in (0, 1, 7, 8, 15):
        ours, theirs = sample.engine_steps(model, *inputs), sample.plain_steps(model, *inputs)
        with torch.inference_mode():
            assert torch.equal(ours(position)(), theirs(position)())


def test_weights_are_counted_as_they_are_held() -> None:
    torch.manual_seed(0)
    config = TransformerConfig(width=48, layers=3, heads=3, grid=4, classes=7)
    model = CoarseModel(config, 40).requires_grad_(False)
    everything = sum(p.numel() for p in model.parameters())
    matrices = sum(p.numel() for n, p in model.named_parameters() if "embedding" not in n)
    assert sample.weight_bytes(model) == 4 * everything
    if kernels.available("auto", CPU):
        kernels.for_sampling(model, None, None, "auto")
        assert sample.weight_bytes(model) == 4 * everything
    if kernels.available("int8", CPU):
        low = CoarseModel(config, 40).requires_grad_(False)
        kernels.for_sampling(low, None, None, "int8")
        size = sample.weight_bytes(low)
        assert 4 * (everything - matrices) + matrices < size < 4 * everything - 2 * matrices


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
