"""Evaluations from what is asked to the report: what is kept, what is refused, and after kills."""

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
from ctf.evaluation import evaluate as evaluation
from ctf.evaluation import reference_sets, report
from ctf.evaluation.classifier import SHIPPED, ClassifierConfig, classify, shipped_classifier
from ctf.evaluation.evaluate import Job, prepare, recognised
from ctf.evaluation.reference_sets import open_scored
from ctf.evaluation.report import Result
from ctf.evaluation.sample_cache import Drawing
from ctf.pipelines.folder import hash_pipeline
from ctf.pipelines.pipeline import Pipeline
from ctf.training.classifier import train_classifier
from tests.conftest import CLASSES, SIDE, files
from tests.evaluation.test_inception import random_weights
from tests.gallery import Gallery, noise

CPU = torch.device("cpu")
FASHION: dict[str, Any] = {"features": ("fashion",), "device": CPU}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to be in; the features of references are those of all tests here."""
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
def no_drawing(name: str) -> Iterator[Any]:
    assert name != "draw" and "search" not in name, "samples are drawn again"
    yield lambda done, total: None


def evaluate(model: str | Path, reference: str | Path | None = None, **more: Any) -> Result:
    return job(model, reference, **more).run(silent)


def job(model: str | Path, reference: str | Path | None = None, **more: Any) -> Job:
    given = None if reference is None else str(reference)
    return prepare(str(model), given, **{**FASHION, **more})


def save_npz(path: Path, pixels: np.ndarray, classes_N: np.ndarray | None = None) -> Path:
    np.savez(path, pixels, *[] if classes_N is None else [classes_N])
    return path


def values(result: Result) -> dict[str, float]:
    return {name: score["value"] for name, score in result.scores.items()}


# --- class accuracy -------------------------------------------------------------------------------


def test_recognised_is_the_classifiers_accuracy_on_what_is_drawn(images: ImageSet) -> None:
    gallery, seen = Gallery(images), []
    asked = Drawing(200, seed=5, settings={"guidance": 3.0})
    got = recognised(gallery, shipped_classifier(), asked, lambda *given: seen.append(given))
    numbers = [gallery.number(i % 10, 5 + i) for i in range(200)]
    right_N = classify(shipped_classifier(), images.read(numbers)).classes_N == np.arange(200) % 10
    assert got.value == pytest.approx(right_N.mean()) and got.count == 200
    assert 0.8 < got.low < got.value < got.high < 1
    assert seen == [(64, 200), (128, 200), (192, 200), (200, 200)]
    assert all(settings == {"guidance": 3.0} for settings in gallery.settings)


# --- a pipeline -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def done(
    run: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory, cache: Path
) -> tuple[Path, Result]:
    """An evaluation of the run against the pictures that it was trained on."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CTF_CACHE", str(cache))
        out = tmp_path_factory.mktemp("done") / "report.json"
        return out, evaluate(run, pictures, samples=150, seed=3, settings={"top_k": 9}, out=out)


def test_what_is_kept(done: tuple[Path, Result], run: Path) -> None:
    out, result = done
    folder = out.with_suffix("")
    assert sorted(files(folder)) == [
        "asked.json", "report.json", "report.md", "samples.npz", "samples.png", "statistics.npz"
    ]  # fmt: skip
    assert out.read_bytes() == (folder / "report.json").read_bytes()
    assert report.load(out) == result
    assert result.subject.name == "run" and result.subject.hash == hash_pipeline(run)
    drawing = result.subject.drawing
    assert drawing is not None and (drawing.samples, drawing.seed, drawing.balance) == (
        150, 3, "balanced"
    )  # fmt: skip
    assert drawing.settings["top_k"] == 9 and drawing.settings["guidance"] == 2.0
    assert list(result.scores) == [
        "FID-fashion", "IS-fashion", "KID-fashion", "precision-fashion", "recall-fashion",
        "density-fashion", "coverage-fashion",
    ]  # fmt: skip
    assert result.reference.name == "discs (all)" and result.reference.count == 24
    assert result.reference.size == result.size == (SIDE, SIDE) and result.count == 150
    assert result.classifier is None and result.accuracy is None and result.device == "cpu"
    assert list(result.per_class) == list(CLASSES)
    assert all(row.keys() == {"mean distance-fashion"} for row in result.per_class.values())


