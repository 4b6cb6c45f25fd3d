"""What cells do: train a stage, score what is drawn, time it.

Every job is a dataclass that says all that decides its result, and names the cells before it.

Shapes: B batch, L tokens of an image, V codes, K clusters.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ctf.common import config, storage
from ctf.common.distributed import World
from ctf.common.progress import OpenProgress
from ctf.data.extraction import TokensConfig
from ctf.data.image_set import ImageSet, Splits
from ctf.data.tokens import Tokens
from ctf.data.transforms import as_pil
from ctf.evaluation import evaluate, reference_sets, scores
from ctf.evaluation.extractors import Extractor, open_extractor
from ctf.evaluation.reference_sets import Collection
from ctf.evaluation.sample_cache import Drawing
from ctf.evaluation.search import search
from ctf.models import clusters
from ctf.models.clusters import Clusters, ClustersConfig
from ctf.models.sizes import TokenizerShape, TransformerShape
from ctf.models.transformer import TransformerConfig
from ctf.pipelines import pipeline  # fmt: skip
from ctf.pipelines.folder import CLUSTERS, SETTINGS, load_clusters, load_fine, load_tokenizer
from ctf.training import cost, fit, loop
from ctf.training import tokenizer as tokenizer_training
from ctf.training.recipes import GroupLoss, Recipe, preset
from ctf.training.tokenizer import TokenizerTraining
from ctf.training.transformers import TrainingConfig

Found = dict[str, Any]
Codes = Literal["true", "random", "model"]


@dataclasses.dataclass(frozen=True)
class Place:
    """What all cells of a run have in common.

    source: name or folder of the pictures. images: those to learn from, and held-out ones.
    kept_back: those that searches are against. features: the networks that look at pictures, by
        name; searches are by the first.
    """

    source: str
    images: Splits
    kept_back: ImageSet
    features: tuple[str, ...]
    device: torch.device


@dataclasses.dataclass(frozen=True)
class TokenizerJob:
    """Trains a tokenizer.

    kept_back: how many pictures are kept from all trainings, for the searches.
    """

    shape: TokenizerShape
    training: TokenizerTraining
    kept_back: int

    @property
    def needs(self) -> tuple[str, ...]:
        return ()


@dataclasses.dataclass(frozen=True)
class TokensJob:
    """Encodes the pictures to learn from and the held-out ones with a tokenizer."""

    tokenizer: str

    @property
    def needs(self) -> tuple[str, ...]:
        return (self.tokenizer,)


@dataclasses.dataclass(frozen=True)
class ClustersJob:
    """Clusters of a tokenizer's codebook, and the study of redundancy (Fig. 1b)."""

    tokens: str
    clusters: ClustersConfig

    @property
    def needs(self) -> tuple[str, ...]:
        return (self.tokens,)


@dataclasses.dataclass(frozen=True)
class CoarseJob:
    """Trains a coarse model; with identity clusters it is the full-vocabulary baseline.

    warm_start: the cell of a baseline that it starts from.
    """

    clusters: str
    shape: TransformerShape
    training: TrainingConfig
    group_loss: GroupLoss = dataclasses.field(default_factory=GroupLoss)
    warm_start: str | None = None

    @property
    def needs(self) -> tuple[str, ...]:
        return (self.clusters, *([self.warm_start] if self.warm_start else []))


@dataclasses.dataclass(frozen=True)
class FineJob:
    """Trains a fine model."""

    clusters: str
    shape: TransformerShape
    training: TrainingConfig
    softmax: Literal["members", "full"] = "members"
    corruption: float = 0.0

    @property
    def needs(self) -> tuple[str, ...]:
        return (self.clusters,)


@dataclasses.dataclass(frozen=True)
class ScoreJob:
    """Draws samples of a coarse and a fine model and scores them against the held-out pictures.

    settings: of the sampling, where they are not the defaults.
    tuned: the cell of a search whose settings are the start; those above replace some.
    """

    coarse: str
    fine: str | None
    samples: int
    seed: int
    settings: dict[str, float] = dataclasses.field(default_factory=dict)
    tuned: str | None = None

    @property
    def needs(self) -> tuple[str, ...]:
        return tuple(name for name in (self.coarse, self.fine, self.tuned) if name is not None)


@dataclasses.dataclass(frozen=True)
class SearchJob:
    """Looks for guidance and temperatures: the lowest FID to the pictures that are kept back.

    The held-out pictures, which all final scores are against, are not looked at.
    """

    coarse: str
    fine: str | None
    samples: int
    points: int

    @property
    def needs(self) -> tuple[str, ...]:
        return tuple(name for name in (self.coarse, self.fine) if name is not None)


