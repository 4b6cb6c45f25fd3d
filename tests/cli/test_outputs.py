"""What commands write: nothing in a dry run, sheets, folders of samples, reports."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ctf.pipelines import export
from ctf.pipelines.pipeline import Pipeline
from tests.cli.helpers import LLAMAGEN
from tests.conftest import CLASSES, SIDE, Command, read_files


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["demo", "--out", "NEW"], "about 2 minutes in all"),
        (["demo", "--images", "eurosat", "--out", "NEW"], "64 pixels -> 8 x 8"),
        (["fit", "eurosat", "--out", "NEW"], "64 pixels -> 16 x 16 of 4096 codes"),
        (["fit", "eurosat", "--out", "NEW", "--image-size", 32], "21,600 to train on"),
        (["tokenizer", "train", "eurosat", "--out", "NEW", "--preset", "tiny"], "64 pixels"),
        (["classifier", "train", "eurosat", "--out", "NEW"], "would train a classifier on 21600"),
        (
            ["evaluate", "RUN", "--reference", "eurosat", "--samples", 30, "--out", "NEW"],
            "reference: 27,000 images in 10 classes: AnnualCrop (3,000)",
        ),
        (["fit", "IMAGES", "--out", "NEW", "--preset", "tiny"], "600 steps"),
        (["fit", "fashion-mnist", "--out", "NEW", "--minutes", 2], "60,000 to train on"),
        (["sample", "RUN", "--out", "NEW"], "would sample 8 images of each of 3 classes"),
        (["tokenizer", "train", "IMAGES", "--out", "NEW", "--preset", "tiny"], "tokenizer: "),
        (["tokens", "extract", "IMAGES", "--run", "RUN", "--preset", "tiny"], "held out"),
        (["clusters", "fit", "RUN", "--count", 4], "would cluster 64 codes"),
        (["train", "coarse", "RUN", "--preset", "tiny"], "would train"),
        (["train", "fine", "RUN", "--preset", "tiny"], "would train"),
        (["train", "baseline", "RUN", "--out", "NEW", "--preset", "tiny"], "would create"),
        (["classifier", "train", "IMAGES", "--out", "NEW", "--image-size", 32], "would train"),
        (
            ["evaluate", "RUN", "--reference", "IMAGES", "--samples", 30, "--out", "NEW"],
            "would write",
        ),
        (
            [
                "convert",
                "llamagen",
                "--vq",
                "VQ",
                "--gpt",
                "GPT",
                "--image-size",
                8,
                "--heads",
                4,
                "--out",
                "NEW",
            ],
            "10 classes",
        ),
        (["push", "RUN", "--to", "someone/something"], "would push"),
    ],
)
def test_dry_runs_write_nothing(
    ctf: Command, run: Path, image_folder: Path, tmp_path: Path, command: list[Any], message: str
) -> None:
    before = read_files(run)
    paths = {"RUN": run, "IMAGES": image_folder, "NEW": tmp_path / "new"}
    paths |= {"VQ": LLAMAGEN / "vq.pt", "GPT": LLAMAGEN / "gpt.pt"}
    result = ctf(*[paths.get(word, word) for word in command], "--dry-run")
    assert result.code == 0 and message in result.out, result
    assert list(tmp_path.iterdir()) == []
    assert read_files(run) == before


def test_a_contact_sheet_is_the_same_each_time(ctf: Command, run: Path, tmp_path: Path) -> None:
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


def test_a_folder_of_samples_has_images_codes_and_settings(
    ctf: Command, run: Path, tmp_path: Path
) -> None:
    out = tmp_path / "samples"
    arguments = ["sample", run, "--count", 2, "--seed", 5, "--guidance", 1.5, "--out", out]
    assert ctf(*arguments).code == 0
    assert sorted(read_files(out)) == [
        *(f"{i:06d}.png" for i in range(6)),
        "codes.npz",
        "settings.json",
    ]
    arrays = np.load(out / "codes.npz")
    assert arrays["codes"].shape == arrays["coarse"].shape == (6, 16)
    assert arrays["classes"].tolist() == [0, 0, 1, 1, 2, 2]
    assert arrays["seeds"].tolist() == [5, 6, 7, 8, 9, 10]
    settings = json.loads((out / "settings.json").read_text())
    assert (settings["classes"], settings["count"], settings["seed"]) == ([0, 1, 2], 2, 5)
    assert settings["sampling"]["guidance"] == 1.5 and settings["sampling"]["top_k"] == 0
    with Image.open(out / "000000.png") as image:
        assert image.size == (SIDE, SIDE) and image.mode == "RGB"
    before = read_files(out)
    assert ctf(*arguments).code == 0  # over itself
    assert read_files(out) == before
    assert ctf("sample", run, "--classes", "2,2", "--count", 1, "--out", out).code == 0  # fewer
    assert sorted(read_files(out)) == ["000000.png", "000001.png", "codes.npz", "settings.json"]
    assert json.loads((out / "settings.json").read_text())["classes"] == [2, 2]


def test_a_folder_and_a_sheet_show_the_same(ctf: Command, run: Path, tmp_path: Path) -> None:
    for out in ("sheet.png", "folder"):
        assert ctf("sample", run, "--count", 1, "--seed", 3, "--out", tmp_path / out).code == 0
    images = [Image.open(tmp_path / "folder" / f"{i:06d}.png") for i in range(3)]
    expected = export.contact_sheet(images, CLASSES, 1)
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert (np.asarray(sheet) == np.asarray(expected)).all()


def test_a_trained_classifier_scores_a_pipeline(
    ctf: Command,
    run: Path,
    image_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CTF_CACHE", str(tmp_path / "cache"))
    folder, report = tmp_path / "classifier", tmp_path / "report.json"
    train = [
        "classifier",
        "train",
        image_folder,
        "--out",
        folder,
        "--image-size",
        SIDE,
        "--steps",
        2,
    ]
    result = ctf(*train)
    assert result.code == 0 and "held-out images classified correctly" in result.out
    arguments = ("evaluate", run, "--classifier", folder, "--reference", image_folder)
    more = ("--features", "fashion", "--samples", 30, "--out", report)
    result = ctf(*arguments, *more)
    assert result.code == 0, result.err
    assert "FID-fashion" in result.out and "class accuracy" in result.out
    scored = json.loads(report.read_text())
    assert scored["count"] == 30 and scored["per_class"].keys() == set(CLASSES)
    assert ctf(*arguments, *more).out == result.out  # the evaluation is complete
    against = ctf(*arguments, *more[:-1], tmp_path / "again.json", "--against", report)
    assert against.code == 0 and "may be chance" in against.out


NAMED = ("tench, Tinca tinca", "all", "1")


def sampled_classes(ctf: Command, model: Path, tmp_path: Path, *arguments: str) -> list[int]:
    result = ctf("sample", model, "--count", 1, *arguments, "--out", tmp_path / "samples")
    assert result.code == 0, result.err
    classes: list[int] = json.loads((tmp_path / "samples" / "settings.json").read_text())["classes"]
    return classes


def test_classes_of_every_name_can_be_chosen(ctf: Command, pipe: Pipeline, tmp_path: Path) -> None:
    model = tmp_path / "named"
    dataclasses.replace(pipe, class_names=NAMED).save_pretrained(model)

    def chosen(*arguments: str) -> list[int]:
        return sampled_classes(ctf, model, tmp_path, *arguments)

    assert chosen() == [0, 1, 2]
    assert chosen("--classes", "tench, Tinca tinca") == [0]
    assert chosen("--classes", "tench, Tinca tinca,all") == [0, 1]
    assert chosen("--classes", "all", "--classes", "0") == [1, 0]
    assert chosen("--classes", "all") == [1]  # a class's name comes first
    result = ctf("sample", model, "--classes", "1", "--count", 1, "--out", tmp_path / "one.png")
    assert result.code == 0
    assert "class 1: the one of that name, number 2; not number 1, which is 'all'" in result.err


@pytest.mark.parametrize(
    "name", ["-x", "--count", "a b", "\u72ac \U0001f600", "it's", '"q"', "a\nb"]
)
def test_odd_names_of_classes_can_be_chosen(
    ctf: Command, pipe: Pipeline, tmp_path: Path, name: str
) -> None:
    model = tmp_path / "named"
    dataclasses.replace(pipe, class_names=("[red]", name, "z")).save_pretrained(model)
    assert sampled_classes(ctf, model, tmp_path, f"--classes={name},[red]") == [1, 0]
