"""Evaluations: a pipeline or images, and a reference -> samples -> features -> scores -> report.

FOLDER/asked.json      everything that determines the result; another configuration is refused
FOLDER/settings.json   for `ctf sample --settings`, to generate the samples again
FOLDER/samples.npz     the samples of a pipeline, in the format of ADM's evaluator
FOLDER/statistics.npz  mean and covariance of their features, usable as a reference
FOLDER/report.json     the scores, for programs; report.md and samples.png for people
FOLDER/search.json     with a search: all points that were tried, with search.png
FOLDER/nearest.png     on request: samples next to their nearest training images
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ctf.common import claims, config, storage
from ctf.common.errors import UserError
from ctf.common.progress import OpenProgress, Progress
from ctf.data.image_set import Splits
from ctf.evaluation import report, scores
from ctf.evaluation.classifier import Classifier, classify
from ctf.evaluation.extractors import Extractor
from ctf.evaluation.image_collection import ImageCollection, StoredStatistics
from ctf.evaluation.intervals import GROUPS, Estimate
from ctf.evaluation.metrics import Accuracy, class_accuracy
from ctf.evaluation.nearest import find_nearest
from ctf.evaluation.npz_files import save_statistics
from ctf.evaluation.report import ReferenceInfo, Report, Subject
from ctf.evaluation.sample_cache import GenerationConfig, cached_samples, generate
from ctf.evaluation.scores import FeatureSummary, Reference
from ctf.evaluation.search import search
from ctf.models import noise
from ctf.pipelines import export
from ctf.pipelines.arguments import update_sampling
from ctf.pipelines.folder import lasting_name
from ctf.pipelines.pipeline import Pipeline

CONFIG, EVALUATION = "asked.json", "an evaluation"

PerClass = dict[str, dict[str, Any]]


def sample_accuracy(
    pipe: Pipeline,
    classifier: Classifier,
    generation: GenerationConfig,
    progress: Progress | None = None,
) -> Accuracy:
    """Generate samples and measure how many the classifier assigns to their own class."""
    classes_N = generation.classes(len(pipe.class_names))
    predicted, done = [], 0
    for batch in generate(pipe, generation):
        predicted.append(classify(classifier, batch))
        done += len(batch)
        if progress is not None:
            progress(done, generation.samples)
    return class_accuracy(np.concatenate(predicted), classes_N)


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """An evaluation that was checked by `prepare` and is ready to run.

    subject: what is scored.
    pipe: generates the samples; None if `images` are scored as they are.
    reference: what they are scored against.
    extractors: the feature networks; the first is that of the search and of statistics.npz.
    classifier: measures the class accuracy, if there is one.
    search_samples: per point of a search for guidance and temperatures; None: no search.
    against: a report that the new one will be compared with.
    model: the pipeline's name or folder, for settings.json.
    training_images: those that samples are compared with, with held-out ones; None: they are not.
    out: folder of the report, or a .json file next to it; None: named after `config`.
    """

    subject: Subject
    pipe: Pipeline | None
    images: ImageCollection | None
    reference: ImageCollection | StoredStatistics
    extractors: Sequence[Extractor]
    classifier: Classifier | None
    search_samples: int | None
    against: Report | None
    out: Path | None
    device: torch.device
    model: str | None = None
    training_images: Splits | None = None

    @property
    def config(self) -> dict[str, Any]:
        """Everything that determines the result: the content of asked.json."""
        generation = self.subject.drawing
        optional: dict[str, Any] = {} if generation is None else {"noise_version": noise.VERSION}
        if (splits := self.training_images) is not None:
            optional["nearest"] = [splits.train.fingerprint, splits.val.fingerprint]
        return {
            "version": scores.VERSION,
            "subject": self.subject.hash,
            "drawing": None if generation is None else config.to_json(generation),
            "search_samples": self.search_samples,
            "reference": self.reference.fingerprint,
            "features": [f"{extractor.name} {extractor.digest}" for extractor in self.extractors],
            "classifier": None if self.classifier is None else self.classifier.digest,
            **optional,
        }

    @property
    def folder(self) -> Path:
        """Where the report goes; by default a name made of the subject and the configuration."""
        if self.out is None:
            stem = self.subject.name.removesuffix(".npz").replace("/", "-").replace("@", "-")
            return report.FOLDER / f"{stem}-{storage.hash_json(self.config)[:8]}"
        return self.out.with_suffix("") if self._copy else self.out

    @property
    def _copy(self) -> Path | None:
        """A second report.json, if `out` names a file."""
        return self.out if self.out is not None and self.out.suffix == ".json" else None

    def check(self) -> None:
        """Check whatever could keep `run` from finishing, before anything is written.

        Raises:
            UserError: too few images, a folder with something else in it, or a report that this one
                is not comparable with.
        """
        generation = self.subject.drawing
        count = self.images.count if self.images else generation.samples if generation else 0
        counts = [(count, "scored")]
        if self.search_samples is not None:
            counts.append((self.search_samples, "per point of the search"))
        if isinstance(self.reference, ImageCollection):
            counts.append((self.reference.count, f"in the reference {self.reference.name}"))
        for number, role in counts:
            if number < GROUPS:
                raise UserError(f"{number} images {role}: expected {GROUPS} or more")
        if self.against is not None:
            digests = {extractor.name: extractor.digest for extractor in self.extractors}
            fingerprint = self.reference.fingerprint
            report.check_comparable(self.against, fingerprint, digests, count, generation)
        if claims.is_ours(self.folder, CONFIG, what=EVALUATION):
            stored = storage.load_json(self.folder / CONFIG)
            claims.check_same(self.folder, stored, self.config, what=EVALUATION)
        elif self._copy is not None and self._copy.exists():
            raise UserError(
                f"{self._copy} exists without {self.folder}, the folder of its evaluation\n"
                "choose another --out"
            )

    def run(self, open_progress: OpenProgress) -> Report:
        """Generate, score and write the report.

        An interrupted evaluation resumes with the samples it has and ends with the same bits; a
        finished one returns its report.

        Raises:
            UserError: see `check`; features that are not finite; a file that cannot be read.
        """
        self.check()
        with claims.hold(self.folder, CONFIG, what=EVALUATION):
            return self._run(open_progress)

    def _run(self, open_progress: OpenProgress) -> Report:
        claims.claim(self.folder, self.config, marker=CONFIG, what=EVALUATION)
        path = self.folder / report.FILE
        if not path.is_file():
            # Before sampling, so that an invalid reference is reported early.
            references = []
            for extractor in self.extractors:
                with open_progress(f"{extractor.name}: reference") as progress:
                    references.append(scores.load_reference(self.reference, extractor, progress))
            subject, images = self._samples(references[0], open_progress)
            report.write(
                self.folder, self._score(subject, images, references, open_progress), images
            )
        result = report.load(path)
        if self._copy is not None and not self._copy.is_file():
            storage.save_json(self._copy, config.to_json(result))
        return result

    def _samples(
        self, reference: Reference, open_progress: OpenProgress
    ) -> tuple[Subject, ImageCollection]:
        """The images to score; a search replaces the settings of the subject."""
        generation = self.subject.drawing
        if self.pipe is None or generation is None:
            assert self.images is not None
            return self.subject, self.images
        if self.search_samples is not None:
            best = search(
                self.pipe,
                dataclasses.replace(generation, samples=self.search_samples),
                self.extractors[0],
                reference.pooled,
                self.folder,
                open_progress,
            )
            generation = dataclasses.replace(generation, settings={**generation.settings, **best})
        self._save_settings(self.pipe, generation)
        with open_progress("samples") as progress:
            images = cached_samples(self.pipe, generation, self.folder, progress)
        return dataclasses.replace(self.subject, drawing=generation), images

    def _save_settings(self, pipe: Pipeline, generation: GenerationConfig) -> None:
        """Write the settings with which `ctf sample` generates the samples again."""
        settings = export.Settings(
            tuple(generation.classes(len(pipe.class_names)).tolist()),
            1,
            generation.seed,
            update_sampling(pipe.sampling, generation.settings),
            generation.resize,
            model=lasting_name(self.model or self.subject.name),
            weights=self.subject.hash,
        )
        storage.save_json(self.folder / export.SETTINGS, settings.to_json())

    def _score(
        self,
        subject: Subject,
        images: ImageCollection,
        references: Sequence[Reference],
        open_progress: OpenProgress,
    ) -> Report:
        by_name: dict[str, dict[str, float]] = {}
        per_class: PerClass = {name: {} for name in images.class_names or ()}
        for extractor, reference in zip(self.extractors, references, strict=True):
            with open_progress(f"{extractor.name}: samples") as progress:
                summary = scores.summarize(extractor, images, progress)
            computed = scores.compute_scores(summary, reference, extractor.suffix)
            for name, score in computed.items():
                by_name[name] = (
                    config.to_json(score) if isinstance(score, Estimate) else {"value": score}
                )
            _add_class_distances(per_class, summary, images, reference, extractor.suffix)
            if extractor is self.extractors[0]:
                spatial = None if summary.spatial is None else summary.spatial.gaussian
                path = self.folder / "statistics.npz"
                save_statistics(path, summary.gaussian, spatial, extractor.digest)
        accuracy = None
        if self.classifier is not None:
            accuracy = add_class_accuracies(per_class, self.classifier, images)
        found = None
        if self.training_images is not None:
            with open_progress("nearest") as progress:
                found, sheet = find_nearest(
                    images, self.training_images, self.extractors[0], progress
                )
            storage.save_png(self.folder / "nearest.png", sheet)
        known, count, size = self.reference, None, None
        if isinstance(known, ImageCollection):
            count, size = known.count, known.size
        return Report(
            subject=subject,
            search_samples=self.search_samples,
            reference=ReferenceInfo(known.name, known.fingerprint, count, size),
            features={extractor.name: extractor.digest for extractor in self.extractors},
            classifier=None if self.classifier is None else self.classifier.digest,
            count=images.count,
            size=images.size,
            pictures=images.fingerprint,
            scores=by_name,
            accuracy=accuracy,
            per_class=per_class,
            device=self.device.type,
            versions=report.versions(),
            nearest=found,
        )


def add_class_accuracies(
    per_class: PerClass, classifier: Classifier, images: ImageCollection
) -> Accuracy:
    """Add the accuracy of each class to `per_class`, and return that of all images."""
    assert images.classes_N is not None
    predicted_N = np.concatenate([classify(classifier, b) for b in images.batches()])
    for number, name in enumerate(classifier.class_names):
        of_class = images.classes_N == number
        if of_class.any():
            accuracy = class_accuracy(predicted_N[of_class], images.classes_N[of_class])
            per_class[name]["accuracy"] = config.to_json(accuracy)
    return class_accuracy(predicted_N, images.classes_N)


def _add_class_distances(
    per_class: PerClass,
    summary: FeatureSummary,
    images: ImageCollection,
    reference: Reference,
    suffix: str,
) -> None:
    """Add the squared distance between the mean features of each class in samples and reference."""
    own_CD, reference_CD = summary.class_means_CD, reference.class_means_CD
    if own_CD is None or reference_CD is None or reference.class_names != images.class_names:
        return
    for name, own_D, reference_D in zip(per_class, own_CD, reference_CD, strict=True):
        distance = float(np.square(own_D - reference_D).sum())
        if np.isfinite(distance):
            per_class[name][f"mean distance{suffix}"] = distance
