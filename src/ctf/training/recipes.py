"""Recipes: everything that `ctf fit` needs besides images, and presets of them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

from ctf.common import config, storage
from ctf.common.errors import UserError
from ctf.data.extraction import TokensConfig
from ctf.data.image_set import Splits
from ctf.evaluation.classifier import ClassifierConfig
from ctf.models.clusters import ClustersConfig
from ctf.models.sampling import Sampling
from ctf.models.sizes import SIZES, TokenizerShape, TransformerShape
from ctf.training import optim
from ctf.training.tokenizer import TokenizerTraining
from ctf.training.transformers import TrainingConfig

Kind = Literal["coarse", "fine"]
KINDS: tuple[Kind, ...] = ("coarse", "fine")
Stage = Literal["tokenizer", "coarse", "fine"]
STAGES: tuple[Stage, ...] = ("tokenizer", "coarse", "fine")  # those that are trained


@dataclasses.dataclass(frozen=True)
class TimeShares:
    """How `ctf fit --minutes` divides its time among the stages; clusters take what they need."""

    tokenizer: float = 0.40
    tokens: float = 0.10
    coarse: float = 0.30
    fine: float = 0.20


@dataclasses.dataclass(frozen=True)
class GroupLoss:
    """The cluster-level loss of IAR (arXiv 2501.00880), added to a full-vocabulary model's own."""

    weight: float = 0.0  # 0 for none
    clusters: ClustersConfig = dataclasses.field(  # of the codes, for this loss alone
        default_factory=lambda: ClustersConfig(method="balanced", count=128)
    )

    def __post_init__(self) -> None:
        if not 0 <= self.weight < math.inf:
            raise UserError(f"group_loss.weight: got {self.weight}, expected 0 or more")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Shapes and training of every stage."""

    tokenizer: TokenizerShape
    tokenizer_training: TokenizerTraining
    tokens: TokensConfig
    clusters: ClustersConfig
    coarse: TransformerShape
    coarse_training: TrainingConfig
    fine: TransformerShape
    fine_softmax: Literal["members", "full"]
    fine_training: TrainingConfig
    sampling: Sampling
    image_size: int = 64  # of folders of images, unless the user chooses another
    time_shares: TimeShares = TimeShares()
    # Share of wrong labels when the fine model is trained, so that it tolerates coarse mistakes.
    fine_corruption: float = 0.0
    group_loss: GroupLoss = GroupLoss()  # of a full-vocabulary baseline
    # Whether the transformers know the codebook, see models/points.py; None is no, as in recipes
    # of before there was a choice.
    geometry: bool | None = dataclasses.field(default=None, metadata=config.OMIT_DEFAULT)

    def __post_init__(self) -> None:
        if not 0 <= self.fine_corruption < 1:
            raise UserError(f"fine_corruption: got {self.fine_corruption}, expected 0 to below 1")

    def shape(self, kind: Kind) -> TransformerShape:
        """Return the shape of the coarse or the fine model."""
        return self.coarse if kind == "coarse" else self.fine

    def training(self, kind: Kind) -> TrainingConfig:
        """Return how the coarse or the fine model is trained."""
        return self.coarse_training if kind == "coarse" else self.fine_training

    def with_steps(self, steps: int, stages: Sequence[Stage] = STAGES) -> Recipe:
        """Return the recipe with this many steps in the given stages."""
        trainings = {f"{stage}_training": getattr(self, f"{stage}_training") for stage in stages}
        changes: dict[str, Any] = {k: with_steps(t, steps) for k, t in trainings.items()}
        return dataclasses.replace(self, **changes)


def as_recorded(recipe: Recipe, path: Path, *keys: str) -> Recipe:
    """Return the recipe without what a training begun by an earlier version has no record of.

    Args:
        recipe: The one to resume with.
        path: JSON file of the training; may be missing.
        keys: Those under which it has the recipe's values.
    """
    if not path.is_file():
        return recipe
    recorded = storage.load_json(path)
    for key in keys:
        recorded = recorded.get(key) if isinstance(recorded, dict) else None
    if not isinstance(recorded, dict):
        return recipe
    changes: dict[str, Any] = {} if "geometry" in recorded else {"geometry": None}
    for name in (f"{stage}_training" for stage in STAGES):
        # The configuration of a stage has its own training alone.
        own = recorded.get(name, recorded.get("training"))
        changes[name] = optim.as_recorded(getattr(recipe, name), own)
    return dataclasses.replace(recipe, **changes)


T = TypeVar("T", TokenizerTraining, TrainingConfig, ClassifierConfig)


def with_steps(training: T, steps: int) -> T:
    """Return the training with another number of steps; a short one also has a short warm-up.

    Raises:
        UserError: There is no step.
    """
    if steps < 1:
        raise UserError(f"steps: got {steps}, expected 1 or more")
    warm_up = min(training.warm_up, steps // 10)
    return dataclasses.replace(training, steps=steps, warm_up=warm_up)


def preset(name: str) -> Recipe:
    """Return a preset. Raises UserError for an unknown name."""
    if name not in PRESETS:
        raise UserError(f"unknown preset {name!r}{config.did_you_mean(name, PRESETS)}")
    return PRESETS[name]


def resolve(
    preset_name: str,
    images: Splits,
    *,
    steps: int | None = None,
    views: str | None = None,
    overrides: Sequence[str] = (),
) -> Recipe:
    """Return the recipe of a preset for some images, with the user's changes.

    Args:
        preset_name: A key of `PRESETS`.
        images: What to train on.
        steps: Of every trained stage; None for the preset's.
        views: Of each training image, a key of `data.transforms.VIEWS`; None for the preset's, but
            plain for images that must not be mirrored.
        overrides: As `config.override` takes them.

    Raises:
        UserError: The preset, the views or a key is unknown, or a value is out of its range.
    """
    if views is None and not images.train.mirrors:
        views = "plain"
    if views is not None:
        overrides = [f"tokens.views={views}", *overrides]
    return adjust(preset(preset_name), steps, overrides)


def adjust(recipe: Recipe, steps: int | None, overrides: Sequence[str]) -> Recipe:
    """Return the recipe with values replaced, then with `steps` steps in every trained stage."""
    recipe = config.override(recipe, overrides)
    return recipe if steps is None else recipe.with_steps(steps)


def check_recipe(images: Splits, recipe: Recipe) -> None:
    """Check what would fail in a later stage, before there is any work to lose.

    Raises:
        UserError: The image size is not divisible by the tokenizer's factor, there are more
            clusters than codes, or a model cannot have such a shape.
    """
    tokenizer = recipe.tokenizer.config(images.train.image_size)
    for shape in (recipe.coarse, recipe.fine):
        shape.config(tokenizer.grid, len(images.train.class_names))
    count, codes = recipe.clusters.count, tokenizer.codebook_size
    if recipe.clusters.method != "identity" and count > codes:
        raise UserError(f"got {count} clusters, expected 1 to {codes}: the number of codes")


# --- Presets --------------------------------------------------------------------------------------


class DataSize(NamedTuple):
    """The size of a training set."""

    images: int
    classes: int


IMAGENET = DataSize(images=1_281_167, classes=1000)  # ImageNet-1k, training images


def _imagenet(size: str, guidance: float) -> Recipe:
    """Return the paper's system at one size, on ImageNet at 256 pixels.

    Tokenizer: LlamaGen's VQ-16 and its training, 40 epochs of Adam without decay or schedule,
    with the discriminator from step 20,000. (The paper uses the released one: docs/llamagen.md.)
    The revival of codes is this project's. Coarse: LlamaGen's training, 300 epochs, constant
    learning rate, dropout of tokens and outputs 0.1, ten-crop at two scales. Fine: the shape of L
    at every size, 100 epochs. The EMA is a choice made here: neither paper mentions one.
    """

    def steps(epochs: int, batch_size: int) -> int:
        return round(epochs * IMAGENET.images / batch_size)

    return Recipe(
        tokenizer=_VQ16,
        tokenizer_training=TokenizerTraining(
            steps=steps(40, 128),
            batch_size=128,
            learning_rate=1e-4,
            schedule="constant",
            warm_up=0,
            weight_decay=0.0,
            perceptual_weight=1.0,
            adversarial_weight=0.5,
            adversarial_start=0.05,
            evaluate_every=5000,
            evaluate_images=5000,
        ),
        tokens=TokensConfig(views="ten-crop"),
        clusters=ClustersConfig(count=512),
        coarse=SIZES[size],
        coarse_training=TrainingConfig(
            steps=steps(300, 256),
            batch_size=256,
            schedule="constant",
            warm_up=0,
            ema=0.9999,
            evaluate_every=5000,
            evaluate_images=10_000,
        ),
        fine=SIZES["L"],
        fine_softmax="members",
        fine_training=TrainingConfig(
            steps=steps(100, 1024),
            batch_size=1024,
            schedule="constant",
            warm_up=0,
            ema=0.9999,
            evaluate_every=2500,
            evaluate_images=10_000,
        ),
        sampling=Sampling(guidance=guidance, temperature=1.1, fine_temperature=1.1),
        image_size=256,
    )


_VQ16 = TokenizerShape(
    codebook_size=16384,
    channels=128,
    multipliers=(1, 1, 2, 2, 4),
    blocks=2,
    latent_channels=256,
    groups=32,
    smallest_factor=8,
    largest_grid=16,
)

PRESETS = {
    # For a first look: after two minutes on two CPU cores (`ctf demo`), shapes without details.
    "tiny": Recipe(
        tokenizer=TokenizerShape(),
        tokenizer_training=TokenizerTraining(
            steps=400,
            batch_size=32,
            learning_rate=2e-3,
            warm_up=20,
            revive_every=10,
            optimizer="muon",
        ),
        tokens=TokensConfig(),
        clusters=ClustersConfig(count=256),
        coarse=TransformerShape(width=128, layers=4, heads=4),
        coarse_training=TrainingConfig(
            steps=600, batch_size=32, learning_rate=5e-3, warm_up=50, ema=0.95, optimizer="muon"
        ),
        fine=TransformerShape(width=128, layers=2, heads=4),
        fine_softmax="members",
        fine_training=TrainingConfig(
            steps=400, batch_size=32, learning_rate=3e-3, warm_up=50, ema=0.99, optimizer="muon"
        ),
        sampling=Sampling(),
        image_size=32,
        # After two minutes, the quality of images depends on the coarse model.
        time_shares=TimeShares(tokenizer=0.3, tokens=0.1, coarse=0.45, fine=0.15),
        geometry=True,
    ),
    # For an hour or two on a processor. The shipped pipeline was trained by an earlier state of it,
    # with AdamW and without `geometry`: 7060 seconds on one thread, transformers in bfloat16.
    "small": Recipe(
        tokenizer=TokenizerShape(largest_grid=16),
        tokenizer_training=TokenizerTraining(
            steps=6400, batch_size=32, learning_rate=2e-3, perceptual_weight=0.2, optimizer="muon"
        ),
        tokens=TokensConfig(),
        clusters=ClustersConfig(count=256),
        coarse=TransformerShape(width=192, layers=6, heads=6),
        coarse_training=TrainingConfig(
            steps=4000, batch_size=32, learning_rate=3e-3, optimizer="muon"
        ),
        fine=TransformerShape(width=192, layers=4, heads=6),
        fine_softmax="members",
        fine_training=TrainingConfig(
            steps=4000, batch_size=32, learning_rate=2e-3, optimizer="muon"
        ),
        sampling=Sampling(),
        image_size=64,
        geometry=True,
    ),
    # The paper's size B with a fine model of the shape of L, for GPUs and images of 256 pixels.
    "base": Recipe(
        tokenizer=_VQ16,
        tokenizer_training=TokenizerTraining(
            steps=200_000,
            batch_size=128,
            learning_rate=1e-4,
            perceptual_weight=1.0,
            adversarial_weight=0.5,
            adversarial_start=0.1,
        ),
        tokens=TokensConfig(views="ten-crop"),
        clusters=ClustersConfig(count=512),
        coarse=SIZES["B"],
        coarse_training=TrainingConfig(steps=300_000, batch_size=256, ema=0.9999),
        fine=SIZES["L"],
        fine_softmax="members",
        fine_training=TrainingConfig(steps=125_000, batch_size=1024, ema=0.9999),
        sampling=Sampling(guidance=2.0, temperature=1.1, fine_temperature=1.1),
        image_size=256,
        geometry=True,
    ),
    # The paper's table 1, not trained here; `ctf cost` calculates them. The guidance of B is the
    # paper's, that of L and XL is LlamaGen's for these sizes.
    "imagenet256-B": _imagenet("B", guidance=2.0),
    "imagenet256-L": _imagenet("L", guidance=2.0),
    "imagenet256-XL": _imagenet("XL", guidance=1.75),
}
