"""Several processes train what one trains: real ones, started by torchrun, on the CPU."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import Command, files, sets

from ctf import checkpoint
from ctf.distributed import ALONE, World, joined
from ctf.errors import UserError


def torchrun(processes: int, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node")
    return subprocess.run(
        # "--", or torchrun takes options of ours for abbreviations of its own.
        [*launcher, str(processes), "-m", "--", "ctf", *map(str, arguments)],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=200,
    )  # fmt: skip


def losses(run: Path, kind: str) -> list[tuple[float, float]]:
    lines = (json.loads(x) for x in (run / kind / "metrics.jsonl").read_text().splitlines())
    return [(line["step"], line["loss"]) for line in lines]


def largest_difference(one: Path, other: Path) -> float:
    (a, _), (b, _) = (checkpoint.load_tensors(x / "model.safetensors") for x in (one, other))
    return max(float((a[name] - b[name]).abs().max()) for name in a)


@pytest.fixture
def branches(run: Path, tmp_path: Path, ctf: Command) -> tuple[Path, Path]:
    for name in ("alone", "together"):
        assert ctf("clusters", "fit", run, "--count", 8, "--out", tmp_path / name).code == 0
    return tmp_path / "alone", tmp_path / "together"


@pytest.mark.parametrize("kind", ["coarse", "fine"])
def test_two_processes_train_what_one_trains(
    branches: tuple[Path, Path], ctf: Command, kind: str
) -> None:
    alone, together = branches
    recipe = ("--preset", "tiny", "--steps", 20, *sets())
    assert ctf("train", kind, alone, *recipe).code == 0
    done = torchrun(2, "train", kind, together, *recipe)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("done") == 1  # one of them speaks
    for (step, one), (other_step, other) in zip(
        losses(alone, kind), losses(together, kind), strict=True
    ):
        assert step == other_step and one == pytest.approx(other, abs=1e-5)
    assert largest_difference(alone / kind, together / kind) < 1e-4
    # And again, alone: it is done.
    before = files(together)
    assert ctf("train", kind, together, *recipe).code == 0 and files(together) == before


def test_a_baseline_with_a_warm_start_by_two(run: Path, tmp_path: Path, ctf: Command) -> None:
    first, out = tmp_path / "first", tmp_path / "out"
    recipe = ("--preset", "tiny", "--steps", 20, *sets())
    assert torchrun(2, "train", "baseline", run, "--out", first, *recipe).returncode == 0
    assert ctf("clusters", "fit", run, "--count", 8, "--out", out).code == 0
    done = torchrun(2, "train", "coarse", out, "--warm-start", first, *recipe)
    assert done.returncode == 0, done.stderr
    assert [step for step, _ in losses(out, "coarse")] == [0, 20, 20]


def test_tokens_by_two(run: Path, pictures: Path, tmp_path: Path, ctf: Command) -> None:
    small = ("--preset", "tiny", "--views", "flip", "--set", "tokens.shard_images=7")
    for name in ("alone", "together"):
        (tmp_path / name).mkdir()
        shutil.copytree(run / "tokenizer", tmp_path / name / "tokenizer")
    assert ctf("tokens", "extract", pictures, "--run", tmp_path / "alone", *small).code == 0
    done = torchrun(2, "tokens", "extract", pictures, "--run", tmp_path / "together", *small)
    assert done.returncode == 0, done.stderr
    assert files(tmp_path / "alone") == files(tmp_path / "together")
    assert len([*(tmp_path / "together" / "tokens").glob("train-0*.npy")]) > 2


def test_batches_that_cannot_be_shared(branches: tuple[Path, Path]) -> None:
    done = torchrun(3, "train", "coarse", branches[1], "--preset", "tiny", "--steps", 20, *sets())
    assert done.returncode != 0 and "expected a multiple of the 3 processes" in done.stderr
    assert not (branches[1] / "coarse" / "model.safetensors").exists()


def test_shares() -> None:
    parts = [World(rank, 3).share(12, "batch_size") for rank in range(3)]
    assert [i for part in parts for i in range(12)[part]] == [*range(12)]
    with pytest.raises(UserError, match="batch_size: got 10, expected a multiple of the 3"):
        World(0, 3).share(10, "batch_size")


def test_alone_nothing_is_shared() -> None:
    with joined(torch.device("cpu")) as world:
        assert world == ALONE and world.main and not torch.distributed.is_initialized()
        assert world.told(7) == 7 and float(world.sum(torch.tensor(2.5))) == 2.5
