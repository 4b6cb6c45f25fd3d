"""`ctf bench train` at toy shapes: every way is timed in every round, and the table adds up."""

import dataclasses
import functools
from pathlib import Path

import pytest
import torch

from ctf.bench import train
from ctf.bench.shapes import Shapes
from ctf.bench.train import TrainBenchmark
from ctf.common.markdown import markdown_table
from ctf.common.precision import supports_bf16
from ctf.models.sizes import TransformerShape
from tests.bench.test_harness import silent
from tests.conftest import Command

CPU = torch.device("cpu")
SMALL = TrainBenchmark(sizes=("B",), batch=4, rounds=2)


@pytest.fixture
def small_shapes(shapes: Shapes) -> Shapes:
    shape = TransformerShape(width=32, layers=2, heads=2, dropout=0.1)
    return dataclasses.replace(shapes, sizes=dict.fromkeys(("S", "B", "L"), shape))


def test_every_way_is_timed_in_every_round(small_shapes: Shapes, tmp_path: Path) -> None:
    results = train.run(SMALL, tmp_path, CPU, silent, small_shapes)
    assert [*results.groups] == ["B round 1", "B round 2", "fine round 1", "fine round 2"]
    for group in results.groups.values():
        for timing in group.timings:
            assert min(timing.forward, timing.backward, timing.update) > 0
            assert timing.seconds == timing.forward + timing.backward + timing.update
    names = ("plain", "baseline", "coarse")
    flops = {name: train.timings_of(results, "B", name)[0].flops for name in names}
    assert flops["plain"] == flops["baseline"]
    assert flops["baseline"] - flops["coarse"] == 4 * 6 * 16 * 32 * (64 - 8)
    columns, rows = train.table(results, "B")
    low = supports_bf16(CPU)
    assert len(rows) == 5 + 2 * low and all(len(row) == len(columns) for row in rows)
    assert ("in bfloat16 the baseline is" in train.summary(results, "B")) == low
    plain, ours = (train.timings_of(results, "B", name) for name in ("plain", "baseline"))
    assert train.speed_ups(results, "B", "plain", "baseline") == [
        a.seconds / b.seconds for a, b in zip(plain, ours, strict=True)
    ]
    assert markdown_table(columns, rows) in (tmp_path / "train.md").read_text()


def test_a_table_of_bfloat16_alone_is_that_of_a_gpu(small_shapes: Shapes, tmp_path: Path) -> None:
    results = train.run(dataclasses.replace(SMALL, rounds=1), tmp_path, CPU, silent, small_shapes)
    groups = {
        key: dataclasses.replace(
            group,
            timings=tuple(
                dataclasses.replace(timing, name=timing.name + train.BF16)
                for timing in group.timings
                if not timing.name.endswith(train.BF16)
            ),
        )
        for key, group in results.groups.items()
    }
    on_gpu = dataclasses.replace(results, groups=groups, environment={"device": "cuda: a card"})
    columns, rows = train.table(on_gpu, "B")
    assert [row[0] for row in rows] == [
        f"{name}{train.BF16}"
        for name in (
            "LlamaGen's step, plain", "baseline", "CTF coarse, K = 512", "CTF fine S", "CTF fine L",
        )
    ]  # fmt: skip
    at = columns.index("speed, plain = 1")
    assert rows[0][at].startswith("1.00") and rows[3][at] == ""
    assert "the baseline is" in train.summary(on_gpu, "B")
    assert "8192 x 8192" in "".join(train.report(on_gpu))


def test_without_bfloat16_there_are_no_rows_of_it(
    small_shapes: Shapes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "supports_bf16", lambda _: False)
    benchmark = dataclasses.replace(SMALL, rounds=1)
    results = train.run(benchmark, tmp_path, CPU, silent, small_shapes)
    assert len(train.table(results, "B")[1]) == 5
    assert "bfloat16" not in train.summary(results, "B")


def test_command(
    small_shapes: Shapes, ctf: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "run", functools.partial(train.run, shapes=small_shapes))
    out = tmp_path / "out"
    command = ("bench", "train", "--sizes", "B", "--batch", 2, "--rounds", 1, "--out", out)
    result = ctf(*command, "--dry-run")
    assert result.code == 0 and "would measure B round 1, fine round 1" in result.out
    assert not out.exists()
    result = ctf(*command)
    assert result.code == 0, result.err
    assert "size B: the baseline is" in result.out and (out / "train.md").is_file()


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (("--sizes", "B,Q"), "unknown size 'Q', expected some of S, B, L, XL, XXL, 3B"),
        (("--batch", 0), "batch: got 0, expected 1 or more"),
    ],
)
def test_mistakes(ctf: Command, options: tuple[str, int], error: str, tmp_path: Path) -> None:
    result = ctf("bench", "train", *options, "--out", tmp_path / "out")
    assert result.code == 2 and error in result.err and not (tmp_path / "out").exists()
