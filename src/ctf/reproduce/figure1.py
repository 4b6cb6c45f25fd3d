"""Fig. 1: codes of a cluster draw nearly the same, and what swapping them does."""

from __future__ import annotations

from ctf.clusters import Method
from ctf.reproduce import plan as planned
from ctf.reproduce.cells import Cell
from ctf.reproduce.jobs import DetailsJob
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
    return [*found, *details(plan)]


def details(plan: Plan) -> list[Cell]:
    """The fine stage alone, on true labels."""
    fine = planned.fine(plan, plan.largest, plan.seeds[0])
    job = DetailsJob(fine[-1].name, plan.pictures_of_details)
    return [*fine, Cell(f"details-{plan.largest}", job)]
