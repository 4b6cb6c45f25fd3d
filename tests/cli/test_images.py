"""Commands that open images: what they say about them, and how they are told to read them."""

import shutil
from pathlib import Path

import pytest

from tests.conftest import Command, recipe_options

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CTF_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def split_folder(image_folder: Path, tmp_path: Path) -> Path:
    """The classes blue, green and red, eight images each, in train/ and in test/."""
    root = tmp_path / "sets"
    for split in ("train", "test"):
        shutil.copytree(image_folder, root / split)
    (root / "train" / "blue" / "notes.txt").write_text("not an image")
    return root


SUMMARY = """\
24 images in 3 classes: blue (8), green (8), red (8); 25 files left out: 24 in split test, \
1 not an image (.txt)
20 to train on, 4 held out
splits: train to train on, test left out
classes: the folders in sets/train/
"""


@pytest.mark.parametrize(
    "command",
    [
        ("fit", "--out", "{out}", "--preset", "tiny"),
        ("tokenizer", "train", "--out", "{out}", "--preset", "tiny"),
        ("tokens", "extract", "--run", "{run}", "--preset", "tiny"),
        ("classifier", "train", "--out", "{out}", "--image-size", "32"),
    ],
    ids=lambda command: " ".join(command[:2]),
)
def test_a_dry_run_says_in_full_what_was_understood(
    command: tuple[str, ...], split_folder: Path, run: Path, tmp_path: Path, ctf: Command
) -> None:
    options = [option.format(out=tmp_path / "out", run=run) for option in command]
    result = ctf(*options, split_folder, "--dry-run")
    assert result.code == 0, result.err
    assert result.out.startswith(SUMMARY)
    assert "left out, not an image (.txt): train/blue/notes.txt\n" in result.out
    images = sorted(
        str(path.relative_to(split_folder)) for path in (split_folder / "test").rglob("*.*")
    )
    assert f"left out, split test: {', '.join(images)}\n" in result.out
    assert not (tmp_path / "out").exists()


def test_training_says_it_shortly(split_folder: Path, tmp_path: Path, ctf: Command) -> None:
    arguments = ("--preset", "tiny", "--steps", 1, "--image-size", 32, *recipe_options())
    result = ctf("tokenizer", "train", split_folder, "--out", tmp_path / "run", *arguments)
    assert result.code == 0, result.err
    assert result.out == SUMMARY + f"{tmp_path / 'run' / 'tokenizer'}: done\n"


def test_evaluations_follow_links_as_training_does(
    image_folder: Path, tmp_path: Path, ctf: Command
) -> None:
    linked = tmp_path / "linked"
    linked.mkdir()
    for folder in image_folder.iterdir():
        (linked / folder.name).symlink_to(folder, target_is_directory=True)
    result = ctf("evaluate", linked, "--reference", linked, "--dry-run")
    assert result.code == 0, result.err
    contents = "24 images in 3 classes: blue (8), green (8), red (8)\n"
    assert f"samples: {contents}" in result.out
    assert f"reference: {contents}" in result.out


def test_a_depth_says_where_the_classes_are(
    split_folder: Path, tmp_path: Path, ctf: Command
) -> None:
    shutil.copytree(split_folder / "train", split_folder / "more")
    fit = ("fit", split_folder, "--out", tmp_path / "run", "--preset", "tiny", "--dry-run")
    result = ctf(*fit)
    assert result.code == 2
    assert "are these folders classes or splits: more, test, train?" in result.err
    assert "48 images in 3 classes: blue (16), " in ctf(*fit, "--classes-at-depth", 2).out
    assert "72 images in 3 classes: more (24), " in ctf(*fit, "--classes-at-depth", 1).out
    assert "72 images in 1 class: sets (72)" in ctf(*fit, "--classes-at-depth", 0).out


def test_a_limit_below_the_number_of_classes_is_told(
    image_folder: Path, run: Path, ctf: Command
) -> None:
    extract = ("tokens", "extract", image_folder, "--run", run, "--preset", "tiny", "--dry-run")
    assert "--limit 2: 1 of 3 classes are left out" in ctf(*extract, "--limit", 2).out
    assert "are left out" not in ctf(*extract, "--limit", 3).out
