"""Evaluations: files and content of the report, resumption, comparison."""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ctf.common.errors import UserError
from ctf.data.image_set import ImageSet
from ctf.data.images import open_images
from ctf.evaluation import report
from ctf.evaluation.classifier import SHIPPED, classify, shipped_classifier
from ctf.evaluation.evaluate import sample_accuracy
from ctf.evaluation.extractors import open_extractor
from ctf.evaluation.options import EvaluationOptions
from ctf.evaluation.prepare import prepare
from ctf.evaluation.reference_sets import open_samples
from ctf.evaluation.report import Report
from ctf.evaluation.sample_cache import GenerationConfig
from ctf.pipelines.folder import hash_pipeline
from ctf.pipelines.pipeline import Pipeline
from tests.conftest import CLASSES, SIDE, read_files
from tests.evaluation.helpers import RealImages, noise, prepared, save_npz, silent

pytestmark = pytest.mark.usefixtures("here")


@contextlib.contextmanager
def no_generation(name: str) -> Iterator[Any]:
    assert name != "samples" and "search" not in name, "samples are generated again"
    yield lambda done, total: None


def evaluate(model: str | Path, reference: str | Path | None = None, **options: Any) -> Report:
    return prepared(model, reference, **options).run(silent)


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
    run: Path, image_folder: Path, tmp_path_factory: pytest.TempPathFactory, shared_cache: Path
) -> tuple[Path, Report]:
    """An evaluation of the run against the pictures that it was trained on."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CTF_CACHE", str(shared_cache))
        out = tmp_path_factory.mktemp("done") / "report.json"
        return out, evaluate(run, image_folder, samples=150, seed=3, settings={"top_k": 9}, out=out)


def test_files_and_content_of_the_report(done: tuple[Path, Report], run: Path) -> None:
    out, result = done
    folder = out.with_suffix("")
    assert sorted(read_files(folder)) == [
        "asked.json", "report.json", "report.md", "samples.npz", "samples.png", "settings.json",
        "statistics.npz",
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
    done: tuple[Path, Report], image_folder: Path
) -> None:
    out, result = done
    samples = open_samples(out.with_suffix("") / "samples.npz")
    assert samples.classes_N is not None
    generated = np.concatenate(list(samples.batches()))
    sets = open_images(str(image_folder), SIDE)
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
    done: tuple[Path, Report], run: Path, image_folder: Path
) -> None:
    out, result = done
    before = read_files(out.parent)
    options: dict[str, Any] = {"samples": 150, "seed": 3, "settings": {"top_k": 9}, "out": out}
    assert prepared(run, image_folder, **options).run(no_generation) == result
    assert read_files(out.parent) == before
    out.unlink()
    assert prepared(run, image_folder, **options).run(no_generation) == result
    assert read_files(out.parent) == before


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
    done: tuple[Path, Report],
    run: Path,
    image_folder: Path,
    changes: dict[str, Any],
    difference: str,
) -> None:
    out, _ = done
    before = read_files(out.parent)
    options = {"samples": 150, "seed": 3, "settings": {"top_k": 9}, "out": out, **changes}
    with pytest.raises(UserError, match="an evaluation of another configuration: ") as error:
        prepared(run, image_folder, **options)
    assert difference in str(error.value) and "choose another folder" in str(error.value)
    assert len(str(error.value).splitlines()) == 2
    assert read_files(out.parent) == before


def test_the_included_pipeline_with_all_defaults(here: Path) -> None:
    """lite0 and fashion, the held-out images, class accuracy."""
    evaluation = prepare("fashion-mnist", EvaluationOptions(samples=20), device=torch.device("cpu"))
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
    run: Path, image_folder: Path, here: Path
) -> None:
    evaluation = prepared(run, image_folder, samples=12, search_samples=12, out=here / "out")
    result = evaluation.run(silent)
    assert {"search.json", "search.png"} <= read_files(here / "out").keys()
    points = json.loads((here / "out" / "search.json").read_text())["points"]
    assert len(points) == 16 and result.search_samples == 12
    best = min(points, key=lambda point: point["fid"])["settings"]
    generation = result.subject.drawing
    assert generation is not None and generation.samples == 12 and generation.seed == 0
    assert {name: generation.settings[name] for name in best} == best
    assert generation.settings["fine_guidance"] == 1.0  # the pipeline's own
    plain = evaluate(run, image_folder, samples=12, settings=best)
    assert plain.scores == result.scores and plain.pictures == result.pictures
    assert evaluation.run(no_generation) == result


def test_several_features_and_user_defined_ones(run: Path, image_folder: Path, here: Path) -> None:
    code = "def make():\n    return lambda x: x.flatten(2).mean(2)\n"
    (here / "my_colours.py").write_text(code)
    spec = "my_colours:make"
    result = evaluate(run, image_folder, samples=30, features=("fashion", spec, "fashion"))
    assert list(result.features) == ["fashion", spec]
    assert {f"FID-{spec}", "FID-fashion"} <= result.scores.keys()
    assert f"IS-{spec}" not in result.scores
    assert result.per_class["red"].keys() == {"mean distance-fashion", f"mean distance-{spec}"}
    first = prepared(run, image_folder, samples=30, features=(spec, "fashion"))
    again = prepared(run, image_folder, samples=30, features=("fashion", spec))
    assert first.config != again.config  # the search uses the first features
    del sys.modules["my_colours"]


# --- images ---------------------------------------------------------------------------------------


def test_samples_on_disk_have_the_same_scores_as_the_pipeline(
    done: tuple[Path, Report], image_folder: Path, here: Path
) -> None:
    out, result = done
    path = out.with_suffix("") / "samples.npz"
    from_npz = evaluate(path, image_folder, out=here / "npz")
    assert from_npz.scores == result.scores and from_npz.subject.drawing is None
    assert from_npz.subject.hash == from_npz.pictures == result.pictures
    assert sorted(read_files(here / "npz")) == [
        "asked.json", "report.json", "report.md", "samples.png", "statistics.npz"
    ]  # fmt: skip
    folder = here / "pngs"
    folder.mkdir()
    for i, pixels in enumerate(np.concatenate(list(open_samples(path).batches()))):
        Image.fromarray(pixels).save(folder / f"{i:04d}.png")
    from_folder = evaluate(folder, image_folder)
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


# --- interruption ---------------------------------------------------------------------------------

# Each evaluation runs in a fork of a process that has only done its imports. It is killed before it
# syncs a file for the nth time.
KILLED_EVALUATIONS = """
import contextlib, json, os, sys, torch
from pathlib import Path
from ctf.evaluation.options import EvaluationOptions
from ctf.evaluation.prepare import prepare

