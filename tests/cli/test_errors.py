"""Mistakes of users: refused in two lines, and nothing is written."""

import dataclasses
import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ctf.models import clusters
from ctf.models.coarse import CoarseModel
from ctf.pipelines.pipeline import Pipeline
from tests.cli.helpers import check_refused, fit_tiny
from tests.conftest import (
    SIDE,
    STEPS,
    Command,
    disc_image,
    fit_arguments,
    read_files,
    recipe_options,
    save_images,
)

# --- images ---------------------------------------------------------------------------------------


@pytest.fixture
def partly_bad(tmp_path: Path) -> Path:
    root = save_images(tmp_path / "images", count=4)
    intact = (root / "red" / "0.jpg").read_bytes()
    (root / "red" / "cut.jpg").write_bytes(intact[: len(intact) // 2])
    (root / "blue" / "empty.png").touch()
    (root / "green" / "letter.webp").write_text("dear aunt")
    disc_image(0.5, 0).resize((20, 20)).save(root / "green" / "small.png")
    return root


@pytest.mark.parametrize("command", ["fit", "tokenizer train", "classifier train"])
def test_all_bad_images_are_listed(
    ctf: Command, partly_bad: Path, tmp_path: Path, command: str
) -> None:
    out = tmp_path / "run"
    result = ctf(*command.split(), partly_bad, "--out", out, "--image-size", SIDE)
    check_refused(
        result, f"{partly_bad}: 4 of 16 images cannot be used", "--skip-bad",
        "red/cut.jpg", "blue/empty.png", "green/letter.webp",
        "20x20, smaller than --image-size 32", "green/small.png", lines=5,
    )  # fmt: skip
    assert not out.exists()


def test_skip_bad_leaves_bad_images_out(ctf: Command, partly_bad: Path, tmp_path: Path) -> None:
    result = fit_tiny(ctf, partly_bad, tmp_path / "run", "--skip-bad", "--dry-run")
    assert result.code == 0
    assert (
        "4 files left out: 3 unreadable, 1 too small" in result.out
        and "blue/empty.png" in result.out
    )
    result = fit_tiny(ctf, partly_bad, tmp_path / "run", "--skip-bad")
    assert result.code == 0, result.err
    manifest = json.loads((tmp_path / "run" / "tokens" / "manifest.json").read_text())
    assert manifest["train"]["count"] + manifest["val"]["count"] == 12


@pytest.fixture
def odd(tmp_path: Path) -> Path:
    """Folders that are no data sets."""
    for name in ("empty", "one", "no red/red", "no red/blue", "other"):
        (tmp_path / "odd" / name).mkdir(parents=True)
    disc_image(0.1, 0).save(tmp_path / "odd" / "one" / "1.png")
    for i in range(3):
        disc_image(0.1, i).save(tmp_path / "odd" / "no red" / "blue" / f"{i}.png")
    (tmp_path / "odd" / "other" / "thesis.tex").write_text("mine")
    (tmp_path / "odd" / "file").write_text("mine")
    return tmp_path / "odd"


@pytest.mark.parametrize(
    ("folder", "message"),
    [
        ("empty", "no usable images"),
        ("other", "no usable images"),
        ("one", "got one usable image, expected 2 or more"),
        ("no red", "red"),
        ("nowhere", "no such folder"),
        ("file", "got a file, expected a folder"),
    ],
)
def test_folders_that_are_no_data_sets_are_refused(
    ctf: Command, odd: Path, tmp_path: Path, folder: str, message: str
) -> None:
    before = read_files(odd)
    for more in ([], ["--skip-bad"], ["--dry-run"]):
        error = check_refused(fit_tiny(ctf, odd / folder, tmp_path / "run", *more), message)
        assert str(odd / folder) in error
    assert not (tmp_path / "run").exists()
    assert read_files(odd) == before


def test_a_misspelt_name_is_corrected(ctf: Command, tmp_path: Path) -> None:
    check_refused(
        fit_tiny(ctf, "fashion-minst", tmp_path / "run"),
        "fashion-minst: no such folder, nor an included set of that name",
        "did you mean 'fashion-mnist'?",
    )


# --- values ---------------------------------------------------------------------------------------


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
def test_invalid_values_are_refused(
    ctf: Command, image_folder: Path, tmp_path: Path, more: list[Any], message: str
) -> None:
    preset = [] if "--preset" in more else ["--preset", "tiny"]
    for dry in ([], ["--dry-run"]):
        result = ctf("fit", image_folder, "--out", tmp_path / "run", *preset, *more, *dry)
        # Images that are too small are listed.
        check_refused(result, message, lines=3)
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
        (["--count", str(10**30), "--out", "folder"], "images, expected 10,000,000 or fewer"),
        (["--out", "sheet.jpg"], "sheet.jpg: expected a name ending in .png, or a folder"),
    ],
)
def test_invalid_samples_are_refused(
    ctf: Command, run: Path, tmp_path: Path, arguments: list[str], message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    for dry in ([], ["--dry-run"]):
        check_refused(ctf("sample", run, *arguments, *dry), message)
    assert list(tmp_path.iterdir()) == []


def test_class_numbers_begin_at_0(ctf: Command, pipe: Pipeline, tmp_path: Path) -> None:
    names = tuple(f"class {chr(97 + i)}" for i in range(10))
    coarse = CoarseModel(dataclasses.replace(pipe.coarse.config, classes=10), 64)
    baseline = Pipeline(pipe.tokenizer, clusters.identity(64), coarse, None, names)
    baseline.save_pretrained(tmp_path / "ten")
    check_refused(
        ctf("sample", tmp_path / "ten", "--classes", "10", "--out", tmp_path / "sheet.png"),
        "class 10 of 10: expected 0 to 9, or a name: class a, class b, ",
    )
    assert not (tmp_path / "sheet.png").exists()
    options = ["--classes", "9,class a", "--count", 1, "--out", tmp_path / "sheet.png"]
    assert ctf("sample", tmp_path / "ten", *options).code == 0


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["clusters", "fit", "RUN", "--count", 65], "another configuration: count was 8, now 65"),
        (["clusters", "fit", "RUN", "--count", 0], "count: got 0"),
        (["tokens", "extract", "IMAGES", "--run", "RUN", "--limit", 0], "limit"),
        (
            ["tokens", "extract", "IMAGES", "--run", "RUN", "--limit", 3],
            "another configuration: ",
        ),
        (["tokenizer", "train", "IMAGES", "--out", "RUN", "--image-size", 32], "another config"),
        (
            ["tokenizer", "train", "IMAGES", "--out", "NEW", "--preset", "tiny", "--steps", 0],
            "steps: got 0",
        ),
        (["train", "coarse", "RUN", "--preset", "tiny", "--steps", 3], "another configuration"),
        (["train", "fine", "RUN", "--preset", "tony"], "unknown preset 'tony': did you mean"),
        (["train", "fine", "RUN", "--set", "fine.width=6"], "width 6 with"),
        (
            ["classifier", "train", "IMAGES", "--out", "NEW", "--image-size", 32, "--steps", 0],
            "steps: got 0",
        ),
        (["evaluate", "RUN", "--samples", 30], "nothing to score against; pass a --reference"),
        (
            ["evaluate", "RUN", "--samples", 31, "--reference", "IMAGES"],
            "31 samples cannot be split equally among 3",
        ),
        (["evaluate", "RUN", "--samples", 30, "--reference", "nowhere"], "nowhere: no such folder"),
        (
            ["evaluate", "RUN", "--samples", 30, "--reference", "IMAGES", "--features", "lite1"],
            "unknown features 'lite1': did you mean 'lite0'?",
        ),
        (
            ["evaluate", "RUN", "--samples", 3, "--reference", "IMAGES", "--classifier", "NEW"],
            "not found",
        ),
        (
            ["train", "baseline", "RUN", "--out", "NEW", "--warm-start", "nowhere", "--dry-run"],
            "nowhere",
        ),
        (
            ["evaluate", "RUN", "--samples", 3 * 10**12, "--reference", "IMAGES"],
            "got 3000000000000 samples, expected 10,000,000 or fewer",
        ),
        (["runs", "tensorboard", "RUN", "--samples-every", -1], "samples-every: got -1"),
        (["evaluate", "nowhere"], "no pipeline 'nowhere'"),
        (["tokenizer", "evaluate", "nowhere", "--images", "IMAGES"], "no pipeline 'nowhere'"),
    ],
)
def test_mistakes_of_every_command_are_refused(
    ctf: Command, run: Path, image_folder: Path, tmp_path: Path, command: list[Any], message: str
) -> None:
    before = read_files(run)
    paths = {"RUN": run, "IMAGES": image_folder, "NEW": tmp_path / "new"}
    check_refused(ctf(*[paths.get(word, word) for word in command]), message)
    assert list(tmp_path.iterdir()) == []
    assert read_files(run) == before


