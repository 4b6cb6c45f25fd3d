"""Evaluations from the configuration to the report: files, refusals, interruptions."""

import contextlib
import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ctf.common import config
from ctf.common.errors import UserError
from ctf.data.image_set import ImageSet, Splits
from ctf.data.images import open_images
from ctf.evaluation import reference_sets, report
from ctf.evaluation.classifier import SHIPPED, ClassifierConfig, classify, shipped_classifier
from ctf.evaluation.evaluate import Evaluation, add_class_accuracies, prepare, sample_accuracy
from ctf.evaluation.extractors import open_extractor
from ctf.evaluation.reference_sets import open_samples
from ctf.evaluation.report import Report
from ctf.evaluation.sample_cache import GenerationConfig
from ctf.pipelines.folder import hash_pipeline
from ctf.pipelines.pipeline import Pipeline
from ctf.training.classifier import train_classifier
from tests.conftest import CLASSES, SIDE, files
from tests.evaluation.fakes import RealImages, noise
from tests.evaluation.test_inception import random_weights

CPU = torch.device("cpu")
FASHION: dict[str, Any] = {"features": ("fashion",), "device": CPU}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder; cached features of references are shared by all tests."""
    monkeypatch.setenv("CTF_CACHE", str(cache))
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture(scope="module")
def images() -> ImageSet:
    return open_images("fashion-mnist").val


@contextlib.contextmanager
def silent(name: str) -> Iterator[Any]:
    yield lambda done, total: None


@contextlib.contextmanager
def no_generation(name: str) -> Iterator[Any]:
    assert name != "samples" and "search" not in name, "samples are generated again"
    yield lambda done, total: None


def evaluate(model: str | Path, reference: str | Path | None = None, **options: Any) -> Report:
    return prepared(model, reference, **options).run(silent)


def prepared(model: str | Path, reference: str | Path | None = None, **options: Any) -> Evaluation:
    source = None if reference is None else str(reference)
    return prepare(str(model), source, **{**FASHION, **options})


def save_npz(path: Path, pixels: np.ndarray, classes_N: np.ndarray | None = None) -> Path:
    np.savez(path, pixels, *[] if classes_N is None else [classes_N])
    return path


def values(result: Report) -> dict[str, float]:
    return {name: score["value"] for name, score in result.scores.items()}


# --- class accuracy -------------------------------------------------------------------------------


def test_sample_accuracy_is_the_accuracy_of_the_classifier_on_samples(images: ImageSet) -> None:
    pipe, calls = RealImages(images), []
    generation = GenerationConfig(200, seed=5, settings={"guidance": 3.0})
    got = sample_accuracy(pipe, shipped_classifier(), generation, lambda *args: calls.append(args))
    numbers = [pipe.number(i % 10, 5 + i) for i in range(200)]
    correct_N = classify(shipped_classifier(), images.read(numbers)) == np.arange(200) % 10
    assert got.value == pytest.approx(correct_N.mean()) and got.count == 200
    assert 0.8 < got.low < got.value < got.high < 1
    assert calls == [(64, 200), (128, 200), (192, 200), (200, 200)]
    assert all(settings == {"guidance": 3.0} for settings in pipe.settings)


# --- a pipeline -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def done(
    run: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory, cache: Path
) -> tuple[Path, Report]:
    """An evaluation of the run against the pictures that it was trained on."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CTF_CACHE", str(cache))
        out = tmp_path_factory.mktemp("done") / "report.json"
        return out, evaluate(run, pictures, samples=150, seed=3, settings={"top_k": 9}, out=out)


def test_files_and_content_of_the_report(done: tuple[Path, Report], run: Path) -> None:
    out, result = done
    folder = out.with_suffix("")
    assert sorted(files(folder)) == [
        "asked.json", "report.json", "report.md", "samples.npz", "samples.png", "statistics.npz"
    ]  # fmt: skip
    assert out.read_bytes() == (folder / "report.json").read_bytes()
    assert report.load(out) == result
    assert result.subject.name == "run" and result.subject.hash == hash_pipeline(run)
    generation = result.subject.drawing
    assert generation is not None
    assert (generation.samples, generation.seed, generation.balance) == (150, 3, "balanced")
    assert generation.settings["top_k"] == 9 and generation.settings["guidance"] == 2.0
    assert list(result.scores) == [
        "FID-fashion", "IS-fashion", "KID-fashion", "precision-fashion", "recall-fashion",
        "density-fashion", "coverage-fashion",
    ]  # fmt: skip
    assert result.reference.name == "discs (all)" and result.reference.count == 24
    assert result.reference.size == result.size == (SIDE, SIDE) and result.count == 150
    assert result.classifier is None and result.accuracy is None and result.device == "cpu"
    assert list(result.per_class) == list(CLASSES)
    assert all(row.keys() == {"mean distance-fashion"} for row in result.per_class.values())


