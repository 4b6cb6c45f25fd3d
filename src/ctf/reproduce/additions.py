"""Experiments that the paper does not have, as data.

Shapes: V codes, K clusters.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ctf.reproduce.fine_cells import Codes, FineStageCell
from ctf.reproduce.plan import Plan
from ctf.reproduce.sampling_cells import PassesCell, ScoreCell
from ctf.reproduce.systems import (
    UNIFORM,
    baseline,
    classifier,
    clusters,
    coarse,
    fine,
    pair,
    score,
    with_geometry,
)
from ctf.reproduce.training_cells import FineCell

# --- Embeddings and output layers that know the codebook ------------------------------------------


def geometry(plan: Plan) -> dict[str, tuple[ScoreCell, ScoreCell]]:
    """The baseline and CTF at the largest V, each without and with geometry (models/points.py).

    All are trained alike, for the first seed, and baseline and CTF have a search of their own each,
    without and with. Those without are rows of Tables 1 and 3. A random member instead of the fine
    model, at the settings of CTF, shows what the fine model adds.
    """
    usual = pair(plan, plan.largest, plan.seeds[0])

    def with_and_without(
        name: str, without: ScoreCell, settings: Mapping[str, float] | None = None
    ) -> tuple[ScoreCell, ScoreCell]:
        coarse, fine = with_geometry(without.coarse), without.fine
        fine = None if fine is None else with_geometry(fine)
        name = f"geometry-{name}-{plan.largest}-s{plan.seeds[0]}"
        return without, score(plan, name, coarse, fine, settings)

    random = {"fine_temperature": UNIFORM}
    member = score(plan, "table3-member", usual.ctf.coarse, usual.ctf.fine, random)
    return {
        "baseline": with_and_without("baseline", usual.baseline),
        "CTF": with_and_without("ctf", usual.ctf),
        "CTF, a random member instead of the fine model": with_and_without(
            "member", member, random
        ),
    }


# --- The fine stage alone -------------------------------------------------------------------------

TRUE, RANDOM, NEAREST = "true codes", "random members", "members nearest to the centres"
KNOWS = "knows the codebook"
# Ways of sampling the fine model, as fields of `Sampling`, with what the cells are called.
FINE_SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "temperature 1": ("t1", {}),
    "temperature 0.7": ("t0.7", {"fine_temperature": 0.7}),
    "temperature 0.5": ("t0.5", {"fine_temperature": 0.5}),
    "temperature 0.3": ("t0.3", {"fine_temperature": 0.3}),
    "most likely": ("top1", {"fine_top_k": 1}),
    "nearest to the mean": ("mean", {"fine_choice": "mean"}),
    "nearest to the mean, temperature 0.5": (
        "mean-t0.5",
        {"fine_choice": "mean", "fine_temperature": 0.5},
    ),
    "nearest to the mean, temperature 0.25": (
        "mean-t0.25",
        {"fine_choice": "mean", "fine_temperature": 0.25},
    ),
    "guidance 1.5": ("g1.5", {"fine_guidance": 1.5}),
    "guidance 2.5": ("g2.5", {"fine_guidance": 2.5}),
    "guidance 2.5, most likely": ("g2.5-top1", {"fine_guidance": 2.5, "fine_top_k": 1}),
}


def fine_stage(plan: Plan) -> dict[int, dict[str, FineStageCell]]:
    """Held-out images whose codes are chosen for their true labels, for each K of the largest V.

    The true codes are the best that a fine model can do, and random members what it has to beat.
    """
    return {count: _fine_stage(plan, count) for count in plan.fine_clusters}


def true_codes(plan: Plan, codes: int) -> FineStageCell:
    """The reconstructions of a tokenizer; which clusters there are doesn't matter."""
    return _chosen(plan, f"{codes}-true", codes, None, "true")


def _fine_stage(plan: Plan, count: int) -> dict[str, FineStageCell]:
    codes = plan.largest
    plain = fine(plan, clusters(plan, codes, count), plan.seeds[0])
    rows = {
        TRUE: true_codes(plan, codes),
        RANDOM: _chosen(plan, f"{codes}-{count}-random", codes, count, "random"),
        NEAREST: _chosen(plan, f"{codes}-{count}-nearest", codes, count, "nearest"),
    }
    for label, prefix, model in (
        ("fine model", "", plain),
        (f"fine model that {KNOWS}", "geometry-", with_geometry(plain)),
    ):
        for way, (short, settings) in FINE_SETTINGS.items():
            name = f"{codes}-{count}-{prefix}{short}"
            rows[f"{label}, {way}"] = _chosen(plan, name, codes, count, "model", model, settings)
    return rows


def _chosen(
    plan: Plan,
    name: str,
    codes: int,
    count: int | None,
    which: Codes,
    model: FineCell | None = None,
    settings: Mapping[str, Any] | None = None,
) -> FineStageCell:
    return FineStageCell(
        f"fine-stage-{name}",
        clusters(plan, codes, count),
        model,
        which,
        dict(settings or {}),
        plan.fine_images,
        classifier(plan),
    )


# --- Exact parallel sampling ----------------------------------------------------------------------


def passes(plan: Plan) -> dict[tuple[int, int], PassesCell]:
    """Passes of an image by V and K, on the models of the first seed; K = V is the baseline.

    CTF has the usual K of each V, and at the largest V all K of Table 3a. Models of the same V have
    the same tokens.
    """
    seed, cells = plan.seeds[0], {}
    for codes in plan.codebooks:
        others = plan.other_clusters if codes == plan.largest else ()
        for count in sorted({plan.clusters_of(codes), *others}):
            model = coarse(plan, clusters(plan, codes, count), seed)
            cells[codes, count] = PassesCell(f"passes-{codes}-{count}", model)
        model = baseline(plan, codes, seed)
        cells[codes, codes] = PassesCell(f"passes-{codes}-baseline", model)
    return cells
