"""The tables and figures of the paper (arXiv 2503.16194) as data: what is trained and scored.

Shapes: V codes, K clusters.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal

from ctf.common.config import did_you_mean
from ctf.common.errors import UserError
from ctf.models.clusters import Method
from ctf.models.sizes import TransformerShape
from ctf.reproduce import additions
from ctf.reproduce.cells import Cell, with_needs
from ctf.reproduce.fine_cells import DetailsCell
from ctf.reproduce.plan import Plan
from ctf.reproduce.sampling_cells import SpeedCell
from ctf.reproduce.systems import (
    UNIFORM,
    Choice,
    Pair,
    baseline,
    classifier,
    clusters,
    coarse,
    fine,
    pair,
    score,
    search,
    variant,
)
from ctf.reproduce.training_cells import ClustersCell, CoarseCell, FineCell

# --- Table 1 and Figure 2: the baseline against CTF -----------------------------------------------


def table1(plan: Plan, codes: int) -> list[Pair]:
    """The pairs of a V: one for each seed."""
    seeds = plan.seeds if codes == plan.largest else plan.seeds[:1]
    return [pair(plan, codes, seed) for seed in seeds]


def figure2(plan: Plan) -> list[Pair]:
    """Quality over training: a pair for each length, each with a schedule of its own."""
    shares = sorted((*plan.lengths, 1.0))
    return [pair(plan, plan.largest, plan.seeds[0], share) for share in shares]


# --- Table 2: the speed of sampling ---------------------------------------------------------------


def table2(plan: Plan, *, parallel: bool = False) -> SpeedCell:
    """Both samplers in turn, at the largest V; `parallel` isn't in the paper."""
    name = f"table2-{plan.largest}" + "-parallel" * parallel
    base, ctf = (search(plan, plan.largest, ctf=ctf) for ctf in (False, True))
    assert ctf.fine is not None
    return SpeedCell(name, base.coarse, ctf.coarse, ctf.fine, (base, ctf), parallel=parallel)


# --- Table 3: one choice at a time ----------------------------------------------------------------


def table3(plan: Plan) -> dict[str, list[Choice]]:
    """The rows of each part. What a row does not change is as in the CTF of Table 1."""
    codes, seed, usual = plan.largest, plan.seeds[0], pair(plan, plan.largest, plan.seeds[0])
    ctf, base = usual.ctf, baseline(plan, codes, seed)
    first, second = ctf.coarse, fine(plan, ctf.coarse.clusters, seed)

    def row(
        label: str,
        name: str,
        coarse: CoarseCell = first,
        fine: FineCell | None = second,
        settings: Mapping[str, float] | None = None,
    ) -> Choice:
        return Choice(label, score(plan, f"table3-{name}", coarse, fine, settings))

    def setting(name: str, *values: float) -> list[Choice]:
        short = name.replace("_", "-")
        rows = [row(f"{value:g}", f"{short}-{value:g}", settings={name: value}) for value in values]
        return [*rows, Choice("found by the search", ctf, name)]

    def clustered(
        label: str, name: str, count: int | None = None, method: Method = "kmeans"
    ) -> Choice:
        other = clusters(plan, codes, count, method)
        return row(label, name, coarse(plan, other, seed), fine(plan, other, seed))

    counts = {k: clustered(f"{k}", f"k{k}", k) for k in plan.other_clusters}
    counts[plan.clusters_of(codes)] = Choice(f"{plan.clusters_of(codes)}", ctf)
    sizes = {plan.fine: Choice(_size(plan.fine), ctf)}
    for shape in plan.other_fines:
        other = variant(second, _size(shape), shape=shape)
        sizes[shape] = row(_size(shape), f"fine{_size(shape)}", fine=other)
    full = variant(second, "full", softmax="full")
    corrupted = variant(second, "corrupted", corruption=0.1)
    warm = variant(first, "warm", warm_start=base)
    grouped = variant(base, "iar", group_loss=plan.group_loss)
    return {
        "a: number of clusters K": [counts[k] for k in sorted(counts)],
        "b: size of the fine model": [
            sizes[shape] for shape in sorted(sizes, key=lambda shape: (shape.width, shape.layers))
        ],
        "c: guidance scale": setting("guidance", 1.0, 1.75, 3.25),
        "d: top-k of the fine model": [
            row("1", "fine-top-k-1", settings={"fine_top_k": 1}),
            row("4", "fine-top-k-4", settings={"fine_top_k": 4}),
            Choice("all", ctf),
        ],
        "e: temperature, coarse": setting("temperature", 1.0, 1.1),
        "f: temperature, fine": setting("fine_temperature", 0.5, 1.1),
        "control": [clustered("random clusters of the same sizes", "random", method="random")],
        "beyond the paper": [
            clustered("clusters by average linkage", "average", method="average"),
            clustered("clusters of equal sizes (IAR)", "balanced", method="balanced"),
            row(
                "a random member instead of the fine model (MASC)",
                "member",
                settings={"fine_temperature": UNIFORM},
            ),
            row("fine softmax over all codes", "full", fine=full),
            # The temperature that the search found is for a choice among members alone.
            row(
                "the same, at fine temperature 1",
                "full-fine-temperature-1",
                fine=full,
                settings={"fine_temperature": 1.0},
            ),
            row("fine model trained on 10% wrong labels", "corrupted", fine=corrupted),
            row("coarse model started from the baseline", "warm", warm),
            row("baseline with the cluster loss of IAR", "iar", grouped, None),
            Choice("baseline", usual.baseline),
        ],
    }


