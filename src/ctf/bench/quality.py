"""`ctf bench quality`: what an engine that is nearly the same costs in quality.

Shapes: B batch, L tokens of an image, K choices.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ctf.common.errors import UserError
from ctf.common.progress import OpenProgress, Progress
from ctf.data import fashion_mnist
from ctf.data.image_set import ImageSet
from ctf.data.images import INCLUDED, open_images
from ctf.data.transforms import as_tensor
from ctf.evaluation.classifier import shipped_classifier
from ctf.evaluation.evaluate import sample_accuracy
from ctf.evaluation.metrics import Accuracy
from ctf.evaluation.sample_cache import GenerationConfig
from ctf.kernels.sampling_cpu import Engine
from ctf.models import sampling
from ctf.pipelines.folder import find_pipeline
from ctf.pipelines.pipeline import Pipeline

BATCH = 256


@dataclasses.dataclass(frozen=True)
class Quality:
    """What one engine makes of a pipeline.

    coarse, fine: cross-entropy of held-out pictures' labels, and of their codes given the labels,
        nats a token; their sum is that of the codes.
    accuracy: share of samples that a classifier recognises; None where there is none.
    """

    engine: str
    coarse: float
    fine: float
    accuracy: Accuracy | None

    @property
    def nats(self) -> float:
        return self.coarse + self.fine


def compare(
    name: str,
    engines: Sequence[Engine],
    samples: int,
    held_out: int,
    device: torch.device,
    open_progress: OpenProgress,
) -> list[Quality]:
    """The quality of each engine on the same held-out pictures and the same seeds.

    Args:
        name: a pipeline that was trained on an included set.
        samples: drawn for the accuracy. held_out: pictures for the cross-entropy, at most.

    Raises:
        UserError: the pipeline was trained on other pictures.
    """
    folder = find_pipeline(name)
    plain = Pipeline.from_pretrained(folder, device)
    source = str(plain.origin.get("images"))
    if source not in INCLUDED:
        raise UserError(f"{name}: was trained on {source}, expected one of {', '.join(INCLUDED)}")
    pictures = open_images(source, plain.tokenizer.config.image_size).val
    count = min(held_out, len(pictures))
    with open_progress("held-out pictures") as progress:
        codes_NL, classes_N = _encoded(plain, pictures, count, progress)
    found = []
    for engine in engines:
        pipe = Pipeline.from_pretrained(folder, device, engine=engine)
        coarse, fine = cross_entropy(pipe, codes_NL, classes_N)
        accuracy = None
        if pipe.class_names == fashion_mnist.CLASSES:
            with open_progress(f"samples, {engine}") as progress:
                accuracy = sample_accuracy(
                    pipe, shipped_classifier(device), GenerationConfig(samples), progress
                )
        found.append(Quality(engine, coarse, fine, accuracy))
    return found


def _encoded(
    pipe: Pipeline, pictures: ImageSet, count: int, progress: Progress
) -> tuple[Tensor, Tensor]:
    """Codes and classes of pictures spread over the set, which may be sorted by class."""
    chosen_N = np.linspace(0, len(pictures) - 1, count).round().astype(np.int64)
    codes = []
    for start in range(0, count, BATCH):
        batch_BHWC = pictures.read(chosen_N[start : start + BATCH])
        with torch.inference_mode():
            codes.append(pipe.tokenizer.encode(as_tensor(batch_BHWC, pipe.device)))
        progress(min(start + BATCH, count), count)
    return torch.cat(codes), torch.from_numpy(pictures.classes_N[chosen_N]).to(pipe.device)


@torch.inference_mode()
def cross_entropy(pipe: Pipeline, codes_NL: Tensor, classes_N: Tensor) -> tuple[float, float]:
    """Of labels, and of codes given their labels: nats a token each."""
    totals = [0.0, 0.0]
    for codes_BL, classes_B in zip(codes_NL.split(BATCH), classes_N.split(BATCH), strict=True):
        labels_BL = pipe.clusters.labels_V[codes_BL]
        # Step by step, since what the cache rounds is part of it.
        decoder = sampling.Decoder(pipe.coarse, classes_B, guided=False)
        for i in range(labels_BL.shape[1]):
            totals[0] += _sum(decoder.logits(labels_BL, i, 1.0), labels_BL[:, i])
        if pipe.fine is not None:
            totals[1] += _sum(pipe.fine(labels_BL, classes_B), pipe.fine.choices(codes_BL))
    return totals[0] / codes_NL.numel(), totals[1] / codes_NL.numel()


def _sum(logits: Tensor, targets: Tensor) -> float:
    """Over (..., K) logits and targets of the same shape without K."""
    losses = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none")
    return float(losses.double().sum())
