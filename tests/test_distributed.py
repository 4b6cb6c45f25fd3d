"""Several processes train what one trains: real ones, started by torchrun, on the CPU."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import Command, files, sets, without_times

import ctf as ctf_package
from ctf import checkpoint, cli
from ctf.distributed import ALONE, World, joined
from ctf.errors import UserError

ROOT = Path(__file__).parents[1]
SOURCE = Path(ctf_package.__file__).parents[1]


def torchrun(
    processes: int, *arguments: object, module: str = "ctf"
) -> subprocess.CompletedProcess[str]:
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node")
    return subprocess.run(
        # "--", or torchrun takes options of ours for abbreviations of its own.
        [*launcher, str(processes), "-m", "--", module, *map(str, arguments)],
        capture_output=True, text=True, cwd=ROOT, timeout=200,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SOURCE)},
    )  # fmt: skip


def losses(stage: Path) -> list[tuple[float, float]]:
    lines = (json.loads(x) for x in (stage / "metrics.jsonl").read_text().splitlines())
    return [(line["step"], line["loss"]) for line in lines]


def largest_difference(one: Path, other: Path) -> float:
    (a, _), (b, _) = (checkpoint.load_tensors(x / "model.safetensors") for x in (one, other))
    return max(float((a[name] - b[name]).abs().max()) for name in a)


RECIPE = ("--preset", "tiny", "--steps", 20, *sets())


def branch(run: Path, out: Path) -> Path:
    """A run with the tokenizer, tokens and clusters of another."""
    assert cli.main(["clusters", "fit", str(run), "--count", "8", "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def alone(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose coarse and fine model one process has trained."""
    out = branch(run, tmp_path_factory.mktemp("one") / "alone")
    for kind in ("coarse", "fine"):
        assert cli.main(["train", kind, str(out), *map(str, RECIPE)]) == 0
    return out


def agree(one: Path, other: Path, tolerance: float) -> None:
    for (step, loss), (other_step, other_loss) in zip(losses(one), losses(other), strict=True):
        assert step == other_step and loss == pytest.approx(other_loss, abs=tolerance)
    assert largest_difference(one, other) < 10 * tolerance


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("coarse", ()),
        ("fine", ("--micro-batch", 3)),
        ("coarse", ("--shard", "--checkpoint-activations")),
        ("fine", ("--shard", "--micro-batch", 3)),
    ],
)
def test_two_processes_train_what_one_trains(
    run: Path, alone: Path, tmp_path: Path, ctf: Command, kind: str, options: tuple[object, ...]
) -> None:
    together = branch(run, tmp_path / "together")
    done = torchrun(2, "train", kind, together, *RECIPE, *options)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("done") == 1  # one of them speaks
    agree(alone / kind, together / kind, 1e-5)
    # And again, alone: it is done.
    before = files(together)
    assert ctf("train", kind, together, *RECIPE).code == 0 and files(together) == before


def test_in_parts_as_at_once(run: Path, alone: Path, tmp_path: Path, ctf: Command) -> None:
    parts = branch(run, tmp_path / "parts")
    options = ("--micro-batch", 3, "--checkpoint-activations")
    assert ctf("train", "coarse", parts, *RECIPE, *options).code == 0
    agree(alone / "coarse", parts / "coarse", 1e-5)
    # How it was computed is no part of what it is.
    assert files(alone / "coarse")["config.json"] == files(parts / "coarse")["config.json"]


@pytest.mark.parametrize(
    ("before", "after"),
    [((1,), (2,)), ((2,), (1,)), ((2, "--shard"), (1,)), ((1,), (2, "--shard"))],
)
def test_stopped_and_continued_by_another_number_of_processes(
    run: Path, alone: Path, tmp_path: Path, before: tuple[object, ...], after: tuple[object, ...]
) -> None:
    out = branch(run, tmp_path / "out")
    train = ("train", "coarse", out, *RECIPE)
    processes, *options = before
    done = torchrun(int(str(processes)), 12, *train, *options, module="tests.interrupted")
    assert done.returncode == 0, done.stderr
    said = f"{out / 'coarse'}: stopped after step 13 and saved; run it again to go on"
    assert done.stdout.count(said) == 1 and done.stdout.count("done") == 0
    (state,) = (out / "coarse" / "state").iterdir()
    assert state.stem == "step-00000013" and state.is_dir() == ("--shard" in options)
    processes, *options = after
    done = torchrun(int(str(processes)), *train, *options)
    assert done.returncode == 0, done.stderr
    agree(alone / "coarse", out / "coarse", 1e-6)


