"""Cells that train: tokenizer, tokens, clusters, coarse and fine model, and a classifier."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

from ctf.common import config, storage
from ctf.common.distributed import World
from ctf.common.weights import count_parameters
from ctf.data.extraction import TokensConfig
from ctf.evaluation import scores
from ctf.evaluation.classifier import ClassifierConfig
from ctf.evaluation.extractors import Extractor, classifier_extractor, open_extractor
from ctf.evaluation.reconstruction import reconstruction_metrics
from ctf.models.clusters import Clusters, ClustersConfig
from ctf.models.sizes import TokenizerShape, TransformerShape, training_flops
from ctf.pipelines.folder import CLUSTERS, load_clusters, load_tokenizer
from ctf.reproduce.cells import Cell, Outcome, Workspace, link, stored_as
from ctf.training import cost, metrics_log, stages
from ctf.training.classifier import held_out_accuracy, train_classifier
from ctf.training.model_stage import ModelStage
from ctf.training.recipes import GroupLoss, Recipe, preset
from ctf.training.tokenizer import TokenizerTraining
from ctf.training.transformers import TrainingConfig


@dataclasses.dataclass(frozen=True)
class ClassifierCell(Cell):
    """Trains a classifier of the images: a feature network, and a measure of class accuracy."""

    training: ClassifierConfig

    def folder(self, space: Workspace) -> Path:
        """Where the classifier is."""
        return space.run(self) / "classifier"

    def compute(self, space: Workspace) -> Outcome:
        """Return the accuracy on held-out images."""
        with space.open_progress("classifier") as progress:
            model = train_classifier(
                space.images,
                self.folder(space),
                self.training,
                device=space.device,
                progress=progress,
            )
        return {
            "accuracy": held_out_accuracy(model, space.images.val),
            "parameters": count_parameters(model),
        }


def open_extractors(space: Workspace, classifier: ClassifierCell | None = None) -> list[Extractor]:
    """Open the feature networks of the plan, and that of a classifier."""
    named = [open_extractor(name, device=space.device) for name in space.plan.features]
    if classifier is None:
        return named
    return [*named, classifier_extractor(classifier.folder(space), space.device)]


@dataclasses.dataclass(frozen=True)
class TokenizerCell(Cell):
    """Trains a tokenizer; `reserved` training images are left out, for the searches."""

    shape: TokenizerShape
    training: TokenizerTraining
    reserved: int = stored_as("kept_back")

    def compute(self, space: Workspace) -> Outcome:
        """Return the reconstruction's metrics and distances, and the cost."""
        run, world = space.run(self), World(device=space.device)
        recipe = _recipe(tokenizer=self.shape, tokenizer_training=self.training)
        with space.open_progress("tokenizer") as progress:
            tokenizer = stages.train_tokenizer(run, space.images, recipe, world, progress)
        with space.open_progress("reconstruction") as progress:
            outcome: Outcome = dict(
                reconstruction_metrics(tokenizer, space.images.val, space.device, progress=progress)
            )
        held_out = space.held_out()
        for extractor in open_extractors(space):
            name = f"rFID{extractor.suffix}"
            with space.open_progress(name) as progress:
                distance = scores.reconstruction_fid(tokenizer, held_out, extractor, progress)
            outcome[name] = config.to_json(distance)
        images = self.training.steps * self.training.batch_size
        return {
            **outcome,
            "parameters": count_parameters(tokenizer),
            "flops": 3 * sum(cost.tokenizer_flops(tokenizer.config)) * images,
            "images_seen": images,
            "seconds_of_training": _training_seconds(run / "tokenizer"),
        }


@dataclasses.dataclass(frozen=True)
class TokensCell(Cell):
    """Encodes the training and the held-out images with a tokenizer."""

    tokenizer: TokenizerCell

    def compute(self, space: Workspace) -> Outcome:
        """Return the number of images."""
        run, images = space.run(self), space.images
        link(run, space.run(self.tokenizer), "tokenizer")
        tokenizer = load_tokenizer(run / "tokenizer", space.device)
        with space.open_progress("tokens") as progress:
            stages.extract_tokens(run, tokenizer, images, _recipe(), progress=progress)
        return {"pictures": len(images.train) + len(images.val)}


@dataclasses.dataclass(frozen=True)
class ClustersCell(Cell):
    """Clusters the codebook of a tokenizer and measures redundancy (Fig. 1b)."""

    tokens: TokensCell
    clusters: ClustersConfig

    def compute(self, space: Workspace) -> Outcome:
        """Return the report of the stage."""
        run = space.run(self)
        link(run, space.run(self.tokens), "tokenizer", "tokens")
        stages.fit_clusters(run, load_tokenizer(run / "tokenizer"), self.clusters)
        return storage.load_object(run / "clusters" / "report.json")