def test_the_samples_are_those_of_ctf_sample(done: tuple[Path, Result], run: Path) -> None:
    out, result = done
    kept = open_scored(out.with_suffix("") / "samples.npz")
    pixels = np.concatenate(list(kept.batches()))
    assert kept.fingerprint == result.pictures and kept.classes_N is not None
    pipe, number = Pipeline.from_pretrained(run), 77
    (image,) = pipe.sample([int(kept.classes_N[number])], 3 + number, top_k=9).images
    assert abs(np.asarray(image).astype(int) - pixels[number]).max() <= 1


def test_mean_distances_are_those_of_mean_features(
    done: tuple[Path, Result], pictures: Path
) -> None:
    out, result = done
    kept = open_scored(out.with_suffix("") / "samples.npz")
    assert kept.classes_N is not None
    drawn = np.concatenate(list(kept.batches()))
    sets = open_images(str(pictures), SIDE)
    real = np.concatenate([s.read(np.arange(len(s))) for s in (sets.train, sets.val)])
    real_classes = np.concatenate([sets.train.classes_N, sets.val.classes_N])
    features = [classify(shipped_classifier(), pixels).features_ND for pixels in (drawn, real)]
    for number, name in enumerate(CLASSES):
        means = [
            rows[classes == number].mean(0)
            for rows, classes in zip(features, (kept.classes_N, real_classes), strict=True)
        ]
        expected = np.square(means[0] - means[1]).sum()
        assert result.per_class[name]["mean distance-fashion"] == pytest.approx(expected, rel=1e-4)


def test_run_again_it_is_done(done: tuple[Path, Result], run: Path, pictures: Path) -> None:
    out, result = done
    before = files(out.parent)
    asked: dict[str, Any] = {"samples": 150, "seed": 3, "settings": {"top_k": 9}, "out": out}
    assert job(run, pictures, **asked).run(no_drawing) == result
    assert files(out.parent) == before
    out.unlink()
    assert job(run, pictures, **asked).run(no_drawing) == result
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
def test_another_question_is_refused(
    done: tuple[Path, Result], run: Path, pictures: Path, changes: dict[str, Any], difference: str
) -> None:
    out, _ = done
    before = files(out.parent)
    asked = {"samples": 150, "seed": 3, "settings": {"top_k": 9}, "out": out, **changes}
    with pytest.raises(UserError, match="an evaluation of another configuration: ") as error:
        job(run, pictures, **asked)
    assert difference in str(error.value) and "choose another folder" in str(error.value)
    assert len(str(error.value).splitlines()) == 2
    assert files(out.parent) == before


def test_each_question_has_a_folder_of_its_own(run: Path, pictures: Path, here: Path) -> None:
    one, same, other = (job(run, pictures, seed=seed) for seed in (0, 0, 1))
    assert one.folder == same.folder != other.folder
    assert one.folder.parent == Path("evaluations") and one.folder.name.startswith("run-")
    copy = here / "copy"
    shutil.copytree(run, copy)
    assert job(copy, pictures).asked == one.asked  # whatever it is called
    (copy / "pipeline.json").write_text((copy / "pipeline.json").read_text() + " ")
    assert job(copy, pictures).asked != one.asked
    assert os.listdir(here) == ["copy"]  # nothing is written before it runs


def test_by_default_as_many_as_the_classes_can_share(run: Path, pictures: Path) -> None:
    drawing = job(run, pictures, search_samples=1000).subject.drawing
    assert drawing is not None and drawing.samples == 5001  # of 3 classes
    assert job(run, pictures, search_samples=1000).search_samples == 1002
    uniform = job(run, pictures, search_samples=1000, balance="uniform")
    assert uniform.subject.drawing is not None and uniform.subject.drawing.samples == 5000
    assert uniform.search_samples == 1000


def test_the_shipped_pipeline_with_all_defaults(here: Path) -> None:
    """lite0 and fashion, the held-out pictures, class accuracy: nothing has to be given."""
    asked = prepare("fashion-mnist", samples=20, device=CPU)
    assert [extractor.name for extractor in asked.extractors] == ["lite0", "fashion"]
    assert asked.reference.name == "fashion-mnist (val)" and asked.judge is not None
    few = dataclasses.replace(
        open_scored(save_npz(here / "few.npz", noise(30, 0, 32))), fingerprint="noise"
    )  # instead of all 10,000, to save a minute
    asked = dataclasses.replace(asked, reference=few)
    result = asked.run(silent)
    assert result.accuracy is not None and result.accuracy.value > 0.8
    assert {"FID-Lite0", "IS-Lite0", "KID-fashion", "coverage-fashion"} <= result.scores.keys()
    assert {*result.features} == {"lite0", "fashion"}
    assert all(row.keys() == {"accuracy"} for row in result.per_class.values())
    said = (asked.folder / "report.md").read_text()
    assert "| class accuracy |" in said and "| ankle-boot | 100.0% (" in said


