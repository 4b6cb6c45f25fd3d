"""How much is computed: the budgets, and the cells that several tables share.

Shapes: V codes, K clusters.
"""

from __future__ import annotations

import dataclasses

from ctf.models.clusters import ClustersConfig, Method
from ctf.models.sizes import TokenizerShape, TransformerShape
from ctf.reproduce.cells import Cell
from ctf.reproduce.jobs import (
    ClustersJob,
    CoarseJob,
    FineJob,
    ScoreJob,
    SearchJob,
    TokenizerJob,
    TokensJob,
)
from ctf.training.recipes import GroupLoss, with_steps
from ctf.training.tokenizer import TokenizerTraining
from ctf.training.transformers import TrainingConfig


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything that decides the cells.

    source: of the pictures. features: the networks that look at them; searches are by the first.
    codebooks: each V, the last with all of `seeds`, the others with the first one.
    counts: K for each V. other_counts: for the last V, those of Table 3a besides.
    backbone: of the coarse model. baselines: of the full-vocabulary model for each V.
    fine, other_fines: of the fine model, the usual one and the others of Table 3b.
    samples: of each score.
    kept_back: pictures of the training split that nothing is trained with; searches are against
        these. search_samples, search_points: see `SearchJob`.
    lengths: shares of the training that Fig. 2 looks at. group_loss: IAR's, for Table 3.
    """

    source: str
    image_size: int
    features: tuple[str, ...]
    codebooks: tuple[int, ...]
    counts: tuple[int, ...]
    other_counts: tuple[int, ...]
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
    kept_back: int
    search_samples: int
    search_points: int
    lengths: tuple[float, ...]
    group_loss: GroupLoss
    pictures_of_details: int

    @property
    def largest(self) -> int:
        """The V of everything but Table 1."""
        return self.codebooks[-1]

    def count(self, codes: int) -> int:
        """The usual K for that V."""
        return self.counts[self.codebooks.index(codes)]


FULL = Plan(
    source="fashion-mnist",
    image_size=32,
    features=("lite0", "fashion"),
    codebooks=(1024, 4096, 16384),
    counts=(128, 256, 512),  # 4 times the square root of V
    other_counts=(128, 1024),
    seeds=(0, 1, 2),
    tokenizer=TokenizerShape(largest_grid=16),
    tokenizer_training=TokenizerTraining(steps=1600, batch_size=32, perceptual_weight=0.2),
    # At V = 16384 the baseline has the coarse model's transformer, and more parameters than coarse
    # and fine model together, 7.3 against 6.3 M, and takes more FLOPs. With smaller codebooks it
    # needs more layers for that.
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
    kept_back=10_000,
    search_samples=500,
    search_points=24,
    lengths=(0.25, 0.5),
    group_loss=GroupLoss(weight=1.0),
    pictures_of_details=10_000,
)

BUDGETS = {
    # An hour on two cores: one seed, two codebooks, a quarter of the training, 1000 samples.
    "small": dataclasses.replace(
        FULL,
        codebooks=(1024, 16384),
        counts=(128, 512),
        baselines=(FULL.baselines[0], FULL.baselines[2]),
        other_counts=(128,),
        seeds=(0,),
        tokenizer_training=dataclasses.replace(FULL.tokenizer_training, steps=400),
        other_fines=FULL.other_fines[:1],
        training=with_steps(FULL.training, 160),
        fine_training=with_steps(FULL.fine_training, 160),
        samples=1000,
        search_points=12,
        lengths=(0.5,),
        pictures_of_details=1000,
    ),
    "full": FULL,
}


# The last of each is a coarse and a fine model, those before it what they need.
Models = tuple[list[Cell], list[Cell] | None]


# --- Cells that several tables share --------------------------------------------------------------


def tokenizer(plan: Plan, codes: int) -> Cell:
    shape = dataclasses.replace(plan.tokenizer, codebook_size=codes)
    job = TokenizerJob(shape, plan.tokenizer_training, plan.kept_back)
    return Cell(f"tokenizer-{codes}", job)


def tokens(plan: Plan, codes: int) -> list[Cell]:
    """Codes of all pictures, after the tokenizer that they need."""
    before = tokenizer(plan, codes)
    return [before, Cell(f"tokens-{codes}", TokensJob(before.name))]


def clusters(plan: Plan, codes: int, count: int, method: Method = "kmeans") -> list[Cell]:
    """Clusters, after what they need."""
    before = tokens(plan, codes)
    name = f"clusters-{codes}-" + ("identity" if method == "identity" else str(count))
    if method not in ("kmeans", "identity"):
        name += f"-{method}"
    config = ClustersConfig(method=method, count=codes if method == "identity" else count)
    return [*before, Cell(name, ClustersJob(before[-1].name, config))]


def baseline(
    plan: Plan, codes: int, seed: int, *, share: float = 1.0, grouped: bool = False
) -> list[Cell]:
    """A full-vocabulary model, after what it needs.

    Args:
        share: of the steps. grouped: with IAR's loss beside its own.
    """
    before = clusters(plan, codes, codes, "identity")
    training, more = _training(plan.training, seed, share)
    loss = plan.group_loss if grouped else GroupLoss()
    name = f"baseline-{codes}-s{seed}{more}{'-iar' * grouped}"
    shape = plan.baselines[plan.codebooks.index(codes)]
    return [*before, Cell(name, CoarseJob(before[-1].name, shape, training, loss))]


def coarse(
    plan: Plan,
    codes: int,
    seed: int,
    *,
    count: int | None = None,
    method: Method = "kmeans",
    share: float = 1.0,
    warm: bool = False,
) -> list[Cell]:
    """A coarse model, after what it needs; `warm` starts from the baseline of the same seed."""
    before = clusters(plan, codes, count or plan.count(codes), method)
    name = before[-1].name.replace("clusters", "coarse")
    training, more = _training(plan.training, seed, share)
    start = baseline(plan, codes, seed) if warm else []
    job = CoarseJob(
        before[-1].name, plan.backbone, training, warm_start=start[-1].name if warm else None
    )
    return [*before, *start, Cell(f"{name}-s{seed}{more}{'-warm' * warm}", job)]


def fine(
    plan: Plan,
    codes: int,
    seed: int,
    *,
    count: int | None = None,
    method: Method = "kmeans",
    share: float = 1.0,
    shape: TransformerShape | None = None,
    full: bool = False,
    corruption: float = 0.0,
) -> list[Cell]:
    """A fine model, after what it needs."""
    before = clusters(plan, codes, count or plan.count(codes), method)
    name = before[-1].name.replace("clusters", "fine")
    training, more = _training(plan.fine_training, seed, share)
    if shape is not None:
        more += f"-{shape.width}x{shape.layers}"
    more += "-full" * full + "-corrupted" * (corruption > 0)
    job = FineJob(
        before[-1].name,
        shape or plan.fine,
        training,
        softmax="full" if full else "members",
        corruption=corruption,
    )
    return [*before, Cell(f"{name}-s{seed}{more}", job)]


def search(plan: Plan, codes: int, *, ctf: bool) -> list[Cell]:
    """The search for the settings of a V, on its models of the first seed, after these."""
    seed = plan.seeds[0]
    second: str | None
    if ctf:
        before = [*coarse(plan, codes, seed), *fine(plan, codes, seed)]
        first, second = coarse(plan, codes, seed)[-1].name, fine(plan, codes, seed)[-1].name
    else:
        before = baseline(plan, codes, seed)
        first, second = before[-1].name, None
    job = SearchJob(first, second, plan.search_samples, plan.search_points)
    return [*before, Cell(f"search-{'ctf' if ctf else 'baseline'}-{codes}", job)]


def score(
    plan: Plan,
    name: str,
    models: Models,
    tuned: list[Cell],
    *,
    seed: int = 0,
    settings: dict[str, float] | None = None,
) -> list[Cell]:
    """A score of these models with the settings of a search, some of them replaced."""
    first, second = models
    job = ScoreJob(
        first[-1].name,
        None if second is None else second[-1].name,
        plan.samples,
        seed * plan.samples,
        settings or {},
        tuned[-1].name,
    )
    return [*first, *(second or []), *tuned, Cell(name, job)]


def _training(training: TrainingConfig, seed: int, share: float) -> tuple[TrainingConfig, str]:
    """That of a seed, for a share of the steps; and what is put behind the cell's name."""
    training = dataclasses.replace(training, seed=seed)
    if share == 1:
        return training, ""
    steps = round(share * training.steps)
    return with_steps(training, steps), f"-{steps}steps"
