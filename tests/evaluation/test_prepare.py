"""Preparation of an evaluation: its defaults, its identity, and errors before anything is done."""

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ctf.common import config
from ctf.common.errors import UserError
from ctf.data.image_set import ImageSet, Splits
from ctf.evaluation import classifier
from ctf.evaluation.classifier import SHIPPED, ClassifierConfig, classify, shipped_classifier
from ctf.evaluation.evaluate import add_class_accuracies
from ctf.evaluation.image_collection import ImageCollection
from ctf.evaluation.options import EvaluationOptions
from ctf.evaluation.prepare import prepare
from ctf.evaluation.sample_cache import GenerationConfig
from ctf.training.classifier import train_classifier
from tests.conftest import CLASSES
from tests.evaluation.helpers import noise, prepared, save_npz, silent
from tests.evaluation.test_inception import random_weights

pytestmark = pytest.mark.usefixtures("here")


def test_each_configuration_has_its_own_folder(run: Path, image_folder: Path, here: Path) -> None:
    one, same, other = (prepared(run, image_folder, seed=seed) for seed in (0, 0, 1))
    assert one.folder == same.folder != other.folder
    assert one.folder.parent == Path("evaluations") and one.folder.name.startswith("run-")
    copy = here / "copy"
    shutil.copytree(run, copy)
    assert prepared(copy, image_folder).config == one.config  # under any name
    (copy / "pipeline.json").write_text((copy / "pipeline.json").read_text() + " ")
    assert prepared(copy, image_folder).config != one.config
    assert os.listdir(here) == ["copy"]  # `prepare` writes nothing


def test_sample_counts_are_rounded_up_to_balanced_classes(run: Path, image_folder: Path) -> None:
    generation = prepared(run, image_folder, search_samples=1000).subject.drawing
    assert generation is not None and generation.samples == 5001  # 3 classes
    assert prepared(run, image_folder, search_samples=1000).search_samples == 1002
    uniform = prepared(run, image_folder, search_samples=1000, balance="uniform")
    assert uniform.subject.drawing is not None and uniform.subject.drawing.samples == 5000
    assert uniform.search_samples == 1000


def test_config_is_plain_json(run: Path, image_folder: Path) -> None:
    plain = prepared(run, image_folder, samples=12).config
    assert json.loads(json.dumps(plain)) == plain
    assert plain["drawing"] == config.to_json(GenerationConfig(**plain["drawing"]))


@pytest.mark.parametrize("kind", ["folder", "npz", "unknown", "other", "large"])
def test_class_accuracy_needs_known_classes_and_the_right_size(
    images: ImageSet, here: Path, kind: str
) -> None:
    """Images like Fashion-MNIST are classified by the included classifier, others are not."""
    pixels, classes_N = images.read(np.arange(40)), images.classes_N[:40]
    path = here / "samples.npz"
    if kind == "folder":  # in another order than the classifier's
        path = here / "samples"
        for i, (image, number) in enumerate(zip(pixels, classes_N, strict=True)):
            (path / images.class_names[number]).mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path / images.class_names[number] / f"{i}.png")
    elif kind == "large":
        save_npz(path, np.repeat(np.repeat(pixels, 2, 1), 2, 2)[:, ::2], classes_N)
    else:
        known = {"npz": classes_N, "unknown": None, "other": classes_N + 1}[kind]
        save_npz(path, pixels, known)
    evaluation = prepare(str(path), EvaluationOptions("fashion-mnist"), device=torch.device("cpu"))
    assert [e.name for e in evaluation.extractors] == ["lite0", "fashion"]
    assert (evaluation.classifier is not None) == (kind in ("folder", "npz"))
    if evaluation.classifier is not None and evaluation.images is not None:
        accuracy = add_class_accuracies(
            {name: {} for name in images.class_names}, evaluation.classifier, evaluation.images
        )
        correct_N = classify(shipped_classifier(), pixels) == classes_N
        assert accuracy.value == correct_N.mean()
        assert evaluation.images.class_names == images.class_names


@pytest.mark.parametrize(("name", "count"), [("fashion-mnist", 10_000), ("eurosat", 5_400)])
def test_the_reference_is_by_default_the_included_set_that_was_trained_on(
    run: Path, here: Path, name: str, count: int
) -> None:
    copy = here / "copy"
    shutil.copytree(run, copy)
    settings = json.loads((copy / "pipeline.json").read_text())
    settings["origin"]["images"] = name
    (copy / "pipeline.json").write_text(json.dumps(settings))
    evaluation = prepare(str(copy), EvaluationOptions(samples=12), device=torch.device("cpu"))
    assert isinstance(evaluation.reference, ImageCollection)
    assert evaluation.reference.name == f"{name} (val)" and evaluation.reference.count == count


