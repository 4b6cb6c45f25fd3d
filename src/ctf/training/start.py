"""The pipeline that `ctf fit --from` starts from, and recipes that fit it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ctf.common import claims, config
from ctf.common.errors import UserError
from ctf.data.image_set import Splits
from ctf.models.clusters import Clusters, ClustersConfig
from ctf.models.fine import Softmax
from ctf.models.sizes import TokenizerShape
from ctf.models.tokenizer import TokenizerConfig
from ctf.models.transformer import TransformerConfig
from ctf.pipelines.folder import (
    CLUSTERS,
    PipelineSettings,
    find_pipeline,
    hash_pipeline,
    lasting_name,
    load_clusters,
    load_model_config,
    load_settings,
    load_tokenizer_config,
)
from ctf.training import recipes
from ctf.training.recipes import KINDS, Kind, Recipe
from ctf.training.warm_start import short_name

DEFAULT_PRESET = "small"


@dataclasses.dataclass(frozen=True)
class Start:
    """A finished pipeline whose tokenizer, clusters and weights a run starts from.

    name: as `find_pipeline` takes it.
    weights: hash of its files.
    models: shapes of the transformers; no fine model with a cluster for each code.
    train_tokenizer: whether the tokenizer is trained on, too, and not taken over as it is.
    """

    name: str
    folder: Path
    weights: str
    settings: PipelineSettings
    tokenizer: TokenizerConfig
    clusters: Clusters
    models: dict[Kind, TransformerConfig]
    softmax: Softmax
    train_tokenizer: bool

    @property
    def image_size(self) -> int:
        """Side in pixels of the images that the pipeline is for."""
        return self.tokenizer.image_size

    def to_json(self) -> dict[str, Any]:
        """Return what fit.json records."""
        return {
            "pipeline": lasting_name(self.name),
            "weights": self.weights,
            "train_tokenizer": self.train_tokenizer,
        }

    def origin(self) -> dict[str, Any]:
        """Return what pipeline.json records: the same, without paths of this machine."""
        return {**self.to_json(), "pipeline": short_name(self.name)}

    def describe(self, images: Splits) -> str:
        """Say in a line what is taken over for these images."""
        names = images.train.class_names
        known = len({*names} & {*self.settings.class_names})
        tokenizer = "trained on" if self.train_tokenizer else "as it is"
        return (
            f"from {self.name}: its tokenizer ({tokenizer}), its {self.clusters.count} clusters, "
            f"the weights of its transformers; it knows {known} of {len(names)} classes"
        )

    def resolve(
        self,
        images: Splits,
        *,
        preset: str | None = None,
        steps: int | None = None,
        views: str | None = None,
        overrides: Sequence[str] = (),
    ) -> Recipe:
        """Return the recipe to train with; like `recipes.resolve`, but with the pipeline's sizes.

        Args:
            images: What to train on.
            preset: None for the recipe that the pipeline was trained by, or "small" if it is
                unknown.
            steps: Of every trained stage; None for the recipe's.
            views: Of each training image; None for the recipe's, as in `recipes.resolve`.
            overrides: As `config.override` takes them.

        Raises:
            UserError: See `recipes.resolve` and `check`.
        """
        if preset is not None:
            recipe = recipes.preset(preset)
        else:
            recipe = self._with_sizes(self._own_recipe())
            if recipe.tokens.views == "plain":  # those images, not these, were not to be mirrored
                recipe = dataclasses.replace(recipe, tokens=type(recipe.tokens)())
        if views is None and not images.train.mirrors:
            views = "plain"
        if views is not None:
            overrides = [f"tokens.views={views}", *overrides]
        recipe = recipes.adjust(recipe, steps, overrides)
        self.check(images, recipe)
        return recipe

    def check(self, images: Splits, recipe: Recipe) -> None:
        """Check that the pipeline can be continued with these images by this recipe.

        Raises:
            UserError: The images or the recipe have other sizes.
        """
        self.check_image_size(images.train.image_size)
        expected, got = (config.to_json(each) for each in (self._with_sizes(recipe), recipe))
        if difference := claims.first_difference(expected, got):
            raise UserError(
                f"--from {self.name} has other sizes than the recipe: {difference}\n"
                "sizes come from the pipeline: omit --preset and --set of them"
            )

    def check_image_size(self, requested: int | None) -> int:
        """Return the size to open images at.

        Raises:
            UserError: Another one was requested.
        """
        if requested not in (None, self.image_size):
            raise UserError(
                f"--from {self.name}: its images have {self.image_size} pixels, got {requested}; "
                "omit --image-size"
            )
        return self.image_size

    def _own_recipe(self) -> Recipe:
        """Return the recipe that the pipeline was trained by, with its sampling settings."""
        stored = self.settings.origin.get("recipe")
        try:
            if stored is None:
                recipe = recipes.preset(DEFAULT_PRESET)
            else:
                recipe = config.from_json(Recipe, stored, "its recipe")
        except UserError as error:
            raise UserError(f"--from {self.name}: {error}; choose one by --preset") from None
        return dataclasses.replace(recipe, sampling=self.settings.sampling)

    def _with_sizes(self, recipe: Recipe) -> Recipe:
        """Return the recipe with the pipeline's shapes and number of clusters."""
        changes: dict[str, Any] = {}
        if recipe.tokenizer.config(self.image_size) != self.tokenizer:
            changes["tokenizer"] = _tokenizer_shape(self.tokenizer)
        for kind, model in self.models.items():
            changes[kind] = dataclasses.replace(
                recipe.shape(kind), width=model.width, layers=model.layers, heads=model.heads
            )
        if "fine" in self.models:
            changes["fine_softmax"] = self.softmax
        if self.clusters.largest == 1:
            changes["clusters"] = ClustersConfig(method="identity")
        elif recipe.clusters.method == "identity" or recipe.clusters.count != self.clusters.count:
            changes["clusters"] = ClustersConfig(count=self.clusters.count)
        return dataclasses.replace(recipe, **changes)


def _tokenizer_shape(tokenizer: TokenizerConfig) -> TokenizerShape:
    """Return the shape that gives this tokenizer, as far as shapes can say it."""
    names = {field.name for field in dataclasses.fields(TokenizerShape)}
    values = {name: value for name, value in vars(tokenizer).items() if name in names}
    factor, grid = tokenizer.factor, tokenizer.grid
    return TokenizerShape(**values, smallest_factor=factor, largest_grid=grid)


def open_start(name: str | Path, *, train_tokenizer: bool = False) -> Start:
    """Find a pipeline to start from, and read what it is.

    Args:
        name: As `find_pipeline` takes it: a shipped pipeline, a run's folder, or a Hub repository.
        train_tokenizer: See `Start`.

    Raises:
        UserError: There is no such pipeline, or it is not finished.
    """
    folder = find_pipeline(name)
    settings = load_settings(folder)
    clusters = load_clusters(folder / "clusters" / CLUSTERS)
    kinds = KINDS if clusters.largest > 1 else KINDS[:1]
    for part in ("tokenizer", *kinds):
        if not (folder / part / "model.safetensors").is_file():
            raise UserError(f"--from {name}: its {part} is missing; finish its training first")
    models, softmax = {}, "members"
    for kind in kinds:
        models[kind], stored = load_model_config(folder / kind, clusters)
        softmax = stored.get("softmax", softmax)
    return Start(
        str(name), folder, hash_pipeline(folder), settings,
        load_tokenizer_config(folder / "tokenizer"), clusters, models,
        "full" if softmax == "full" else "members", train_tokenizer,
    )  # fmt: skip
