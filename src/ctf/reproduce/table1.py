"""Table 1: the full-vocabulary baseline against CTF, for several sizes of the codebook."""

from __future__ import annotations

from ctf.reproduce import plan as planned
from ctf.reproduce.cells import Cell
from ctf.reproduce.plan import Plan


def cells(plan: Plan) -> list[Cell]:
    """Those of the largest codebook first: they matter most."""
    found: list[Cell] = []
    for codes in reversed(plan.codebooks):
        for seed in seeds(plan, codes):
            for ctf in (False, True):
                found += row(plan, codes, seed, ctf=ctf)
    return found


def seeds(plan: Plan, codes: int) -> tuple[int, ...]:
    return plan.seeds if codes == plan.largest else plan.seeds[:1]


def row(plan: Plan, codes: int, seed: int, *, ctf: bool) -> list[Cell]:
    """The last cell is the score, those before it what it needs."""
    tuned = planned.search(plan, codes, ctf=ctf)
    models: planned.Models = (planned.baseline(plan, codes, seed), None)
    if ctf:
        models = (planned.coarse(plan, codes, seed), planned.fine(plan, codes, seed))
    name = f"table1-{'ctf' if ctf else 'baseline'}-{codes}-s{seed}"
    return planned.score(plan, name, models, tuned, seed=seed)
