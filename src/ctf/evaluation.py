"""A pipeline or pictures, and a reference -> a report that says all that is needed to repeat it.

FOLDER/asked.json      what was asked for; another question is refused
FOLDER/samples.npz     the pictures that were drawn, as ADM's evaluator takes them
FOLDER/statistics.npz  mean and covariance of their features, a reference for others
FOLDER/report.json     the scores; report.md and samples.png show them
FOLDER/search.json     every setting that was tried, and search.png, where that was asked for
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ctf import checkpoint, collection, config, pipeline, report
from ctf.classifier import Classifier, classify, load_classifier, shipped_classifier
from ctf.collection import Collection, Split, Statistics
from ctf.drawing import BLOCK, Balance, Drawing, Report, Sampler, draw, draw_block
from ctf.errors import UserError
from ctf.extractors import Extractor, open_extractor
from ctf.images import INCLUDED
from ctf.loop import first_difference
from ctf.metrics import Accuracy, Estimate, class_accuracy
from ctf.pipeline import Pipeline
from ctf.progress import Reporter
from ctf.report import Result, Subject
from ctf.scores import Gathered, Reference, Score, class_means, gather, look_at_reference, scores
from ctf.search import search

Progress = Callable[[str], AbstractContextManager[Reporter]]


def recognised(
    pipe: Sampler, classifier: Classifier, drawing: Drawing, advance: Report | None = None
) -> Accuracy:
    """How many samples are recognised as the class asked for; nothing is kept."""
    classes_N = drawing.classes(len(pipe.class_names))
    found = []
    for start in range(0, len(classes_N), BLOCK):
        found.append(classify(classifier, draw_block(pipe, drawing, classes_N, start)).classes_N)
        if advance is not None:
            advance(min(start + BLOCK, len(classes_N)), len(classes_N))
    return class_accuracy(np.concatenate(found), classes_N)


@dataclasses.dataclass(frozen=True)
class Job:
    """An evaluation whose every part was found and fits; `run` does it."""

    name: str
    hash: str
    pipe: Pipeline | None  # draws what is scored; None: `pictures` are
    pictures: Collection | None
    drawing: Drawing | None
    reference: Collection | Statistics
    extractors: Sequence[Extractor]
    classifier: Classifier | None
    search_samples: int | None
    out: Path | None

    @property
    def asked(self) -> dict[str, Any]:
        """All that decides the result."""
        return {
            "subject": config.to_json(Subject(self.name, self.hash, self.drawing)),
            "reference": self.reference.fingerprint,
            "features": {extractor.name: extractor.digest for extractor in self.extractors},
            "classifier": None if self.classifier is None else list(self.classifier.class_names),
            "search_samples": self.search_samples,
        }

    @property
    def folder(self) -> Path:
        """Where the report goes: what was asked names it, unless the user does."""
        if self.out is not None:
            return self.out.with_suffix("") if self.out.suffix == ".json" else self.out
        stem = self.name.removesuffix(".npz").replace("/", "-").replace("@", "-")
        return Path("evaluations") / f"{stem}-{checkpoint.hash_json(self.asked)[:8]}"

    def run(self, progress: Progress) -> Result:
        """Draws, scores and writes the report.

        Killed at any moment and run again, it goes on with the samples that are there; where it
        is done, it reads the report.

        Raises:
            UserError: the folder holds something else; too few pictures.
        """
        folder = self.folder
        _claim(folder, self.asked)
        if (folder / report.FILE).is_file():
            return report.load(folder / report.FILE)
        pictures, drawing = self.pictures, self.drawing
        if self.pipe is not None and drawing is not None:
            if self.search_samples is not None:
                found = search(
                    self.pipe,
                    dataclasses.replace(drawing, samples=self.search_samples),
                    self.reference,
                    self.extractors[0],
                    folder,
                    progress,
                    has_fine=self.pipe.fine is not None,
                )
                settings = {**drawing.settings, **found}
                drawing = dataclasses.replace(drawing, settings=settings)
            with progress("draw") as advance:
                pictures = draw(self.pipe, drawing, folder, advance)
        assert pictures is not None
        result = self._score(pictures, Subject(self.name, self.hash, drawing), progress)
        report.write(folder, result, pictures)
        if self.out is not None and self.out.suffix == ".json":
            checkpoint.save_json(self.out, config.to_json(result))
        return result

    def _score(self, pictures: Collection, subject: Subject, progress: Progress) -> Result:
        found: dict[str, Score] = {}
        per_class: dict[str, dict[str, Any]] = {name: {} for name in pictures.class_names or ()}
        for extractor in self.extractors:
            with progress(f"{extractor.name}: reference") as advance:
                known = look_at_reference(self.reference, extractor, advance)
            with progress(f"{extractor.name}: samples") as advance:
                gathered = gather(extractor, pictures, seed=0, report=advance)
            found |= scores(gathered, known, extractor.suffix)
            _add_class_distances(per_class, gathered, pictures, known, extractor.suffix)
            if extractor is self.extractors[0]:
                collection.save_statistics(
                    self.folder / "statistics.npz",
                    gathered.pooled.merged().gaussian,
                    None if gathered.spatial is None else gathered.spatial.gaussian,
                    extractor.digest,
                )
        accuracy = None
        if self.classifier is not None:
            accuracy = _add_accuracy(per_class, self.classifier, pictures)
        counted = self.reference.count if isinstance(self.reference, Collection) else None
        return Result(
            subject=subject,
            reference={
                "name": self.reference.name,
                "fingerprint": self.reference.fingerprint,
                "count": counted,
            },
            features={extractor.name: extractor.digest for extractor in self.extractors},
            count=pictures.count,
            size=pictures.size,
            scores={
                name: config.to_json(score) if isinstance(score, Estimate) else score
                for name, score in found.items()
            },
            accuracy=accuracy,
            per_class=per_class,
            versions=report.versions(),
        )


def prepare(
    model: str,
    reference: str | None = None,
    *,
    samples: int = 5000,
    features: Sequence[str] = (),
    weights: Path | None = None,
    classifier: Path | None = None,
    settings: Mapping[str, float] | None = None,
    seed: int = 0,
    balance: Balance = "balanced",
    resize: int | None = None,
    split: Split | None = None,
    search_samples: int | None = None,
    out: Path | None = None,
    device: torch.device,
) -> Job:
    """Opens and checks everything that an evaluation needs; see `ctf evaluate --help`.

    Args:
        model: a pipeline, by name or folder, or pictures: a folder or an .npz file.
        reference: an included set, a folder, or an .npz file; None: what the pipeline was trained
            on, if it is included.
        settings: any fields of `Sampling`; the rest as the pipeline has them.
        search_samples: of each point of a search for guidance and temperatures; None: no search.
        out: a folder, or a .json file beside one; None: a folder in evaluations/.

    Raises:
        UserError: something is not there, is not what it should be, or does not fit the rest.
    """
    pipe, pictures, drawing = None, None, None
    if _is_pictures(Path(model)):
        pictures = collection.open_scored(Path(model))
        if settings or search_samples or resize:
            raise UserError(f"{model}: pictures that are there; settings are for a pipeline")
        name, named, size = pictures.name, pictures.fingerprint, max(pictures.size)
    else:
        folder = pipeline.find(model)
        pipe = pipeline.load(folder, device)
        name, named = Path(model).name or str(folder.resolve().name), pipeline.hash_of(folder)
        chosen = dataclasses.replace(pipe.sampling, **(settings or {}))  # type: ignore[arg-type]
        drawing = Drawing(samples, seed, balance, dataclasses.asdict(chosen), resize)
        drawing.classes(len(pipe.class_names))
        pipeline.check_seed(seed, samples)
        if search_samples is not None:
            dataclasses.replace(drawing, samples=search_samples).classes(len(pipe.class_names))
        size = resize or pipe.tokenizer.config.image_size
    source = reference or _trained_on(pipe)
    if source is None:
        raise UserError(f"{model}: nothing to score against; give a --reference")
    shipped = shipped_classifier(device)
    fashion = (
        shipped.class_names == pipe.class_names if pipe is not None else source in INCLUDED
    ) and size == shipped.image_size
    chosen_features = tuple(features) or (("lite0", "fashion") if fashion else ("lite0",))
    judge = None
    if classifier is not None:
        judge = load_classifier(classifier, device)
    elif fashion and (pictures is None or pictures.classes_N is not None):
        judge = shipped
    if judge is not None:
        pictures = _check_classifier(judge, pipe, pictures, size)
    found = collection.open_reference(source, size, split)
    if weights is not None and "inception" not in chosen_features:
        raise UserError(f"--weights {weights}: only --features inception takes weights")
    extractors = [
        open_extractor(spec, weights=weights if spec == "inception" else None, device=device)
        for spec in chosen_features
    ]
    if isinstance(found, Statistics) and any(
        found.features not in (None, extractor.digest) for extractor in extractors
    ):
        raise UserError(
            f"{source}: made with other features than {', '.join(chosen_features)}; make it again, "
            "or choose those with --features"
        )
    return Job(name, named, pipe, pictures, drawing, found, extractors, judge, search_samples, out)


def _is_pictures(path: Path) -> bool:
    return path.suffix == ".npz" or (path.is_dir() and not (path / pipeline.SETTINGS).is_file())


def _trained_on(pipe: Pipeline | None) -> str | None:
    name = None if pipe is None else pipe.origin.get("images")
    return name if name in INCLUDED else None


def _claim(folder: Path, asked: dict[str, Any]) -> None:
    path = folder / "asked.json"
    if path.is_file():
        there = checkpoint.load_json(path)
        if there != asked:
            raise UserError(
                f"{folder} holds another evaluation: {first_difference(there, asked)}\n"
                "choose another --out"
            )
    elif not checkpoint.is_vacant(folder):
        raise UserError(f"{folder} exists and holds no evaluation; choose another --out")
    else:
        checkpoint.save_json(path, asked)
    checkpoint.remove_temporaries(folder)


def _check_classifier(
    classifier: Classifier, pipe: Pipeline | None, pictures: Collection | None, size: int
) -> Collection | None:
    """Raises UserError where the classifier cannot judge them; names the pictures' classes."""
    if size != classifier.image_size:
        raise UserError(
            f"the classifier is for {classifier.image_size} pixels, the pictures have {size}"
        )
    names = None if pictures is None else pictures.class_names
    if pictures is not None and names is None:
        if pictures.classes_N is None:
            raise UserError(f"{pictures.name}: does not say what classes its pictures are of")
        if pictures.classes_N.max() < len(classifier.class_names):
            names = classifier.class_names
            pictures = dataclasses.replace(pictures, class_names=names)
    if pipe is not None:
        names = pipe.class_names
    if names != classifier.class_names:
        raise UserError(
            f"the classifier knows {_listed(classifier.class_names)}, the pictures are of "
            f"{_listed(names or ())}\nuse one that was trained on the same classes"
        )
    return pictures


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return f"{len(names)} classes ({shown})" if names else "unknown classes"


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
    own_CD, others_CD = class_means(gathered, pictures), reference.class_means_CD
    if own_CD is None or others_CD is None or reference.class_names != pictures.class_names:
        return
    for name, own_D, other_D in zip(per_class, own_CD, others_CD, strict=True):
        distance = float(np.square(own_D - other_D).sum())
        if np.isfinite(distance):
            per_class[name][f"mean distance{suffix}"] = distance
