"""What `ctf reproduce` computes: a plan for each included set of images and each budget.

Shapes: V codes, K clusters.
"""

from __future__ import annotations

import dataclasses

from ctf.common.config import did_you_mean
from ctf.common.errors import UserError
from ctf.evaluation.classifier import ClassifierConfig
from ctf.models.sizes import TokenizerShape, TransformerShape
from ctf.training.recipes import GroupLoss, with_steps
from ctf.training.tokenizer import TokenizerTraining
from ctf.training.transformers import TrainingConfig


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything that decides the cells.

    Attributes:
        source: Images to train on and to compare with.
        features: Feature networks of the scores; searches use the first.
        codebooks: Each V. The last one is trained with all `seeds`, the others with the first.
        clusters: K for each V.
        other_clusters: More K for the last V (Table 3a).
        backbone: Of the coarse model.
        baselines: Of the full-vocabulary model, for each V.
        fine: Of the fine model; `other_fines` are the others of Table 3b.
        samples: Of each score.
        reserved: Training images that no model is trained on; searches compare with them.
        lengths: Of training, for Fig. 2, as multiples of the training steps; 1 comes on top.
        group_loss: IAR's cluster loss, for Table 3.
        details: Held-out images whose codes are resampled (Fig. 1).
        fine_clusters: K for the largest V, for the fine stage alone.
        fine_images: Held-out images of each row about the fine stage alone.
        classifier: Trained on the images as one more feature network, which also measures the class
            accuracy; None where the shipped one does.
    """

    source: str
    image_size: int
    features: tuple[str, ...]
    codebooks: tuple[int, ...]
    clusters: tuple[int, ...]
    other_clusters: tuple[int, ...]
    seeds: tuple[int, ...]
    tokenizer: TokenizerShape
    tokenizer_training: TokenizerTraining
    backbone: TransformerShape
    baselines: tuple[TransformerShape, ...]
    fine: TransformerShape
    other_fines: tuple[TransformerShape, ...]
    training: TrainingConfig
    fine_training: TrainingConfig
    samples: int
    reserved: int
    search_samples: int
    search_points: int
    lengths: tuple[float, ...]
    group_loss: GroupLoss
    details: int
    fine_clusters: tuple[int, ...]
    fine_images: int
    classifier: ClassifierConfig | None = None

    @property
    def largest(self) -> int:
        """The V of everything but Table 1."""
        return self.codebooks[-1]

    def clusters_of(self, codes: int) -> int:
        """The usual K for a V."""
        return self.clusters[self.codebooks.index(codes)]

    def baseline_of(self, codes: int) -> TransformerShape:
        """The full-vocabulary model for a V."""
        return self.baselines[self.codebooks.index(codes)]


FULL = Plan(
    source="fashion-mnist",
    image_size=32,
    features=("lite0", "fashion"),
    codebooks=(1024, 4096, 16384),
    clusters=(128, 256, 512),  # 4 times the square root of V
    other_clusters=(128, 1024),
    seeds=(0, 1, 2),
    tokenizer=TokenizerShape(largest_grid=16),
    tokenizer_training=TokenizerTraining(steps=1600, batch_size=32, perceptual_weight=0.2),
    # At V = 16384 the baseline has the backbone of the coarse model, and more parameters than
    # coarse and fine model together, 7.3 against 6.3 M, and takes more FLOPs. With smaller
    # codebooks it needs more layers for that.
    backbone=TransformerShape(width=160, layers=6, heads=5),
    baselines=tuple(TransformerShape(width=160, layers=n, heads=5) for n in (10, 9, 6)),
    fine=TransformerShape(width=160, layers=4, heads=5),
    other_fines=(
        TransformerShape(width=96, layers=2, heads=3),
        TransformerShape(width=192, layers=6, heads=6),
    ),
    training=TrainingConfig(
        steps=640, batch_size=32, learning_rate=5e-3, warm_up=50, ema=0.99, evaluate_every=320
    ),
    fine_training=TrainingConfig(
        steps=640, batch_size=32, learning_rate=2e-3, warm_up=50, ema=0.99, evaluate_every=320
    ),
    samples=10_000,
    reserved=10_000,
    search_samples=500,
    search_points=24,
    lengths=(0.25, 0.5),
    group_loss=GroupLoss(weight=1.0),
    details=10_000,
    fine_clusters=(128, 512, 1024, 2048),
    fine_images=2000,
)

# One seed, two codebooks, a quarter of the training, 1000 samples.
SMALL = dataclasses.replace(
    FULL,
    codebooks=(1024, 16384),
    clusters=(128, 512),
    baselines=(FULL.baselines[0], FULL.baselines[2]),
    other_clusters=(128,),
    seeds=(0,),
    tokenizer_training=dataclasses.replace(FULL.tokenizer_training, steps=400),
    other_fines=FULL.other_fines[:1],
    training=with_steps(FULL.training, 160),
    fine_training=with_steps(FULL.fine_training, 160),
    samples=1000,
    search_points=12,
    lengths=(0.5,),
    details=1000,
    fine_clusters=(512,),
    fine_images=500,
)

# EuroSAT: photographs in colour, on which there is much for the fine stage to choose; 256 tokens,
# as in the paper. Four times as many tokens an image, and several times as many images seen as on
# Fashion-MNIST, where training stopped while both models still improved fast: the lengths of
# Figure 2 are 1, 2, 4 and 10 epochs of the 18,000 images that are left to train on. At width 160
# all that would take some 60 hours of one thread, at width 96 about 32, estimated from a few steps
# of each kind of model. There, too, the baseline has more parameters than coarse and fine model
# together: 3.8 against 2.8 M at V = 16384. All are trained with Muon, at the learning rates of
# preset `small`.
EUROSAT_FULL = dataclasses.replace(
    FULL,
    source="eurosat",
    image_size=64,
    features=("lite0",),
    classifier=ClassifierConfig(steps=2000, batch_size=128, evaluate_every=500),
    tokenizer_training=dataclasses.replace(
        FULL.tokenizer_training, steps=2400, learning_rate=2e-3, optimizer="muon"
    ),
    backbone=TransformerShape(width=96, layers=6, heads=3),
    baselines=tuple(TransformerShape(width=96, layers=n, heads=3) for n in (10, 9, 6)),
    fine=TransformerShape(width=96, layers=4, heads=3),
    other_fines=(
        TransformerShape(width=64, layers=2, heads=2),
        TransformerShape(width=128, layers=6, heads=4),
    ),
    training=dataclasses.replace(
        with_steps(FULL.training, 2250),
        learning_rate=3e-3,
        optimizer="muon",
        evaluate_every=375,
    ),
    fine_training=dataclasses.replace(
        with_steps(FULL.fine_training, 2250), optimizer="muon", evaluate_every=375
    ),
    samples=5000,
    reserved=3600,
    lengths=(0.25, 0.5, 2.5),
    details=2000,
)

# One seed, two codebooks, a sixth of the training, 1000 samples.
EUROSAT_SMALL = dataclasses.replace(
    EUROSAT_FULL,
    codebooks=SMALL.codebooks,
    clusters=SMALL.clusters,
    baselines=(EUROSAT_FULL.baselines[0], EUROSAT_FULL.baselines[2]),
    other_clusters=SMALL.other_clusters,
    seeds=SMALL.seeds,
    classifier=ClassifierConfig(steps=500, batch_size=128, evaluate_every=500),
    tokenizer_training=dataclasses.replace(EUROSAT_FULL.tokenizer_training, steps=400),
    other_fines=EUROSAT_FULL.other_fines[:1],
    training=with_steps(EUROSAT_FULL.training, 375),
    fine_training=with_steps(EUROSAT_FULL.fine_training, 375),
    samples=SMALL.samples,
    search_samples=300,
    search_points=SMALL.search_points,
    lengths=SMALL.lengths,
    details=SMALL.details,
    fine_clusters=SMALL.fine_clusters,
    fine_images=SMALL.fine_images,
)

PLANS = {  # by the images, then by the budget
    "fashion-mnist": {"small": SMALL, "full": FULL},
    "eurosat": {"small": EUROSAT_SMALL, "full": EUROSAT_FULL},
}


def plan_of(budget: str, images: str = "fashion-mnist") -> Plan:
    """Return the plan for a budget and an included set of images.

    Raises:
        UserError: There is no such budget, or no plan for these images.
    """
    if images not in PLANS:
        raise UserError(f"no experiments on {images!r}{did_you_mean(images, PLANS)}")
    if budget not in PLANS[images]:
        raise UserError(f"unknown budget {budget!r}{did_you_mean(budget, PLANS[images])}")
    return PLANS[images][budget]


def folder_of(budget: str, images: str) -> str:
    """Return the name of the folder for a plan's files and results."""
    return budget if images == "fashion-mnist" else f"{images}-{budget}"