def _size(shape: TransformerShape) -> str:
    return f"{shape.width}x{shape.layers}"


@dataclasses.dataclass(frozen=True)
class Claim:
    """That a row of Table 3 is better than another one."""

    text: str
    score: Literal["FID", "IS"]
    better: Choice
    worse: Choice


def claims(plan: Plan) -> list[Claim]:
    """What the paper concludes from Table 3."""
    counts, sizes, guidances, top_ks, temperatures, _, control, beyond = table3(plan).values()
    usual, member = top_ks[-1], beyond[2]
    return [
        Claim("more clusters than a few are better", "FID", usual, counts[0]),
        Claim("a larger fine model is better", "FID", sizes[-1], sizes[0]),
        Claim("guidance raises IS", "IS", guidances[-2], guidances[0]),
        Claim("sampling details beats taking the most likely", "FID", usual, top_ks[0]),
        Claim("a temperature above 1 is better", "FID", temperatures[-2], temperatures[0]),
        Claim("random clusters make it fail", "FID", usual, control[0]),
        Claim("the fine model beats a random member", "FID", usual, member),
    ]


# --- Figure 1: codes of a cluster look alike ------------------------------------------------------


def figure1(plan: Plan) -> list[ClustersCell]:
    """The clusters whose redundancy is shown, the usual ones of the largest V first."""
    usual = [clusters(plan, codes) for codes in reversed(plan.codebooks)]
    counts = [clusters(plan, plan.largest, count) for count in plan.other_clusters]
    methods: tuple[Method, ...] = ("average", "balanced")
    return [*usual, *counts, *(clusters(plan, plan.largest, method=m) for m in methods)]


def details(plan: Plan) -> dict[str, DetailsCell]:
    """The fine stage alone, on true labels, by what the codes are."""
    model = fine(plan, clusters(plan, plan.largest), plan.seeds[0])

    def cell(
        name: str, codes: Literal["true", "random", "model"], temperature: float = 1.0
    ) -> DetailsCell:
        name = f"details-{plan.largest}-{name}"
        return DetailsCell(name, model, codes, temperature, plan.details, classifier(plan))

    return {
        "true codes": cell("true", "true"),
        "random members": cell("random", "random"),
        "fine model, temperature 1": cell("fine-1", "model"),
        "fine model, temperature 0.8": cell("fine-0.8", "model", 0.8),
        "fine model, most likely": cell("likeliest", "model", 0.0),
    }


# --- All together ---------------------------------------------------------------------------------


def select(plan: Plan, what: str = "all", only: str | None = None) -> dict[str, Cell]:
    """Return the cells of a table or figure by name, in the order of computation.

    Args:
        plan: How much is computed.
        what: "all", or a table, a figure or another experiment, see below.
        only: One of the cells; None: all.

    Raises:
        UserError: There is no such cell.
    """
    pairs = [each for codes in reversed(plan.codebooks) for each in table1(plan, codes)]
    # A tokenizer's own cell has no FID by the classifier.
    decoded = () if plan.classifier is None else plan.codebooks
    experiments: dict[str, Sequence[Cell]] = {  # what matters most first
        "table1": [
            *(cell for each in pairs for cell in (each.baseline, each.ctf)),
            *(additions.true_codes(plan, codes) for codes in decoded),
        ],
        "table3": [row.cell for rows in table3(plan).values() for row in rows],
        "figure1": [*figure1(plan), *details(plan).values()],
        "figure2": [cell for each in figure2(plan) for cell in (each.baseline, each.ctf)],
        "geometry": [cell for pair in additions.geometry(plan).values() for cell in pair],
        "fine": [cell for rows in additions.fine_stage(plan).values() for cell in rows.values()],
        "passes": [*additions.passes(plan).values()],
        "table2": [table2(plan), table2(plan, parallel=True)],
    }
    chosen = experiments.values() if what == "all" else [experiments[what]]
    cells = with_needs(cell for group in chosen for cell in group)
    if only is None:
        return cells
    if only not in cells:
        raise UserError(f"unknown cell {only!r}{did_you_mean(only, cells)}")
    return {only: cells[only]}
