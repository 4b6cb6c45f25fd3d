"""Several processes train what one trains; real ones, started by torchrun, on the CPU."""

import functools
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import ctf as ctf_package
from ctf.cli import main as cli
from ctf.common import storage
from ctf.kernels import compiled
from tests.conftest import Command, read_files, recipe_options, without_times

ROOT = Path(__file__).parents[2]
SOURCE = Path(ctf_package.__file__).parents[1]


def torchrun(
    processes: int, *arguments: object, module: str = "ctf", largest_file: int | None = None
) -> subprocess.CompletedProcess[str]:
    """Args: largest_file: no file can grow above that many bytes, as on a full disk."""

    def limit() -> None:
        if largest_file is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))

    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node")
    return subprocess.run(
        # "--", or torchrun takes options of ours for abbreviations of its own.
        [*launcher, str(processes), "-m", "--", module, *map(str, arguments)],
        capture_output=True, text=True, cwd=ROOT, timeout=200, preexec_fn=limit,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SOURCE)},
    )  # fmt: skip


def losses(stage: Path) -> list[tuple[float, float]]:
    lines = (json.loads(x) for x in (stage / "metrics.jsonl").read_text().splitlines())
    return [(line["step"], line["loss"]) for line in lines]


def largest_difference(one: Path, other: Path) -> float:
    (a, _), (b, _) = (storage.load_tensors(x / "model.safetensors") for x in (one, other))
    return max(float((a[name] - b[name]).abs().max()) for name in a)


# At the rates of the preset, 20 steps amplify the rounding of sums in another order a hundredfold
# on some processors; at these rates they don't.
CALM = ("coarse_training.learning_rate=0.001", "fine_training.learning_rate=0.001")
RECIPE = ("--preset", "tiny", "--steps", 20, *recipe_options(*CALM))


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


def agree(one: Path, other: Path) -> None:
    for (step, loss), (other_step, other_loss) in zip(losses(one), losses(other), strict=True):
        assert step == other_step and loss == pytest.approx(other_loss, abs=1e-5)
    assert largest_difference(one, other) < 1e-4


Trained = Callable[..., Path]


@pytest.fixture(scope="module")
def together(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """The stage that two processes have trained, once for each kind and options."""

    @functools.cache
    def train(kind: str, *options: object) -> Path:
        out = branch(run, tmp_path_factory.mktemp("two") / "together")
        done = torchrun(2, "train", kind, out, *RECIPE, *options)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("done") == 1  # only one prints
        return out / kind

    return train


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("coarse", ("--shard", "--checkpoint-activations")),
        ("coarse", ("--micro-batch", 3)),
        ("fine", ()),
        ("fine", ("--shard", "--micro-batch", 3)),
    ],
)
def test_two_processes_train_what_one_trains(
    alone: Path, together: Trained, ctf: Command, kind: str, options: tuple[object, ...]
) -> None:
    stage = together(kind, *options)
    agree(alone / kind, stage)
    # The execution is not part of the configuration; run again by one process, it is done.
    before = read_files(stage.parent)
    assert before[f"{kind}/config.json"] == read_files(alone)[f"{kind}/config.json"]
    assert (
        ctf("train", kind, stage.parent, *RECIPE).code == 0 and read_files(stage.parent) == before
    )


def test_two_processes_start_from_the_same_weights(run: Path, tmp_path: Path, ctf: Command) -> None:
    one, two = (branch(run, tmp_path / name) for name in ("one", "two"))
    train = ("train", "fine", "--from", run, *RECIPE)
    assert ctf(*train[:2], one, *train[2:]).code == 0
    done = torchrun(2, *train[:2], two, *train[2:])
    assert done.returncode == 0, done.stderr
    assert [step for step, _ in losses(one / "fine")] == [0, 20, 20]
    agree(one / "fine", two / "fine")


def test_micro_batches_and_checkpointing_train_the_same(
    run: Path, alone: Path, tmp_path: Path, ctf: Command
) -> None:
    parts = branch(run, tmp_path / "parts")
    options = ("--micro-batch", 3, "--checkpoint-activations")
    assert ctf("train", "coarse", parts, *RECIPE, *options).code == 0
    agree(alone / "coarse", parts / "coarse")