@dataclasses.dataclass(frozen=True)
class DetailsJob:
    """The fine stage alone: held-out pictures whose codes are drawn anew from their true labels.

    codes: the true ones; random members of their clusters; or as the fine model has it, at
        `temperature`, the likeliest at 0.
    """

    fine: str
    codes: Codes
    temperature: float
    pictures: int

    @property
    def needs(self) -> tuple[str, ...]:
        return (self.fine,)


@dataclasses.dataclass(frozen=True)
class SpeedJob:
    """Times two samplers in turn, each with the settings of its search."""

    baseline: str
    coarse: str
    fine: str
    tuned: tuple[str, str]
    batches: tuple[int, ...] = (1, 64)
    rounds: int = 15

    @property
    def needs(self) -> tuple[str, ...]:
        return (self.baseline, self.coarse, self.fine, *self.tuned)


Job = (
    TokenizerJob | TokensJob | ClustersJob | CoarseJob | FineJob | ScoreJob | SearchJob
    | DetailsJob | SpeedJob
)  # fmt: skip


def make(job: Job, run: Path, work: Path, place: Place, open_progress: OpenProgress) -> Found:
    """Does a job in the folder `run`, the cells that it needs being done in `work`."""
    match job:
        case TokenizerJob():
            return _tokenizer(job, run, place, open_progress)
        case TokensJob():
            return _tokens(job, run, work, place, open_progress)
        case ClustersJob():
            return _clusters(job, run, work)
        case CoarseJob():
            return _coarse(job, run, work, place, open_progress)
        case FineJob():
            return _fine(job, run, work, place, open_progress)
        case ScoreJob():
            return _score(job, run, work, place, open_progress)
        case SearchJob():
            return _search(job, run, work, place, open_progress)
        case DetailsJob():
            return _details(job, run, work, place, open_progress)
        case SpeedJob():
            return _speed(job, run, work, place, open_progress)


# --- Training -------------------------------------------------------------------------------------


def recipe(**values: Any) -> Recipe:
    """That of preset "small" with values replaced; pictures are taken as they are."""
    return dataclasses.replace(preset("small"), tokens=TokensConfig(views="plain"), **values)


def _tokenizer(job: TokenizerJob, run: Path, place: Place, open_progress: OpenProgress) -> Found:
    used = recipe(tokenizer=job.shape, tokenizer_training=job.training)
    with open_progress("tokenizer") as progress:
        world = World(device=place.device)
        tokenizer = fit.train_tokenizer(run, place.images, used, world, progress)
    with open_progress("reconstruction") as progress:
        found: Found = dict(
            tokenizer_training.evaluate(
                tokenizer, place.images.val, place.device, progress=progress
            )
        )
    held_out = _held_out(place)
    for extractor in _extractors(place):
        with open_progress(f"rFID{extractor.suffix}") as progress:
            distance = scores.reconstruction_distance(tokenizer, held_out, extractor, progress)
        found[f"rFID{extractor.suffix}"] = config.to_json(distance)
    images = job.training.steps * job.training.batch_size
    forward = sum(cost.tokenizer_flops(tokenizer.config))
    found["parameters"] = sum(p.numel() for p in tokenizer.parameters())
    found["flops"] = 3 * forward * images
    found["images_seen"] = images
    found["seconds_of_training"] = _training_seconds(run / "tokenizer")
    return found


def _tokens(
    job: TokensJob, run: Path, work: Path, place: Place, open_progress: OpenProgress
) -> Found:
    _link(run, work / job.tokenizer / "run" / "tokenizer")
    tokenizer = load_tokenizer(run / "tokenizer", place.device)
    with open_progress("tokens") as progress:
        fit.extract_tokens(run, tokenizer, place.images, recipe(), None, progress)
    return {"pictures": len(place.images.train) + len(place.images.val)}


def _clusters(job: ClustersJob, run: Path, work: Path) -> Found:
    source = work / job.tokens / "run"
    _link(run, source / "tokenizer", source / "tokens")
    tokenizer = load_tokenizer(run / "tokenizer")
    fit.fit_clusters(run, tokenizer, job.clusters)
    return storage.load_object(run / "clusters" / "report.json")


def _link(run: Path, *stages: Path) -> None:
    """Makes `run` a run with these folders of other runs; all cells can be moved together."""
    run.mkdir(parents=True, exist_ok=True)
    for stage in stages:
        link = run / stage.name
        if not link.is_symlink():
            link.symlink_to(os.path.relpath(stage, run), target_is_directory=stage.is_dir())


def _branch(run: Path, source: Path) -> Clusters:
    """Makes `run` a run with the tokenizer, tokens and clusters of `source`."""
    _link(run, *(source / stage for stage in ("tokenizer", "tokens", "clusters")))
    return load_clusters(run / "clusters" / CLUSTERS)


