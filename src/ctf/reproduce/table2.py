"""Table 2: the speed of sampling, both in turn, each with the settings of its search."""

from __future__ import annotations

from ctf.reproduce import plan as planned
from ctf.reproduce.cells import Cell
from ctf.reproduce.jobs import SpeedJob
from ctf.reproduce.plan import Plan


def cells(plan: Plan) -> list[Cell]:
    codes, seed = plan.largest, plan.seeds[0]
    baseline, ctf = (planned.search(plan, codes, ctf=ctf) for ctf in (False, True))
    job = SpeedJob(
        planned.baseline(plan, codes, seed)[-1].name,
        planned.coarse(plan, codes, seed)[-1].name,
        planned.fine(plan, codes, seed)[-1].name,
        (baseline[-1].name, ctf[-1].name),
    )
    return [*baseline, *ctf, Cell(f"table2-{codes}", job)]