def test_more_clusters_than_codes_are_refused(ctf: Command, run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "clusters")
    before = read_files(copy)
    check_refused(ctf("clusters", "fit", copy, "--count", 65), "got 65 clusters, expected 1 to 64")
    assert read_files(copy) == before


# --- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["file", "other"])
@pytest.mark.parametrize(
    "command",
    [
        ["fit", "IMAGES", "--out", "OUT", "--image-size", SIDE, "--steps", 1],
        ["tokenizer", "train", "IMAGES", "--out", "OUT", "--image-size", SIDE, "--steps", 1],
        ["train", "baseline", "RUN", "--out", "OUT"],
        ["classifier", "train", "IMAGES", "--out", "OUT", "--image-size", SIDE],
        ["sample", "RUN", "--count", 1, "--out", "OUT"],
    ],
)
def test_an_output_folder_of_something_else_is_refused(
    ctf: Command, run: Path, image_folder: Path, odd: Path, kind: str, command: list[Any]
) -> None:
    before = read_files(odd)
    paths = {"RUN": run, "IMAGES": image_folder, "OUT": odd / kind}
    error = check_refused(ctf(*[paths.get(word, word) for word in command]), "choose another")
    assert str(odd / kind) in error
    assert read_files(odd) == before


def test_a_sheet_does_not_replace_a_folder(ctf: Command, run: Path, tmp_path: Path) -> None:
    (tmp_path / "sheet.png").mkdir()
    check_refused(
        ctf("sample", run, "--count", 1, "--out", tmp_path / "sheet.png"), "cannot be written"
    )
    assert read_files(tmp_path) == {}


