"""Cells that sample: search settings, score samples, resample details, time sampling.

Shapes: B batch, L tokens of an image, V codes, S members of the largest cluster, T tokens.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ctf.bench import harness
from ctf.common import config, storage
from ctf.data.tokens import Tokens
from ctf.data.transforms import as_pil
from ctf.evaluation import reference_sets, scores
from ctf.evaluation.distances import frechet_distance_estimate
from ctf.evaluation.options import EvaluationOptions
from ctf.evaluation.prepare import prepare
from ctf.evaluation.sample_cache import GenerationConfig
from ctf.evaluation.search import search
from ctf.models.clusters import Clusters, swap
from ctf.models.fine import FineModel
from ctf.pipelines.folder import SETTINGS, load_fine, load_tokenizer
from ctf.pipelines.pipeline import Pipeline
from ctf.reproduce.cells import Cell, Outcome, Workspace, link, stored_as
from ctf.reproduce.training_cells import CoarseCell, FineCell, link_clusters
from ctf.training import stages
from ctf.training.tokenizer import EVALUATION_BATCH


def _pipeline(
    folder: Path, coarse: CoarseCell, fine: FineCell | None, space: Workspace
) -> Pipeline:
    """Make `folder` a pipeline of the models of other cells, and load it."""
    link(folder, space.run(coarse), "tokenizer", "clusters", "coarse", SETTINGS)
    if fine is not None:
        link(folder, space.run(fine), "fine")
    return Pipeline.from_pretrained(folder, space.device, engine="auto")


@dataclasses.dataclass(frozen=True)
class SearchCell(Cell):
    """Searches guidance and temperatures for the lowest FID to the reserved images.

    It never reads the held-out images, which the scores are computed against.
    """

    coarse: CoarseCell
    fine: FineCell | None
    samples: int
    points: int

    def compute(self, space: Workspace) -> Outcome:
        """Return the best settings, and all that were tried."""
        run, extractor = space.run(self), space.extractors()[0]
        pipe = _pipeline(run / "pipeline", self.coarse, self.fine, space)
        images = reference_sets.from_image_sets("reserved images", (space.reserved,))
        with space.open_progress(f"{extractor.name}: reserved images") as progress:
            reference = scores.load_reference(images, extractor, progress)
        best = search(
            pipe,
            GenerationConfig(self.samples).rounded_up(len(pipe.class_names)),
            extractor,
            reference.pooled,
            run,
            space.open_progress,
            budget=self.points,
        )
        return {"best": best, "points": storage.load_object(run / "search.json")["points"]}

    def best(self, space: Workspace) -> dict[str, Any]:
        """Return the sampling settings that it found, as keywords of `Pipeline.sample`."""
        result = storage.load_object(space.work / self.name / "result.json")
        best: dict[str, Any] = result["found"]["best"]
        return best


@dataclasses.dataclass(frozen=True)
class ScoreCell(Cell):
    """Scores samples of a coarse and a fine model against the held-out images.

    Attributes:
        seed: Of the first sample.
        settings: Sampling settings that replace those of the search.
        tuned: The search that the settings are from.
    """

    coarse: CoarseCell
    fine: FineCell | None
    samples: int
    seed: int
    settings: dict[str, float]
    tuned: SearchCell

    def compute(self, space: Workspace) -> Outcome:
        """Return the scores with their intervals, the class accuracy, and the settings."""
        folder = space.run(self) / "pipeline"
        pipe = _pipeline(folder, self.coarse, self.fine, space)
        settings = {**self.tuned.best(space), **self.settings}
        evaluation = prepare(
            str(folder),
            EvaluationOptions(
                space.plan.source,
                samples=self.samples,
                out=space.run(self) / "report",
                features=space.plan.features,
                seed=self.seed,
                split="val",
            ),
            settings=settings,
            device=space.device,
        )
        began = time.monotonic()
        # The same pipeline, with the engine that samples fastest.
        result = dataclasses.replace(evaluation, pipe=pipe).run(space.open_progress)
        return {
            "scores": result.scores,
            "accuracy": None if result.accuracy is None else config.to_json(result.accuracy),
            "settings": settings,
            "samples": result.count,
            "pictures": result.pictures,
            "seconds_of_scoring": round(time.monotonic() - began, 1),
        }


@dataclasses.dataclass(frozen=True)
class DetailsCell(Cell):
    """Scores the fine stage alone: held-out images with codes resampled from their true labels.

    Attributes:
        codes: The true codes, random members of their clusters, or samples of the fine model.
        temperature: Of the fine model; 0 takes the most likely member.
    """

    fine: FineCell
    codes: Literal["true", "random", "model"]
    temperature: float
    images: int = stored_as("pictures")

    @torch.inference_mode()
    def compute(self, space: Workspace) -> Outcome:
        """Return the FID by each feature network."""
        run = space.run(self)
        clusters = link_clusters(self.fine, run, space)
        tokenizer = load_tokenizer(run / "tokenizer", space.device)
        fine = load_fine(space.run(self.fine) / "fine", clusters, space.device)
        val = Tokens(stages.tokens_folder(run), "val", stages.tokenizer_hash(run))
        generator = torch.Generator().manual_seed(0)
        batches = []  # sampled once for all networks
        rows_N = np.arange(min(self.images, len(val)))
        for rows_B in np.split(rows_N, range(EVALUATION_BATCH, len(rows_N), EVALUATION_BATCH)):
            codes_BL, classes_B = val.codes(rows_B), torch.from_numpy(val.classes_N[rows_B])
            codes_BL = self._resample(fine, clusters, codes_BL, classes_B, generator)
            images = as_pil(tokenizer.decode(codes_BL.to(space.device)))
            batches.append(np.stack([np.asarray(image) for image in images]))
        held_out, outcome = space.held_out(), {}
        subject = dataclasses.replace(
            held_out,
            batches=batches.__iter__,
            count=sum(map(len, batches)),
            classes_N=None,
            class_names=None,
        )
        for extractor in space.extractors():
            reference = scores.load_reference(held_out, extractor)
            with space.open_progress(f"{extractor.name}: {self.codes} codes") as progress:
                summary = scores.summarize(extractor, subject, progress)
            distance = frechet_distance_estimate(summary.groups, reference.pooled)
            outcome[f"FID{extractor.suffix}"] = config.to_json(distance)
        return outcome

    def _resample(
        self,
        fine: FineModel,
        clusters: Clusters,
        codes_BL: Tensor,
        classes_B: Tensor,
        generator: torch.Generator,
    ) -> Tensor:
        if self.codes == "true":
            return codes_BL
        if self.codes == "random":
            return swap(codes_BL, clusters, generator)
        labels_BL = clusters.labels_V[codes_BL]
        logits_BLS = fine(labels_BL, classes_B).float()
        if self.temperature == 0:
            return fine.codes(labels_BL, logits_BLS.argmax(-1))
        probabilities_TS = (logits_BLS / self.temperature).softmax(-1).flatten(0, 1)
        members_T1 = torch.multinomial(probabilities_TS, 1, generator=generator)
        return fine.codes(labels_BL, members_T1.view_as(labels_BL))


@dataclasses.dataclass(frozen=True)
class SpeedCell(Cell):
    """Times the baseline and CTF in turn, each with the settings of its own search."""

    baseline: CoarseCell
    coarse: CoarseCell
    fine: FineCell
    tuned: tuple[SearchCell, SearchCell]
    batches: tuple[int, ...] = (1, 64)
    rounds: int = 15

    def compute(self, space: Workspace) -> Outcome:
        """Return the seconds of each round, by sampler and batch."""
        run = space.run(self)
        pipes = {
            "baseline": _pipeline(run / "baseline", self.baseline, None, space),
            "CTF": _pipeline(run / "pipeline", self.coarse, self.fine, space),
        }
        settings = {name: tuned.best(space) for name, tuned in zip(pipes, self.tuned, strict=True)}
        seconds: dict[str, dict[str, list[float]]] = {name: {} for name in pipes}
        for batch in self.batches:
            classes = [i % len(pipes["CTF"].class_names) for i in range(batch)]

            def sample(
                name: str, seed: int, classes: Sequence[int] = classes
            ) -> Callable[[], object]:
                return partial(pipes[name].sample, classes, seed=seed, **settings[name])

            with space.open_progress(f"speed, batch {batch}") as progress:
                ways = {name: partial(sample, name) for name in pipes}
                rounds = harness.in_turn(
                    ways, self.rounds, space.device, warm_up=1, progress=progress
                )
            for name, each in rounds.items():
                seconds[name][str(batch)] = list(each)
        return {"seconds": seconds, "settings": settings}
