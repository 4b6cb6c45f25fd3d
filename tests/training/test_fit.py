"""All stages in order: killed at any moment, on a full disk, within a time budget."""

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ctf.cli import main as cli
from ctf.common import claims, config, storage
from ctf.data import extraction, image_set
from ctf.data.images import open_images
from ctf.data.tokens import Tokens
from ctf.models import clusters
from ctf.models.clusters import Clusters
from ctf.pipelines.pipeline import Pipeline
from ctf.training import fit, loop, stages
from ctf.training.recipes import resolve
from ctf.training.tokenizer import TokenizerTrainer
from ctf.training.transformers import Trainer
from tests.conftest import (
    CLASSES,
    SIDE,
    SMALLER_RECIPE,
    STEPS,
    Command,
    comparable,
    fit_arguments,
    read_files,
    recipe_options,
    save_images,
    weights,
)

SOURCE = Path(fit.__file__).parents[2]


def metrics(run: Path, stage: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / stage / "metrics.jsonl").open()]


# --- the whole chain ------------------------------------------------------------------------------


def test_a_run_has_all_stages_and_their_metrics(run: Path, splits: image_set.Splits) -> None:
    stages = ("tokenizer", "coarse", "fine")
    for stage in stages:
        lines = metrics(run, stage)
        assert [line["step"] for line in lines if line["split"] == "train"] == [20, STEPS]
        assert [line["step"] for line in lines if line["split"] == "val"] == [STEPS]
        assert not (run / stage / "state").exists()
    assert not [name for name in read_files(run) if name.endswith(".tmp")]

    tokenizer_hash = storage.hash_file(run / "tokenizer" / "model.safetensors")
    train, val = (Tokens(run / "tokens", split, tokenizer_hash) for split in ("train", "val"))
    assert (len(train), train.views) == (len(splits.train), 2)
    assert (len(val), val.views) == (len(splits.val), 1)
    assert (run / "clusters" / "swaps.png").is_file()

    log = json.loads((run / "fit.json").read_text())
    assert log["seconds"].keys() == {"tokenizer", "tokens", "clusters", "coarse", "fine"}
    content = json.loads((run / "pipeline.json").read_text())
    assert content["class_names"] == list(CLASSES)
    assert content["origin"]["images"] == "discs"
    assert content["origin"]["seconds"] == log["seconds"]
    assert content["origin"]["recipe"] == log["asked"]["recipe"]
    measured = content["origin"]["metrics"]
    assert measured["tokenizer"]["images"] == len(splits.val)
    for stage in ("coarse", "fine"):
        assert measured[stage]["loss"] == metrics(run, stage)[-1]["loss"]