def _coarse(
    job: CoarseJob, run: Path, work: Path, place: Place, open_progress: OpenProgress
) -> Found:
    parts = _branch(run, work / job.clusters / "run")
    used = recipe(coarse=job.shape, coarse_training=job.training, group_loss=job.group_loss)
    source = None if job.warm_start is None else work / job.warm_start / "run"
    with open_progress("coarse") as progress:
        fit.train_model(run, "coarse", parts, used, World(device=place.device), progress, source)
    shape = config.from_json(
        TransformerConfig, storage.load_object(run / "coarse" / "config.json")["model"], "model"
    )
    flops = cost.transformer_flops(shape, shape.length, parts.count)
    return _trained(run / "coarse", job.training, shape.length, flops)


def _fine(job: FineJob, run: Path, work: Path, place: Place, open_progress: OpenProgress) -> Found:
    parts = _branch(run, work / job.clusters / "run")
    used = recipe(
        fine=job.shape,
        fine_training=job.training,
        fine_softmax=job.softmax,
        fine_corruption=job.corruption,
    )
    with open_progress("fine") as progress:
        fit.train_model(run, "fine", parts, used, World(device=place.device), progress)
    shape = config.from_json(
        TransformerConfig, storage.load_object(run / "fine" / "config.json")["model"], "model"
    )
    outputs = parts.codebook_size if job.softmax == "full" else _mean_choices(run, parts)
    flops = cost.transformer_flops(shape, shape.length + 1, outputs)
    return _trained(run / "fine", job.training, shape.length, flops)


def _mean_choices(run: Path, parts: Clusters) -> int:
    """How many members a token's cluster has, on average over held-out pictures."""
    val = Tokens(run / "tokens", "val", fit.tokenizer_hash(run))
    codes_BL = val.codes(np.arange(min(len(val), fit.STUDY_PICTURES)))
    return round(float(parts.sizes_K[parts.labels_V[codes_BL]].double().mean()))


def _trained(folder: Path, training: TrainingConfig, length: int, flops_each: int) -> Found:
    images = training.steps * training.batch_size
    tensors, _ = storage.load_tensors(folder / "model.safetensors")
    curve = [line for line in loop.read_metrics(folder) if line["split"] == "val"]
    return {
        "parameters": sum(tensor.numel() for tensor in tensors.values()),
        "flops": flops_each * images,
        "images_seen": images,
        "tokens_seen": images * length,
        "loss": curve[-1]["loss"],
        "curve": [[line["step"], line["loss"]] for line in curve],
        "seconds_of_training": _training_seconds(folder),
    }


def _training_seconds(folder: Path) -> float:
    return float(loop.last_metrics(folder, "val")["seconds"])


# --- Drawing and scoring --------------------------------------------------------------------------


def _assemble(run: Path, coarse: Path, fine: Path | None) -> Path:
    """Makes `run` a pipeline of the models of other runs."""
    _link(run, *(coarse / name for name in ("tokenizer", "clusters", "coarse", SETTINGS)))
    if fine is not None:
        _link(run, fine / "fine")
    return run


def _pipeline(
    job: ScoreJob | SearchJob | SpeedJob, run: Path, work: Path, place: Place
) -> pipeline.Pipeline:
    fine = None if job.fine is None else work / job.fine / "run"
    folder = _assemble(run, work / job.coarse / "run", fine)
    return pipeline.load(folder, place.device, "auto")


def _settings(work: Path, tuned: str | None) -> dict[str, float]:
    """What a search found. By default no guidance: temperatures 1, everything as learned."""
    if tuned is None:
        return {}
    found: dict[str, float] = storage.load_object(work / tuned / "result.json")["found"]["best"]
    return found


def _score(
    job: ScoreJob, run: Path, work: Path, place: Place, open_progress: OpenProgress
) -> Found:
    pipe = _pipeline(job, run / "pipeline", work, place)
    settings = {**_settings(work, job.tuned), **job.settings}
    prepared = evaluate.prepare(
        str(run / "pipeline"),
        place.source,
        samples=job.samples,
        features=place.features,
        settings=settings,
        seed=job.seed,
        split="val",
        out=run / "report",
        device=place.device,
    )
    began = time.monotonic()
    # The same pipeline, made ready to draw faster.
    result = dataclasses.replace(prepared, pipe=pipe).run(open_progress)
    return {
        "scores": result.scores,
        "accuracy": None if result.accuracy is None else config.to_json(result.accuracy),
        "settings": settings,
        "samples": result.count,
        "pictures": result.pictures,
        "seconds_of_scoring": round(time.monotonic() - began, 1),
    }


