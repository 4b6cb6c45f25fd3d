"""Evaluations: a pipeline or images, and a reference -> samples -> features -> scores -> report.

FOLDER/asked.json      everything that determines the result; another configuration is refused
FOLDER/samples.npz     the samples of a pipeline, in the format of ADM's evaluator
FOLDER/statistics.npz  mean and covariance of their features, usable as a reference
FOLDER/report.json     the scores, for programs; report.md and samples.png for people
FOLDER/search.json     with a search: all points that were tried, with search.png
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ctf.common import claims, config, storage
from ctf.common.errors import UserError
from ctf.common.progress import OpenProgress, Progress
from ctf.data import fashion_mnist
from ctf.data.images import INCLUDED
from ctf.evaluation import report, scores
from ctf.evaluation.classifier import (
    SHIPPED,
    Classifier,
    classify,
    hash_classifier,
    load_classifier,
)
from ctf.evaluation.extractors import Extractor, open_extractor
from ctf.evaluation.intervals import GROUPS, Estimate
from ctf.evaluation.metrics import Accuracy, class_accuracy
from ctf.evaluation.reference_sets import (
    ImageCollection,
    Split,
    StoredStatistics,
    open_reference,
    open_samples,
    save_statistics,
)
from ctf.evaluation.report import ReferenceInfo, Report, Subject
from ctf.evaluation.sample_cache import Balance, GenerationConfig, cached_samples, generate
from ctf.evaluation.scores import FeatureSummary, Reference
from ctf.evaluation.search import SEED_OFFSET, search, searched_settings
from ctf.pipelines.arguments import check_seed, update_sampling
from ctf.pipelines.folder import PIPELINE_FILES, find_pipeline, hash_pipeline
from ctf.pipelines.pipeline import Pipeline

SAMPLES = 5000
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
    out: folder of the report, or a .json file next to it; None: named after `config`.
    """

    subject: Subject
    pipe: Pipeline | None
    images: ImageCollection | None
    reference: ImageCollection | StoredStatistics
    extractors: Sequence[Extractor]
    classifier: Classifier | None
    classifier_hash: str | None
    search_samples: int | None
    against: Report | None
    out: Path | None
    device: torch.device

    @property
    def config(self) -> dict[str, Any]:
        """Everything that determines the result: the content of asked.json."""
        generation = self.subject.drawing
        return {
            "version": scores.VERSION,
            "subject": self.subject.hash,
            "drawing": None if generation is None else config.to_json(generation),
            "search_samples": self.search_samples,
            "reference": self.reference.fingerprint,
            "features": [f"{extractor.name} {extractor.digest}" for extractor in self.extractors],
            "classifier": self.classifier_hash,
        }

    @property
    def folder(self) -> Path:
        """Where the report goes; by default a name made of the subject and the configuration."""
        if self.out is None:
            stem = self.subject.name.removesuffix(".npz").replace("/", "-").replace("@", "-")
            return Path("evaluations") / f"{stem}-{storage.hash_json(self.config)[:8]}"
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
                has_fine=self.pipe.fine is not None,
            )
            generation = dataclasses.replace(generation, settings={**generation.settings, **best})
        with open_progress("samples") as progress:
            images = cached_samples(self.pipe, generation, self.folder, progress)
        return dataclasses.replace(self.subject, drawing=generation), images

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
        known, count, size = self.reference, None, None
        if isinstance(known, ImageCollection):
            count, size = known.count, known.size
        return Report(
            subject=subject,
            search_samples=self.search_samples,
            reference=ReferenceInfo(known.name, known.fingerprint, count, size),
            features={extractor.name: extractor.digest for extractor in self.extractors},
            classifier=self.classifier_hash,
            count=images.count,
            size=images.size,
            pictures=images.fingerprint,
            scores=by_name,
            accuracy=accuracy,
            per_class=per_class,
            device=self.device.type,
            versions=report.versions(),
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


# --- Preparation ----------------------------------------------------------------------------------


def prepare(
    model: str,
    reference: str | None = None,
    *,
    samples: int | None = None,
    features: Sequence[str] = (),
    weights: Path | None = None,
    classifier: Path | None = None,
    settings: Mapping[str, Any] | None = None,
    seed: int = 0,
    balance: Balance = "balanced",
    resize: int | None = None,
    split: Split | None = None,
    background: str = "white",
    skip_bad: bool = False,
    search_samples: int | None = None,
    against: Path | None = None,
    out: Path | None = None,
    device: torch.device,
    progress: Progress | None = None,
) -> Evaluation:
    """Open and check everything that an evaluation needs.

    The arguments are those of `ctf evaluate`, which describes them; None and () are its defaults.
    `search_samples` is None for no search. `progress` is called with the number of files read and
    to read, if a folder of images is read.

    Raises:
        UserError: something does not exist, is invalid, or does not fit the rest.
    """
    pipe, images = None, None
    if _is_images(Path(model)):
        if settings or not (samples is resize is search_samples is None):
            raise UserError(
                f"{model}: all images of a folder or file are scored as they are; a number of "
                "samples, settings, --resize and --search are for pipelines"
            )
        images = open_samples(Path(model), progress)
        subject, size = Subject(images.name, images.fingerprint), min(images.size)
    else:
        folder = find_pipeline(model)
        pipe = Pipeline.from_pretrained(folder, device)
        generation = _generation_config(pipe, samples, settings or {}, seed, balance, resize)
        if search_samples is not None:
            search_samples = _search_samples(pipe, generation, search_samples, settings or {})
        name = folder.resolve().name if Path(model).is_dir() else model
        subject = Subject(name, hash_pipeline(folder), generation)
        size = resize or pipe.tokenizer.config.image_size
    source = _reference_source(model, reference, pipe)
    like_fashion = _is_like_fashion_mnist(pipe, source, size)
    judge, digest, images = _open_classifier(classifier, like_fashion, pipe, images, size, device)
    extractors = _open_extractors(features, like_fashion, weights, device)
    known = open_reference(
        source, size, split, background=background, skip_bad=skip_bad, progress=progress
    )
    for extractor in extractors:
        if isinstance(known, StoredStatistics):
            scores.check_statistics(known, extractor, size)
        elif known.statistics is not None and extractor.name == "inception":
            scores.check_statistics(known.statistics, extractor, size)
    evaluation = Evaluation(
        subject, pipe, images, known, extractors, judge, digest, search_samples,
        None if against is None else report.load(against), out, device,
    )  # fmt: skip
    evaluation.check()
    return evaluation


def _is_images(path: Path) -> bool:
    """Whether `path` means images; a folder with any file of a pipeline means a pipeline."""
    if path.suffix == ".npz":
        return True
    return path.is_dir() and not any((path / file).is_file() for file in PIPELINE_FILES)


def _reference_source(model: str, reference: str | None, pipe: Pipeline | None) -> str:
    if reference is not None:
        return reference
    source = None if pipe is None else pipe.origin.get("images")
    if source not in INCLUDED:
        raise UserError(f"{model}: nothing to score against; pass a --reference")
    return str(source)


def _generation_config(
    pipe: Pipeline,
    samples: int | None,
    settings: Mapping[str, Any],
    seed: int,
    balance: Balance,
    resize: int | None,
) -> GenerationConfig:
    sampling = dataclasses.asdict(update_sampling(pipe.sampling, settings))
    class_count = len(pipe.class_names)
    count = SAMPLES if samples is None else samples
    generation = GenerationConfig(count, seed, balance, sampling, resize)
    if samples is None:
        generation = generation.rounded_up(class_count)
    generation.classes(class_count)  # raises a UserError if they cannot be balanced
    check_seed(seed, SEED_OFFSET + generation.samples)
    return generation


def _search_samples(
    pipe: Pipeline, generation: GenerationConfig, samples: int, settings: Mapping[str, Any]
) -> int:
    for name in searched_settings(pipe.fine is not None):
        if name in settings:
            raise UserError(f"{name} is set, but --search finds it; omit one of them")
    return (
        dataclasses.replace(generation, samples=samples).rounded_up(len(pipe.class_names)).samples
    )


def _is_like_fashion_mnist(pipe: Pipeline | None, source: str, size: int) -> bool:
    """Whether the images are like those that the included classifier was trained on."""
    known = source in INCLUDED if pipe is None else pipe.class_names == fashion_mnist.CLASSES
    return known and size == fashion_mnist.PADDED_SIZE


def _open_extractors(
    features: Sequence[str], like_fashion: bool, weights: Path | None, device: torch.device
) -> list[Extractor]:
    names = tuple(dict.fromkeys(features)) or ("lite0", *["fashion"] * like_fashion)
    if weights is not None and "inception" not in names:
        raise UserError(f"--weights {weights}: only --features inception takes weights")
    return [
        open_extractor(name, weights=weights if name == "inception" else None, device=device)
        for name in names
    ]


def _open_classifier(
    folder: Path | None,
    like_fashion: bool,
    pipe: Pipeline | None,
    images: ImageCollection | None,
    size: int,
    device: torch.device,
) -> tuple[Classifier | None, str | None, ImageCollection | None]:
    """Open the classifier in `folder`, or the included one if it fits.

    Returns:
        The classifier and its hash, or None, and the images with their classes numbered as in the
        classifier.

    Raises:
        UserError: the classifier in `folder` does not fit.
    """
    if folder is None and not like_fashion:
        return None, None, images
    classifier = load_classifier(folder or SHIPPED, device)
    if images is not None:
        images = _renumber_classes(images, classifier.class_names)
    try:
        _check_classifier(classifier, pipe, images, size)
    except UserError:
        if folder is not None:
            raise
        return None, None, images
    return classifier, hash_classifier(folder or SHIPPED), images


def _renumber_classes(images: ImageCollection, names: tuple[str, ...]) -> ImageCollection:
    """Number classes as in `names`, if they are a subset of these, or numbers without names."""
    own, classes_N = images.class_names, images.classes_N
    if classes_N is None or not (
        classes_N.max() < len(names) if own is None else {*own} <= {*names}
    ):
        return images
    if own is not None:
        classes_N = np.array([names.index(name) for name in own])[classes_N]
    return dataclasses.replace(images, classes_N=classes_N, class_names=names)


def _check_classifier(
    classifier: Classifier, pipe: Pipeline | None, images: ImageCollection | None, size: int
) -> None:
    if images is not None and images.classes_N is None:
        raise UserError(f"{images.name}: the classes of its images are unknown")
    height, width = (size, size) if images is None else images.size
    if not height == width == classifier.image_size:
        raise UserError(
            f"the classifier is for {classifier.image_size} pixels per side, the images have "
            f"{width} x {height}"
        )
    subject = images if pipe is None else pipe
    class_names = None if subject is None else subject.class_names
    if class_names != classifier.class_names:
        raise UserError(
            f"the classifier has {_describe(classifier.class_names)}, the images have "
            f"{_describe(class_names or ())}\nuse one that was trained on the same classes"
        )


def _describe(names: Sequence[str]) -> str:
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return f"{len(names)} classes ({shown})" if names else "others, known by number only"