def test_a_finished_run_stays_as_it_is(run: Path, image_folder: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    content = read_files(run)
    assert cli.main(fit_arguments(image_folder, run)) == 0
    assert read_files(run) == content
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_moved_images_are_the_same_configuration(
    run: Path, image_folder: Path, tmp_path: Path, ctf: Command
) -> None:
    before = read_files(run)
    copy = save_images(tmp_path / "elsewhere" / image_folder.name)
    assert ctf(*fit_arguments(copy, run)).code == 0
    assert read_files(run) == before


@pytest.mark.parametrize("flat", [True, False])
def test_a_renamed_folder_of_images_is_the_same(tmp_path: Path, ctf: Command, flat: bool) -> None:
    images = save_images(tmp_path / "discs")
    folder, out = images / "red" if flat else images, tmp_path / "run"
    command = ["fit", "--out", out, "--preset", "tiny", "--image-size", 32, "--steps", 2]
    command += recipe_options("tokenizer_training.batch_size=4")
    assert ctf(*command[:1], folder, *command[1:]).code == 0
    folder.rename(tmp_path / "renamed")
    before = comparable(out)
    for lost in ("tokens/train-00000.npy", "fine/model.safetensors"):  # to be made again
        (out / lost).unlink()
    (out / "fine" / "metrics.jsonl").unlink()
    result = ctf(*command[:1], tmp_path / "renamed", *command[1:])
    assert result.code == 0, result.err
    assert f"the images of {folder.name} are now in renamed" in result.out
    after = comparable(out)
    assert after.pop("fit.json")["asked"]["images"] == "renamed"
    before.pop("fit.json")
    origins = [content["pipeline.json"].pop("origin", None) for content in (before, after)]
    assert all(origins) and after == before
    next((tmp_path / "renamed").rglob("7.png")).unlink()
    result = ctf(*command[:1], tmp_path / "renamed", *command[1:])
    assert result.code == 2 and "of another configuration: " in result.err
    assert "was 7, now 6" in result.err or "was 8, now 7" in result.err or "train was" in result.err


def test_a_flat_folder_of_color_images_at_64_pixels(tmp_path: Path, ctf: Command) -> None:
    folder = tmp_path / "flat"
    folder.mkdir()
    random = np.random.default_rng(0)
    for i in range(6):
        pixels = random.integers(0, 256, (70, 80, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    out = tmp_path / "run"
    result = ctf("fit", folder, "--out", out, "--preset", "tiny", "--image-size", 64,
                 "--background", "red", "--steps", 2,
                 *recipe_options("tokenizer_training.batch_size=2"))  # fmt: skip
    assert result.code == 0, result.err
    pipe = Pipeline.from_pretrained(out)
    assert pipe.class_names == ("flat",)
    assert pipe.origin["background"] == "#ff0000"  # for Pipeline.encode
    manifest = out / "tokens" / "manifest.json"
    content = json.loads(manifest.read_text())
    assert content.pop("background") == "#ff0000"
    assert "background" not in Pipeline.from_pretrained("fashion-mnist").origin
    assert pipe.sample([0], seed=0).images[0].size == (64, 64)


def test_fit_can_make_a_baseline_too(image_folder: Path, tmp_path: Path, ctf: Command) -> None:
    out = tmp_path / "run"
    identity = recipe_options("clusters.method=identity")
    arguments = ["--image-size", 32, "--steps", 2, "--preset", "tiny", *identity]
    result = ctf("fit", image_folder, "--out", out, *arguments)
    assert result.code == 0, result.err
    assert Pipeline.from_pretrained(out).fine is None
    assert not (out / "fine").exists()


# --- killed ---------------------------------------------------------------------------------------

SHORT = 10  # steps

# Runs `ctf` again and again, each time in a process of its own that is killed when it has written
# so often, until one ends; `tests.torture` kills by the clock. They are forked from this one,
# which has imported everything: a kill costs no new start.
KILLER = """
import os, random, signal, sys
import sklearn.cluster, torch._dynamo
import ctf.training.fit
from ctf.cli import main as cli
from ctf.training import loop

loop.LOG_EVERY, loop.SAVE_SECONDS = 2, -1.0  # a state every other step
mode, arguments = sys.argv[1], sys.argv[2:]
random.seed(mode)
left = 0

def counting(function):
    def count(*args, **more):
        global left
        result = function(*args, **more)
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    return count

def work():
    for name in ("fsync", "replace", "unlink", "rmdir", "mkdir"):
        setattr(os, name, counting(getattr(os, name)))
    os._exit(cli.main(arguments))

for attempt in range(1, 200):
    left = attempt if mode == "growing" else random.randint(1, 25)
    pid = os.fork()
    if pid == 0:
        work()
    _, status = os.waitpid(pid, 0)
    if not os.WIFSIGNALED(status):
        print(attempt)
        sys.exit(os.WEXITSTATUS(status))
"""


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": str(SOURCE)},
        capture_output=True,
        text=True,
        timeout=250,
    )


@pytest.fixture(scope="module")
def undisturbed(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the real command that nothing happened to."""
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    process = python("-m", "ctf", *fit_arguments(image_folder, out, steps=SHORT))
    assert process.returncode == 0, process.stderr
    return out


@pytest.mark.parametrize("mode", ["growing", "random"])
def test_killed_at_any_write_it_ends_the_same(
    image_folder: Path, undisturbed: Path, tmp_path: Path, mode: str
) -> None:
    out = tmp_path / "run"
    process = python("-c", KILLER, mode, *fit_arguments(image_folder, out, steps=SHORT))
    assert process.returncode == 0, process.stderr[-2000:]
    assert int(process.stdout.split()[-1]) > 1, "it was never killed"
    assert "Traceback" not in process.stderr
    mine, expected = weights(out), weights(undisturbed)
    assert mine.keys() == expected.keys()
    for name, content in expected.items():
        assert mine[name] == content, name
    assert comparable(out)["pipeline.json"] == comparable(undisturbed)["pipeline.json"]
    for stage in ("tokenizer", "coarse", "fine"):
        steps = [line["step"] for line in metrics(out, stage) if line["split"] == "train"]
        assert steps == [2, 4, 6, 8, 10]  # none missing, none doubled
        assert metrics(out, stage)[-1]["split"] == "val"


def test_sigterm_in_every_stage(
    image_folder: Path,
    undisturbed: Path,
    tmp_path: Path,
    ctf: Command,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each time it exits with 0 and a message, and in the end everything is the same."""
    out = tmp_path / "run"
    before = signal.getsignal(signal.SIGTERM)
    for module, name, message in (
        (fit, "check_recipe", "run: stopped; run it again to resume"),
        (
            TokenizerTrainer,
            "step",
            "run/tokenizer: stopped after step 1 and saved; run it again to resume",
        ),
        (extraction, "as_tensor", "run/tokens: stopped and saved; run it again to resume"),
        (clusters, "fit", "run: stopped; run it again to resume"),
        (Trainer, "step", "run/coarse: stopped after step 1 and saved; run it again to resume"),
        (loop, "finish", "run: stopped; run it again to resume"),
        (Trainer, "step", "run/fine: stopped after step 1 and saved; run it again to resume"),
        (fit, "save_origin", "run: stopped; run it again to resume"),
    ):
        function = getattr(module, name)

        def stop(*args: Any, function: Any = function, **more: Any) -> Any:
            os.kill(os.getpid(), signal.SIGTERM)
            return function(*args, **more)

        with monkeypatch.context() as patch:
            patch.setattr(module, name, stop)
            result = ctf(*fit_arguments(image_folder, out, steps=SHORT))
        assert result.code == 0, result.err
        assert result.out.splitlines()[-1] == f"{tmp_path}/{message}"
        assert signal.getsignal(signal.SIGTERM) == before
        if "/" in message:  # stopped in a stage, whose time so far is logged
            stage = message.split("/")[1].split(":")[0]
            log = json.loads((out / "fit.json").read_text())
            assert log["seconds"][stage] > 0 and stage not in log["done"]
    assert ctf(*fit_arguments(image_folder, out, steps=SHORT)).code == 0
    assert comparable(out) == comparable(undisturbed)


def test_sigterm_while_clusters_are_fitted(
    run: Path, tmp_path: Path, ctf: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit = clusters.fit

    def stop(*args: Any) -> Clusters:
        os.kill(os.getpid(), signal.SIGTERM)
        return fit(*args)

    command: tuple[object, ...] = (
        "clusters",
        "fit",
        run,
        "--count",
        8,
        "--out",
        tmp_path / "other",
    )
    with monkeypatch.context() as patch:
        patch.setattr(clusters, "fit", stop)
        result = ctf(*command)
    assert result.code == 0
    assert result.out == f"{tmp_path}/other/clusters: stopped; run it again to resume\n"
    assert not list((tmp_path / "other").glob("clusters/*"))
    result = ctf(*command)
    assert result.code == 0 and (tmp_path / "other" / "clusters" / "report.json").is_file()


# --- disks ----------------------------------------------------------------------------------------


def test_full_disk_at_any_write(
    image_folder: Path,
    undisturbed: Path,
    tmp_path: Path,
    ctf: Command,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every attempt gets a little further, and fails with a message and no half-written file."""
    monkeypatch.setattr(loop, "LOG_EVERY", 2)
    monkeypatch.setattr(loop, "SAVE_SECONDS", -1.0)
    out, sync, calls = tmp_path / "run", os.fsync, 0

    def full_at_last(handle: int) -> None:
        nonlocal calls
        calls -= 1
        if calls == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(handle)

    monkeypatch.setattr(os, "fsync", full_at_last)
    for attempt in range(1, 60):
        calls = attempt
        result = ctf(*fit_arguments(image_folder, out, steps=SHORT))
        if result.code == 0:
            break
        assert result.code == 2
        message = result.err[result.err.index("ctf: ") :]
        assert "the disk is full" in message and len(message.splitlines()) <= 2
        assert not [name for name in read_files(out) if name.endswith(".tmp")]
    assert attempt > 5
    assert weights(out) == weights(undisturbed)


@contextmanager
def limited(size: int) -> Iterator[None]:
    """Limit the size of files, which also stops root, unlike permissions."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_too_small_for_a_state(
    image_folder: Path, undisturbed: Path, tmp_path: Path, ctf: Command
) -> None:
    out = tmp_path / "run"
    with limited(500_000):
        result = ctf(*fit_arguments(image_folder, out, steps=SHORT))
    assert result.code == 2
    assert "tokenizer/state/step-00000010.safetensors: the disk is full" in result.err
    assert "Traceback" not in result.err
    assert read_files(out).keys() == {
        "fit.json",
        "tokenizer/config.json",
        "tokenizer/metrics.jsonl",
    }
    assert ctf(*fit_arguments(image_folder, out, steps=SHORT)).code == 0
    assert weights(out) == weights(undisturbed)


# --- other configurations, other things -----------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--steps", "41"], "_training.steps was 40, now 41"),
        (["--background", "black"], "fingerprint was "),
        (["--views", "plain"], 'recipe.tokens.views was "flip", now "plain"'),
    ],
)
def test_runs_of_another_configuration_are_refused(
    run: Path, image_folder: Path, ctf: Command, more: list[str], message: str
) -> None:
    before = read_files(run)
    result = ctf(*fit_arguments(image_folder, run, *more))
    assert result.code == 2
    assert f"{run} is a run of ctf fit of another configuration: " in result.err
    assert message in result.err
    assert read_files(run) == before


def test_other_options_are_another_configuration(
    run: Path, image_folder: Path, ctf: Command
) -> None:
    before = read_files(run)
    for wrong, message in (
        (["--minutes", 1.0, "--image-size", 32, *recipe_options()], "minutes was null, now 1.0"),
        (["--steps", STEPS, "--image-size", 16, *recipe_options()], "fingerprint was"),
        (["--steps", STEPS, "--image-size", 32, *recipe_options("coarse.width=48")],
         "recipe.coarse.width was 32, now 48"),
    ):  # fmt: skip
        result = ctf("fit", image_folder, "--out", run, "--preset", "tiny", *map(str, wrong))
        assert result.code == 2 and message in result.err
    assert read_files(run) == before


def test_new_images_are_another_configuration(run: Path, tmp_path: Path, ctf: Command) -> None:
    more = save_images(tmp_path / "discs", count=9)
    result = ctf(*fit_arguments(more, run))
    assert result.code == 2 and "data.train was 20, now 23" in result.err


def test_other_classes_of_the_same_images_are_another_configuration(
    run: Path, image_folder: Path, ctf: Command
) -> None:
    """And the same by an option are not."""
    assert ctf(*fit_arguments(image_folder, run, "--classes-at-depth", 1)).code == 0
    result = ctf(*fit_arguments(image_folder, run, "--classes-at-depth", 0))
    assert result.code == 2 and "data.options.classes_at_depth was null, now 0" in result.err


def test_runs_of_earlier_versions_keep_the_order_of_their_classes(
    tmp_path: Path, ctf: Command
) -> None:
    folder = save_images(tmp_path / "discs")
    for number, path in zip((2, 10, 9), sorted(folder.iterdir()), strict=True):
        path.rename(folder / f"class{number}")
    images = open_images(folder, SIDE)
    assert images.train.class_names == ("class2", "class9", "class10")
    earlier = images.earlier[0]()
    recipe = resolve("tiny", earlier, steps=2, overrides=SMALLER_RECIPE)
    pipe = fit.fit(earlier, tmp_path / "run", recipe, device=torch.device("cpu"))
    assert pipe.class_names == ("class10", "class2", "class9")
    before = read_files(tmp_path / "run")
    assert ctf(*fit_arguments(folder, tmp_path / "run", steps=2)).code == 0
    assert read_files(tmp_path / "run") == before


# --- minutes --------------------------------------------------------------------------------------


def with_minutes(image_folder: Path, out: Path, minutes: float) -> list[str]:
    return [
        "fit", str(image_folder), "--out", str(out), "--preset", "tiny", "--image-size", "32",
        "--minutes", str(minutes), *recipe_options(),
    ]  # fmt: skip


def test_the_plan_of_a_time_budget_is_followed(
    image_folder: Path, tmp_path: Path, ctf: Command
) -> None:
    out = tmp_path / "run"
    assert ctf(*with_minutes(image_folder, out, 0.15)).code == 0
    log = json.loads((out / "fit.json").read_text())
    assert log["plan"].keys() == {"tokenizer", "tokens", "coarse", "fine"}
    for stage in ("tokenizer", "coarse", "fine"):
        steps = log["plan"][stage]
        assert metrics(out, stage)[-1]["step"] == steps
        assert steps % loop.LOG_EVERY == 0 or steps < loop.LOG_EVERY
    before = read_files(out)
    assert ctf(*with_minutes(image_folder, out, 0.15)).code == 0
    assert read_files(out) == before


def test_steps_follow_from_the_measured_speed(
    splits: image_set.Splits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With steps of a known duration the plan is arithmetic, and a kill does not change it."""
    monkeypatch.setattr(loop, "seconds_per_step", lambda trial: 0.05)
    recipe = config.override(resolve("tiny", splits), recipe_options()[1:])
    planned: dict[str, int] = {}

    class Killed(Exception):
        pass

    class Reporter:
        def __init__(self, name: str) -> None:
            self.name = name

        def __enter__(self) -> "Reporter":
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def __call__(self, done: int, total: int, *_: object) -> None:
            planned[self.name] = total
            if self.name == "coarse" and not killed:
                raise Killed

    killed: list[bool] = []
    device = torch.device("cpu")
    with pytest.raises(Killed):
        fit.fit(splits, tmp_path, recipe, minutes=0.25, device=device, open_progress=Reporter)
    killed.append(True)
    shares = recipe.time_shares
    log = json.loads((tmp_path / "fit.json").read_text())
    expected = 0.25 * 60 * shares.tokenizer / 0.05 * (1 - fit.OVERHEAD)
    assert expected - 20 - 10 <= planned["tokenizer"] <= expected
    left = 0.25 * 60 - log["seconds"]["tokenizer"]
    seconds = max(1.0, left * shares.coarse / (shares.coarse + shares.fine))
    expected = seconds / 0.05 * (1 - fit.OVERHEAD)
    assert 0.5 * expected <= planned["coarse"] <= expected
    before = log["plan"]
    assert before["coarse"] == planned["coarse"]
    monkeypatch.setattr(loop, "seconds_per_step", lambda trial: 0.5)
    fit.fit(splits, tmp_path, recipe, minutes=0.25, device=device, open_progress=Reporter)
    after = json.loads((tmp_path / "fit.json").read_text())["plan"]
    assert {stage: after[stage] for stage in before} == before
    assert planned["coarse"] == before["coarse"] and planned["fine"] == after["fine"] <= 20


def test_time_of_a_training_that_was_killed_counts(
    splits: image_set.Splits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The log lacks it, the training's own lines have it; the other stages get what is left."""
    monkeypatch.setattr(loop, "seconds_per_step", lambda trial: 0.5)
    recipe = config.override(resolve("tiny", splits), recipe_options()[1:])

    def fit_once(minutes: float) -> None:
        fit.fit(splits, tmp_path, recipe, minutes=minutes, device=torch.device("cpu"))

    def kill(*_: object, **__: object) -> None:
        raise RuntimeError("killed")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "extract_tokens", kill)
        with pytest.raises(RuntimeError):
            fit_once(minutes=1)
    path = tmp_path / "tokenizer" / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[-1]["seconds"] = 1000.0
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    fit_once(minutes=1)
    log = json.loads((tmp_path / "fit.json").read_text())
    assert log["plan"]["coarse"] == log["plan"]["fine"] == 1  # of the second that is always left
    origin = json.loads((tmp_path / "pipeline.json").read_text())["origin"]
    assert origin["seconds"]["tokenizer"] == 1000.0


def test_with_little_time_only_some_images_are_encoded(
    splits: image_set.Splits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many of each class."""
    monkeypatch.setattr(fit, "seconds_per_image", lambda *_: 0.05)
    recipe = config.override(resolve("tiny", splits, steps=2), recipe_options()[1:])
    fit.fit(splits, tmp_path, recipe, minutes=0.02, device=torch.device("cpu"))
    train = Tokens(tmp_path / "tokens", "train")
    assert len(train) < len(splits.train)
    assert max(np.bincount(train.classes_N)) - min(np.bincount(train.classes_N, minlength=3)) <= 1


def test_a_run_that_is_removed_during_training_can_be_made_again(
    image_folder: Path, tmp_path: Path, ctf: Command
) -> None:
    out = tmp_path / "run"

    def remove(_: TokenizerTrainer) -> dict[str, float]:
        shutil.rmtree(out)
        return {}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TokenizerTrainer, "evaluate", remove)
        result = ctf(*fit_arguments(image_folder, out, steps=2))
    assert result.code == 2 and "run/tokenizer was removed during the training" in result.err
    assert not out.exists()
    assert ctf(*fit_arguments(image_folder, out, steps=2)).code == 0


# --- beside its images ----------------------------------------------------------------------------


def test_a_run_among_its_images_is_no_class(
    tmp_path: Path, ctf: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = save_images(tmp_path / "discs")
    monkeypatch.chdir(images)
    command = fit_arguments(Path("."), Path("run"), steps=2)
    assert ctf(*command).code == 0
    samples = ("sample", "run", "--count", 1)
    assert ctf(*samples, "--out", "samples").code == 0
    assert ctf(*samples, "--out", Path("red") / "samples").code == 0
    before = read_files(Path("run"))
    result = ctf(*command)
    assert result.code == 0, result.err
    assert "made by ctf" in result.out and "3 classes" in result.out
    assert read_files(Path("run")) == before
    for stage in ("run/clusters", "run/tokenizer", "run/tokens", "run/coarse", "samples"):
        assert claims.is_ctf_folder(Path(stage)), stage
    for out in (".", "..", "red"):
        result = ctf(*fit_arguments(Path("."), Path(out), steps=2))
        assert result.code == 2 and f"--out {out}: " in result.err, result
    report = ("evaluate", "run", "--reference", ".", "--samples", 30, "--features", "fashion")
    assert ctf(*report, "--out", "scores").code == 0
    assert claims.is_ctf_folder(Path("scores"))


# --- earlier versions, other defaults -------------------------------------------------------------


FORMER = [  # as recipes of before there were these choices
    "geometry=null",
    *(f"{stage}_training.optimizer=null" for stage in ("tokenizer", "coarse", "fine")),
]


def test_trainings_begun_by_earlier_versions_resume_as_they_were(
    image_folder: Path, run: Path, tmp_path: Path, ctf: Command
) -> None:
    copied, two = shutil.copytree(run, tmp_path / "run"), ["coarse_training.steps=2"]
    shutil.rmtree(copied / "coarse")
    train = ("train", "coarse", copied, "--preset", "tiny")
    assert ctf(*train, *recipe_options(*two, *FORMER)).code == 0
    assert "optimizer" not in (copied / "coarse" / "config.json").read_text()
    before = read_files(copied)
    assert ctf(*train, *recipe_options(*two)).code == 0 and read_files(copied) == before

    made = ("fit", image_folder, "--out", tmp_path / "made", "--image-size", 32, "--preset", "tiny")
    options = ("--steps", 2, *recipe_options())
    assert ctf(*made, *options, *FORMER).code == 0
    before = read_files(tmp_path / "made")
    assert ctf(*made, *options).code == 0 and read_files(tmp_path / "made") == before
    tokenizer = ("tokenizer", "train", image_folder, "--out", tmp_path / "made", "--image-size", 32)
    assert ctf(*tokenizer, "--preset", "tiny", *options).code == 0
    assert read_files(tmp_path / "made") == before


@pytest.mark.parametrize("default", [torch.device("meta"), torch.float64], ids=str)
def test_training_does_not_depend_on_the_callers_defaults(
    image_folder: Path, tmp_path: Path, default: torch.device | torch.dtype
) -> None:
    def train(folder: Path) -> dict[str, bytes]:
        images = open_images(image_folder, SIDE)
        recipe = resolve("tiny", images, steps=1, overrides=SMALLER_RECIPE)
        fit.fit(images, folder, recipe, device=torch.device("cpu"))
        return {k: v for k, v in read_files(folder).items() if k.endswith(".safetensors")}

    expected = train(tmp_path / "plain")
    try:
        if isinstance(default, torch.device):
            torch.set_default_device(default)
        else:
            torch.set_default_dtype(default)
        assert train(tmp_path / "other") == expected
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