def test_a_search_comes_first(run: Path, pictures: Path, here: Path) -> None:
    asked = job(run, pictures, samples=12, search_samples=12, out=here / "out")
    result = asked.run(silent)
    assert {"search.json", "search.png"} <= files(here / "out").keys()
    points = json.loads((here / "out" / "search.json").read_text())["points"]
    assert len(points) == 16 and result.search_samples == 12
    best = min(points, key=lambda point: point["fid"])["settings"]
    drawing = result.subject.drawing
    assert drawing is not None and drawing.samples == 12 and drawing.seed == 0
    assert {name: drawing.settings[name] for name in best} == best
    assert drawing.settings["fine_guidance"] == 1.0  # as the pipeline has it
    plain = evaluate(run, pictures, samples=12, settings=best)
    assert plain.scores == result.scores and plain.pictures == result.pictures
    assert asked.run(no_drawing) == result


def test_several_features_and_those_of_the_user(run: Path, pictures: Path, here: Path) -> None:
    code = "def make():\n    return lambda x: x.flatten(2).mean(2)\n"
    (here / "my_colours.py").write_text(code)
    spec = "my_colours:make"
    result = evaluate(run, pictures, samples=30, features=("fashion", spec, "fashion"))
    assert list(result.features) == ["fashion", spec]
    assert {f"FID-{spec}", "FID-fashion"} <= result.scores.keys()
    assert f"IS-{spec}" not in result.scores
    assert result.per_class["red"].keys() == {"mean distance-fashion", f"mean distance-{spec}"}
    first = job(run, pictures, samples=30, features=(spec, "fashion"))
    again = job(run, pictures, samples=30, features=("fashion", spec))
    assert first.asked != again.asked  # the search is by the first ones
    del sys.modules["my_colours"]


# --- pictures -------------------------------------------------------------------------------------


def test_kept_samples_score_as_the_pipeline_did(
    done: tuple[Path, Result], pictures: Path, here: Path
) -> None:
    out, result = done
    kept = out.with_suffix("") / "samples.npz"
    from_npz = evaluate(kept, pictures, out=here / "npz")
    assert from_npz.scores == result.scores and from_npz.subject.drawing is None
    assert from_npz.subject.hash == from_npz.pictures == result.pictures
    assert sorted(files(here / "npz")) == [
        "asked.json", "report.json", "report.md", "samples.png", "statistics.npz"
    ]  # fmt: skip
    folder = here / "pngs"
    folder.mkdir()
    for i, pixels in enumerate(np.concatenate(list(open_scored(kept).batches()))):
        Image.fromarray(pixels).save(folder / f"{i:04d}.png")
    from_folder = evaluate(folder, pictures)
    assert from_folder.scores == result.scores and from_folder.per_class == {}
    statistics = out.with_suffix("") / "statistics.npz"
    itself = evaluate(kept, statistics)
    assert itself.scores["FID-fashion"]["value"] == pytest.approx(0, abs=1e-6)
    assert itself.scores.keys() == {"FID-fashion", "IS-fashion"}
    assert itself.reference.count is None
    assert "against statistics.npz.\n" in report.markdown(itself)


def test_real_pictures_against_themselves(images: ImageSet, here: Path) -> None:
    numbers = np.arange(1000)
    pixels, classes_N = images.read(numbers), images.classes_N[numbers]
    file = save_npz(here / "real.npz", pixels, classes_N)
    result = evaluate(file, file, classifier=SHIPPED)
    found = values(result)
    assert found["FID-fashion"] == pytest.approx(0, abs=1e-6)
    shares = [found[f"{name}-fashion"] for name in ("precision", "recall", "density", "coverage")]
    assert shares == [1, 1, 1, 1]
    right_N = classify(shipped_classifier(), pixels).classes_N == classes_N
    assert result.accuracy is not None and result.accuracy.value == right_N.mean() > 0.9
    for number, name in enumerate(images.class_names):
        assert result.per_class[name]["accuracy"]["value"] == right_N[classes_N == number].mean()
        assert result.per_class[name]["accuracy"]["count"] == (classes_N == number).sum()
    assert result.classifier is not None


