"""Experiments that the paper does not have, as data.

Shapes: V codes, K clusters.
"""

from __future__ import annotations

from collections.abc import Mapping

from ctf.reproduce.plan import Plan
from ctf.reproduce.sampling_cells import ScoreCell
from ctf.reproduce.systems import UNIFORM, pair, score, with_geometry

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
