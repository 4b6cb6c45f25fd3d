"""`ctf bench quality`: what an engine that computes nearly the same costs in quality.

Shapes: B batch, N images, L tokens of an image, K outputs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ctf.bench.harness import check_positive
from ctf.common.errors import UserError
from ctf.common.progress import OpenProgress, Progress
from ctf.data.image_set import ImageSet
from ctf.data.images import INCLUDED, open_images
from ctf.data.transforms import as_tensor
from ctf.evaluation.classifier import load_classifier, shipped_classifiers
from ctf.evaluation.evaluate import sample_accuracy
from ctf.evaluation.metrics import Accuracy
from ctf.evaluation.sample_cache import GenerationConfig
from ctf.kernels import Engine
from ctf.models.parallel import CoarseDecoder
from ctf.pipelines.folder import find_pipeline
from ctf.pipelines.pipeline import Pipeline

BATCH = 256


@dataclasses.dataclass(frozen=True)
class Quality:
    """What a pipeline achieves with one engine.

    Attributes:
        coarse: Cross-entropy of held-out images' labels, nats a token.
        fine: Cross-entropy of their codes, given the labels, nats a token.
        accuracy: Share of samples that a classifier recognises; None where there is no classifier.
    """

    engine: str
    coarse: float
    fine: float
    accuracy: Accuracy | None

    @property
    def nats(self) -> float:
        """Cross-entropy of the codes, nats a token."""
        return self.coarse + self.fine


def compare(
    model: str,
    engines: Sequence[Engine],
    samples: int,
    held_out: int,
    device: torch.device,
    open_progress: OpenProgress,
) -> list[Quality]:
    """Measure the quality of each engine on the same held-out images and the same seeds.

    The accuracy is that of `samples` samples, the cross-entropy that of up to `held_out` images.

    Raises:
        UserError: A number is below 1, or the pipeline was not trained on an included image set.
    """
    check_positive(samples=samples, held_out=held_out)
    folder = find_pipeline(model)
    pipe = Pipeline.from_pretrained(folder, device)
    source = str(pipe.origin.get("images"))
    if source not in INCLUDED:
        raise UserError(f"{model}: was trained on {source}, expected one of {', '.join(INCLUDED)}")
    images = open_images(source, pipe.tokenizer.image_size).val
    classifier = shipped_classifiers().get(source)
    with open_progress("held-out images") as progress:
        codes_NL, classes_N = _encode(pipe, images, min(held_out, len(images)), progress)
    qualities = []
    for engine in engines:
        pipe = Pipeline.from_pretrained(folder, device, engine=engine)
        coarse, fine = cross_entropy(pipe, codes_NL, classes_N)
        accuracy = None
        if classifier is not None:
            with open_progress(f"samples, {engine}") as progress:
                accuracy = sample_accuracy(
                    pipe, load_classifier(classifier, device), GenerationConfig(samples), progress
                )
        qualities.append(Quality(engine, coarse, fine, accuracy))
    return qualities


def _encode(
    pipe: Pipeline, images: ImageSet, count: int, progress: Progress
) -> tuple[Tensor, Tensor]:
    """Codes and classes of images spread over the set, which may be sorted by class."""
    rows_N = np.linspace(0, len(images) - 1, count).round().astype(np.int64)
    codes = []
    for start in range(0, count, BATCH):
        batch_BHWC = images.read(rows_N[start : start + BATCH])
        with torch.inference_mode():
            codes.append(pipe.tokenizer.encode(as_tensor(batch_BHWC, pipe.device)))
        progress(min(start + BATCH, count), count)
    return torch.cat(codes), torch.from_numpy(images.classes_N[rows_N]).to(pipe.device)


@torch.inference_mode()
def cross_entropy(pipe: Pipeline, codes_NL: Tensor, classes_N: Tensor) -> tuple[float, float]:
    """Return the cross-entropy of labels, and of codes given their labels, in nats a token."""
    coarse = fine = 0.0
    for codes_BL, classes_B in zip(
        torch.split(codes_NL, BATCH), torch.split(classes_N, BATCH), strict=True
    ):
        labels_BL = pipe.clusters.labels_V[codes_BL]
        # Step by step, since the rounding of cached keys and values counts, too.
        decoder = CoarseDecoder(pipe.coarse, classes_B, [1.0] * labels_BL.shape[1])
        for i, labels_B in enumerate(labels_BL.unbind(1)):
            coarse += _summed(decoder.logits(labels_BL, [i] * len(classes_B), 1)[:, 0], labels_B)
        if pipe.fine is not None:
            fine += _summed(pipe.fine(labels_BL, classes_B), pipe.fine.choices(codes_BL))
    return coarse / codes_NL.numel(), fine / codes_NL.numel()


def _summed(logits: Tensor, targets: Tensor) -> float:
    """Summed cross-entropy of (..., K) logits and targets of the same shape without K."""
    losses = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none")
    return float(losses.double().sum())


def rows(qualities: Sequence[Quality]) -> list[tuple[str, ...]]:
    """Return the rows of a table with `COLUMNS`; changes are stated against the first engine."""
    first = qualities[0]
    table = []
    for each in qualities:
        accuracy = change = ""
        if each.accuracy is not None and first.accuracy is not None:
            accuracy = f"{each.accuracy.value:.2%}"
            change = f"{100 * (each.accuracy.value - first.accuracy.value):+.2f} points"
        nats = [f"{value:.4f}" for value in (each.coarse, each.fine, each.nats)]
        table.append((each.engine, *nats, f"{each.nats / first.nats - 1:+.3%}", accuracy, change))
    return table


COLUMNS = (
    "engine", "labels, nats a token", "codes given labels", "codes", "change",
    "class accuracy", "change",
)  # fmt: skip