@contextlib.contextmanager
def silent(name):
    yield lambda done, total: None

def evaluate(moment):
    real, left = os.fsync, iter(range(moment, -1, -1))
    def fsync(handle):
        if next(left) == 0:
            os.kill(os.getpid(), 9)
        return real(handle)
    os.fsync = fsync
    options = EvaluationOptions(
        reference, samples=150, out=Path(out), features=("fashion",), seed=3
    )
    prepare(
        model, options, settings={"top_k": 9}, device=torch.device("cpu")
    ).run(silent)

model, reference, out, *moments = sys.argv[1:]
codes = []
for moment in moments:
    child = os.fork()
    if child == 0:
        evaluate(int(moment))
        os._exit(0)
    codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(json.dumps(codes))
"""


def test_a_killed_evaluation_resumes_to_the_same_bits(
    done: tuple[Path, Report],
    run: Path,
    image_folder: Path,
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Killed again and again, each time later: before features of the reference are cached, while
    samples are generated and joined, while the report is written."""
    monkeypatch.setenv("CTF_CACHE", str(here / "cache"))
    environment = {**os.environ, "PYTHONPATH": str(Path(report.__file__).parents[2])}
    out, moments = here / "report.json", ("3", "3", "4", "5", "3")
    finished = subprocess.run(
        [sys.executable, "-c", KILLED_EVALUATIONS, str(run), str(image_folder), str(out), *moments],
        capture_output=True,
        env=environment,
    )
    assert finished.returncode == 0, finished.stderr
    codes = json.loads(finished.stdout)
    assert codes[:3] == [-9, -9, -9], finished.stderr
    options: dict[str, Any] = {"samples": 150, "seed": 3, "settings": {"top_k": 9}, "out": out}
    result = prepared(run, image_folder, **options).run(silent)
    uninterrupted, expected_result = done
    assert result == expected_result
    found, expected = read_files(here / "report"), read_files(uninterrupted.with_suffix(""))
    assert found.keys() == expected.keys()
    for name in ("asked.json", "samples.npz", "statistics.npz", "report.md", "samples.png"):
        assert found[name] == expected[name], name
    assert found["report.json"] == expected["report.json"] == out.read_bytes()


def test_other_folders_and_files_are_left_alone(run: Path, image_folder: Path, here: Path) -> None:
    (here / "other").mkdir()
    (here / "other" / "thesis.txt").write_text("mine")
    (here / "mine.json").write_text("mine")
    (here / "file").write_text("mine")
    before = read_files(here)
    for name, message in (
        ("other", "other exists, but is not an evaluation"),
        ("other.json", "other exists, but is not an evaluation"),
        ("file", "file exists, but is not an evaluation"),
        ("mine.json", "mine.json exists without .*mine, the folder of its evaluation"),
    ):
        with pytest.raises(UserError, match=message):
            prepared(run, image_folder, samples=12, out=here / name)
    assert read_files(here) == before


# --- comparison -----------------------------------------------------------------------------------


def test_comparison_with_another_report(
    done: tuple[Path, Report], run: Path, image_folder: Path, here: Path
) -> None:
    out, old = done
    for against in (out, out.with_suffix("")):
        evaluation = prepared(run, image_folder, samples=150, against=against)
        assert evaluation.against == old
    # It does not change the scores.
    assert prepared(run, image_folder, samples=150).config == evaluation.config
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
    done: tuple[Path, Report], run: Path, image_folder: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        prepared(run, image_folder, **{"samples": 150, "against": done[0], **changes})


def test_features_that_are_not_finite_are_refused_before_sampling(
    run: Path, image_folder: Path, here: Path
) -> None:
    (here / "my_wrong.py").write_text("def make():\n    return lambda x: x.log().mean((2, 3))\n")
    with pytest.raises(UserError, match="not finite"):
        evaluate(run, image_folder, features=("my_wrong:make",), samples=12, out=here / "out")
    assert sorted(read_files(here / "out")) == ["asked.json"]
    del sys.modules["my_wrong"]