def test_samples_are_those_of_ctf_sample(done: tuple[Path, Report], run: Path) -> None:
    out, result = done
    samples = open_samples(out.with_suffix("") / "samples.npz")
    pixels = np.concatenate(list(samples.batches()))
    assert samples.fingerprint == result.pictures and samples.classes_N is not None
    pipe, number = Pipeline.from_pretrained(run), 77
    (image,) = pipe.sample([int(samples.classes_N[number])], 3 + number, top_k=9).images
    assert abs(np.asarray(image).astype(int) - pixels[number]).max() <= 1


def test_mean_distances_are_those_of_mean_features(
    done: tuple[Path, Report], pictures: Path
) -> None:
    out, result = done
    samples = open_samples(out.with_suffix("") / "samples.npz")
    assert samples.classes_N is not None
    generated = np.concatenate(list(samples.batches()))
    sets = open_images(str(pictures), SIDE)
    real = np.concatenate([s.read(np.arange(len(s))) for s in (sets.train, sets.val)])
    real_classes = np.concatenate([sets.train.classes_N, sets.val.classes_N])
    fashion = open_extractor("fashion")
    features = [fashion(pixels).pooled_ND.numpy() for pixels in (generated, real)]
    for number, name in enumerate(CLASSES):
        means = [
            rows[classes == number].mean(0)
            for rows, classes in zip(features, (samples.classes_N, real_classes), strict=True)
        ]
        expected = np.square(means[0] - means[1]).sum()
        assert result.per_class[name]["mean distance-fashion"] == pytest.approx(expected, rel=1e-4)


def test_a_finished_evaluation_is_not_repeated(
    done: tuple[Path, Report], run: Path, pictures: Path
) -> None:
    out, result = done
    before = files(out.parent)
    options: dict[str, Any] = {"samples": 150, "seed": 3, "settings": {"top_k": 9}, "out": out}
    assert prepared(run, pictures, **options).run(no_generation) == result
    assert files(out.parent) == before
    out.unlink()
    assert prepared(run, pictures, **options).run(no_generation) == result
    assert files(out.parent) == before


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"samples": 153}, "drawing.samples was 150, now 153"),
        ({"seed": 4}, "drawing.seed was 3, now 4"),
        ({"balance": "uniform"}, 'drawing.balance was "balanced", now "uniform"'),
        ({"settings": {"top_k": 8}}, "drawing.settings.top_k was 9, now 8"),
        ({"resize": 16}, "drawing.resize was null, now 16"),
        ({"split": "train"}, "reference was "),
        ({"background": "black"}, "reference was "),
        ({"features": ("fashion", "lite0")}, "features was "),
        ({"search_samples": 30}, "search_samples was null, now 30"),
    ],
)
def test_another_configuration_is_refused(
    done: tuple[Path, Report], run: Path, pictures: Path, changes: dict[str, Any], difference: str
) -> None:
    out, _ = done
    before = files(out.parent)
    options = {"samples": 150, "seed": 3, "settings": {"top_k": 9}, "out": out, **changes}
    with pytest.raises(UserError, match="an evaluation of another configuration: ") as error:
        prepared(run, pictures, **options)
    assert difference in str(error.value) and "choose another folder" in str(error.value)
    assert len(str(error.value).splitlines()) == 2
    assert files(out.parent) == before


def test_each_configuration_has_its_own_folder(run: Path, pictures: Path, here: Path) -> None:
    one, same, other = (prepared(run, pictures, seed=seed) for seed in (0, 0, 1))
    assert one.folder == same.folder != other.folder
    assert one.folder.parent == Path("evaluations") and one.folder.name.startswith("run-")
    copy = here / "copy"
    shutil.copytree(run, copy)
    assert prepared(copy, pictures).config == one.config  # under any name
    (copy / "pipeline.json").write_text((copy / "pipeline.json").read_text() + " ")
    assert prepared(copy, pictures).config != one.config
    assert os.listdir(here) == ["copy"]  # `prepare` writes nothing