def stop(processes: int, step: int, out: Path, kind: str, *options: object) -> None:
    """Train, with a SIGTERM to the last process in the middle of that step."""
    train = ("train", kind, out, *RECIPE, *options)
    done = torchrun(processes, step, *train, module="tests.interrupted")
    assert done.returncode == 0, done.stderr
    message = f"{out / kind}: stopped after step {step + 1} and saved; run it again to resume"
    assert done.stdout.count(message) == 1 and "done" not in done.stdout
    newest = max((out / kind / "state").iterdir())
    assert newest.stem == f"step-{step + 1:08d}" and newest.is_dir() == ("--shard" in options)


@pytest.mark.parametrize("option", ["--shard", "--micro-batch=8"])
def test_two_processes_resume_what_one_began(
    run: Path, alone: Path, tmp_path: Path, option: str
) -> None:
    out = branch(run, tmp_path / "out")
    stop(1, 12, out, "coarse")
    done = torchrun(2, "train", "coarse", out, *RECIPE, option)
    assert done.returncode == 0, done.stderr
    agree(alone / "coarse", out / "coarse")


@pytest.mark.parametrize("option", ["--shard", "--micro-batch=8"])
def test_one_process_resumes_what_two_began(
    run: Path, alone: Path, tmp_path: Path, ctf: Command, option: str
) -> None:
    out = branch(run, tmp_path / "out")
    stop(2, 12, out, "coarse", option)
    assert ctf("train", "coarse", out, *RECIPE).code == 0
    agree(alone / "coarse", out / "coarse")


def test_stopped_by_sigterm_they_resume_to_the_bit(
    run: Path, together: Trained, tmp_path: Path
) -> None:
    out = branch(run, tmp_path / "out")
    stop(2, 12, out, "fine")
    assert torchrun(2, "train", "fine", out, *RECIPE).returncode == 0
    same(out / "fine", together("fine"))


def test_a_damaged_shard_of_a_state_costs_one_state(
    run: Path, together: Trained, tmp_path: Path
) -> None:
    out, options = branch(run, tmp_path / "out"), ("--shard", "--micro-batch", 3)
    for step in (4, 12):
        stop(2, step, out, "fine", *options)
    part = min(max((out / "fine" / "state").iterdir()).iterdir())
    part.write_bytes(part.read_bytes()[:-10])
    done = torchrun(2, "train", "fine", out, *RECIPE, *options)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("resuming from the state before it") == 1
    same(out / "fine", together("fine", *options))


def same(one: Path, other: Path) -> None:
    weights = [read_files(x)["model.safetensors"] for x in (one, other)]
    assert weights[0] == weights[1] and without_times(one) == without_times(other)


def test_all_stop_at_a_loss_that_is_not_finite(run: Path, tmp_path: Path) -> None:
    out = branch(run, tmp_path / "out")
    wild = ("--set", *RECIPE[RECIPE.index("--set") + 1 :], "coarse_training.learning_rate=1e30")
    done = torchrun(2, "train", "coarse", out, "--preset", "tiny", "--steps", 20, *wild)
    assert done.returncode != 0
    assert done.stderr.count("is nan on a batch of 8, the images ") == 1, done.stderr
    assert done.stderr.count("exitcode  : 2") + done.stderr.count("exitcode: 2") > 0
    assert "Traceback" not in done.stderr.split("ChildFailedError")[0].split("is nan on")[0]


@pytest.mark.parametrize("option", ["--micro-batch=8", "--shard"])
def test_a_full_disk_stops_all(run: Path, tmp_path: Path, option: str) -> None:
    out = branch(run, tmp_path / "out")
    done = torchrun(2, "train", "coarse", out, *RECIPE, option, largest_file=50_000)
    assert done.returncode != 0
    assert done.stderr.count("the disk is full") == 1, done.stderr
    assert [path.name for path in (out / "coarse" / "state").iterdir()] == []


def test_two_processes_train_the_tokenizer_that_one_trains(
    image_folder: Path, tmp_path: Path
) -> None:
    """With codes that are initialized and revived, and a discriminator.

    Each process has one thread: with more, sums are rounded otherwise; where that moves a vector
    across the border of two codes, more changes than the rounding.
    """
    recipe = (
        "--preset", "tiny", "--steps", 20, "--image-size", 32, *recipe_options(
            "tokenizer_training.adversarial_weight=0.1", "tokenizer_training.revive_every=5",
            "tokenizer_training.free_until=0.3", "tokenizer_training.revive_below=0.5",
            "tokenizer_training.learning_rate=0.0002",
        ),
    )  # fmt: skip
    one, two = tmp_path / "one", tmp_path / "two"
    for count, out in ((1, one), (2, two)):
        done = torchrun(count, "tokenizer", "train", image_folder, "--out", out, *recipe)
        assert done.returncode == 0, done.stderr
    lines = [without_times(x / "tokenizer") for x in (one, two)]
    assert lines[0][0]["revived"] > 0 and "discriminator" in lines[0][0]
    for mine, other in zip(*lines, strict=True):
        assert mine.keys() == other.keys()
        for name in mine.keys() & {"step", "revived"}:
            assert mine[name] == other[name]
        for name in mine.keys() & {"loss", "reconstruction", "discriminator", "mse"}:
            assert mine[name] == pytest.approx(other[name], abs=1e-3), name