@pytest.mark.parametrize("kind", ["folder", "npz", "unknown", "other", "large"])
def test_whose_class_is_known_is_judged(images: ImageSet, here: Path, kind: str) -> None:
    """Of pictures like Fashion-MNIST by the shipped classifier; other ones are not, silently."""
    pixels, classes_N = images.read(np.arange(40)), images.classes_N[:40]
    path = here / "drawn.npz"
    if kind == "folder":  # in another order than the classifier's
        path = here / "drawn"
        for i, (picture, number) in enumerate(zip(pixels, classes_N, strict=True)):
            (path / images.class_names[number]).mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(path / images.class_names[number] / f"{i}.png")
    elif kind == "large":
        save_npz(path, np.repeat(np.repeat(pixels, 2, 1), 2, 2)[:, ::2], classes_N)
    else:
        known = {"npz": classes_N, "unknown": None, "other": classes_N + 1}[kind]
        save_npz(path, pixels, known)
    asked = prepare(str(path), "fashion-mnist", device=CPU)
    if kind == "large":
        assert [e.name for e in asked.extractors] == ["lite0", "fashion"] and asked.judge is None
        return
    assert [e.name for e in asked.extractors] == ["lite0", "fashion"]
    assert (asked.judge is not None) == (kind in ("folder", "npz"))
    if asked.judge is not None and asked.pictures is not None:
        accuracy = evaluation._add_accuracy(
            {name: {} for name in images.class_names}, asked.judge.classifier, asked.pictures
        )
        right_N = classify(shipped_classifier(), pixels).classes_N == classes_N
        assert accuracy.value == right_N.mean()
        assert asked.pictures.class_names == images.class_names


def test_a_classifier_is_known_by_its_weights(
    run: Path, pictures: Path, splits: Splits, here: Path
) -> None:
    tiny = ClassifierConfig(width=16, steps=1, batch_size=8, warm_up=1)
    for name, seed in (("a", 0), ("b", 1)):
        train_classifier(splits, here / name, dataclasses.replace(tiny, seed=seed))
    jobs = [job(run, pictures, samples=12, classifier=here / name) for name in "aab"]
    assert jobs[0].asked == jobs[1].asked != jobs[2].asked
    assert {*jobs[0].asked} == {*jobs[2].asked}
    result = jobs[0].run(silent)
    assert result.accuracy is not None and result.accuracy.count == 12
    assert jobs[0].judge is not None and result.classifier == jobs[0].judge.hash
    assert result.per_class["red"].keys() == {"mean distance-fashion", "accuracy"}


# --- kills ----------------------------------------------------------------------------------------

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
job = prepare(model, reference, samples=150, seed=3, settings={"top_k": 9}, features=("fashion",),
              out=Path(out), device=torch.device("cpu"))
job.run(silent)
"""


def test_killed_it_ends_the_same(
    done: tuple[Path, Result],
    run: Path,
    pictures: Path,
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Again and again, each time later: with features of the reference not kept yet, while
    samples are drawn and put together, while the report is written."""
    monkeypatch.setenv("CTF_CACHE", str(here / "cache"))
    environment = {**os.environ, "PYTHONPATH": str(Path(evaluation.__file__).parents[2])}
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
    asked: dict[str, Any] = {"samples": 150, "seed": 3, "settings": {"top_k": 9}, "out": out}
    result = job(run, pictures, **asked).run(silent)
    undisturbed, _ = done
    assert result == done[1]
    found, expected = files(here / "report"), files(undisturbed.with_suffix(""))
    assert found.keys() == expected.keys()
    for name in ("asked.json", "samples.npz", "statistics.npz", "report.md", "samples.png"):
        assert found[name] == expected[name], name
    assert found["report.json"] == expected["report.json"] == out.read_bytes()


def test_nothing_is_done_in_the_folder_of_something_else(
    run: Path, pictures: Path, here: Path
) -> None:
    (here / "other").mkdir()
    (here / "other" / "thesis.txt").write_text("mine")
    (here / "mine.json").write_text("mine")
    (here / "file").write_text("mine")
    before = files(here)
    for name, message in (
        ("other", "other exists, but is not an evaluation"),
        ("other.json", "other exists, but is not an evaluation"),
        ("file", "file exists, but is not an evaluation"),
        ("mine.json", "mine.json exists, without the folder"),
    ):
        with pytest.raises(UserError, match=message):
            job(run, pictures, samples=12, out=here / name)
    assert files(here) == before


# --- comparing ------------------------------------------------------------------------------------