def test_sample_counts_are_rounded_up_to_balanced_classes(run: Path, pictures: Path) -> None:
    generation = prepared(run, pictures, search_samples=1000).subject.drawing
    assert generation is not None and generation.samples == 5001  # 3 classes
    assert prepared(run, pictures, search_samples=1000).search_samples == 1002
    uniform = prepared(run, pictures, search_samples=1000, balance="uniform")
    assert uniform.subject.drawing is not None and uniform.subject.drawing.samples == 5000
    assert uniform.search_samples == 1000


def test_the_included_pipeline_with_all_defaults(here: Path) -> None:
    """lite0 and fashion, the held-out images, class accuracy."""
    evaluation = prepare("fashion-mnist", samples=20, device=CPU)
    assert [extractor.name for extractor in evaluation.extractors] == ["lite0", "fashion"]
    assert evaluation.reference.name == "fashion-mnist (val)"
    assert evaluation.classifier is not None
    few = dataclasses.replace(
        open_samples(save_npz(here / "few.npz", noise(30, 0, 32))), fingerprint="noise"
    )  # instead of all 10,000, to save a minute
    evaluation = dataclasses.replace(evaluation, reference=few)
    result = evaluation.run(silent)
    assert result.accuracy is not None and result.accuracy.value > 0.8
    assert {"FID-Lite0", "IS-Lite0", "KID-fashion", "coverage-fashion"} <= result.scores.keys()
    assert {*result.features} == {"lite0", "fashion"}
    assert all(row.keys() == {"accuracy"} for row in result.per_class.values())
    text = (evaluation.folder / "report.md").read_text()
    assert "| class accuracy |" in text and "| ankle-boot | 100.0% (" in text


def test_a_search_determines_the_settings_of_the_samples(
    run: Path, pictures: Path, here: Path
) -> None:
    evaluation = prepared(run, pictures, samples=12, search_samples=12, out=here / "out")
    result = evaluation.run(silent)
    assert {"search.json", "search.png"} <= files(here / "out").keys()
    points = json.loads((here / "out" / "search.json").read_text())["points"]
    assert len(points) == 16 and result.search_samples == 12
    best = min(points, key=lambda point: point["fid"])["settings"]
    generation = result.subject.drawing
    assert generation is not None and generation.samples == 12 and generation.seed == 0
    assert {name: generation.settings[name] for name in best} == best
    assert generation.settings["fine_guidance"] == 1.0  # the pipeline's own
    plain = evaluate(run, pictures, samples=12, settings=best)
    assert plain.scores == result.scores and plain.pictures == result.pictures
    assert evaluation.run(no_generation) == result


def test_several_features_and_user_defined_ones(run: Path, pictures: Path, here: Path) -> None:
    code = "def make():\n    return lambda x: x.flatten(2).mean(2)\n"
    (here / "my_colours.py").write_text(code)
    spec = "my_colours:make"
    result = evaluate(run, pictures, samples=30, features=("fashion", spec, "fashion"))
    assert list(result.features) == ["fashion", spec]
    assert {f"FID-{spec}", "FID-fashion"} <= result.scores.keys()
    assert f"IS-{spec}" not in result.scores
    assert result.per_class["red"].keys() == {"mean distance-fashion", f"mean distance-{spec}"}
    first = prepared(run, pictures, samples=30, features=(spec, "fashion"))
    again = prepared(run, pictures, samples=30, features=("fashion", spec))
    assert first.config != again.config  # the search uses the first features
    del sys.modules["my_colours"]


# --- images ---------------------------------------------------------------------------------------


def test_samples_on_disk_have_the_same_scores_as_the_pipeline(
    done: tuple[Path, Report], pictures: Path, here: Path
) -> None:
    out, result = done
    path = out.with_suffix("") / "samples.npz"
    from_npz = evaluate(path, pictures, out=here / "npz")
    assert from_npz.scores == result.scores and from_npz.subject.drawing is None
    assert from_npz.subject.hash == from_npz.pictures == result.pictures
    assert sorted(files(here / "npz")) == [
        "asked.json", "report.json", "report.md", "samples.png", "statistics.npz"
    ]  # fmt: skip
    folder = here / "pngs"
    folder.mkdir()
    for i, pixels in enumerate(np.concatenate(list(open_samples(path).batches()))):
        Image.fromarray(pixels).save(folder / f"{i:04d}.png")
    from_folder = evaluate(folder, pictures)
    assert from_folder.scores == result.scores and from_folder.per_class == {}
    statistics = out.with_suffix("") / "statistics.npz"
    itself = evaluate(path, statistics)
    assert itself.scores["FID-fashion"]["value"] == pytest.approx(0, abs=1e-6)
    assert itself.scores.keys() == {"FID-fashion", "IS-fashion"}
    assert itself.reference.count is None
    assert "against statistics.npz.\n" in report.markdown(itself)