@pytest.mark.parametrize("option", ["--shard", "--micro-batch=3"])
def test_stopped_and_continued_to_the_bit(run: Path, tmp_path: Path, option: str) -> None:
    whole, stopped = (branch(run, tmp_path / name) for name in ("whole", "stopped"))
    assert torchrun(2, "train", "fine", whole, *RECIPE, option).returncode == 0
    train = ("train", "fine", stopped, *RECIPE, option)
    for step in (4, 12):
        done = torchrun(2, step, *train, module="tests.interrupted")
        assert done.returncode == 0 and "run it again" in done.stdout, done.stderr
    if option == "--shard":  # what a state is that was damaged later
        newest = max((stopped / "fine" / "state").iterdir())
        part = min(newest.iterdir())
        part.write_bytes(part.read_bytes()[:-10])
    done = torchrun(2, *train)
    assert done.returncode == 0, done.stderr
    assert ("going on from the state before it" in done.stdout) == (option == "--shard")
    one, other = (files(x / "fine")["model.safetensors"] for x in (whole, stopped))
    assert one == other and without_times(whole / "fine") == without_times(stopped / "fine")


def test_all_stop_before_what_is_not_finite(run: Path, tmp_path: Path) -> None:
    out = branch(run, tmp_path / "out")
    wild = ("--set", *RECIPE[RECIPE.index("--set") + 1 :], "coarse_training.learning_rate=1e30")
    done = torchrun(2, "train", "coarse", out, "--preset", "tiny", "--steps", 20, *wild)
    assert done.returncode != 0
    assert done.stderr.count("is nan on a batch of 8, the pictures ") == 1, done.stderr
    assert done.stderr.count("exitcode  : 2") + done.stderr.count("exitcode: 2") > 0
    assert "Traceback" not in done.stderr.split("ChildFailedError")[0].split("is nan on")[0]


def test_a_full_disk_stops_all(run: Path, tmp_path: Path) -> None:
    out = branch(run, tmp_path / "out")
    (out / "coarse").mkdir()
    (out / "coarse" / "state").write_text("no folder")  # where none can be made
    (out / "coarse" / "config.json").write_text("{")
    done = torchrun(2, "train", "coarse", out, *RECIPE)
    assert done.returncode != 0 and done.stderr.count("config.json: not valid JSON") == 1


def test_a_tokenizer_by_two(pictures: Path, tmp_path: Path, ctf: Command) -> None:
    """With codes that are placed and revived, and a discriminator."""
    recipe = (
        "--preset", "tiny", "--steps", 20, "--image-size", 32, *sets(
            "tokenizer_training.adversarial_weight=0.1", "tokenizer_training.revive_every=5",
            "tokenizer_training.free_until=0.3", "tokenizer_training.revive_below=0.5",
        ),
    )  # fmt: skip
    one, two = tmp_path / "one", tmp_path / "two"
    assert ctf("tokenizer", "train", pictures, "--out", one, *recipe).code == 0
    done = torchrun(2, "tokenizer", "train", pictures, "--out", two, *recipe)
    assert done.returncode == 0, done.stderr
    lines = [without_times(x / "tokenizer") for x in (one, two)]
    assert lines[0][0]["revived"] > 0 and "discriminator" in lines[0][0]
    for mine, other in zip(*lines, strict=True):
        assert mine.keys() == other.keys()
        for name in mine.keys() & {"step", "loss", "reconstruction", "discriminator", "revived"}:
            assert mine[name] == pytest.approx(other[name], abs=1e-5), name
    assert largest_difference(one / "tokenizer", two / "tokenizer") < 1e-3


def test_a_baseline_with_a_warm_start_by_two(run: Path, tmp_path: Path, ctf: Command) -> None:
    first, out = tmp_path / "first", tmp_path / "out"
    recipe = ("--preset", "tiny", "--steps", 20, *sets())
    assert torchrun(2, "train", "baseline", run, "--out", first, *recipe).returncode == 0
    assert ctf("clusters", "fit", run, "--count", 8, "--out", out).code == 0
    done = torchrun(2, "train", "coarse", out, "--warm-start", first, *recipe)
    assert done.returncode == 0, done.stderr
    assert [step for step, _ in losses(out / "coarse")] == [0, 20, 20]


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


def test_batches_that_cannot_be_shared(run: Path, tmp_path: Path) -> None:
    out = branch(run, tmp_path / "out")
    done = torchrun(3, "train", "coarse", out, *RECIPE)
    assert done.returncode != 0 and "expected a multiple of the 3 processes" in done.stderr
    assert not (out / "coarse").exists()


def test_shares() -> None:
    parts = [World(rank, 3).share(12, "batch_size") for rank in range(3)]
    assert [i for part in parts for i in range(12)[part]] == [*range(12)]
    with pytest.raises(UserError, match="batch_size: got 10, expected a multiple of the 3"):
        World(0, 3).share(10, "batch_size")


def test_alone_nothing_is_shared() -> None:
    with joined(torch.device("cpu")) as world:
        assert world == ALONE and world.main and not torch.distributed.is_initialized()
        assert world.told(7) == 7 and float(world.sum(torch.tensor(2.5))) == 2.5
