"""The systems that are compared: cells that several tables and figures share.

Shapes: V codes, K clusters.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from ctf.models.clusters import ClustersConfig, Method
from ctf.reproduce.plan import Plan
from ctf.reproduce.sampling_cells import ScoreCell, SearchCell
from ctf.reproduce.training_cells import (
    ClassifierCell,
    ClustersCell,
    CoarseCell,
    FineCell,
    TokenizerCell,
    TokensCell,
)
from ctf.training.recipes import with_steps

UNIFORM = 1e6  # a temperature at which all members of a cluster are equally likely

Model = TypeVar("Model", CoarseCell, FineCell)


def classifier(plan: Plan) -> ClassifierCell | None:
    """The classifier that is a feature network of the scores, if the plan has one."""
    return None if plan.classifier is None else ClassifierCell("classifier", plan.classifier)


def tokenizer(plan: Plan, codes: int) -> TokenizerCell:
    """The tokenizer with V codes."""
    shape = dataclasses.replace(plan.tokenizer, codebook_size=codes)
    return TokenizerCell(f"tokenizer-{codes}", shape, plan.tokenizer_training, plan.reserved)


def clusters(
    plan: Plan, codes: int, count: int | None = None, method: Method = "kmeans"
) -> ClustersCell:
    """K clusters of V codes, by default the usual number."""
    count = codes if method == "identity" else count or plan.clusters_of(codes)
    suffix = {"identity": "identity", "kmeans": f"{count}"}.get(method, f"{count}-{method}")
    tokens = TokensCell(f"tokens-{codes}", tokenizer(plan, codes))
    config = ClustersConfig(method=method, count=count)
    return ClustersCell(f"clusters-{codes}-{suffix}", tokens, config)


def baseline(plan: Plan, codes: int, seed: int) -> CoarseCell:
    """The full-vocabulary baseline: a coarse model of identity clusters."""
    training = dataclasses.replace(plan.training, seed=seed)
    shape = plan.baselines[plan.codebooks.index(codes)]
    identity = clusters(plan, codes, method="identity")
    return CoarseCell(f"baseline-{codes}-s{seed}", identity, shape, training)


def coarse(plan: Plan, clusters: ClustersCell, seed: int) -> CoarseCell:
    """The coarse model of CTF."""
    name = f"{clusters.name.replace('clusters', 'coarse')}-s{seed}"
    training = dataclasses.replace(plan.training, seed=seed)
    return CoarseCell(name, clusters, plan.backbone, training)


def fine(plan: Plan, clusters: ClustersCell, seed: int) -> FineCell:
    """The fine model of CTF."""
    name = f"{clusters.name.replace('clusters', 'fine')}-s{seed}"
    training = dataclasses.replace(plan.fine_training, seed=seed)
    return FineCell(name, clusters, plan.fine, training)


def search(plan: Plan, codes: int, *, ctf: bool, geometry: bool = False) -> SearchCell:
    """The search for the sampling settings of a V, on the models of the first seed."""
    seed, usual = plan.seeds[0], clusters(plan, codes)
    first = coarse(plan, usual, seed) if ctf else baseline(plan, codes, seed)
    second = fine(plan, usual, seed) if ctf else None
    name = f"search-{'ctf' if ctf else 'baseline'}-{codes}"
    if geometry:
        first, second = with_geometry(first), None if second is None else with_geometry(second)
        name = f"{name}-geometry"
    return SearchCell(name, first, second, plan.search_samples, plan.search_points)


def score(
    plan: Plan,
    name: str,
    coarse: CoarseCell,
    fine: FineCell | None,
    settings: Mapping[str, float] | None = None,
) -> ScoreCell:
    """A score at the settings of the search for CTF or the baseline, some of them replaced."""
    codes = coarse.clusters.tokens.tokenizer.shape.codebook_size
    first_sample = coarse.training.seed * plan.samples
    tuned = search(plan, codes, ctf=fine is not None, geometry=coarse.geometry)
    return ScoreCell(
        name,
        coarse,
        fine,
        plan.samples,
        first_sample,
        dict(settings or {}),
        tuned,
        classifier(plan),
    )


def variant(cell: Model, suffix: str, **changes: Any) -> Model:
    """A model of its own with other values in some fields."""
    return dataclasses.replace(cell, name=f"{cell.name}-{suffix}", **changes)


def with_geometry(cell: Model) -> Model:
    """The same model, whose embedding and output layer know the codebook."""
    return variant(cell, "geometry", geometry=True)


@dataclasses.dataclass(frozen=True)
class Pair:
    """The baseline and CTF, trained alike for `steps` steps."""

    codes: int
    seed: int
    steps: int
    baseline: ScoreCell
    ctf: ScoreCell


def pair(plan: Plan, codes: int, seed: int, share: float = 1.0) -> Pair:
    """Both at a share of the training steps; at the full length they are rows of Table 1."""
    usual, steps = clusters(plan, codes), round(share * plan.training.steps)
    base = _shortened(baseline(plan, codes, seed), share)
    first = _shortened(coarse(plan, usual, seed), share)
    second = _shortened(fine(plan, usual, seed), share)

    def name(which: str) -> str:
        full = f"table1-{which}-{codes}-s{seed}"
        return full if share == 1 else f"figure2-{which}-{steps}"

    scores = score(plan, name("baseline"), base, None), score(plan, name("ctf"), first, second)
    return Pair(codes, seed, steps, *scores)


def _shortened(cell: Model, share: float) -> Model:
    if share == 1:
        return cell
    steps = round(share * cell.training.steps)
    return variant(cell, f"{steps}steps", training=with_steps(cell.training, steps))


@dataclasses.dataclass(frozen=True)
class Choice:
    """A row of a table; `setting` is the sampling setting whose value is by the search."""

    label: str
    cell: ScoreCell
    setting: str | None = None