def test_real_images_against_themselves_have_perfect_scores(images: ImageSet, here: Path) -> None:
    numbers = np.arange(1000)
    pixels, classes_N = images.read(numbers), images.classes_N[numbers]
    file = save_npz(here / "real.npz", pixels, classes_N)
    result = evaluate(file, file, classifier=SHIPPED)
    found = values(result)
    assert found["FID-fashion"] == pytest.approx(0, abs=1e-6)
    shares = [found[f"{name}-fashion"] for name in ("precision", "recall", "density", "coverage")]
    assert shares == [1, 1, 1, 1]
    correct_N = classify(shipped_classifier(), pixels) == classes_N
    assert result.accuracy is not None and result.accuracy.value == correct_N.mean() > 0.9
    for number, name in enumerate(images.class_names):
        assert result.per_class[name]["accuracy"]["value"] == correct_N[classes_N == number].mean()
        assert result.per_class[name]["accuracy"]["count"] == (classes_N == number).sum()
    assert result.classifier is not None


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
    evaluation = prepare(str(path), "fashion-mnist", device=CPU)
    assert [e.name for e in evaluation.extractors] == ["lite0", "fashion"]
    assert (evaluation.classifier is not None) == (kind in ("folder", "npz"))
    if evaluation.classifier is not None and evaluation.images is not None:
        accuracy = add_class_accuracies(
            {name: {} for name in images.class_names}, evaluation.classifier, evaluation.images
        )
        correct_N = classify(shipped_classifier(), pixels) == classes_N
        assert accuracy.value == correct_N.mean()
        assert evaluation.images.class_names == images.class_names


def test_a_classifier_is_identified_by_its_weights(
    run: Path, pictures: Path, splits: Splits, here: Path
) -> None:
    tiny = ClassifierConfig(width=16, steps=1, batch_size=8, warm_up=1)
    for name, seed in (("a", 0), ("b", 1)):
        train_classifier(splits, here / name, dataclasses.replace(tiny, seed=seed))
    first, same, other = (
        prepared(run, pictures, samples=12, classifier=here / name) for name in "aab"
    )
    assert first.config == same.config != other.config
    assert {*first.config} == {*other.config}
    result = first.run(silent)
    assert result.accuracy is not None and result.accuracy.count == 12
    assert result.classifier == first.classifier_hash is not None
    assert result.per_class["red"].keys() == {"mean distance-fashion", "accuracy"}


# --- interruption ---------------------------------------------------------------------------------

CHILD = """
import contextlib, os, sys, torch
model, reference, out, moment = sys.argv[1:]
from ctf.evaluation.evaluate import prepare
real, left = os.fsync, iter(range(int(moment), -1, -1))
def fsync(handle):
    if next(left) == 0:
        os.kill(os.getpid(), 9)
    return real(handle)
os.fsync = fsync
@contextlib.contextmanager
def silent(name):
    yield lambda done, total: None
from pathlib import Path
evaluation = prepare(
    model, reference, samples=150, seed=3, settings={"top_k": 9}, features=("fashion",),
    out=Path(out), device=torch.device("cpu"),
)
evaluation.run(silent)
"""