def test_against_another_report(
    done: tuple[Path, Result], run: Path, pictures: Path, here: Path
) -> None:
    out, old = done
    for against in (out, out.with_suffix("")):
        asked = job(run, pictures, samples=150, against=against)
        assert asked.against == old
    assert job(run, pictures, samples=150).asked == asked.asked  # the scores are the same
    rows = report.difference_rows(asked.run(silent), old)
    assert [row[0] for row in rows] == ["FID-fashion", "IS-fashion", "KID-fashion x 1000"]
    assert {row[3] for row in rows} <= {"yes", "no"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samples": 153}, "is of 150 pictures, this one of 153"),
        ({"split": "train"}, "against another reference"),
        ({"features": ("lite0",)}, "by other features"),
        ({"balance": "uniform"}, "of balanced classes, this one of uniform ones"),
    ],
)
def test_what_cannot_be_compared_is_told_before_it_is_drawn(
    done: tuple[Path, Result], run: Path, pictures: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        job(run, pictures, **{"samples": 150, "against": done[0], **changes})


# --- what cannot be done --------------------------------------------------------------------------


@pytest.fixture
def places(run: Path, pictures: Path, images: ImageSet, here: Path) -> dict[str, str]:
    """Words of the cases below -> what they stand for."""
    few = here.parent / "few"
    for i in range(6):
        (few / CLASSES[i % 3]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise(1, i, 40)[0]).save(few / CLASSES[i % 3] / f"{i}.png")
    unfinished = here.parent / "unfinished"
    shutil.copytree(run, unfinished)
    (unfinished / "pipeline.json").unlink()
    empty = here.parent / "empty"
    empty.mkdir()
    drawn = save_npz(here.parent / "drawn.npz", noise(30, 0, 40))
    numbered = save_npz(here.parent / "numbered.npz", noise(30, 0, 32), np.arange(30))
    nine = save_npz(here.parent / "nine.npz", noise(9, 0, 32))
    ones = {"mu": np.zeros(7), "sigma": np.eye(7)}
    np.savez(here.parent / "seven.npz", **ones)
    np.savez(here.parent / "others.npz", **ones, features=np.array("made of others"))
    paths = {
        "RUN": run, "PICTURES": pictures, "FEW": few, "UNFINISHED": unfinished, "EMPTY": empty,
        "DRAWN": drawn, "NUMBERED": numbered, "NINE": nine, "SHIPPED": SHIPPED,
        "SEVEN": here.parent / "seven.npz", "OTHERS": here.parent / "others.npz",
    }  # fmt: skip
    return {word: str(path) for word, path in paths.items()}


MISTAKES: list[tuple[str, str | None, dict[str, Any], str]] = [
    ("nowhere", "PICTURES", {}, "no pipeline 'nowhere'"),
    ("nowhere.npz", "PICTURES", {}, "nowhere.npz: not found"),
    ("EMPTY", "PICTURES", {}, "holds no pictures"),
    ("UNFINISHED", "PICTURES", {}, "pipeline.json: not found"),
    ("SEVEN", "PICTURES", {}, "holds statistics and no pictures (arr_0)"),
    ("RUN", None, {}, "nothing to score against; give a --reference"),
    ("DRAWN", None, {}, "nothing to score against; give a --reference"),
    ("RUN", "nowhere", {}, "nowhere: no such folder"),
    ("RUN", "nowhere.npz", {}, "nowhere.npz: not found"),
    ("RUN", "FEW", {}, "6 pictures of the reference few (all): expected 10 or more"),
    ("RUN", "NINE", {}, "9 pictures of the reference nine.npz: expected 10 or more"),
    ("NINE", "PICTURES", {}, "9 pictures scored: expected 10 or more"),
    ("RUN", "PICTURES", {"samples": 9}, "9 pictures scored: expected 10 or more"),
    ("RUN", "PICTURES", {"samples": 0}, "got 0 samples, expected 1 or more"),
    ("RUN", "PICTURES", {"samples": 31}, "31 samples cannot be shared equally among 3 classes"),
    ("RUN", "PICTURES", {"search_samples": 6}, "6 pictures of each point of the search"),
    ("RUN", "PICTURES", {"search_samples": -2}, "0 pictures of each point of the search"),
    (
        "RUN", "PICTURES", {"search_samples": 30, "settings": {"temperature": 1.0}},
        "temperature is given, and is what --search finds",
    ),
    ("RUN", "PICTURES", {"seed": 2**63}, "seed: got 9223372036854775808"),
    ("RUN", "PICTURES", {"settings": {"top_p": 2.0}}, "top_p: got 2.0"),
    ("RUN", "PICTURES", {"resize": 4}, "image size 4"),
    ("RUN", "PICTURES", {"features": ("lite1",)}, "unknown features 'lite1'"),
    ("RUN", "PICTURES", {"weights": Path("w.pth")}, "only --features inception takes weights"),
    ("RUN", "PICTURES", {"features": ("inception",), "weights": Path("w")}, "w: no such file"),
    ("RUN", "PICTURES", {"classifier": Path("none")}, "none/config.json: not found"),
    (
        "RUN", "PICTURES", {"classifier": SHIPPED},
        "the classifier knows 10 classes (t-shirt, trouser, pullover, ...), the pictures are of "
        "3 classes (blue, green, red)",
    ),
    ("DRAWN", "PICTURES", {"classifier": SHIPPED}, "does not say what classes its pictures are of"),
    ("NUMBERED", "DRAWN", {"classifier": SHIPPED}, "the pictures are of other ones, by number"),
    ("RUN", "PICTURES", {"classifier": SHIPPED, "resize": 16}, "have 16 x 16"),
    ("RUN", "PICTURES", {"against": Path("none.json")}, "none.json: not found"),
    ("RUN", "SEVEN", {}, "seven.npz: statistics of 7 features, but fashion has 128"),
    ("RUN", "OTHERS", {}, "others.npz: made with other features than fashion"),
    ("RUN", "DRAWN", {"split": "val"}, "an .npz file has no splits"),
    ("RUN", "PICTURES", {"background": "bleu"}, "unknown colour 'bleu'"),
    ("RUN", "fashion-mnist", {"resize": 64}, "fewer than --image-size 64"),
    *[
        ("DRAWN", "PICTURES", more, "pictures, which are all scored as they are")
        for more in (
            {"samples": 5}, {"resize": 32}, {"search_samples": 9}, {"settings": {"top_k": 1}}
        )
    ],
]  # fmt: skip


@pytest.mark.parametrize(("model", "reference", "more", "message"), MISTAKES)
def test_mistakes_are_told_before_anything_is_drawn(
    model: str,
    reference: str | None,
    more: dict[str, Any],
    message: str,
    places: dict[str, str],
    here: Path,
) -> None:
    with pytest.raises(UserError) as error:
        job(places.get(model, model), places.get(reference or "", reference), **more)
    assert message in str(error.value)
    assert len(str(error.value).splitlines()) <= 2
    assert os.listdir(here) == []


def test_statistics_beside_pictures_are_checked_for_inception(run: Path, here: Path) -> None:
    """In ADM's reference batches; other features do not use them."""
    torch.save(random_weights(0), here / "inception.pth")
    inception = {"features": ("inception",), "weights": here / "inception.pth"}
    pixels, path = noise(12, 0, 32), here / "batch.npz"
    np.savez(path, pixels, mu=np.zeros(7), sigma=np.eye(7))
    assert job(run, path).reference.name == "batch.npz"
    with pytest.raises(UserError, match=r"statistics of 7 features, but inception has 2048"):
        job(run, path, **inception)
    np.savez(path, pixels, mu=np.zeros(2048), sigma=np.eye(2048))
    known = job(run, path, **inception).reference
    assert isinstance(known, reference_sets.Collection) and known.statistics is not None


def test_bad_pictures_of_a_reference_can_be_left_out(run: Path, pictures: Path, here: Path) -> None:
    copy = here / "discs"
    shutil.copytree(pictures, copy)
    (copy / "red" / "bad.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"bad\.png"):
        job(run, copy)
    assert isinstance(job(run, copy, skip_bad=True).reference, reference_sets.Collection)


def test_a_network_that_fails_is_told_by_its_line(run: Path, pictures: Path, here: Path) -> None:
    (here / "my_wrong.py").write_text("def make():\n    return lambda x: x.log().mean((2, 3))\n")
    with pytest.raises(UserError, match="not finite"):
        evaluate(run, pictures, features=("my_wrong:make",), samples=12, out=here / "out")
    assert sorted(files(here / "out")) == ["asked.json"]  # told before anything was drawn
    del sys.modules["my_wrong"]


def test_what_was_asked_can_be_read(run: Path, pictures: Path) -> None:
    asked = job(run, pictures, samples=12).asked
    assert json.loads(json.dumps(asked)) == asked
    assert asked["drawing"] == config.to_json(Drawing(**asked["drawing"]))
