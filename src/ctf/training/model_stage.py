"""The coarse or the fine model of a run: its configuration, its training, and what it starts from.

    RUN/coarse/  fine/

A finished model is left as it is, a stopped training resumes.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from pathlib import Path
from typing import Any

import torch

from ctf.common import config, storage
from ctf.common.distributed import ALONE, World, full_tensor
from ctf.common.errors import UserError
from ctf.common.progress import Progress
from ctf.common.weights import load_strict
from ctf.data import tokens
from ctf.data.tokens import Tokens
from ctf.models import clusters as clustering
from ctf.models import objectives, points
from ctf.models.clusters import Clusters
from ctf.models.coarse import CoarseModel
from ctf.models.fine import FineModel
from ctf.models.transformer import TransformerConfig
from ctf.pipelines.folder import (
    CLUSTERS,
    DRAFTS,
    SETTINGS,
    PipelineSettings,
    load_clusters,
    load_tokenizer,
)
from ctf.training import cost, loop, recipes, state, transformers, warm_start
from ctf.training.best import BestWeights
from ctf.training.drafts import fit_drafts
from ctf.training.loop import DEFAULT_EXECUTION, Execution
from ctf.training.recipes import Kind, Recipe
from ctf.training.stages import open_tokens, tokenizer_hashes, tokens_folder
from ctf.training.transformers import TrainingConfig
from ctf.training.warm_start import Source


@dataclasses.dataclass(frozen=True)
class ModelStage:
    """The coarse or the fine model of a run whose tokens and clusters are finished."""

    run: Path
    kind: Kind
    recipe: Recipe
    clusters: Clusters
    world: World = ALONE
    execution: Execution = DEFAULT_EXECUTION
    warm_start: Source | None = None  # the model that this one starts from

    @classmethod
    def open(
        cls,
        run: Path,
        kind: Kind,
        recipe: Recipe,
        world: World = ALONE,
        execution: Execution = DEFAULT_EXECUTION,
        warm_start_from: str | Path | None = None,
        clusters: Clusters | None = None,
    ) -> ModelStage:
        """Return the stage, by default with the run's clusters; a warm start is from a pipeline.

        Raises:
            UserError: There are no clusters, or see `warm_start.open_source`.
        """
        clusters, source = clusters or load_clusters(run / "clusters" / CLUSTERS), None
        recipe = recipes.as_recorded(recipe, run / kind / "config.json")
        if warm_start_from is not None:
            hashes = tokenizer_hashes(run)
            source = warm_start.open_source(warm_start_from, kind, clusters, hashes)
        return cls(run, kind, recipe, clusters, world, execution, source)

    @property
    def folder(self) -> Path:
        """The folder of the stage."""
        return self.run / self.kind

    @property
    def training(self) -> TrainingConfig:
        """How the model is trained."""
        return self.recipe.training(self.kind)

    @functools.cached_property
    def tokens(self) -> tuple[Tokens, Tokens]:
        """The tokens of training and of held-out images."""
        return open_tokens(self.run)

    @functools.cached_property
    def model_config(self) -> TransformerConfig:
        """The shape of the model; with a warm start, that of the model it starts from.

        Raises:
            UserError: A fine model would have nothing to predict, or the warm start is from a
                model of another grid or softmax.
        """
        manifest = self.tokens[0].manifest
        grid, classes = math.isqrt(manifest.length), len(manifest.class_names)
        if self.kind == "fine":
            if self.clusters.largest == 1:
                raise UserError(
                    f"{self.run}: each code is a cluster of its own, which leaves a fine model "
                    "nothing to predict"
                )
            if self.warm_start is not None:
                self._check_softmax(self.warm_start)
        if self.warm_start is None:
            return self.recipe.shape(self.kind).config(grid, classes)
        source = self.warm_start.model.config
        if source.grid != grid:
            raise UserError(
                f"the model to start from was trained on a grid of {source.grid} x {source.grid}, "
                f"the tokens have a grid of {grid} x {grid}"
            )
        dropout = self.recipe.shape(self.kind).dropout
        return dataclasses.replace(source, classes=classes, dropout=dropout)

    def _check_softmax(self, source: Source) -> None:
        assert isinstance(source.model, FineModel)
        if source.model.softmax != (softmax := self.recipe.fine_softmax):
            raise UserError(
                f"the model to start from was trained with softmax {source.model.softmax!r}, the "
                f"recipe has {softmax!r}\nuse --set fine_softmax={source.model.softmax}"
            )

    def describe(self) -> str:
        """Return what `train` would do, and what it costs by calculation. Raises as `train`."""
        (train, _), shape, t = self.tokens, self.model_config, self.training
        self.world.share(t.batch_size, "batch_size")
        setting = cost.Setting(
            train.manifest.image_size, len(train), shape.classes, self.world.size,
            execution=self.execution,
        )  # fmt: skip
        stage = cost.model_cost(
            self.kind, shape, t, setting,
            clusters=self.clusters.count, codes=self.clusters.codebook_size,
            largest=self.clusters.largest, softmax=self.recipe.fine_softmax,
        )  # fmt: skip
        first = f"would train {stage.parameters / 1e6:.1f} M parameters: {t}"
        return "\n".join([first, *cost.describe_cost(stage, setting)])

    def train(self, progress: Progress | None = None) -> None:
        """Train the model, resume its training, or find that it is finished.

        With a warm start, the first line of metrics.jsonl has the loss that it starts with.

        Raises:
            UserError: The folder belongs to another configuration or holds something else, the
                batch size is no multiple of the number of processes, or see `model_config`.
            Stopped: See `loop.run`.
        """
        world, t = self.world, self.training
        world.share(t.batch_size, "batch_size")  # before anything is written
        with loop.hold(self.folder, self._description(), world) as unfinished:
            if unfinished:
                self._train(progress)

    def _train(self, progress: Progress | None) -> None:
        world, t = self.world, self.training
        train, _ = self.tokens
        origin = {"images": train.manifest.train.images, "recipe": config.to_json(self.recipe)}
        if (background := train.manifest.background) != tokens.WHITE:  # for `Pipeline.encode`
            origin["background"] = background
        if self.warm_start is not None:
            origin["from"] = {"pipeline": self.warm_start.name}
        settings = PipelineSettings(train.manifest.class_names, self.recipe.sampling, origin)
        world.on_main(lambda: storage.save_json(self.run / SETTINGS, config.to_json(settings)))
        states = self.folder / "state"
        resumed = bool(world.broadcast(state.latest_state(states) if world.is_main else 0))
        trainer = self.make_trainer(resumed=resumed)
        best, evaluate_every = None, t.evaluate_every
        if self.keeps_best:
            best = BestWeights(states, trainer.averaged.state_dict, world)
            evaluate_every = transformers.best_evaluations(t, len(self.tokens[1]))
        loop.run(
            trainer, self.folder, t.steps,
            evaluate_every=evaluate_every, evaluate_first=self.warm_start is not None,
            on_evaluation=best, progress=progress, world=world,
        )  # fmt: skip
        if self.kind == "coarse":
            world.on_main(self._save_drafts)
        weights = {n: full_tensor(t) for n, t in trainer.averaged.state_dict().items()}
        if best is not None and best.step < t.steps and world.is_main:
            weights = best.load()
            print(
                f"{self.kind}: the held-out loss was lowest after {best.step} of {t.steps} steps; "
                "these weights are kept",
                flush=True,
            )
        loop.finish(self.folder, points.fold(weights), world)

    @functools.cached_property
    def keeps_best(self) -> bool:
        """Whether the weights of the best evaluation are kept; a training keeps to what it began.

        Those that were begun by earlier versions keep the last.
        """
        path = self.folder / "config.json"
        if self.training.keep == "auto" and path.is_file():
            return storage.load_object(path).get("keep") == "best"
        train, val = self.tokens
        return transformers.keeps_best(self.training, len(train), len(val))

    def _save_drafts(self) -> None:
        if (drafts := fit_drafts(self.tokens[0], self.clusters)) is not None:
            storage.save_tensors(self.folder / DRAFTS, drafts.tables())

    def _description(self) -> dict[str, Any]:
        """Return all that determines the weights."""
        recipe = self.recipe
        description: dict[str, Any] = {
            "model": config.to_json(self.model_config),
            "clusters": clustering.fingerprint(self.clusters),
            "training": config.to_json(self.training),
            "tokens": storage.hash_file(tokens_folder(self.run) / tokens.MANIFEST),
        }
        if self.kind == "fine":
            description["softmax"] = recipe.fine_softmax
            if recipe.fine_corruption > 0:
                description["corruption"] = recipe.fine_corruption
        elif recipe.group_loss.weight > 0:
            description["group_loss"] = config.to_json(recipe.group_loss)
        if recipe.geometry is not None:
            description["geometry"] = recipe.geometry
        if self.warm_start is not None:
            description["warm_start"] = self.warm_start.hash
        if self.keeps_best:
            description["keep"] = "best"
        return description

    def make_trainer(self, *, resumed: bool = False) -> transformers.Trainer:
        """Return the trainer of the model.

        Args:
            resumed: Whether a state will be loaded, so that a warm start is not needed.

        Raises:
            UserError: See `model_config`; or the recipe has a group loss for a model with clusters.
        """
        torch.manual_seed(self.training.seed)
        recipe, clusters = self.recipe, self.clusters
        other: objectives.Objective | None = None  # to train on, if not on the objective
        model: transformers.Model
        if self.kind == "coarse":
            model = CoarseModel(self.model_config, clusters.count)
            objective = objectives.coarse_objective(clusters)
            if recipe.group_loss.weight > 0:
                other = self._grouped_objective()
        else:
            model = FineModel(self.model_config, clusters, recipe.fine_softmax)
            objective = objectives.fine_objective(clusters)
            if recipe.fine_corruption > 0:
                other = objectives.corrupted_objective(clusters, recipe.fine_corruption)
        if self.warm_start is not None and not resumed:
            train, device = self.tokens[0], self.world.device
            first = warm_start.first_weights(self.warm_start, clusters, train, model, device)
            load_strict(model, {k: v.cpu() for k, v in first.items()}, "the first weights")
        if recipe.geometry:
            codebook_VC = load_tokenizer(self.run / "tokenizer").codebook()
            points.use_points(model, codebook_VC, clusters, warm=self.warm_start is not None)
        return transformers.Trainer(
            model, objective, *self.tokens, self.training, self.world, self.execution, other,
            in_parts=self.kind == "coarse" or recipe.fine_corruption == 0,
        )  # fmt: skip

    def _grouped_objective(self) -> objectives.Objective:
        if self.clusters.largest > 1:
            raise UserError(
                "group_loss: is for the full-vocabulary baseline, where each code is a cluster of "
                "its own"
            )
        codebook_VC = load_tokenizer(self.run / "tokenizer").codebook()
        group_loss = self.recipe.group_loss
        groups = clustering.fit(codebook_VC, group_loss.clusters)
        return objectives.grouped_objective(groups, group_loss.weight)
