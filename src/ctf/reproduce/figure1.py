"""Fig. 1: codes of a cluster draw nearly the same, and what swapping them does."""

from __future__ import annotations

from ctf.models.clusters import Method
from ctf.reproduce import plan as planned
from ctf.reproduce.cells import Cell
from ctf.reproduce.jobs import Codes, DetailsJob
from ctf.reproduce.plan import Plan

METHODS: tuple[Method, ...] = ("average", "balanced")


def cells(plan: Plan) -> list[Cell]:
    found: list[Cell] = []
    for codes in reversed(plan.codebooks):
        found += planned.clusters(plan, codes, plan.count(codes))
    for count in plan.other_counts:
        found += planned.clusters(plan, plan.largest, count)
    for method in METHODS:
        found += planned.clusters(plan, plan.largest, plan.count(plan.largest), method)
    return [*found, *planned.fine(plan, plan.largest, plan.seeds[0]), *details(plan).values()]


def details(plan: Plan) -> dict[str, Cell]:
    """The fine stage alone, on true labels, each way in its own words."""
    fine = planned.fine(plan, plan.largest, plan.seeds[0])[-1].name

    def cell(name: str, codes: Codes, temperature: float = 1.0) -> Cell:
        job = DetailsJob(fine, codes, temperature, plan.pictures_of_details)
        return Cell(f"details-{plan.largest}-{name}", job)

    return {
        "true codes": cell("true", "true"),
        "random members": cell("random", "random"),
        "fine model, temperature 1": cell("fine-1", "model"),
        "fine model, temperature 0.8": cell("fine-0.8", "model", 0.8),
        "fine model, the likeliest": cell("likeliest", "model", 0.0),
    }