def test_a_killed_evaluation_resumes_to_the_same_bits(
    done: tuple[Path, Report],
    run: Path,
    pictures: Path,
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Killed again and again, each time later: before features of the reference are cached, while
    samples are generated and joined, while the report is written."""
    monkeypatch.setenv("CTF_CACHE", str(here / "cache"))
    environment = {**os.environ, "PYTHONPATH": str(Path(report.__file__).parents[2])}
    out, codes = here / "report.json", []
    for moment in (3, 3, 4, 5, 3):
        arguments = [str(run), str(pictures), str(out), str(moment)]
        finished = subprocess.run(
            [sys.executable, "-c", CHILD, *arguments], capture_output=True, env=environment
        )
        codes.append(finished.returncode)
        if finished.returncode != -9:
            break
    assert codes[:3] == [-9, -9, -9], finished.stderr
    options: dict[str, Any] = {"samples": 150, "seed": 3, "settings": {"top_k": 9}, "out": out}
    result = prepared(run, pictures, **options).run(silent)
    undisturbed, _ = done
    assert result == done[1]
    found, expected = files(here / "report"), files(undisturbed.with_suffix(""))
    assert found.keys() == expected.keys()
    for name in ("asked.json", "samples.npz", "statistics.npz", "report.md", "samples.png"):
        assert found[name] == expected[name], name
    assert found["report.json"] == expected["report.json"] == out.read_bytes()


def test_other_folders_and_files_are_left_alone(run: Path, pictures: Path, here: Path) -> None:
    (here / "other").mkdir()
    (here / "other" / "thesis.txt").write_text("mine")
    (here / "mine.json").write_text("mine")
    (here / "file").write_text("mine")
    before = files(here)
    for name, message in (
        ("other", "other exists, but is not an evaluation"),
        ("other.json", "other exists, but is not an evaluation"),
        ("file", "file exists, but is not an evaluation"),
        ("mine.json", "mine.json exists without .*mine, the folder of its evaluation"),
    ):
        with pytest.raises(UserError, match=message):
            prepared(run, pictures, samples=12, out=here / name)
    assert files(here) == before


# --- comparison -----------------------------------------------------------------------------------


def test_comparison_with_another_report(
    done: tuple[Path, Report], run: Path, pictures: Path, here: Path
) -> None:
    out, old = done
    for against in (out, out.with_suffix("")):
        evaluation = prepared(run, pictures, samples=150, against=against)
        assert evaluation.against == old
    # It does not change the scores.
    assert prepared(run, pictures, samples=150).config == evaluation.config
    rows = report.difference_rows(evaluation.run(silent), old)
    assert [row[0] for row in rows] == ["FID-fashion", "IS-fashion", "KID-fashion x 1000"]
    assert {row[3] for row in rows} <= {"yes", "no"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samples": 153}, "it is of 150 images, this one of 153"),
        ({"split": "train"}, "it has another reference"),
        ({"features": ("lite0",)}, "it has the features fashion, here lite0"),
        ({"balance": "uniform"}, "its classes are balanced, here uniform"),
    ],
)
def test_incomparable_reports_are_refused_before_sampling(
    done: tuple[Path, Report], run: Path, pictures: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        prepared(run, pictures, **{"samples": 150, "against": done[0], **changes})


# --- errors ---------------------------------------------------------------------------------------


@pytest.fixture
def paths(run: Path, pictures: Path, images: ImageSet, here: Path) -> dict[str, str]:
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
        "RUN": run, "PICTURES": pictures, "FEW": few, "UNFINISHED": unfinished, "EMPTY": empty,
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
        "the classifier has 10 classes (t-shirt, trouser, pullover, ...), the images have "
        "3 classes (blue, green, red)",
    ),
    ("SAMPLES", "PICTURES", {"classifier": SHIPPED}, "the classes of its images are unknown"),
    ("NUMBERED", "SAMPLES", {"classifier": SHIPPED}, "the images have others, known by number"),
    ("RUN", "PICTURES", {"classifier": SHIPPED, "resize": 16}, "have 16 x 16"),
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
    assert isinstance(known, reference_sets.ImageCollection) and known.statistics is not None


def test_unreadable_images_of_a_reference_can_be_skipped(
    run: Path, pictures: Path, here: Path
) -> None:
    copy = here / "discs"
    shutil.copytree(pictures, copy)
    (copy / "red" / "bad.png").write_bytes(b"not an image")
    with pytest.raises(UserError, match=r"bad\.png"):
        prepared(run, copy)
    assert isinstance(prepared(run, copy, skip_bad=True).reference, reference_sets.ImageCollection)


def test_features_that_are_not_finite_are_refused_before_sampling(
    run: Path, pictures: Path, here: Path
) -> None:
    (here / "my_wrong.py").write_text("def make():\n    return lambda x: x.log().mean((2, 3))\n")
    with pytest.raises(UserError, match="not finite"):
        evaluate(run, pictures, features=("my_wrong:make",), samples=12, out=here / "out")
    assert sorted(files(here / "out")) == ["asked.json"]
    del sys.modules["my_wrong"]


def test_config_is_plain_json(run: Path, pictures: Path) -> None:
    plain = prepared(run, pictures, samples=12).config
    assert json.loads(json.dumps(plain)) == plain
    assert plain["drawing"] == config.to_json(GenerationConfig(**plain["drawing"]))
