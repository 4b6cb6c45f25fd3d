"""Sections of the report about what the paper does not have."""

from __future__ import annotations

from ctf.common.markdown import markdown_table
from ctf.reproduce import additions
from ctf.reproduce.cells import Outcome, Workspace
from ctf.reproduce.fine_cells import FineStageCell
from ctf.reproduce.scored import (
    MISSING,
    Scored,
    columns,
    compare,
    missing,
    recovered,
    row,
    score_names,
    scored,
)

# --- Embeddings and output layers that know the codebook ------------------------------------------


def geometry(space: Workspace) -> list[str]:
    """Return the section about embeddings and output layers that know the codebook."""
    plan, rows = space.plan, []
    scores: dict[str, tuple[Scored | None, Scored | None]] = {}
    for label, (without, with_it) in additions.geometry(plan).items():
        scores[label] = scored(space, without), scored(space, with_it)
        for known, cell, score in zip(
            ("no", "yes"), (without, with_it), scores[label], strict=True
        ):
            loss = "" if score is None or score.loss is None else f"{score.loss:.3f}"
            rows.append([label, known, *row(space, cell), loss])
    header = ("model", "knows the codebook", *columns(plan), "held-out loss, nats a token")
    return [
        "## Models that know the codebook",
        f"Not in the paper. V = {plan.largest}, seed {plan.seeds[0]}, trained as in Table 1; the "
        "rows of the embedding and of the output layer are free ones plus a learned function of "
        "the code or of its cluster's centre. Each baseline and each CTF has a search of its own; "
        "a random member is sampled at the settings of CTF.",
        markdown_table(header, rows),
        *_geometry_in_words(scores, score_names(plan, "FID")),
    ]


def _geometry_in_words(
    scores: dict[str, tuple[Scored | None, Scored | None]], names: list[str]
) -> list[str]:
    (base, known_base), (ctf, known_ctf), *_ = scores.values()
    if base is None or known_base is None or ctf is None or known_ctf is None:
        return []
    lines = []
    for label, one, other in (("baseline", known_base, base), ("CTF", known_ctf, ctf)):
        changes = " and ".join(f"{name} {compare(one, other, name)}" for name in names)
        assert one.loss is not None and other.loss is not None
        loss = f"held-out loss {other.loss:.3f} before, {one.loss:.3f} after"
        lines.append(f"With knowledge of the codebook, the {label} has {changes}; {loss}.")
    between = " and ".join(f"{name} {compare(known_ctf, known_base, name)}" for name in names)
    lines.append(f"Where both have it, CTF has {between} than the baseline.")
    return [" ".join(lines)]


# --- The fine stage alone -------------------------------------------------------------------------


def fine_stage(space: Workspace) -> list[str]:
    """Return the section about the fine stage alone, on true labels."""
    plan = space.plan
    parts = [
        "## The fine stage alone",
        f"{plan.fine_images:,} held-out images, whose codes are chosen for their true labels; "
        f"V = {plan.largest}. Recovered is (random - x) / (random - true) by FID: 0 % is as good "
        "as a random member of each cluster, 100 % as good as the true codes. In brackets: 95 % "
        "intervals; those of what is recovered are of the same images in all rows.",
    ]
    for count, cells in additions.fine_stage(plan).items():
        parts += _fine_stage_of(space, count, cells)
    return parts


def _fine_stage_of(space: Workspace, count: int, cells: dict[str, FineStageCell]) -> list[str]:
    title = f"### K = {count}"
    if all(space.outcome(cell) is None for cell in cells.values()):
        return [title, f"{MISSING}."]
    names, rows = score_names(space.plan, "FID"), []
    header = ["codes", "PSNR", *(column for name in names for column in (name, "recovered"))]
    for label, cell in cells.items():
        if (outcome := space.outcome(cell)) is None:
            rows.append([label, *missing(len(header) - 1)])
            continue
        rows.append([label, f"{outcome['psnr']:.2f} dB"])
        for name in names:
            distance = "{value:.4g} ({low:.4g} to {high:.4g})".format(**outcome[name])
            rows[-1] += [distance, _recovered(space, cells, outcome, name)]
    return [
        title,
        markdown_table(header, rows),
        *_losses(space, cells),
        *_best_way(space, cells, names),
    ]


def _recovered(
    space: Workspace, cells: dict[str, FineStageCell], outcome: Outcome, name: str
) -> str:
    true, random = (space.outcome(cells[label]) for label in (additions.TRUE, additions.RANDOM))
    if true is None or random is None or (part := recovered(true, random, outcome, name)) is None:
        return ""
    if outcome in (true, random):
        return f"{part.value:.0%}"
    return f"{part.value:.0%} ({part.low:.0%} to {part.high:.0%})"


def _losses(space: Workspace, cells: dict[str, FineStageCell]) -> list[str]:
    """A line with the held-out losses of the fine models, and that of a uniform choice."""
    models = {cell.fine: label.split(",")[0] for label, cell in cells.items() if cell.fine}
    known = [
        f"{label} {outcome['loss']:.3f}"
        for model, label in models.items()
        if (outcome := space.outcome(model)) is not None
    ]
    random = space.outcome(cells[additions.RANDOM])
    if random is None or not known:
        return []
    losses = ", ".join([f"a uniform choice {random['uniform_loss']:.3f}", *known])
    return [f"Held-out loss, nats a token: {losses}."]


def _best_way(space: Workspace, cells: dict[str, FineStageCell], names: list[str]) -> list[str]:
    """A line with the way of sampling the fine model that has the lowest first FID."""
    outcomes = {
        label: outcome
        for label, cell in cells.items()
        if cell.fine is not None and (outcome := space.outcome(cell)) is not None
    }
    if not outcomes:
        return []
    best = min(outcomes, key=lambda label: float(outcomes[label][names[0]]["value"]))
    parts = {name: _recovered(space, cells, outcomes[best], name) for name in names}
    words = " and ".join(f"{part} by {name}" for name, part in parts.items() if part)
    return [f"The best by {names[0]}, {best}, recovers {words}."] if words else []