@pytest.fixture
def locked(image_folder: Path, run: Path) -> Iterator[Path]:
    """A folder that cannot be written, with a run and images in it; root gives up its rights."""
    root = Path(tempfile.mkdtemp())  # pytest's folders cannot be entered by others
    shutil.copytree(image_folder, root / "discs")
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


def test_a_read_only_folder_is_reported(ctf: Command, locked: Path) -> None:
    before = read_files(locked)
    recipe = ["--preset", "tiny", "--steps", STEPS + 1, *recipe_options()]
    paths = ("discs", "run", "new", "empty", "sheet.png")
    for command in (
        ["fit", "discs", "--out", "new", "--image-size", SIDE, "--steps", 1],
        ["fit", "discs", "--out", "empty", "--image-size", SIDE, "--steps", 1],
        ["tokenizer", "train", "discs", "--out", "empty", "--image-size", SIDE, *recipe],
        ["train", "baseline", "run", "--out", "new", *recipe],
        ["classifier", "train", "discs", "--out", "new", "--image-size", SIDE],
        ["sample", "run", "--count", 1, "--out", "new"],
        ["sample", "run", "--count", 1, "--out", "sheet.png"],
    ):
        arguments = [locked / word if word in paths else word for word in command]
        check_refused(ctf(*arguments), "cannot be written (Permission denied)")
    # Finished work needs no writing.
    assert ctf(*fit_arguments(locked / "discs", locked / "run")).code == 0
    assert ctf("sample", locked / "run", "--dry-run").code == 0
    assert read_files(locked) == before


def test_an_unreadable_folder_is_reported(ctf: Command, locked: Path) -> None:
    owner = os.geteuid()
    if owner == 65534:
        os.seteuid(0)
    (locked / "run").chmod(0)
    if owner == 65534:
        os.seteuid(owner)
    check_refused(ctf("sample", locked / "run", "--dry-run"), str(locked / "run"))
    check_refused(fit_tiny(ctf, locked / "discs", locked / "run" / "x"), str(locked / "run"))
    check_refused(fit_tiny(ctf, locked / "run", locked.with_name("new")), str(locked / "run"))


def test_a_full_disk_is_reported(
    ctf: Command, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    for out in ("sheet.png", "folder"):
        check_refused(
            ctf("sample", run, "--count", 1, "--out", tmp_path / out),
            "the disk is full; the previous file is unchanged",
        )
    assert read_files(tmp_path) == {}


def test_a_deleted_current_folder_is_reported(
    ctf: Command, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    check_refused(ctf("sample", run), "the current folder has been deleted", lines=1)
    monkeypatch.chdir(tmp_path)