def test_the_included_classifier_of_the_same_classes_and_size_is_used(
    run: Path, image_folder: Path, splits: Splits, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever image set it is of: its features are named after the set."""
    tiny = ClassifierConfig(width=16, steps=1, batch_size=8, warm_up=1)
    included = here / "shipped" / "colours-classifier"
    digest = train_classifier(splits, included, tiny).digest
    monkeypatch.setattr(classifier, "SHIPPED_MODELS", here / "shipped")
    evaluation = prepare(str(run), EvaluationOptions(str(image_folder)), device=torch.device("cpu"))
    assert [e.name for e in evaluation.extractors] == ["lite0", "colours"]
    assert evaluation.extractors[1].suffix == "-colours"
    assert evaluation.classifier is not None and evaluation.classifier.digest == digest
    larger = EvaluationOptions(str(image_folder), resize=splits.train.image_size + 8)
    assert prepare(str(run), larger, device=torch.device("cpu")).classifier is None


def test_a_classifier_is_identified_by_its_weights(
    run: Path, image_folder: Path, splits: Splits, here: Path
) -> None:
    tiny = ClassifierConfig(width=16, steps=1, batch_size=8, warm_up=1)
    for name, seed in (("a", 0), ("b", 1)):
        train_classifier(splits, here / name, dataclasses.replace(tiny, seed=seed))
    first, same, other = (
        prepared(run, image_folder, samples=12, classifier=here / name) for name in "aab"
    )
    assert first.config == same.config != other.config
    assert {*first.config} == {*other.config}
    result = first.run(silent)
    assert result.accuracy is not None and result.accuracy.count == 12
    assert first.classifier is not None and result.classifier == first.classifier.digest
    assert result.per_class["red"].keys() == {"mean distance-fashion", "accuracy"}


# --- errors ---------------------------------------------------------------------------------------


@pytest.fixture
def paths(run: Path, image_folder: Path, images: ImageSet, here: Path) -> dict[str, str]:
    """What the words in the cases below stand for."""
    few = here.parent / "few"
    for i in range(6):
        (few / CLASSES[i % 3]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise(1, i, 40)[0]).save(few / CLASSES[i % 3] / f"{i}.png")
    unfinished = here.parent / "unfinished"
    shutil.copytree(run, unfinished)
    (unfinished / "pipeline.json").unlink()
    empty = here.parent / "empty"
    empty.mkdir()
    samples = save_npz(here.parent / "samples.npz", noise(30, 0, 40))
    numbered = save_npz(here.parent / "numbered.npz", noise(30, 0, 32), np.arange(30))
    nine = save_npz(here.parent / "nine.npz", noise(9, 0, 32))
    ones = {"mu": np.zeros(7), "sigma": np.eye(7)}
    np.savez(here.parent / "seven.npz", **ones)
    np.savez(here.parent / "others.npz", **ones, features=np.array("made of others"))
    known = {
        "RUN": run, "PICTURES": image_folder, "FEW": few, "UNFINISHED": unfinished, "EMPTY": empty,
        "SAMPLES": samples, "NUMBERED": numbered, "NINE": nine, "SHIPPED": SHIPPED,
        "SEVEN": here.parent / "seven.npz", "OTHERS": here.parent / "others.npz",
    }  # fmt: skip
    return {word: str(path) for word, path in known.items()}


ERRORS: list[tuple[str, str | None, dict[str, Any], str]] = [
    ("nowhere", "PICTURES", {}, "no pipeline 'nowhere'"),
    ("nowhere.npz", "PICTURES", {}, "nowhere.npz: not found"),
    ("EMPTY", "PICTURES", {}, "has no images"),
    ("UNFINISHED", "PICTURES", {}, "pipeline.json: not found"),
    ("SEVEN", "PICTURES", {}, "has statistics but no images (arr_0)"),
    ("RUN", None, {}, "nothing to score against; pass a --reference"),
    ("SAMPLES", None, {}, "nothing to score against; pass a --reference"),
    ("RUN", "nowhere", {}, "nowhere: no such folder"),
    ("RUN", "nowhere.npz", {}, "nowhere.npz: not found"),
    ("RUN", "FEW", {}, "6 images in the reference few (all): expected 10 or more"),
    ("RUN", "NINE", {}, "9 images in the reference nine.npz: expected 10 or more"),
    ("NINE", "PICTURES", {}, "9 images scored: expected 10 or more"),
    ("RUN", "PICTURES", {"samples": 9}, "9 images scored: expected 10 or more"),
    ("RUN", "PICTURES", {"samples": 0}, "got 0 samples, expected 1 or more"),
    ("RUN", "PICTURES", {"samples": 31}, "31 samples cannot be split equally among 3 classes"),
    ("RUN", "PICTURES", {"search_samples": 6}, "6 images per point of the search"),
    ("RUN", "PICTURES", {"search_samples": -2}, "0 images per point of the search"),
    (
        "RUN", "PICTURES", {"search_samples": 30, "settings": {"temperature": 1.0}},
        "temperature is set, but --search finds it",
    ),
    ("RUN", "PICTURES", {"seed": 2**63}, "seed: got 9223372036854775808"),
    ("RUN", "PICTURES", {"settings": {"top_p": 2.0}}, "top_p: got 2.0"),
    ("RUN", "PICTURES", {"resize": 4}, "image size: got 4"),
    ("RUN", "PICTURES", {"features": ("lite1",)}, "unknown features 'lite1'"),
    ("RUN", "PICTURES", {"weights": Path("w.pth")}, "only --features inception takes weights"),
    ("RUN", "PICTURES", {"features": ("inception",), "weights": Path("w")}, "w: no such file"),
    ("RUN", "PICTURES", {"classifier": Path("none")}, "none/config.json: not found"),
    (
        "RUN", "PICTURES", {"classifier": SHIPPED},
        "the classifier is for 10 classes (t-shirt, trouser, pullover, ...) at 32 x 32 pixels; "
        "got 3 classes (blue, green, red) at 32 x 32 pixels",
    ),
    ("SAMPLES", "PICTURES", {"classifier": SHIPPED}, "without named classes at 40 x 40"),
    ("NUMBERED", "SAMPLES", {"classifier": SHIPPED}, "without named classes at 32 x 32"),
    ("RUN", "PICTURES", {"classifier": SHIPPED, "resize": 16}, "at 16 x 16 pixels"),
    ("RUN", "PICTURES", {"against": Path("none.json")}, "none.json: not found"),
    ("RUN", "SEVEN", {}, "seven.npz: statistics of 7 features, but fashion has 128"),
    ("RUN", "OTHERS", {}, "others.npz: made with other features than fashion"),
    ("RUN", "SAMPLES", {"split": "val"}, "an .npz file has no splits"),
    ("RUN", "PICTURES", {"background": "bleu"}, "unknown colour 'bleu'"),
    ("RUN", "fashion-mnist", {"resize": 64}, "fashion-mnist: got --image-size 64"),
    *[
        ("SAMPLES", "PICTURES", options, "are scored as they are")
        for options in (
            {"samples": 5}, {"resize": 32}, {"search_samples": 9}, {"settings": {"top_k": 1}}
        )
    ],
]  # fmt: skip


@pytest.mark.parametrize(("model", "reference", "options", "message"), ERRORS)
def test_errors_are_found_before_anything_is_written(
    model: str,
    reference: str | None,
    options: dict[str, Any],
    message: str,
    paths: dict[str, str],
    here: Path,
) -> None:
    with pytest.raises(UserError) as error:
        prepared(paths.get(model, model), paths.get(reference or "", reference), **options)
    assert message in str(error.value)
    assert len(str(error.value).splitlines()) <= 2
    assert os.listdir(here) == []


def test_statistics_in_adm_reference_batches_are_checked_for_inception(
    run: Path, here: Path
) -> None:
    """Other features do not use them."""
    torch.save(random_weights(0), here / "inception.pth")
    inception = {"features": ("inception",), "weights": here / "inception.pth"}
    pixels, path = noise(12, 0, 32), here / "batch.npz"
    np.savez(path, pixels, mu=np.zeros(7), sigma=np.eye(7))
    assert prepared(run, path).reference.name == "batch.npz"
    with pytest.raises(UserError, match=r"statistics of 7 features, but inception has 2048"):
        prepared(run, path, **inception)
    np.savez(path, pixels, mu=np.zeros(2048), sigma=np.eye(2048))
    known = prepared(run, path, **inception).reference
    assert isinstance(known, ImageCollection) and known.statistics is not None


def test_unreadable_images_of_a_reference_can_be_skipped(
    run: Path, image_folder: Path, here: Path
) -> None:
    copy = here / "discs"
    shutil.copytree(image_folder, copy)
    (copy / "red" / "bad.png").write_bytes(b"not an image")
    with pytest.raises(UserError, match=r"bad\.png"):
        prepared(run, copy)
    assert isinstance(prepared(run, copy, skip_bad=True).reference, ImageCollection)
