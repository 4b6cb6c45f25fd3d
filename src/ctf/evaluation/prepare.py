"""From the options of `ctf evaluate` to an `Evaluation` that is checked and ready to run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import torch

from ctf.common import storage
from ctf.common.errors import UserError
from ctf.common.progress import Progress
from ctf.data.image_set import Splits
from ctf.data.images import INCLUDED, ImageOptions
from ctf.evaluation import nearest, report
from ctf.evaluation.classifier import Classifier, load_classifier, shipped_classifiers
from ctf.evaluation.evaluate import Evaluation
from ctf.evaluation.extractors import Extractor, classifier_name, open_extractor
from ctf.evaluation.image_collection import ImageCollection, StoredStatistics
from ctf.evaluation.options import EvaluationOptions
from ctf.evaluation.reference_sets import open_reference, open_samples
from ctf.evaluation.report import Subject
from ctf.evaluation.sample_cache import GenerationConfig
from ctf.evaluation.scores import check_statistics
from ctf.evaluation.search import SEED_OFFSET, searched_settings
from ctf.pipelines.arguments import check_seed, check_window, update_sampling
from ctf.pipelines.folder import PIPELINE_FILES, find_pipeline, hash_pipeline
from ctf.pipelines.pipeline import Pipeline

SAMPLES = 5000  # by default


def prepare(
    model: str,
    options: EvaluationOptions,
    *,
    settings: Mapping[str, Any] | None = None,
    device: torch.device,
    progress: Progress | None = None,
    **image_options: Unpack[ImageOptions],
) -> Evaluation:
    """Open and check everything that an evaluation needs.

    Args:
        model: A pipeline's name or folder, or images to score.
        options: All other options of `ctf evaluate`.
        settings: Fields of `Sampling` that differ from the pipeline's.
        device: Where to compute.
        progress: Called with the number of files read and to read, if a folder of images is read.
        image_options: How the images of the reference are read, see `open_images`.

    Raises:
        UserError: something does not exist, is invalid, or does not fit the rest.
    """
    pipe, images, search_samples = None, None, None
    if _is_images(Path(model)):
        if settings or options.search or not options.samples is options.resize is None:
            raise UserError(
                f"{model}: all images of a folder or file are scored as they are; a number of "
                "samples, settings, --resize and --search are for pipelines"
            )
        images = open_samples(
            Path(model), progress, background=image_options.get("background", "white")
        )
        subject, size = Subject(images.name, images.fingerprint), min(images.size)
    else:
        folder = find_pipeline(model)
        pipe = Pipeline.from_pretrained(folder, device)
        pipe.window = check_window(options.window)
        generation = _generation_config(pipe, options, settings or {})
        if options.search:
            if searched := {*searched_settings(pipe)} & {*(settings or {})}:
                raise UserError(f"{min(searched)} is set, but --search finds it; omit one of them")
            search = dataclasses.replace(generation, samples=options.search_samples)
            search_samples = search.rounded_up(len(pipe.class_names)).samples
        name = folder.resolve().name if Path(model).is_dir() else model
        subject = Subject(name, hash_pipeline(folder), generation)
        size = options.resize or pipe.tokenizer.image_size
    source = _reference_source(model, options.reference, pipe)
    like = _included_set_like(pipe, source, size)
    loaded, images = _open_classifier(options.classifier, like, pipe, images, size, device)
    extractors = _open_extractors(options, like, device)
    known = open_reference(
        source, size, options.split, progress=progress,
        class_names=None if pipe is None else tuple(pipe.class_names), **image_options,
    )  # fmt: skip
    for extractor in extractors:
        if isinstance(known, StoredStatistics):
            check_statistics(known, extractor, size)
        elif known.statistics is not None and extractor.name == "inception":
            check_statistics(known.statistics, extractor, size)
    splits = None
    if options.nearest:
        splits = _training_images(model, pipe, images, known, size)
    evaluation = Evaluation(
        subject, pipe, images, known, extractors, loaded, search_samples,
        None if options.against is None else report.load(options.against), options.out, device,
        model, splits,
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


def _training_images(
    model: str,
    pipe: Pipeline | None,
    images: ImageCollection | None,
    known: ImageCollection | StoredStatistics,
    size: int,
) -> Splits:
    """Return what samples are compared with for --nearest.

    Raises:
        UserError: There are no such images, or the model was trained on others.
    """
    splits = nearest.check(
        (size, size) if images is None else images.size,
        known.splits if isinstance(known, ImageCollection) else None,
    )
    recorded = None
    if pipe is not None and size == pipe.tokenizer.image_size:
        recorded = _trained_on(find_pipeline(model))
    origin = None if pipe is None else pipe.origin.get("images")
    included = {origin, splits.train.name} & {*INCLUDED}
    if recorded not in (None, splits.train.fingerprint) or (
        origin is not None and included and origin != splits.train.name
    ):
        raise UserError(
            f"--nearest: {model} was not trained on these images of {splits.train.name}\n"
            "pass those that it was trained on by --reference, with the same options as to ctf fit"
        )
    return splits


def _trained_on(folder: Path) -> str | None:
    """Return the fingerprint of the images that a run was trained on; None for other pipelines."""
    path = folder / "tokens" / "manifest.json"
    train = storage.load_object(path).get("train") if path.is_file() else None
    fingerprint = train.get("fingerprint") if isinstance(train, dict) else None
    return fingerprint if isinstance(fingerprint, str) else None


def _generation_config(
    pipe: Pipeline, options: EvaluationOptions, settings: Mapping[str, Any]
) -> GenerationConfig:
    sampling = dataclasses.asdict(update_sampling(pipe.sampling, settings))
    class_count = len(pipe.class_names)
    count = SAMPLES if options.samples is None else options.samples
    generation = GenerationConfig(count, options.seed, options.balance, sampling, options.resize)
    if options.samples is None:
        generation = generation.rounded_up(class_count)
    generation.classes(class_count)  # raises a UserError if they cannot be balanced
    check_seed(options.seed, SEED_OFFSET + generation.samples)
    return generation


def _included_set_like(pipe: Pipeline | None, source: str, size: int) -> str | None:
    """Return the included set that the images are like, if there is a classifier of it."""
    for name, folder in shipped_classifiers().items():
        classifier = load_classifier(folder)
        same = source == name if pipe is None else pipe.class_names == classifier.class_names
        if same and size == classifier.image_size:
            return name
    return None


def _open_extractors(
    options: EvaluationOptions, like: str | None, device: torch.device
) -> list[Extractor]:
    by_default = ("lite0",) if like is None else ("lite0", classifier_name(like))
    names = tuple(dict.fromkeys(options.features)) or by_default
    weights = options.weights
    if weights is not None and "inception" not in names:
        raise UserError(f"--weights {weights}: only --features inception takes weights")
    return [
        open_extractor(name, weights=weights if name == "inception" else None, device=device)
        for name in names
    ]


def _open_classifier(
    folder: Path | None,
    like: str | None,
    pipe: Pipeline | None,
    images: ImageCollection | None,
    size: int,
    device: torch.device,
) -> tuple[Classifier | None, ImageCollection | None]:
    """Open the classifier in `folder`, or that of the included set that the images are like.

    Returns:
        The classifier, or None, and the images with their classes numbered as in the classifier.

    Raises:
        UserError: the classifier in `folder` does not fit.
    """
    if folder is None:
        if like is None:
            return None, images
        classifier = load_classifier(shipped_classifiers()[like], device)
    else:
        classifier = load_classifier(folder, device)
    if images is not None:
        images = _renumber_classes(images, classifier.class_names)
    height, width = (size, size) if images is None else images.size
    subject = images if pipe is None else pipe
    class_names = None if subject is None else subject.class_names
    if height == width == classifier.image_size and class_names == classifier.class_names:
        return classifier, images
    if folder is None:
        return None, images
    raise UserError(
        f"the classifier is for {_describe(classifier.class_names)} at {classifier.image_size} x "
        f"{classifier.image_size} pixels; got {_describe(class_names)} at {width} x {height} "
        "pixels\nuse one that was trained on the same classes at the same size"
    )


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


def _describe(names: Sequence[str] | None) -> str:
    if names is None:
        return "images without named classes"
    return f"{len(names)} classes ({', '.join(names[:3])}{', ...' * (len(names) > 3)})"
