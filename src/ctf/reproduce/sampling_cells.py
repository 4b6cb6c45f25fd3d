"""Cells that sample: search settings, score samples, time sampling."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch

from ctf import kernels
from ctf.bench import harness
from ctf.common import config, storage
from ctf.evaluation import reference_sets, scores
from ctf.evaluation.options import EvaluationOptions
from ctf.evaluation.prepare import prepare
from ctf.evaluation.sample_cache import GenerationConfig
from ctf.evaluation.search import search
from ctf.models.coarse import CoarseModel
from ctf.models.noise import noise_keys
from ctf.models.sampling import Sampling
from ctf.pipelines.arguments import Window
from ctf.pipelines.folder import CLUSTERS, SETTINGS, load_clusters, load_coarse
from ctf.pipelines.generation import Samples
from ctf.pipelines.pipeline import Pipeline
from ctf.reproduce.cells import Cell, Outcome, Workspace, link
from ctf.reproduce.training_cells import ClassifierCell, CoarseCell, FineCell, open_extractors
from ctf.training import stages
from ctf.training.drafts import fit_drafts

IN_PARALLEL = ", in parallel"  # after the name of a sampler


def _pipeline(
    folder: Path, coarse: CoarseCell, fine: FineCell | None, space: Workspace
) -> Pipeline:
    """Make `folder` a pipeline of the models of other cells, and load it."""
    link(folder, space.run(coarse), "tokenizer", "clusters", "coarse", SETTINGS)
    if fine is not None:
        link(folder, space.run(fine), "fine")
    pipe = Pipeline.from_pretrained(folder, space.device, engine="auto")
    pipe.window = 1  # not what is fastest: by rounding, results would depend on how fast passes are
    return pipe


@dataclasses.dataclass(frozen=True)
class SearchCell(Cell):
    """Searches guidance and temperatures for the lowest FID to the reserved images.

    It never reads the held-out images, which the scores are computed against.
    """

    has_files: ClassVar[bool] = False
    coarse: CoarseCell
    fine: FineCell | None
    samples: int
    points: int

    def compute(self, space: Workspace) -> Outcome:
        """Return the best settings, and all that were tried."""
        run, extractor = space.run(self), open_extractors(space)[0]
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
        outcome = space.outcome(self)
        assert outcome is not None, f"{self.name} has no result"
        best: dict[str, Any] = outcome["best"]
        return best


@dataclasses.dataclass(frozen=True)
class ScoreCell(Cell):
    """Scores samples of a coarse and a fine model against the held-out images.

    Attributes:
        seed: Of the first sample.
        settings: Sampling settings that replace those of the search.
        tuned: The search that the settings are from.
        classifier: Of the plan, if it has one.
    """

    coarse: CoarseCell
    fine: FineCell | None
    samples: int
    seed: int
    settings: dict[str, float]
    tuned: SearchCell
    classifier: ClassifierCell | None = dataclasses.field(
        default=None, metadata=config.OMIT_DEFAULT
    )

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
                classifier=None if self.classifier is None else self.classifier.folder(space),
            ),
            settings=settings,
            device=space.device,
        )
        began = time.monotonic()
        # The same pipeline, with the engine that samples fastest.
        evaluation = dataclasses.replace(
            evaluation, pipe=pipe, extractors=open_extractors(space, self.classifier)
        )
        result = evaluation.run(space.open_progress)
        return {
            "scores": result.scores,
            "accuracy": None if result.accuracy is None else config.to_json(result.accuracy),
            "settings": settings,
            "samples": result.count,
            "pictures": result.pictures,
            "seconds_of_scoring": round(time.monotonic() - began, 1),
        }


@dataclasses.dataclass(frozen=True)
class SpeedCell(Cell):
    """Times the baseline and CTF in turn, each with the settings of its own search.

    Attributes:
        parallel: Whether both are also timed with several labels in a pass, see models/parallel.py.
    """

    baseline: CoarseCell
    coarse: CoarseCell
    fine: FineCell
    tuned: tuple[SearchCell, SearchCell]
    batches: tuple[int, ...] = (1, 64)
    rounds: int = 15
    parallel: bool = dataclasses.field(default=False, metadata=config.OMIT_DEFAULT)

    def compute(self, space: Workspace) -> Outcome:
        """Return the seconds of each round, by sampler and batch, and the passes of an image."""
        run = space.run(self)
        pipes = {
            "baseline": _pipeline(run / "baseline", self.baseline, None, space),
            "CTF": _pipeline(run / "pipeline", self.coarse, self.fine, space),
        }
        settings = {name: tuned.best(space) for name, tuned in zip(pipes, self.tuned, strict=True)}

        def sampler(name: str, window: Window) -> Callable[[list[int], int], Samples]:
            return lambda classes, seed: pipes[name].sample(
                classes, seed=seed, window=window, **settings[name]
            )

        samplers = {name: sampler(name, 1) for name in pipes}
        if self.parallel:
            samplers |= {f"{name}{IN_PARALLEL}": sampler(name, "auto") for name in pipes}
        seconds: dict[str, dict[str, list[float]]] = {name: {} for name in samplers}
        passes: dict[str, dict[str, float]] = {name: {} for name in samplers}
        for batch in map(str, self.batches):
            classes = [i % len(pipes["CTF"].class_names) for i in range(int(batch))]
            with space.open_progress(f"speed, batch {batch}") as progress:
                ways = {
                    name: partial(partial, sample, classes) for name, sample in samplers.items()
                }
                rounds = harness.in_turn(
                    ways, self.rounds, space.device, warm_up=1, progress=progress
                )
            for name, each in rounds.items():
                seconds[name][batch] = list(each)
                taken = samplers[name](classes, 0).passes
                assert taken is not None
                passes[name][batch] = float(taken.double().mean())
        return {"seconds": seconds, "passes": passes, "settings": settings}


@dataclasses.dataclass(frozen=True)
class PassesCell(Cell):
    """Counts the passes of a coarse model that an image takes in exact parallel sampling.

    It depends on the labels alone: on how often a guess is right, not on how fast a machine is.
    Labels that enter a window are copies of those above, which needs no tables of the labels.

    Attributes:
        images: Of all classes in turn, from seed 0 on.
        windows: With the first guidance scale and the first temperature; also with drafts (see
            models/drafts.py) unless there are too many labels.
        guidances: With `window` and each of the temperatures.
        window: See `guidances`.
    """

    coarse: CoarseCell
    images: int = 64
    windows: tuple[int, ...] = (4, 8, 16, 64)
    guidances: tuple[float, ...] = (2.0, 1.0, 4.0)
    temperatures: tuple[float, ...] = (1.0, 0.8, 1.2)
    window: int = 16

    def compute(self, space: Workspace) -> Outcome:
        """Return the mean passes of an image, with their standard errors, and L and the labels."""
        folder = space.run(self.coarse)
        clusters = load_clusters(folder / "clusters" / CLUSTERS).to(space.device)
        model = load_coarse(folder / "coarse", clusters, space.device)
        kernels.for_sampling(model, None, None, "auto")
        drafts = fit_drafts(stages.open_tokens(folder)[0], clusters)
        g, t = self.guidances[0], self.temperatures[0]
        ways = [(window, g, t, False) for window in self.windows]
        ways += [(self.window, g, t, False) for g in self.guidances for t in self.temperatures]
        ways += [(window, g, t, True) for window in self.windows if drafts is not None]
        passes = []
        with space.open_progress("passes of an image") as progress:
            for done, way in enumerate(dict.fromkeys(ways), 1):
                window, guidance, temperature, with_drafts = way
                model.drafts = drafts if with_drafts else None
                settings = Sampling(guidance=guidance, temperature=temperature)
                mean, error = self._passes(model, settings, window)
                passes.append(
                    {
                        "window": window,
                        "guidance": guidance,
                        "temperature": temperature,
                        "drafts": with_drafts,
                        "mean": mean,
                        "standard_error": error,
                    }
                )
                progress(done, len({*ways}))
        return {"length": model.config.length, "labels": model.vocab_size, "passes": passes}

    def _passes(self, model: CoarseModel, settings: Sampling, window: int) -> tuple[float, float]:
        device = next(model.parameters()).device
        classes_B = torch.arange(self.images, device=device) % model.config.classes
        keys_BL = noise_keys(range(self.images), model.config.length)[:, 0]
        sampler = kernels.coarse_sampler(model, classes_B, keys_BL, settings)
        while not sampler.done:
            sampler.advance(window)
        passes_B = torch.tensor(sampler.passes).double()
        return float(passes_B.mean()), float(passes_B.std() / len(passes_B) ** 0.5)
