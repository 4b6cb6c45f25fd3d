"""Class accuracy of a pipeline, with one that draws real pictures of the class asked for."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ctf.classifier import Classifier, classify, shipped_classifier
from ctf.config import to_json
from ctf.errors import UserError
from ctf.evaluation import evaluate
from ctf.images import ImageSet, open_images


class Gallery:
    """Picture i of a call is the test picture number seed + i among those of its class."""

    def __init__(self, images: ImageSet) -> None:
        self.class_names = images.class_names
        self.images = images
        self.calls: list[tuple[list[int], int, dict[str, Any]]] = []

    def pick(self, c: int, seed: int) -> int:
        return int(np.flatnonzero(self.images.classes_N == c)[seed])

    def sample(self, *, classes: Sequence[int], seed: int, **settings: Any) -> SimpleNamespace:
        self.calls.append((list(classes), seed, settings))
        numbers = [self.pick(c, seed + i) for i, c in enumerate(classes)]
        return SimpleNamespace(images=[Image.fromarray(p) for p in self.images.read(numbers)])


@pytest.fixture(scope="module")
def classifier() -> Classifier:
    return shipped_classifier()


@pytest.fixture(scope="module")
def images() -> ImageSet:
    return open_images("fashion-mnist").val


def test_accuracy_is_the_classifiers_on_the_pictures_drawn(
    classifier: Classifier, images: ImageSet
) -> None:
    pipeline = Gallery(images)
    progress: list[tuple[int, int]] = []
    got = evaluate(
        pipeline,
        samples=200,
        seed=5,
        classifier=classifier,
        batch_size=64,
        report=lambda done, total: progress.append((done, total)),
    )
    wanted_N = np.arange(200) % 10
    numbers_N = np.array([pipeline.pick(i % 10, 5 + i) for i in range(200)])
    right_N = classify(classifier, images.read(numbers_N)).classes_N == wanted_N
    assert got.accuracy.value == pytest.approx(right_N.mean())
    assert 0.8 < got.accuracy.low < got.accuracy.value < got.accuracy.high < 1
    assert list(got.per_class) == list(images.class_names)
    for c, score in enumerate(got.per_class.values()):
        assert (score.value, score.count) == (pytest.approx(right_N[wanted_N == c].mean()), 20)
    assert progress == [(64, 200), (128, 200), (192, 200), (200, 200)]
    assert to_json(got)["per_class"]["bag"]["count"] == 20


def test_the_batch_size_changes_nothing_and_settings_are_passed_on(
    classifier: Classifier, images: ImageSet
) -> None:
    results = []
    for batch_size in (7, 40):
        pipeline = Gallery(images)
        results.append(
            evaluate(
                pipeline, samples=40, classifier=classifier, batch_size=batch_size, guidance=3.0
            )
        )
        drawn = [(c, s + i) for classes, s, _ in pipeline.calls for i, c in enumerate(classes)]
        assert drawn == [(i % 10, i) for i in range(40)]
        assert all(settings == {"guidance": 3.0} for *_, settings in pipeline.calls)
    assert results[0] == results[1]
    assert results[0].settings == {"guidance": 3.0}


@pytest.mark.parametrize("samples, remedy", [(0, "try 10"), (-3, "try 10"), (25, "try 30")])
def test_counts_that_cannot_be_equal(
    classifier: Classifier, images: ImageSet, samples: int, remedy: str
) -> None:
    with pytest.raises(UserError, match=remedy):
        evaluate(Gallery(images), samples=samples, classifier=classifier)


def test_a_classifier_of_other_classes(classifier: Classifier, images: ImageSet) -> None:
    pipeline = Gallery(images)
    pipeline.class_names = ("cat", "dog")
    with pytest.raises(UserError, match=r"10 classes .*2 classes \(cat, dog\)"):
        evaluate(pipeline, samples=10, classifier=classifier)
    assert pipeline.calls == []