def _search(
    job: SearchJob, run: Path, work: Path, place: Place, open_progress: OpenProgress
) -> Found:
    pipe = _pipeline(job, run / "pipeline", work, place)
    extractor = _extractors(place)[0]
    pictures = reference_sets.of_sets("pictures kept back", (place.kept_back,))
    with open_progress(f"{extractor.name}: pictures kept back") as progress:
        known = scores.look_at_reference(pictures, extractor, progress)
    drawing = Drawing(job.samples).shared(len(pipe.class_names))
    best = search(
        pipe,
        drawing,
        extractor,
        known.pooled,
        run,
        open_progress,
        has_fine=pipe.fine is not None,
        budget=job.points,
    )
    points = storage.load_object(run / "search.json")["points"]
    return {"best": best, "points": points}


@torch.inference_mode()
def _details(
    job: DetailsJob, run: Path, work: Path, place: Place, open_progress: OpenProgress
) -> Found:
    source = work / job.fine / "run"
    parts = _branch(run, source)
    tokenizer = load_tokenizer(run / "tokenizer", place.device)
    fine = load_fine(source / "fine", parts, place.device)
    val = Tokens(run / "tokens", "val", fit.tokenizer_hash(run))
    count = min(job.pictures, len(val))
    generator = torch.Generator().manual_seed(0)

    def drawn(codes_BL: Tensor, classes_B: Tensor) -> Tensor:
        if job.codes == "true":
            return codes_BL
        if job.codes == "random":
            return clusters.swap(codes_BL, parts, generator)
        labels_BL = parts.labels_V[codes_BL]
        logits_BLS = fine(labels_BL, classes_B).float()
        if job.temperature == 0:
            choices_BL = logits_BLS.argmax(-1)
        else:
            probabilities_TS = (logits_BLS / job.temperature).softmax(-1).flatten(0, 1)
            choices_BL = torch.multinomial(probabilities_TS, 1, generator=generator)
        return fine.codes(labels_BL, choices_BL.view_as(labels_BL))

    def pictures() -> Iterator[np.ndarray]:
        for start in range(0, count, tokenizer_training.EVALUATION_BATCH):
            rows_B = np.arange(start, min(start + tokenizer_training.EVALUATION_BATCH, count))
            classes_B = torch.from_numpy(val.classes_N[rows_B])
            codes_BL = drawn(val.codes(rows_B), classes_B)
            images = as_pil(tokenizer.decode(codes_BL.to(place.device)))
            yield np.stack([np.asarray(image) for image in images])

    held_out = _held_out(place)
    extractors = _extractors(place)
    batches = list(pictures())  # drawn once for all networks
    seen = dataclasses.replace(
        held_out, batches=batches.__iter__, count=count, classes_N=None, class_names=None
    )
    found: Found = {}
    for extractor in extractors:
        reference = scores.look_at_reference(held_out, extractor, None)
        with open_progress(f"{extractor.name}: {job.codes} codes") as progress:
            gathered = scores.gather(extractor, seen, progress)
        distance = f"FID{extractor.suffix}"
        scored = scores.scores(gathered, reference, extractor.suffix)
        found[distance] = config.to_json(scored[distance])
    return found


def _held_out(place: Place) -> Collection:
    return reference_sets.open_reference(
        place.source, place.images.val.image_size, "val", background="white", skip_bad=False
    )  # type: ignore[return-value]


def _extractors(place: Place) -> list[Extractor]:
    return [open_extractor(name, device=place.device) for name in place.features]


def _speed(
    job: SpeedJob, run: Path, work: Path, place: Place, open_progress: OpenProgress
) -> Found:
    baseline = pipeline.load(
        _assemble(run / "baseline", work / job.baseline / "run", None), place.device, "auto"
    )
    ctf = _pipeline(job, run / "pipeline", work, place)
    ways: Mapping[str, tuple[pipeline.Pipeline, dict[str, Any]]] = {
        "baseline": (baseline, _settings(work, job.tuned[0])),
        "CTF": (ctf, _settings(work, job.tuned[1])),
    }
    seconds: dict[str, dict[str, list[float]]] = {name: {} for name in ways}
    total = len(job.batches) * (job.rounds + 1)
    with open_progress("speed") as progress:
        for number, batch in enumerate(job.batches):
            classes = [i % len(ctf.class_names) for i in range(batch)]
            for round_ in range(job.rounds + 1):  # the first one warms up
                for name, (pipe, settings) in ways.items():
                    began = time.perf_counter()
                    pipe.sample(classes, seed=round_, **settings)
                    if round_:
                        taken = time.perf_counter() - began
                        seconds[name].setdefault(str(batch), []).append(taken)
                progress(number * (job.rounds + 1) + round_ + 1, total)
    return {
        "seconds": seconds,
        "settings": {name: settings for name, (_, settings) in ways.items()},
    }
