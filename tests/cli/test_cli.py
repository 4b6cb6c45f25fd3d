"""The commands: help with examples, every user's mistake in two lines, and nothing left behind."""

import dataclasses
import errno
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ctf.cli import main as cli
from ctf.models import clusters
from ctf.models.coarse import CoarseModel
from ctf.models.sampling import Sampling
from ctf.pipelines import export
from ctf.pipelines.pipeline import Pipeline
from tests.conftest import (
    CLASSES,
    SIDE,
    STEPS,
    Command,
    Result,
    files,
    fit_arguments,
    picture,
    save_pictures,
    sets,
)

LLAMAGEN = Path(__file__).parents[1] / "fixtures" / "llamagen"
COMMANDS = (
    "demo", "fit", "sample", "evaluate", "tokenizer train", "tokenizer evaluate", "tokens extract",
    "clusters fit", "clusters show", "train coarse", "train fine", "train baseline",
    "classifier train", "convert llamagen", "push", "cost", "runs show",
    "runs tensorboard", "studio",
)  # fmt: skip
READERS = ("tokenizer evaluate", "clusters show", "cost", "studio")
WRITERS = tuple(c for c in COMMANDS if c not in READERS)


def refused(result: Result, *messages: str, lines: int = 2) -> str:
    """Checks that a mistake was told as it should be; returns what was said of it."""
    assert result.code == 2, result
    assert "Traceback" not in result.err
    said = result.err[result.err.index("ctf: ") :]  # what comes before is progress
    assert len(said.splitlines()) <= lines, said
    for message in messages:
        assert message in said
    return said


# --- help -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(ctf: Command, command: str) -> None:
    result = ctf(*command.split(), "--help")
    assert result.code == 0 and result.err == ""
    example = next(line for line in result.out.splitlines() if line.startswith("Example: "))
    assert example.startswith(f"Example: ctf {command}")
    assert ("--dry-run" in result.out) == (command in WRITERS)


