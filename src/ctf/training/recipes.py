"""Recipes: everything that `ctf fit` needs to know besides the pictures."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal, TypeVar

from ctf.common.config import did_you_mean
from ctf.common.errors import UserError
from ctf.data.extraction import TokensConfig
from ctf.models.clusters import ClustersConfig
from ctf.models.sampling import Sampling
from ctf.models.sizes import SIZES, TokenizerShape, TransformerShape
from ctf.training.tokenizer import TokenizerTraining
from ctf.training.transformers import TrainingConfig


@dataclasses.dataclass(frozen=True)
class TimeShares:
    """How `ctf fit --minutes` shares its time among the stages; clusters take what they need."""

    tokenizer: float = 0.40
    tokens: float = 0.10
    coarse: float = 0.30
    fine: float = 0.20


@dataclasses.dataclass(frozen=True)
class GroupLoss:
    """The cluster-level loss of IAR (arXiv 2501.00880) beside a full-vocabulary model's own.

    weight: 0 is none. clusters: of the codes, for this loss alone.
    """

    weight: float = 0.0
    clusters: ClustersConfig = dataclasses.field(
        default_factory=lambda: ClustersConfig(method="balanced", count=128)
    )

    def __post_init__(self) -> None:
        if not 0 <= self.weight < math.inf:
            raise UserError(f"group_loss.weight: got {self.weight}, expected 0 or more")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Shapes and training of every stage.

    fine_corruption: share of the labels that the fine model is taught with that are wrong ones.
    group_loss: of the coarse model, where each code is a cluster of its own.
    """

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
    image_size: int = 64  # of folders, where none is asked for
    time_shares: TimeShares = TimeShares()
    fine_corruption: float = 0.0
    group_loss: GroupLoss = GroupLoss()

    def __post_init__(self) -> None:
        if not 0 <= self.fine_corruption < 1:
            raise UserError(f"fine_corruption: got {self.fine_corruption}, expected 0 to below 1")

    def with_steps(self, steps: int) -> Recipe:
        """The same recipe with this many steps in every trained stage."""
        return dataclasses.replace(
            self,
            tokenizer_training=with_steps(self.tokenizer_training, steps),
            coarse_training=with_steps(self.coarse_training, steps),
            fine_training=with_steps(self.fine_training, steps),
        )


T = TypeVar("T", TokenizerTraining, TrainingConfig)


def with_steps(training: T, steps: int) -> T:
    """The same training in another number of steps; a short one also warms up for less."""
    warm_up = min(training.warm_up, steps // 10)
    return dataclasses.replace(training, steps=steps, warm_up=warm_up)


def preset(name: str) -> Recipe:
    """Raises UserError for an unknown name, saying which one was meant."""
    if name not in PRESETS:
        raise UserError(f"unknown preset {name!r}{did_you_mean(name, PRESETS)}")
    return PRESETS[name]


@dataclasses.dataclass(frozen=True)
class DataSize:
    """How much there is to train on."""

    pictures: int
    classes: int


IMAGENET = DataSize(pictures=1_281_167, classes=1000)  # ImageNet-1k, the training pictures


def _imagenet(size: str, guidance: float) -> Recipe:
    """The paper's system at one size, on ImageNet at 256 pixels.

    Tokenizer: LlamaGen's VQ-16 and its training, 40 epochs of Adam without decay or schedule,
    with the discriminator from step 20,000. (The paper takes the released one: docs/llamagen.md.)
    What revives codes is this project's. Coarse: LlamaGen's training, 300 epochs, constant
    learning rate, dropout of tokens and outputs 0.1, ten-crop at two scales. Fine: the shape of L
    at every size, 100 epochs. The EMA is a choice made here: neither paper speaks of one.
    """

    def steps(epochs: int, batch_size: int) -> int:
        return round(epochs * IMAGENET.pictures / batch_size)

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
    # For a first look: two minutes on two CPU cores (`ctf demo`) show shapes, not details.
    "tiny": Recipe(
        tokenizer=TokenizerShape(),
        tokenizer_training=TokenizerTraining(
            steps=400, batch_size=32, learning_rate=2e-3, warm_up=20, revive_every=10
        ),
        tokens=TokensConfig(),
        clusters=ClustersConfig(count=256),
        coarse=TransformerShape(width=128, layers=4, heads=4),
        coarse_training=TrainingConfig(
            steps=600, batch_size=32, learning_rate=5e-3, warm_up=50, ema=0.95
        ),
        fine=TransformerShape(width=128, layers=2, heads=4),
        fine_softmax="members",
        fine_training=TrainingConfig(
            steps=400, batch_size=32, learning_rate=3e-3, warm_up=50, ema=0.99
        ),
        sampling=Sampling(),
        image_size=32,
        # Within two minutes what pictures show is the coarse model's; details hardly matter yet.
        time_shares=TimeShares(tokenizer=0.3, tokens=0.1, coarse=0.45, fine=0.15),
    ),
    # That of the shipped pipeline, which took 7060 seconds of one thread, the transformers in
    # bfloat16 (README). Not timed on a free machine.
    "small": Recipe(
        tokenizer=TokenizerShape(largest_grid=16),
        tokenizer_training=TokenizerTraining(steps=6400, batch_size=32, perceptual_weight=0.2),
        tokens=TokensConfig(),
        clusters=ClustersConfig(count=256),
        coarse=TransformerShape(width=192, layers=6, heads=6),
        coarse_training=TrainingConfig(steps=4000, batch_size=32, learning_rate=3e-3),
        fine=TransformerShape(width=192, layers=4, heads=6),
        fine_softmax="members",
        fine_training=TrainingConfig(steps=4000, batch_size=32, learning_rate=2e-3),
        sampling=Sampling(),
        image_size=64,
    ),
    # The paper's size B with a fine model of the shape of L, for GPUs and pictures of 256 pixels.
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
    ),
    # The paper's table 1; `ctf cost` has what each takes. Not trained here. The guidance of B is
    # the paper's, that of L and XL is what LlamaGen samples these sizes with.
    "imagenet256-B": _imagenet("B", guidance=2.0),
    "imagenet256-L": _imagenet("L", guidance=2.0),
    "imagenet256-XL": _imagenet("XL", guidance=1.75),
}