def test_two_processes_warm_start_from_a_baseline(run: Path, tmp_path: Path, ctf: Command) -> None:
    first, out = tmp_path / "first", tmp_path / "out"
    recipe = ("--preset", "tiny", "--steps", 20, *recipe_options())
    assert torchrun(2, "train", "baseline", run, "--out", first, *recipe).returncode == 0
    assert ctf("clusters", "fit", run, "--count", 8, "--out", out).code == 0
    done = torchrun(2, "train", "coarse", out, "--warm-start", first, *recipe)
    assert done.returncode == 0, done.stderr
    assert [step for step, _ in losses(out / "coarse")] == [0, 20, 20]


def test_two_processes_extract_the_tokens_that_one_extracts(
    run: Path, image_folder: Path, tmp_path: Path, ctf: Command
) -> None:
    small = ("--preset", "tiny", "--views", "flip", "--set", "tokens.shard_images=7")
    for name in ("alone", "together"):
        (tmp_path / name).mkdir()
        shutil.copytree(run / "tokenizer", tmp_path / name / "tokenizer")
    assert ctf("tokens", "extract", image_folder, "--run", tmp_path / "alone", *small).code == 0
    done = torchrun(2, "tokens", "extract", image_folder, "--run", tmp_path / "together", *small)
    assert done.returncode == 0, done.stderr
    assert read_files(tmp_path / "alone") == read_files(tmp_path / "together")
    assert len([*(tmp_path / "together" / "tokens").glob("train-0*.npy")]) > 2


def test_sigterm_to_one_of_two_stops_the_extraction(
    run: Path, image_folder: Path, tmp_path: Path
) -> None:
    """The other one finishes its share, both exit with 0, and one process resumes."""
    small = ("--preset", "tiny", "--set", "tokens.shard_images=4", "tokens.batch_size=2")
    out = tmp_path / "run"
    shutil.copytree(run / "tokenizer", out / "tokenizer")
    extract = ("tokens", "extract", image_folder, "--run", out, *small)
    done = torchrun(2, 1, *extract, module="tests.interrupted")
    assert done.returncode == 0, done.stderr
    message = f"{out / 'tokens'}: stopped and saved; run it again to resume"
    assert done.stdout.count(message) == 1 and "done" not in done.stdout
    found = {path.name for path in (out / "tokens").glob("train-0*")}
    assert found >= {"train-00000.npy", "train-00001.begun.npy", "train-00002.npy"}
    assert "train-00001.npy" not in found
    assert torchrun(1, *extract).returncode == 0
    assert not list((out / "tokens").glob("*.begun.npy"))
    assert cli.main(["tokens", "check", str(out)]) == 0


def test_batches_must_be_divisible_by_the_processes(run: Path, tmp_path: Path) -> None:
    out = branch(run, tmp_path / "out")
    done = torchrun(3, "train", "coarse", out, *RECIPE)
    assert done.returncode != 0 and "expected a multiple of the 3 processes" in done.stderr
    assert not (out / "coarse").exists()


def test_fit_is_one_process(
    image_folder: Path, tmp_path: Path, ctf: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    variables = {"WORLD_SIZE": 2, "RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 29500}
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))
    result = ctf("fit", image_folder, "--out", tmp_path / "run")
    assert result.code == 2 and "ctf fit runs as one process" in result.err
    assert not (tmp_path / "run").exists()


def test_without_a_compiler_blocks_are_not_compiled(
    run: Path, alone: Path, tmp_path: Path, ctf: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "compiles", lambda _: False)
    out = branch(run, tmp_path / "out")
    result = ctf("train", "coarse", out, *RECIPE, "--compile")
    assert result.code == 0 and result.err.count("PyTorch finds no compiler") == 1
    same(out / "coarse", alone / "coarse")
