"""A pipeline or pictures, and a reference -> a report that says all that is needed to repeat it.

FOLDER/asked.json      what was asked for; another question is refused
FOLDER/samples.npz     the pictures that were drawn, as ADM's evaluator takes them
FOLDER/statistics.npz  mean and covariance of their features, a reference for others
FOLDER/report.json     the scores; report.md and samples.png show them
FOLDER/search.json     every setting that was tried, and search.png, where that was asked for
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
from ctf.evaluation import reference_sets, report
from ctf.evaluation.classifier import SHIPPED, Classifier, classify, load_classifier
from ctf.evaluation.extractors import Extractor, open_extractor
from ctf.evaluation.metrics import GROUPS, Accuracy, Estimate, class_accuracy
from ctf.evaluation.reference_sets import Collection, Split, Statistics
from ctf.evaluation.report import Result, Source, Subject
from ctf.evaluation.sample_cache import Balance, Drawing, Sampler, draw, draw_blocks
from ctf.evaluation.scores import (
    VERSION,
    Gathered,
    Reference,
    check_features,
    gather,
    look_at_reference,
    scores,
)
from ctf.evaluation.search import FAR, search, searched
from ctf.pipelines.arguments import check_seed
from ctf.pipelines.folder import PIPELINE_FILES, find_pipeline, hash_pipeline
from ctf.pipelines.pipeline import Pipeline

SAMPLES = 5000
ASKED, EVALUATION = "asked.json", "an evaluation"


def recognised(
    pipe: Sampler, classifier: Classifier, drawing: Drawing, progress: Progress | None = None
) -> Accuracy:
    """How many samples are recognised as the class asked for; nothing is kept."""
    classes_N = drawing.classes(len(pipe.class_names))
    found, done = [], 0
    for block in draw_blocks(pipe, drawing):
        found.append(classify(classifier, block).classes_N)
        done += len(block)
        if progress is not None:
            progress(done, drawing.samples)
    return class_accuracy(np.concatenate(found), classes_N)


@dataclasses.dataclass(frozen=True)
class Judge:
    """A classifier for the class accuracy, and the hash of its weights."""

    classifier: Classifier
    hash: str


@dataclasses.dataclass(frozen=True)
class Job:
    """An evaluation whose every part was found and fits; `run` does it.

    subject: what is scored. With a drawing `pipe` draws it, without one it is `pictures`.
    search_samples: of each point of a search for guidance and temperatures; None: no search.
    against: a report that this one is going to be compared with.
    """

    subject: Subject
    pipe: Pipeline | None
    pictures: Collection | None
    reference: Collection | Statistics
    extractors: Sequence[Extractor]
    judge: Judge | None
    search_samples: int | None
    against: Result | None
    out: Path | None
    device: torch.device

    @property
    def asked(self) -> dict[str, Any]:
        """All that decides the result."""
        drawing = self.subject.drawing
        return {
            "version": VERSION,
            "subject": self.subject.hash,
            "drawing": None if drawing is None else config.to_json(drawing),
            "search_samples": self.search_samples,
            "reference": self.reference.fingerprint,
            # In order: the search is by the first, whose statistics are kept.
            "features": [f"{extractor.name} {extractor.digest}" for extractor in self.extractors],
            "classifier": None if self.judge is None else self.judge.hash,
        }

    @property
    def folder(self) -> Path:
        """Where the report goes: what was asked names it, unless the user does."""
        if self.out is None:
            stem = self.subject.name.removesuffix(".npz").replace("/", "-").replace("@", "-")
            return Path("evaluations") / f"{stem}-{storage.hash_json(self.asked)[:8]}"
        return self.out.with_suffix("") if self._copy else self.out

    @property
    def _copy(self) -> Path | None:
        """A second report.json, where `out` names a file."""
        return self.out if self.out is not None and self.out.suffix == ".json" else None

    def check(self) -> None:
        """Finds what would keep `run` from doing it, before anything is drawn or written.

        Raises:
            UserError: too few pictures, a folder that holds something else, or a report that this
                one cannot be compared with.
        """
        drawing, known = self.subject.drawing, self.reference
        count = self.pictures.count if self.pictures else drawing.samples if drawing else 0
        given = [(count, "scored")]
        if self.search_samples is not None:
            given.append((self.search_samples, "of each point of the search"))
        if isinstance(known, Collection):
            given.append((known.count, f"of the reference {known.name}"))
        for number, what in given:
            if number < GROUPS:
                raise UserError(f"{number} pictures {what}: expected {GROUPS} or more")
        if self.against is not None:
            digests = {extractor.name: extractor.digest for extractor in self.extractors}
            report.check_comparable(self.against, known.fingerprint, digests, count, drawing)
        if claims.is_ours(self.folder, ASKED, what=EVALUATION):
            stored = storage.load_json(self.folder / ASKED)
            claims.check_same(self.folder, stored, self.asked, what=EVALUATION)
        elif self._copy is not None and self._copy.exists():
            raise UserError(
                f"{self._copy} exists, without the folder {self.folder} of an evaluation\n"
                "choose another --out"
            )

    def run(self, open_progress: OpenProgress) -> Result:
        """Draws, scores and writes the report.

        Killed at any moment and run again, it goes on with the samples that are there, and ends
        with the same bits; where it is done, it reads the report.

        Raises:
            UserError: see `check`; features that are not finite; a file that cannot be read.
        """
        self.check()
        folder = self.folder
        claims.claim(folder, self.asked, marker=ASKED, what=EVALUATION)
        if not (folder / report.FILE).is_file():
            self._make(open_progress)
        result = report.load(folder / report.FILE)
        if self._copy is not None and not self._copy.is_file():
            storage.save_json(self._copy, config.to_json(result))
        return result

    def _make(self, open_progress: OpenProgress) -> None:
        known = []  # first: what is wrong with a reference is told before anything is drawn
        for extractor in self.extractors:
            with open_progress(f"{extractor.name}: reference") as progress:
                known.append(look_at_reference(self.reference, extractor, progress))
        subject, pictures = self.subject, self.pictures
        if self.pipe is not None and subject.drawing is not None:
            drawing = subject.drawing
            if self.search_samples is not None:
                found = search(
                    self.pipe,
                    dataclasses.replace(drawing, samples=self.search_samples),
                    self.extractors[0],
                    known[0].pooled,
                    self.folder,
                    open_progress,
                    has_fine=self.pipe.fine is not None,
                )
                drawing = dataclasses.replace(drawing, settings={**drawing.settings, **found})
                subject = dataclasses.replace(subject, drawing=drawing)
            with open_progress("draw") as progress:
                pictures = draw(self.pipe, drawing, self.folder, progress)
        assert pictures is not None
        report.write(self.folder, self._score(pictures, subject, known, open_progress), pictures)

    def _score(
        self,
        pictures: Collection,
        subject: Subject,
        known: Sequence[Reference],
        open_progress: OpenProgress,
    ) -> Result:
        found: dict[str, dict[str, float]] = {}
        per_class: dict[str, dict[str, Any]] = {name: {} for name in pictures.class_names or ()}
        for extractor, reference in zip(self.extractors, known, strict=True):
            with open_progress(f"{extractor.name}: samples") as progress:
                gathered = gather(extractor, pictures, progress)
            for name, score in scores(gathered, reference, extractor.suffix).items():
                found[name] = (
                    config.to_json(score) if isinstance(score, Estimate) else {"value": score}
                )
            _add_class_distances(per_class, gathered, pictures, reference, extractor.suffix)
            if extractor is self.extractors[0]:
                reference_sets.save_statistics(
                    self.folder / "statistics.npz",
                    gathered.pooled.merged().gaussian,
                    None if gathered.spatial is None else gathered.spatial.gaussian,
                    extractor.digest,
                )
        accuracy = None
        if self.judge is not None:
            accuracy = _add_accuracy(per_class, self.judge.classifier, pictures)
        source = Source(self.reference.name, self.reference.fingerprint, None, None)
        if isinstance(self.reference, Collection):
            source = dataclasses.replace(
                source, count=self.reference.count, size=self.reference.size
            )
        return Result(
            subject=subject,
            search_samples=self.search_samples,
            reference=source,
            features={extractor.name: extractor.digest for extractor in self.extractors},
            classifier=None if self.judge is None else self.judge.hash,
            count=pictures.count,
            size=pictures.size,
            pictures=pictures.fingerprint,
            scores=found,
            accuracy=accuracy,
            per_class=per_class,
            device=self.device.type,
            versions=report.versions(),
        )


def prepare(
    model: str,
    reference: str | None = None,
    *,
    samples: int | None = None,
    features: Sequence[str] = (),
    weights: Path | None = None,
    classifier: Path | None = None,
    settings: Mapping[str, float] | None = None,
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
) -> Job:
    """Opens and checks everything that an evaluation needs; see `ctf evaluate --help`.

    Args:
        model: a pipeline, by name or folder, or pictures: a folder or an .npz file.
        reference: an included set, a folder, or an .npz file; None: what the pipeline was trained
            on, if it is included.
        samples: to be drawn; None: 5000, or the next number that the classes can share equally.
        features: see `open_extractor`; none: lite0, and fashion for pictures like Fashion-MNIST.
        settings: any fields of `Sampling`; the rest as the pipeline has them.
        split, background, skip_bad: see `collection.open_reference`.
        search_samples: of each point of a search for guidance and temperatures, or the next number
            that the classes can share equally; None: no search.
        against: a report.json, or its folder, that the new report will be compared with.
        out: a folder, or a .json file beside one; None: a folder in evaluations/.
        open_progress: called with (files, files in all) while folders of pictures are read.

    Raises:
        UserError: something is not there, is not what it should be, or does not fit the rest.
    """
    pipe, pictures = None, None
    if _is_pictures(Path(model)):
        if settings or not (samples is resize is search_samples is None):
            raise UserError(
                f"{model}: pictures, which are all scored as they are; a number of samples, "
                "settings, --resize and --search are for pipelines"
            )
        if reference is None:
            raise _no_reference(model)
        pictures = reference_sets.open_scored(Path(model), progress)
        subject = Subject(pictures.name, pictures.fingerprint)
        source, size = reference, min(pictures.size)
    else:
        folder = find_pipeline(model)
        pipe = Pipeline.from_pretrained(folder, device)
        name = folder.resolve().name if Path(model).is_dir() else model
        drawing = _drawing(pipe, samples, settings or {}, seed, balance, resize)
        if search_samples is not None:
            search_samples = _search_samples(pipe, drawing, search_samples, settings or {})
        source = str(reference or pipe.origin.get("images"))
        if reference is None and source not in INCLUDED:
            raise _no_reference(model)
        subject = Subject(name, hash_pipeline(folder), drawing)
        size = resize or pipe.tokenizer.config.image_size
    old = None if against is None else report.load(against)
    like_fashion = _is_like_fashion(pipe, source, size)
    judge, pictures = _judge(classifier, like_fashion, pipe, pictures, size, device)
    chosen = tuple(dict.fromkeys(features)) or ("lite0", *["fashion"] * like_fashion)
    if weights is not None and "inception" not in chosen:
        raise UserError(f"--weights {weights}: only --features inception takes weights")
    extractors = [
        open_extractor(spec, weights=weights if spec == "inception" else None, device=device)
        for spec in chosen
    ]
    known = reference_sets.open_reference(
        source, size, split, background=background, skip_bad=skip_bad, progress=progress
    )
    for extractor in extractors:
        if isinstance(known, Statistics):
            check_features(known, extractor, size)
        elif known.statistics is not None and extractor.name == "inception":
            check_features(known.statistics, extractor, size)
    job = Job(subject, pipe, pictures, known, extractors, judge, search_samples, old, out, device)
    job.check()
    return job


def _is_pictures(path: Path) -> bool:
    """Whether it is meant as pictures; a folder with any part of a pipeline is meant as one."""
    if path.suffix == ".npz":
        return True
    return path.is_dir() and not any((path / file).is_file() for file in PIPELINE_FILES)


def _no_reference(model: str) -> UserError:
    return UserError(f"{model}: nothing to score against; give a --reference")


def _drawing(
    pipe: Pipeline,
    samples: int | None,
    settings: Mapping[str, float],
    seed: int,
    balance: Balance,
    resize: int | None,
) -> Drawing:
    chosen = dataclasses.asdict(dataclasses.replace(pipe.sampling, **settings))  # type: ignore[arg-type]
    count = len(pipe.class_names)
    drawing = Drawing(SAMPLES if samples is None else samples, seed, balance, chosen, resize)
    if samples is None:
        drawing = drawing.shared(count)
    drawing.classes(count)
    check_seed(seed, FAR + drawing.samples)
    return drawing


def _search_samples(
    pipe: Pipeline, drawing: Drawing, samples: int, settings: Mapping[str, float]
) -> int:
    for name in searched(pipe.fine is not None):
        if name in settings:
            raise UserError(f"{name} is given, and is what --search finds; leave one of them out")
    return dataclasses.replace(drawing, samples=samples).shared(len(pipe.class_names)).samples


def _is_like_fashion(pipe: Pipeline | None, source: str, size: int) -> bool:
    """Whether what is scored is of the kind that the shipped classifier knows."""
    known = source in INCLUDED if pipe is None else pipe.class_names == fashion_mnist.CLASSES
    return known and size == fashion_mnist.PADDED_SIZE


def _judge(
    folder: Path | None,
    like_fashion: bool,
    pipe: Pipeline | None,
    pictures: Collection | None,
    size: int,
    device: torch.device,
) -> tuple[Judge | None, Collection | None]:
    """The classifier in `folder`, or the shipped one where it fits; the pictures with its classes.

    Raises:
        UserError: the one in `folder` does not fit.
    """
    if folder is None and not like_fashion:
        return None, pictures
    files = [(folder or SHIPPED) / name for name in ("config.json", "model.safetensors")]
    classifier = load_classifier(folder or SHIPPED, device)
    if pictures is not None:
        pictures = _numbered_as(pictures, classifier.class_names)
    misfit = _misfit(classifier, pipe or pictures, size)
    if misfit is None:
        digest = storage.hash_json([storage.hash_file(file) for file in files])
        return Judge(classifier, digest), pictures
    if folder is not None:
        raise UserError(misfit)
    return None, pictures


def _numbered_as(pictures: Collection, names: tuple[str, ...]) -> Collection:
    """With classes numbered as in `names`, if they are of these, or numbers without a name."""
    own, classes_N = pictures.class_names, pictures.classes_N
    if classes_N is None or not (
        classes_N.max() < len(names) if own is None else {*own} <= {*names}
    ):
        return pictures
    if own is not None:
        classes_N = np.array([names.index(name) for name in own])[classes_N]
    return dataclasses.replace(pictures, classes_N=classes_N, class_names=names)


def _misfit(classifier: Classifier, subject: Pipeline | Collection | None, size: int) -> str | None:
    """Why a classifier cannot judge pictures; None where it can."""
    assert subject is not None
    if isinstance(subject, Collection) and subject.classes_N is None:
        return f"{subject.name}: does not say what classes its pictures are of"
    sides = subject.size if isinstance(subject, Collection) else (size, size)
    if sides != (classifier.image_size, classifier.image_size):
        return (
            f"the classifier is for {classifier.image_size} pixels a side, the pictures have "
            f"{sides[1]} x {sides[0]}"
        )
    if subject.class_names != classifier.class_names:
        return (
            f"the classifier knows {_listed(classifier.class_names)}, the pictures are of "
            f"{_listed(subject.class_names or ())}\nuse one that was trained on the same classes"
        )
    return None


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return f"{len(names)} classes ({shown})" if names else "other ones, by number"


def _add_accuracy(
    per_class: dict[str, dict[str, Any]], classifier: Classifier, pictures: Collection
) -> Accuracy:
    assert pictures.classes_N is not None
    found_N = np.concatenate([classify(classifier, b).classes_N for b in pictures.batches()])
    for number, name in enumerate(classifier.class_names):
        of_class = pictures.classes_N == number
        if of_class.any():
            accuracy = class_accuracy(found_N[of_class], pictures.classes_N[of_class])
            per_class[name]["accuracy"] = config.to_json(accuracy)
    return class_accuracy(found_N, pictures.classes_N)


def _add_class_distances(
    per_class: dict[str, dict[str, Any]],
    gathered: Gathered,
    pictures: Collection,
    reference: Reference,
    suffix: str,
) -> None:
    """Squared distances of the mean features of each class to those of the reference's class."""
    own_CD, others_CD = gathered.class_means_CD, reference.class_means_CD
    if own_CD is None or others_CD is None or reference.class_names != pictures.class_names:
        return
    for name, own_D, other_D in zip(per_class, own_CD, others_CD, strict=True):
        distance = float(np.square(own_D - other_D).sum())
        if np.isfinite(distance):
            per_class[name][f"mean distance{suffix}"] = distance
