"""Table 3: one choice at a time, all else as the CTF of Table 1; and lines beyond the paper's."""

from __future__ import annotations

import dataclasses

from ctf.models.sizes import TransformerShape
from ctf.reproduce import plan as planned
from ctf.reproduce import table1
from ctf.reproduce.cells import Cell
from ctf.reproduce.plan import Plan

# Beside what the search has found.
GUIDANCES = (1.0, 1.75, 3.25)
FINE_TOP_KS = (1, 4)
TEMPERATURES = (1.0, 1.1)
FINE_TEMPERATURES = (0.5, 1.1)
UNIFORM = 1e6  # a temperature at which all members of a cluster are equally likely
CORRUPTION = 0.1
MEMBER = "a random member instead of the fine model (MASC)"


@dataclasses.dataclass(frozen=True)
class Line:
    """A line of the table: the part that it belongs to, what is chosen, and its cells.

    setting: of the sampling, where the choice is what the search has found for it.
    """

    part: str
    choice: str
    cells: list[Cell]
    setting: str | None = None


def cells(plan: Plan) -> list[Cell]:
    return [cell for line in lines(plan) for cell in line.cells]


def lines(plan: Plan) -> list[Line]:
    """Every line; the last of its cells is the score."""
    codes, seed = plan.largest, plan.seeds[0]
    usual, baseline = (table1.row(plan, codes, seed, ctf=ctf) for ctf in (True, False))
    tuned = planned.search(plan, codes, ctf=True)
    coarse, fine = planned.coarse(plan, codes, seed), planned.fine(plan, codes, seed)

    def scored(name: str, models: planned.Models, **settings: float) -> list[Cell]:
        return planned.score(plan, f"table3-{name}", models, tuned, settings=settings)

    found = []
    part = "a: number of clusters K"
    for count in sorted((*plan.other_counts, plan.count(codes))):
        models = (
            planned.coarse(plan, codes, seed, count=count),
            planned.fine(plan, codes, seed, count=count),
        )
        is_usual = count == plan.count(codes)
        found.append(Line(part, str(count), usual if is_usual else scored(f"k{count}", models)))

    part = "b: size of the fine model"
    shapes = sorted((*plan.other_fines, plan.fine), key=lambda s: (s.width, s.layers))
    for shape in shapes:
        if shape == plan.fine:
            found.append(Line(part, _size(shape), usual))
            continue
        other = planned.fine(plan, codes, seed, shape=shape)
        found.append(Line(part, _size(shape), scored(f"fine{_size(shape)}", (coarse, other))))

    def settings(part: str, name: str, values: tuple[float, ...]) -> None:
        for value in values:
            short = f"{name.replace('_', '-')}-{value:g}"
            row = scored(short, (coarse, fine), **{name: value})
            found.append(Line(part, f"{value:g}", row))
        found.append(Line(part, "found by the search", usual, name))

    settings("c: guidance scale", "guidance", GUIDANCES)
    part = "d: top-k of the fine model"
    for k in FINE_TOP_KS:
        row = scored(f"fine-top-k-{k}", (coarse, fine), fine_top_k=k)
        found.append(Line(part, str(k), row))
    found.append(Line(part, "all", usual))
    settings("e: temperature, coarse", "temperature", TEMPERATURES)
    settings("f: temperature, fine", "fine_temperature", FINE_TEMPERATURES)

    part = "control"
    models = (
        planned.coarse(plan, codes, seed, method="random"),
        planned.fine(plan, codes, seed, method="random"),
    )
    found.append(Line(part, "random clusters of the same sizes", scored("random", models)))

    part = "beyond the paper"
    models = (
        planned.coarse(plan, codes, seed, method="average"),
        planned.fine(plan, codes, seed, method="average"),
    )
    found.append(Line(part, "clusters by average linkage", scored("average", models)))
    models = (
        planned.coarse(plan, codes, seed, method="balanced"),
        planned.fine(plan, codes, seed, method="balanced"),
    )
    found.append(Line(part, "clusters of equal sizes (IAR)", scored("balanced", models)))
    masc = scored("member", (coarse, fine), fine_temperature=UNIFORM)
    found.append(Line(part, MEMBER, masc))
    full = planned.fine(plan, codes, seed, full=True)
    found.append(Line(part, "fine softmax over all codes", scored("full", (coarse, full))))
    # The temperature that was found is for a choice among members alone.
    row = scored("full-fine-temperature-1", (coarse, full), fine_temperature=1.0)
    found.append(Line(part, "the same, at fine temperature 1", row))
    corrupted = planned.fine(plan, codes, seed, corruption=CORRUPTION)
    found.append(
        Line(
            part,
            f"fine model taught with {CORRUPTION:.0%} wrong labels",
            scored("corrupted", (coarse, corrupted)),
        )
    )
    warm = planned.coarse(plan, codes, seed, warm=True)
    found.append(Line(part, "coarse model started from the baseline", scored("warm", (warm, fine))))
    iar = planned.baseline(plan, codes, seed, grouped=True)
    tuned = planned.search(plan, codes, ctf=False)
    found.append(Line(part, "baseline with the cluster loss of IAR", scored("iar", (iar, None))))
    found.append(Line(part, "baseline", baseline))
    return found


def _size(shape: TransformerShape) -> str:
    return f"{shape.width}x{shape.layers}"