@dataclasses.dataclass(frozen=True)
class CoarseCell(Cell):
    """Trains a coarse model; with identity clusters it is the full-vocabulary baseline.

    Attributes:
        warm_start: A baseline to start from.
        geometry: Whether it knows the codebook, see models/points.py.
    """

    clusters: ClustersCell
    shape: TransformerShape
    training: TrainingConfig
    group_loss: GroupLoss = dataclasses.field(default_factory=GroupLoss)
    warm_start: CoarseCell | None = None
    geometry: bool = dataclasses.field(default=False, metadata=config.OMIT_DEFAULT)

    def compute(self, space: Workspace) -> Outcome:
        """Return the loss and the cost."""
        clusters = link_clusters(self.clusters, run := space.run(self), space)
        recipe = _recipe(
            coarse=self.shape,
            coarse_training=self.training,
            group_loss=self.group_loss,
            geometry=self.geometry or None,
        )
        start = None if self.warm_start is None else space.run(self.warm_start)
        with space.open_progress("coarse") as progress:
            world = World(device=space.device)
            stage = ModelStage.open(run, "coarse", recipe, world, warm_start_from=start)
            stage.train(progress)
        shape = stage.model_config
        flops = training_flops(shape, shape.length, clusters.count)
        return _trained(stage, flops)


@dataclasses.dataclass(frozen=True)
class FineCell(Cell):
    """Trains a fine model; `geometry` as in `CoarseCell`."""

    clusters: ClustersCell
    shape: TransformerShape
    training: TrainingConfig
    softmax: Literal["members", "full"] = "members"
    corruption: float = 0.0
    geometry: bool = dataclasses.field(default=False, metadata=config.OMIT_DEFAULT)

    def compute(self, space: Workspace) -> Outcome:
        """Return the loss and the cost."""
        clusters = link_clusters(self.clusters, run := space.run(self), space)
        recipe = _recipe(
            fine=self.shape,
            fine_training=self.training,
            fine_softmax=self.softmax,
            fine_corruption=self.corruption,
            geometry=self.geometry or None,
        )
        with space.open_progress("fine") as progress:
            stage = ModelStage.open(run, "fine", recipe, World(device=space.device))
            stage.train(progress)
        shape, outputs = stage.model_config, clusters.codebook_size
        if self.softmax == "members":
            outputs = _mean_members(run, clusters)
        flops = training_flops(shape, shape.length + 1, outputs)
        return _trained(stage, flops)


def link_clusters(cell: ClustersCell, run: Path, space: Workspace) -> Clusters:
    """Make `run` a run with the tokenizer, tokens and clusters of a cell; load the clusters."""
    link(run, space.run(cell), "tokenizer", "tokens", "clusters")
    return load_clusters(run / "clusters" / CLUSTERS)


def _recipe(**values: Any) -> Recipe:
    """The preset "small" with plain views and values replaced, by default without additions."""
    plain = {"tokens": TokensConfig(views="plain"), "geometry": None}
    return dataclasses.replace(preset("small"), **{**plain, **values})


def _mean_members(run: Path, clusters: Clusters) -> int:
    """Size of a token's cluster, on average over held-out images."""
    codes_BL = stages.study_codes(run)
    return round(float(clusters.sizes_K[clusters.labels_V[codes_BL]].double().mean()))


def _trained(stage: ModelStage, flops: int) -> Outcome:
    """Loss and cost of a trained transformer; `flops` are those of an image."""
    images = stage.training.steps * stage.training.batch_size
    flops *= images
    if stage.recipe.geometry:  # the rows are computed once a step, forward and backward
        model = stage.make_trainer(resumed=True).model
        flops += 3 * cost.parametrization_flops(model) * stage.training.steps
    tensors, _ = storage.load_tensors(stage.folder / "model.safetensors")
    curve = [line for line in metrics_log.read_metrics(stage.folder) if line["split"] == "val"]
    return {
        "parameters": sum(tensor.numel() for tensor in tensors.values()),
        "flops": flops,
        "images_seen": images,
        "tokens_seen": images * stage.model_config.length,
        "loss": curve[-1]["loss"],
        "curve": [[line["step"], line["loss"]] for line in curve],
        "seconds_of_training": _training_seconds(stage.folder),
    }


def _training_seconds(stage: Path) -> float:
    return float(metrics_log.last_metrics(stage, "val")["seconds"])
