"""The benchmark at toy shapes: what it counts is counted right, and what it writes adds up."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ctf.bench import llamagen_reference, measuring, quality, report, sample, work
from ctf.bench.work import Machine, Work
from ctf.common import memory
from ctf.common.errors import UserError
from ctf.kernels import sampling_cpu
from ctf.models.clusters import Clusters
from ctf.models.coarse import CoarseModel
from ctf.models.fine import FineModel
from ctf.models.sizes import TransformerShape
from ctf.models.tokenizer import TokenizerConfig, VQModel
from ctf.models.transformer import KVCache, TransformerConfig
from ctf.pipelines.pipeline import Pipeline
from tests.conftest import Command

CPU = torch.device("cpu")
CONFIG = TransformerConfig(width=48, layers=3, heads=3, grid=4, classes=7)
VQ = TokenizerConfig(image_size=32, channels=16, multipliers=(1, 2), latent_channels=16, groups=4)


def flops(call) -> int:
    # Of attention it counts the plain products only, not those within other kernels.
    plainly = sdpa_kernel(SDPBackend.MATH)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), plainly:
        call()
    return counter.get_total_flops()


# --- What is counted ------------------------------------------------------------------------------


@pytest.mark.parametrize("labels", [5, 40])
def test_operations_of_a_step_are_those_of_pytorchs_counter(labels: int) -> None:
    model = CoarseModel(CONFIG, labels).eval()
    cache = model.trunk.cache(6)
    for position in range(15):  # the cache has room for 16, all of which the last step looks at
        model.step(torch.zeros(6, 1, dtype=torch.int64), position, cache)
    counted = flops(lambda: model.step(torch.zeros(6, 1, dtype=torch.int64), 15, cache))
    assert work.step(CONFIG, labels, 6, 15, int8=False, cached=torch.float32).operations == counted


def test_operations_of_the_fine_pass_are_those_of_pytorchs_counter() -> None:
    model = FineModel(CONFIG, Clusters.from_labels(torch.arange(40) % 8)).eval()
    labels_BL = torch.zeros(6, 16, dtype=torch.int64)
    counted = flops(lambda: model.trunk(labels_BL, torch.zeros(6, dtype=torch.int64), causal=False))
    assert work.fine(CONFIG, 6, 0.0, int8=False).operations == counted
    head = work.fine(CONFIG, 6, 5.0, int8=False) + Work(fp32=-counted)
    assert head.operations == flops(lambda: torch.zeros(6 * 16, 48) @ torch.zeros(48, 5))


def test_bytes_of_a_step_are_the_weights_and_what_is_in_the_cache() -> None:
    model = CoarseModel(CONFIG, 40)
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embedding" not in n]
    cache = 2 * 3 * 6 * 11 * 48 * 4  # keys and values, layers, images, positions, width, float32
    wide = work.step(CONFIG, 40, 6, 10, int8=False, cached=torch.float32)
    low = work.step(CONFIG, 40, 6, 10, int8=True, cached=torch.bfloat16)
    assert wide.bytes == sum(p.numel() for p in matrices) * 4 + cache
    assert low.bytes == sum(p.numel() for p in matrices) + cache / 2
    assert low.operations == wide.operations and low.fp32 == 0


def test_operations_of_decoding() -> None:
    model = VQModel(VQ)
    assert work.decoding(model) == flops(lambda: model.decode(torch.zeros(1, 256).long()))


def test_a_floor_is_what_takes_longer_of_computing_and_reading() -> None:
    machine = Machine(fp32=100, bf16=200, int8=400, bandwidth=10)
    assert Work(fp32=100, bf16=100, int8=100, bytes=17).floor(machine) == 1.75
    assert Work(fp32=100, bf16=100, int8=100, bytes=18).floor(machine) == 1.8


# --- What is measured -----------------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> sample.Asked:
    """The benchmark at 16 tokens and 64 codes."""
    shape = TransformerShape(width=64, layers=2, heads=4)
    monkeypatch.setattr(sample, "SIZES", dict.fromkeys(("S", "B", "L"), shape))
    monkeypatch.setattr(sample, "TOKENIZERS", {"VQ-16": dataclasses.replace(VQ, image_size=8)})
    for name, value in {"CODES": 64, "COUNT": 8, "CLASSES": 5, "GRID": 4, "LENGTH": 16}.items():
        monkeypatch.setattr(sample, name, value)
    for name, value in {"SIDE": 64, "READ": 2**12}.items():
        monkeypatch.setattr(measuring, name, value)
    monkeypatch.setattr(KVCache, "BLOCK", 8)
    monkeypatch.setattr(sample, "_STARTED", "print(0.1, 0.2, 0.3)")
    return sample.Asked(sizes=("B",), batches=(1, 3), rounds=2)


def silent(done: int, total: int) -> None:
    pass


def test_every_row_has_its_stages_and_adds_up(small: sample.Asked, tmp_path: Path) -> None:
    result = sample.run(small, tmp_path, CPU, silent)
    names = ["start", "decode", "fine 1", "fine 3", "greedy B", "coarse B 1", "coarse B 3"]
    assert [*result.groups] == names
    assert all(seconds > 0 for seconds in result.groups["start"].found.values())
    for group in result.groups.values():
        for timing in group.timings:
            assert len(timing.seconds) == 2 and min(timing.seconds) > 0
            assert timing.floor > 0 and timing.weights > 0
    rows = report.rows_of(result, "B", 3)
    assert len(rows) == 1 + 2 * 5 and rows[0].engine is None
    for row in rows:
        assert sum(row.stages.values()) == pytest.approx(row.transformers + row.decode.median)
    one = result.groups["decode"].timing("plain")
    assert rows[0].decode.median == pytest.approx(3 * one.median)
    assert rows[0].decode.floor == pytest.approx(3 * one.floor)
    found = result.groups["greedy B"].found
    assert found["equal"] == found["labels"] == 2 * 16
    assert result.groups["decode"].found["auto difference"] < 0.01
    report.write(result, tmp_path)
    assert (tmp_path / "sample.png").read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / "sample.md").read_text()
    assert all(row.label in text for row in rows)


def test_killed_it_goes_on_with_what_is_missing(
    small: sample.Asked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sample, "_greedy", stop)
        with pytest.raises(KeyboardInterrupt):
            sample.run(small, tmp_path, CPU, silent)
    before = json.loads((tmp_path / sample.FILE).read_text())["groups"]
    assert [*before] == ["start", "decode", "fine 1", "fine 3"]
    result = sample.run(small, tmp_path, CPU, silent)
    after = json.loads((tmp_path / sample.FILE).read_text())["groups"]
    assert {name: after[name] for name in before} == before
    assert len(result.groups) == len(after) == 7
    assert report.markdown(result) == report.markdown(
        sample.run(small, tmp_path, CPU, silent)  # all of it from the file
    )
    with pytest.raises(UserError, match="another configuration"):
        sample.run(dataclasses.replace(small, rounds=3), tmp_path, CPU, silent)


def test_steps_of_both_ways_compute_the_same(small: sample.Asked) -> None:
    """What is timed, at any position, is what draws: with equal caches, equal labels."""
    model = sample._coarse_model("B", 64, CPU)
    ours, theirs = sample._Steps(model, 3, small, CPU), sample._PlainSteps(model, 3, small)
    theirs.uniforms_B = ours.uniforms_B
    for position in (1, 7, 8, 15):
        theirs.inputs = ours.labels_BL[:, position - 1].repeat(2)
        for caches in theirs.caches:
            caches.fill_(0.01)
        with torch.inference_mode():
            assert torch.equal(ours.at(position)(), theirs.at(position)())


def test_weights_are_counted_as_they_are_held() -> None:
    torch.manual_seed(0)
    model = CoarseModel(CONFIG, 40).requires_grad_(False)
    whole = sum(p.numel() for p in model.parameters())
    matrices = sum(p.numel() for n, p in model.named_parameters() if "embedding" not in n)
    assert sample._bytes(model) == 4 * whole
    if sampling_cpu.available("auto", CPU):
        sampling_cpu.prepare(model, None, None, "auto")
        assert sample._bytes(model) == 4 * whole
    if sampling_cpu.available("int8", CPU):
        low = CoarseModel(CONFIG, 40).requires_grad_(False)
        sampling_cpu.prepare(low, None, None, "int8")
        assert 4 * (whole - matrices) + matrices < sample._bytes(low) < 4 * whole - 2 * matrices


def test_the_peak_is_that_of_what_was_called() -> None:
    def hold() -> None:
        torch.ones(2**24).sum()

    if memory.allocated(CPU):  # systems that tell nothing give 0
        assert measuring.working_memory(hold, CPU) == pytest.approx(2**26, rel=0.2)
        assert measuring.working_memory(lambda: None, CPU) < 2**22
        with memory.keep_freed():  # where what is freed stays for the next tensor
            hold()
            assert measuring.working_memory(hold, CPU) == pytest.approx(2**26, rel=0.2)


def test_the_plain_cache_is_rounded_up_as_llamagens() -> None:
    caches, masks = llamagen_reference.make_caches(CONFIG, 2)
    assert caches.shape == (3, 2, 2, 3, 24, 16) and masks.shape == (2, 24, 24)


# --- The commands ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("--sizes", "B,Q"), "unknown size 'Q', expected some of S, B, L"),
        (("--batches", "1,x"), "batches: got '1,x', expected numbers, e.g. 1,8,32"),
        (("--batches", "0"), "batches: got 0, expected 1 to 1024 images"),
        (("--engines", "auto,in8"), "unknown engine 'in8': did you mean 'int8'?"),
        (("--rounds", "0"), "rounds: got 0, expected 1 or more"),
    ],
)
def test_mistakes(ctf: Command, given: tuple[str, ...], said: str, tmp_path: Path) -> None:
    result = ctf("bench", "sample", *given, "--out", tmp_path / "out")
    assert result.code == 2 and said in result.err
    assert not (tmp_path / "out").exists()


def test_a_dry_run_says_what_would_be_measured(ctf: Command, tmp_path: Path) -> None:
    result = ctf("bench", "sample", "--sizes", "B", "--dry-run", "--out", tmp_path / "out")
    assert result.code == 0 and "coarse B 32" in result.out
    assert not (tmp_path / "out").exists()


def test_likelihoods_are_those_of_the_teacher_forced_models(run: Path) -> None:
    pipe = Pipeline.from_pretrained(run)
    codes_NL = torch.randint(pipe.clusters.codebook_size, (3, pipe.coarse.config.length))
    classes_N = torch.tensor([0, 1, 0])
    labels_NL = pipe.clusters.labels_V[codes_NL]
    coarse, fine = quality.cross_entropy(pipe, codes_NL, classes_N)
    assert pipe.fine is not None
    for found, logits, targets in (
        (coarse, pipe.coarse(labels_NL, classes_N), labels_NL),
        (fine, pipe.fine(labels_NL, classes_N), pipe.fine.choices(codes_NL)),
    ):
        expected = -logits.log_softmax(-1).gather(-1, targets[..., None]).mean()
        assert found == pytest.approx(float(expected), rel=1e-5)


def test_quality_of_engines(ctf: Command) -> None:
    """On the shipped pipeline; the command's defaults take more samples and pictures."""
    result = ctf("bench", "quality", "--samples", 20, "--held-out", 100)
    assert result.code == 0, result.err
    cells = {
        row[0]: row[1:]
        for line in result.out.splitlines()
        if (row := [cell.strip() for cell in line.split("│")[1:-1]])
    }
    exact, same, near = (cells[name] for name in ("eager", "auto", "int8"))
    assert same[:3] == exact[:3]
    assert abs(float(near[3].rstrip("%"))) < 1
