"""Fig. 2: quality over training. Each point is a training of its own length, to the end of its
schedule, so that a short one is not a long one cut off.
"""

from __future__ import annotations

from ctf.reproduce import plan as planned
from ctf.reproduce import table1
from ctf.reproduce.cells import Cell
from ctf.reproduce.plan import Plan


def cells(plan: Plan) -> list[Cell]:
    found: list[Cell] = []
    for share in (*plan.lengths, 1.0):
        for ctf in (False, True):
            found += point(plan, share, ctf=ctf)
    return found


def point(plan: Plan, share: float, *, ctf: bool) -> list[Cell]:
    """The last cell is the score; at the full length it is Table 1's."""
    codes, seed = plan.largest, plan.seeds[0]
    if share == 1:
        return table1.row(plan, codes, seed, ctf=ctf)
    models: planned.Models = (planned.baseline(plan, codes, seed, share=share), None)
    if ctf:
        models = (
            planned.coarse(plan, codes, seed, share=share),
            planned.fine(plan, codes, seed, share=share),
        )
    name = f"figure2-{'ctf' if ctf else 'baseline'}-{round(share * plan.training.steps)}"
    tuned = planned.search(plan, codes, ctf=ctf)
    return planned.score(plan, name, models, tuned)