@pytest.mark.parametrize("command", COMMANDS)
def test_examples_can_be_parsed(
    ctf: Command, command: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Whatever an example names is not there, and that is all that is wrong with it."""
    monkeypatch.chdir(tmp_path)
    helped = ctf(*command.split(), "--help").out
    example = next(line for line in helped.splitlines() if line.startswith("Example: "))
    arguments = example.removeprefix("Example: ctf ").split()
    if command == "demo" or "fashion-mnist" in arguments:
        arguments += ["--device", "mps"]  # which is refused before anything long begins
        refused(ctf(*arguments), "device mps: not available on this machine")
    elif command == "cost":
        assert ctf(*arguments).code == 0  # it needs nothing
    else:
        said = refused(ctf(*arguments))
        assert any(words in said for words in ("no such folder", "not found", "no pipeline"))
    assert list(tmp_path.iterdir()) == []


def test_help_of_all(ctf: Command) -> None:
    for arguments in (["--help"], []):
        result = ctf(*arguments)
        assert result.code == 0
        for command in COMMANDS:
            assert command.split()[0] in result.out
    for group in ("tokenizer", "tokens", "clusters", "train", "classifier", "runs"):
        assert ctf(group, "--help").code == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fitt"], "fit"),
        (["fit"], "--out"),
        (["fit", "fashion-mnist"], "--out"),
        (["fit", "fashion-mnist", "--out", "x", "--stepz", "3"], "--stepz"),
        (["fit", "fashion-mnist", "--out", "x", "--steps", "many"], "many"),
        (["fit", "fashion-mnist", "--out", "x", "--device", "tpu"], "tpu"),
        (["fit", "fashion-mnist", "--out", "x", "--views", "sideways"], "sideways"),
        (["train", "corse", "x"], "coarse"),
        (["clusters", "fit", "x", "--method", "linkage"], "linkage"),
    ],
)
def test_arguments_that_cannot_be(ctf: Command, arguments: list[str], message: str) -> None:
    refused(ctf(*arguments), message, lines=1)


def test_as_a_program(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[2])}

    def program(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "ctf", *arguments],
            env=environment, cwd=tmp_path, capture_output=True, text=True,
        )  # fmt: skip

    helped = program("fit", "--help")
    assert helped.returncode == 0 and "Example: ctf fit" in helped.stdout and helped.stderr == ""
    wrong = program("fit", "nowhere", "--out", "run")
    assert wrong.returncode == 2 and wrong.stdout == ""
    assert wrong.stderr.startswith("ctf: nowhere: no such folder")
    assert len(wrong.stderr.splitlines()) <= 2
    assert list(tmp_path.iterdir()) == []


def test_interrupted(ctf: Command, monkeypatch: pytest.MonkeyPatch, run: Path) -> None:
    def interrupt(*_: object, **__: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(export, "write", interrupt)
    result = ctf("sample", run)
    assert result.code == 130 and result.err == (
        "ctf: interrupted; run the same command again to resume\n"
    )


# --- pictures that are not as they should be ------------------------------------------------------


def fit_tiny(ctf: Command, pictures: Path | str, out: Path, *more: Any) -> Result:
    return ctf("fit", pictures, "--out", out, "--preset", "tiny", "--steps", 1, *more, *sets())


@pytest.fixture
def some_bad(tmp_path: Path) -> Path:
    root = save_pictures(tmp_path / "pictures", count=4)
    whole = (root / "red" / "0.jpg").read_bytes()
    (root / "red" / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (root / "blue" / "empty.png").touch()
    (root / "green" / "letter.webp").write_text("dear aunt")
    picture(0.5, 0).resize((20, 20)).save(root / "green" / "small.png")
    return root


@pytest.mark.parametrize("command", ["fit", "tokenizer train", "classifier train"])
def test_all_bad_pictures_are_named(
    ctf: Command, some_bad: Path, tmp_path: Path, command: str
) -> None:
    out = tmp_path / "run"
    result = ctf(*command.split(), some_bad, "--out", out, "--image-size", SIDE)
    refused(
        result, f"{some_bad}: 4 of 16 images cannot be used", "--skip-bad",
        "red/cut.jpg", "blue/empty.png", "green/letter.webp",
        "20x20, smaller than --image-size 32", "green/small.png", lines=5,
    )  # fmt: skip
    assert not out.exists()


def test_bad_pictures_are_left_out(ctf: Command, some_bad: Path, tmp_path: Path) -> None:
    result = fit_tiny(ctf, some_bad, tmp_path / "run", "--skip-bad", "--dry-run")
    assert result.code == 0
    assert "4 images left out" in result.out and "blue/empty.png" in result.out
    result = fit_tiny(ctf, some_bad, tmp_path / "run", "--skip-bad")
    assert result.code == 0, result.err
    manifest = json.loads((tmp_path / "run" / "tokens" / "manifest.json").read_text())
    assert manifest["train"]["count"] + manifest["val"]["count"] == 12


@pytest.fixture
def odd(tmp_path: Path) -> Path:
    """Folders that cannot be learned from."""
    for name in ("empty", "one", "no red/red", "no red/blue", "other"):
        (tmp_path / "odd" / name).mkdir(parents=True)
    picture(0.1, 0).save(tmp_path / "odd" / "one" / "1.png")
    for i in range(3):
        picture(0.1, i).save(tmp_path / "odd" / "no red" / "blue" / f"{i}.png")
    (tmp_path / "odd" / "other" / "thesis.tex").write_text("mine")
    (tmp_path / "odd" / "file").write_text("mine")
    return tmp_path / "odd"


@pytest.mark.parametrize(
    ("pictures", "message"),
    [
        ("empty", "no usable images"),
        ("other", "no usable images"),
        ("one", "got one usable image, expected 2 or more"),
        ("no red", "red"),
        ("nowhere", "no such folder"),
        ("file", "got a file, expected a folder"),
    ],
)
def test_folders_that_cannot_be_learned_from(
    ctf: Command, odd: Path, tmp_path: Path, pictures: str, message: str
) -> None:
    before = files(odd)
    for more in ([], ["--skip-bad"], ["--dry-run"]):
        said = refused(fit_tiny(ctf, odd / pictures, tmp_path / "run", *more), message)
        assert str(odd / pictures) in said
    assert not (tmp_path / "run").exists()
    assert files(odd) == before


def test_a_name_nearly_right(ctf: Command, tmp_path: Path) -> None:
    refused(
        fit_tiny(ctf, "fashion-minst", tmp_path / "run"),
        "fashion-minst: no such folder, nor an included set of that name",
        "did you mean 'fashion-mnist'?",
    )


# --- values that are not as they should be --------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--image-size", 64], "smaller than --image-size 64"),
        (["--image-size", 0], "image size: got 0, expected 8 to 2048"),
        (["--image-size", 33], "image size 33 is not divisible by the tokenizer's factor"),
        (["--preset", "tinny"], "unknown preset 'tinny': did you mean 'tiny'?"),
        (["--steps", 0], "steps: got 0, expected 1 or more"),
        (["--steps", -3], "steps: got -3"),
        (["--minutes", 0], "minutes: got 0, expected more than 0"),
        (["--minutes", "nan"], "minutes: got nan"),
        (["--minutes", 1, "--steps", 1], "got both --minutes and --steps"),
        (["--background", "whit"], "unknown colour 'whit': did you mean 'white'?"),
        (["--device", "mps"], "device mps: not available on this machine, expected auto or cpu"),
        (["--set", "clusters.count=5000"], "got 5000 clusters, expected 1 to 4096"),
        (["--set", "clusters.cuont=50"], "unknown key 'cuont': did you mean 'count'?"),
        (["--set", "clusters.count"], "expected KEY=VALUE"),
        (["--set", "coarse.heads=3"], "width 128 with 3 heads"),
        (["--set", "fine_training.batch_size=0"], "batch_size: got 0"),
    ],
)  # fmt: skip
def test_values_that_cannot_be(
    ctf: Command, pictures: Path, tmp_path: Path, more: list[Any], message: str
) -> None:
    given = [] if "--preset" in more else ["--preset", "tiny"]
    for dry in ([], ["--dry-run"]):
        result = ctf("fit", pictures, "--out", tmp_path / "run", *given, *more, *dry)
        # Where the pictures are too small, all of them are listed.
        refused(result, message, lines=3)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--classes", "3"], "class 3 of 3: expected 0 to 2, or a name: blue, green, red"),
        (["--classes", "0,10"], "class 10 of 3"),
        (["--classes", "gren"], "unknown class 'gren': did you mean 'green'?"),
        (["--classes", ""], "unknown class ''"),
        (["--count", "0"], "count is 0, expected 1 or more"),
        (["--count", "-1"], "count is -1"),
        (["--temperature", "0"], "temperature: got 0"),
        (["--fine-top-p", "2"], "fine_top_p: got 2"),
        (["--guidance", "nan"], "guidance: got nan"),
        (["--count", "2000"], "6000 images on one sheet, expected 1024 or fewer"),
        (["--seed", str(2**70)], "seed"),
        (["--out", "sheet.jpg"], "sheet.jpg: expected a name ending in .png, or a folder"),
    ],
)
def test_samples_that_cannot_be(
    ctf: Command, run: Path, tmp_path: Path, arguments: list[str], message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    for dry in ([], ["--dry-run"]):
        refused(ctf("sample", run, *arguments, *dry), message)
    assert list(tmp_path.iterdir()) == []


def test_class_ten_of_ten(ctf: Command, pipe: Pipeline, tmp_path: Path) -> None:
    names = tuple(f"class {chr(97 + i)}" for i in range(10))
    coarse = CoarseModel(dataclasses.replace(pipe.coarse.config, classes=10), 64)
    baseline = Pipeline(pipe.tokenizer, clusters.identity(64), coarse, None, names)
    baseline.save_pretrained(tmp_path / "ten")
    refused(
        ctf("sample", tmp_path / "ten", "--classes", "10", "--out", tmp_path / "sheet.png"),
        "class 10 of 10: expected 0 to 9, or a name: class a, class b, ",
    )
    assert not (tmp_path / "sheet.png").exists()
    given = ["--classes", "9,class a", "--count", 1, "--out", tmp_path / "sheet.png"]
    assert ctf("sample", tmp_path / "ten", *given).code == 0


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["clusters", "fit", "RUN", "--count", 65], "another configuration: count was 8, now 65"),
        (["clusters", "fit", "RUN", "--count", 0], "count is 0"),
        (["tokens", "extract", "PICTURES", "--run", "RUN", "--limit", 0], "limit"),
        (
            ["tokens", "extract", "PICTURES", "--run", "RUN", "--limit", 3],
            "another configuration: ",
        ),
        (["tokenizer", "train", "PICTURES", "--out", "RUN", "--image-size", 32], "another config"),
        (
            ["tokenizer", "train", "PICTURES", "--out", "NEW", "--preset", "tiny", "--steps", 0],
            "steps: got 0",
        ),
        (["train", "coarse", "RUN", "--preset", "tiny", "--steps", 3], "another configuration"),
        (["train", "fine", "RUN", "--preset", "tony"], "unknown preset 'tony': did you mean"),
        (["train", "fine", "RUN", "--set", "fine.width=6"], "width 6 with"),
        (
            ["classifier", "train", "PICTURES", "--out", "NEW", "--image-size", 32, "--steps", 0],
            "steps: got 0",
        ),
        (["evaluate", "RUN", "--samples", 30], "nothing to score against; pass a --reference"),
        (
            ["evaluate", "RUN", "--samples", 31, "--reference", "PICTURES"],
            "31 samples cannot be split equally among 3",
        ),
        (["evaluate", "RUN", "--samples", 30, "--reference", "nowhere"], "nowhere: no such folder"),
        (
            ["evaluate", "RUN", "--samples", 30, "--reference", "PICTURES", "--features", "lite1"],
            "unknown features 'lite1': did you mean 'lite0'?",
        ),
        (
            ["evaluate", "RUN", "--samples", 3, "--reference", "PICTURES", "--classifier", "NEW"],
            "not found",
        ),
        (["evaluate", "nowhere"], "no pipeline 'nowhere'"),
        (["tokenizer", "evaluate", "nowhere", "--images", "PICTURES"], "no pipeline 'nowhere'"),
    ],
)
def test_other_mistakes(
    ctf: Command, run: Path, pictures: Path, tmp_path: Path, command: list[Any], message: str
) -> None:
    before = files(run)
    places = {"RUN": run, "PICTURES": pictures, "NEW": tmp_path / "new"}
    refused(ctf(*[places.get(word, word) for word in command]), message)
    assert list(tmp_path.iterdir()) == []
    assert files(run) == before


def test_more_clusters_than_codes(ctf: Command, run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "clusters")
    before = files(copy)
    refused(ctf("clusters", "fit", copy, "--count", 65), "got 65 clusters, expected 1 to 64")
    assert files(copy) == before


# --- what is there already ------------------------------------------------------------------------


@pytest.mark.parametrize("there", ["file", "other"])
@pytest.mark.parametrize(
    "command",
    [
        ["fit", "PICTURES", "--out", "THERE", "--image-size", SIDE, "--steps", 1],
        ["tokenizer", "train", "PICTURES", "--out", "THERE", "--image-size", SIDE, "--steps", 1],
        ["train", "baseline", "RUN", "--out", "THERE"],
        ["classifier", "train", "PICTURES", "--out", "THERE", "--image-size", SIDE],
        ["sample", "RUN", "--count", 1, "--out", "THERE"],
    ],
)
def test_an_output_that_is_not_ours(
    ctf: Command, run: Path, pictures: Path, odd: Path, there: str, command: list[Any]
) -> None:
    before = files(odd)
    places = {"RUN": run, "PICTURES": pictures, "THERE": odd / there}
    said = refused(ctf(*[places.get(word, word) for word in command]), "choose another")
    assert str(odd / there) in said
    assert files(odd) == before


def test_a_sheet_where_a_folder_is(ctf: Command, run: Path, tmp_path: Path) -> None:
    (tmp_path / "sheet.png").mkdir()
    refused(ctf("sample", run, "--count", 1, "--out", tmp_path / "sheet.png"), "cannot be written")
    assert files(tmp_path) == {}


@pytest.fixture
def locked(pictures: Path, run: Path) -> Iterator[Path]:
    """A folder that cannot be written, with a run and pictures in it; root gives up its rights."""
    root = Path(tempfile.mkdtemp())  # others may not even look into pytest's folders
    shutil.copytree(pictures, root / "discs")
    shutil.copytree(run, root / "run")
    (root / "empty").mkdir()
    for folder in (root, *(path for path in root.rglob("*") if path.is_dir())):
        folder.chmod(0o555)
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(65534)
    try:
        yield root
    finally:
        if is_root:
            os.seteuid(0)
        for folder in (root, *(path for path in root.rglob("*") if path.is_dir())):
            folder.chmod(0o755)
        shutil.rmtree(root)


def test_a_read_only_folder(ctf: Command, locked: Path) -> None:
    before = files(locked)
    recipe = ["--preset", "tiny", "--steps", STEPS + 1, *sets()]
    places = ("discs", "run", "new", "empty", "sheet.png")
    for command in (
        ["fit", "discs", "--out", "new", "--image-size", SIDE, "--steps", 1],
        ["fit", "discs", "--out", "empty", "--image-size", SIDE, "--steps", 1],
        ["tokenizer", "train", "discs", "--out", "empty", "--image-size", SIDE, *recipe],
        ["train", "baseline", "run", "--out", "new", *recipe],
        ["classifier", "train", "discs", "--out", "new", "--image-size", SIDE],
        ["sample", "run", "--count", 1, "--out", "new"],
        ["sample", "run", "--count", 1, "--out", "sheet.png"],
    ):
        given = [locked / word if word in places else word for word in command]
        refused(ctf(*given), "cannot be written (Permission denied)")
    # What is done needs no writing.
    assert ctf(*fit_arguments(locked / "discs", locked / "run")).code == 0
    assert ctf("sample", locked / "run", "--dry-run").code == 0
    assert files(locked) == before


def test_a_folder_that_cannot_be_looked_into(ctf: Command, locked: Path) -> None:
    owner = os.geteuid()
    if owner == 65534:
        os.seteuid(0)
    (locked / "run").chmod(0)
    if owner == 65534:
        os.seteuid(owner)
    refused(ctf("sample", locked / "run", "--dry-run"), str(locked / "run"))
    refused(fit_tiny(ctf, locked / "discs", locked / "run" / "x"), str(locked / "run"))
    refused(fit_tiny(ctf, locked / "run", locked / "new"), str(locked / "run"))


def test_a_full_disk(
    ctf: Command, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    for out in ("sheet.png", "folder"):
        refused(
            ctf("sample", run, "--count", 1, "--out", tmp_path / out),
            "the disk is full; the previous file is unchanged",
        )
    assert files(tmp_path) == {}


# --- what they do ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["demo", "--out", "NEW"], "about 2 minutes in all"),
        (["fit", "PICTURES", "--out", "NEW", "--preset", "tiny"], "600 steps"),
        (["fit", "fashion-mnist", "--out", "NEW", "--minutes", 2], "60000 pictures to train on"),
        (["sample", "RUN", "--out", "NEW"], "would sample 8 images of each of 3 classes"),
        (["tokenizer", "train", "PICTURES", "--out", "NEW", "--preset", "tiny"], "tokenizer: "),
        (["tokens", "extract", "PICTURES", "--run", "RUN", "--preset", "tiny"], "held out"),
        (["clusters", "fit", "RUN", "--count", 4], "would cluster 64 codes"),
        (["train", "coarse", "RUN", "--preset", "tiny"], "would train"),
        (["train", "fine", "RUN", "--preset", "tiny"], "would train"),
        (["train", "baseline", "RUN", "--out", "NEW", "--preset", "tiny"], "would create"),
        (["classifier", "train", "PICTURES", "--out", "NEW", "--image-size", 32], "would train"),
        (
            ["evaluate", "RUN", "--reference", "PICTURES", "--samples", 30, "--out", "NEW"],
            "would write",
        ),
        (["convert", "llamagen", "--vq", "VQ", "--gpt", "GPT", "--out", "NEW"], "10 classes"),
        (["push", "RUN", "--to", "someone/something"], "would push"),
    ],
)
def test_dry_runs_write_nothing(
    ctf: Command, run: Path, pictures: Path, tmp_path: Path, command: list[Any], message: str
) -> None:
    before = files(run)
    places = {"RUN": run, "PICTURES": pictures, "NEW": tmp_path / "new"}
    places |= {"VQ": LLAMAGEN / "vq.pt", "GPT": LLAMAGEN / "gpt.pt"}
    result = ctf(*[places.get(word, word) for word in command], "--dry-run")
    assert result.code == 0 and message in result.out, result
    assert list(tmp_path.iterdir()) == []
    assert files(run) == before


def test_a_sheet(ctf: Command, run: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "sheet.png"
    arguments = ["sample", run, "--classes", "2,blue", "--count", 3, "--seed", 7, "--out", out]
    result = ctf(*arguments)
    assert result.code == 0 and str(out) in result.out
    with Image.open(out) as sheet:
        sheet.load()
        # Two rows of three, each enlarged to 64 pixels, with a name above.
        assert sheet.width >= 3 * 64 and sheet.height >= 2 * (64 + 12)
        assert f"{sheet.width} x {sheet.height} pixels" in result.out
    before = out.read_bytes()
    assert ctf(*arguments).code == 0
    assert out.read_bytes() == before
    assert ctf(*arguments, "--temperature", 2, "--fine-temperature", 2).code == 0
    assert out.read_bytes() != before


def test_a_folder_of_samples(ctf: Command, run: Path, tmp_path: Path) -> None:
    out = tmp_path / "samples"
    arguments = ["sample", run, "--count", 2, "--seed", 5, "--guidance", 1.5, "--out", out]
    assert ctf(*arguments).code == 0
    assert sorted(files(out)) == [*(f"{i:06d}.png" for i in range(6)), "codes.npz", "settings.json"]
    drawn = np.load(out / "codes.npz")
    assert drawn["codes"].shape == drawn["coarse"].shape == (6, 16)
    assert drawn["classes"].tolist() == [0, 0, 1, 1, 2, 2]
    assert drawn["seeds"].tolist() == [5, 6, 7, 8, 9, 10]
    settings = json.loads((out / "settings.json").read_text())
    assert (settings["classes"], settings["count"], settings["seed"]) == ([0, 1, 2], 2, 5)
    assert settings["sampling"]["guidance"] == 1.5 and settings["sampling"]["top_k"] == 0
    with Image.open(out / "000000.png") as image:
        assert image.size == (SIDE, SIDE) and image.mode == "RGB"
    before = files(out)
    assert ctf(*arguments).code == 0  # over itself
    assert files(out) == before
    assert ctf("sample", run, "--classes", "2,2", "--count", 1, "--out", out).code == 0  # fewer
    assert sorted(files(out)) == ["000000.png", "000001.png", "codes.npz", "settings.json"]
    assert json.loads((out / "settings.json").read_text())["classes"] == [2, 2]


def test_a_folder_and_a_sheet_show_the_same(ctf: Command, run: Path, tmp_path: Path) -> None:
    for out in ("sheet.png", "folder"):
        assert ctf("sample", run, "--count", 1, "--seed", 3, "--out", tmp_path / out).code == 0
    images = [Image.open(tmp_path / "folder" / f"{i:06d}.png") for i in range(3)]
    expected = export.contact_sheet(images, CLASSES, 1)
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert (np.asarray(sheet) == np.asarray(expected)).all()


def test_a_classifier_of_ones_own_scores_a_pipeline(
    ctf: Command,
    run: Path,
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CTF_CACHE", str(tmp_path / "cache"))
    folder, report = tmp_path / "classifier", tmp_path / "report.json"
    train = ["classifier", "train", pictures, "--out", folder, "--image-size", SIDE, "--steps", 2]
    result = ctf(*train)
    assert result.code == 0 and "held-out images classified correctly" in result.out
    arguments = ("evaluate", run, "--classifier", folder, "--reference", pictures)
    more = ("--features", "fashion", "--samples", 30, "--out", report)
    result = ctf(*arguments, *more)
    assert result.code == 0, result.err
    assert "FID-fashion" in result.out and "class accuracy" in result.out
    scored = json.loads(report.read_text())
    assert scored["count"] == 30 and scored["per_class"].keys() == set(CLASSES)
    assert ctf(*arguments, *more).out == result.out  # it is done
    against = ctf(*arguments, *more[:-1], tmp_path / "again.json", "--against", report)
    assert against.code == 0 and "may be chance" in against.out


@pytest.mark.parametrize("command", ["sample", "evaluate"])
def test_sampling_options_are_the_fields_of_sampling(ctf: Command, command: str) -> None:
    shown = ctf(command, "--help").out
    for field in dataclasses.fields(Sampling):
        assert f"--{field.name.replace('_', '-')} " in shown
