"""Scores of what a pipeline draws: how many samples are recognised as the class asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from PIL import Image

from ctf.classifier import Classifier, classify
from ctf.errors import UserError
from ctf.metrics import Accuracy, class_accuracy


class Samples(Protocol):
    """What a call of `sample` returns."""

    @property
    def images(self) -> Sequence[Image.Image]: ...


class Sampler(Protocol):
    """What is evaluated: `Pipeline`, or anything else that draws pictures of a class."""

    @property
    def class_names(self) -> Sequence[str]: ...

    def sample(self, *, classes: Sequence[int], seed: int, **settings: Any) -> Samples:
        """Image i of the call is of classes[i] and is drawn from seed + i."""


@dataclass(frozen=True)
class Evaluation:
    """How well the samples of a pipeline are recognised; `config.to_json` writes it."""

    accuracy: Accuracy  # of all samples, with its 95 % interval
    per_class: dict[str, Accuracy]  # the same for the samples of each class, by its name
    samples: int  # the same number of each class
    seed: int  # sample i was drawn from seed + i
    settings: dict[str, Any]  # of sampling, where they are not the pipeline's defaults


def draw(
    pipeline: Sampler, samples: int, seed: int, batch_size: int, settings: dict[str, Any]
) -> Iterator[tuple[np.ndarray, Sequence[Image.Image]]]:
    """Batches of (classes, images): sample i is of class i modulo C and is drawn from seed + i,
    so neither the batch size nor an interruption changes what is scored."""
    for start in range(0, samples, batch_size):
        classes_B = np.arange(start, min(start + batch_size, samples)) % len(pipeline.class_names)
        drawn = pipeline.sample(classes=classes_B.tolist(), seed=seed + start, **settings)
        yield classes_B, drawn.images


def evaluate(
    pipeline: Sampler,
    *,
    samples: int,
    classifier: Classifier,
    seed: int = 0,
    batch_size: int = 64,
    report: Callable[[int, int], None] | None = None,
    **settings: Any,
) -> Evaluation:
    """Draws `samples` pictures, equally many of each class, and has them classified.

    Args:
        settings: for `pipeline.sample`, e.g. guidance=2.0; its defaults where there are none.

    Raises:
        UserError: the classifier knows other classes or another image size than the pipeline, or
            the samples cannot be shared equally among the classes.
    """
    names = tuple(pipeline.class_names)
    if names != classifier.class_names:
        raise UserError(
            f"the classifier knows {_listed(classifier.class_names)}, the pipeline draws "
            f"{_listed(names)}\nuse a classifier that was trained on the pipeline's classes"
        )
    if samples < 1 or samples % len(names):
        more = max(1, -(-samples // len(names))) * len(names)
        raise UserError(
            f"{samples} samples cannot be shared equally among {len(names)} classes; try {more}"
        )
    wanted, recognised = [], []
    for classes_B, images in draw(pipeline, samples, seed, batch_size, settings):
        wanted.append(classes_B)
        recognised.append(classify(classifier, images).classes_N)
        if report is not None:
            report(sum(map(len, wanted)), samples)
    wanted_N, recognised_N = np.concatenate(wanted), np.concatenate(recognised)
    per_class = {
        name: class_accuracy(recognised_N[wanted_N == c], wanted_N[wanted_N == c])
        for c, name in enumerate(names)
    }
    overall = class_accuracy(recognised_N, wanted_N)
    return Evaluation(overall, per_class, samples, seed, dict(settings))


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return f"{len(names)} classes ({shown})"
