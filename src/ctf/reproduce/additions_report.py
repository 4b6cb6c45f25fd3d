"""Sections of the report about what the paper does not have."""

from __future__ import annotations

from ctf.common.markdown import markdown_table
from ctf.reproduce import additions
from ctf.reproduce.cells import Workspace
from ctf.reproduce.scored import Scored, columns, compare, row, score_names, scored

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
