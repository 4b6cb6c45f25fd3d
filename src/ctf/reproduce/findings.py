"""Whether the claims of the paper hold for the stored results."""

from __future__ import annotations

import statistics

from ctf.reproduce import experiments
from ctf.reproduce.cells import Workspace
from ctf.reproduce.experiments import Claim
from ctf.reproduce.scored import (
    MISSING,
    margins,
    order,
    score_names,
    scored,
    scored_pair,
    speed_ups,
    table1_pairs,
)

OVERLAP = "no: the intervals overlap"

Row = tuple[str, str, str]  # claim, what was found here, and whether the claim holds

# The paper's Table 1 (arXiv 2503.16194), on ImageNet at 256 pixels: model, parameters, FID, IS.
PAPER_TABLE1 = (
    ("LlamaGen-B", "111 M", 5.46, 193.6),
    ("+ CTF", "87 M", 4.15, 255.0),
    ("LlamaGen-L", "343 M", 3.80, 248.3),
    ("+ CTF", "310 M", 2.97, 291.5),
    ("LlamaGen-XL", "775 M", 3.39, 227.1),
    ("+ CTF", "734 M", 2.76, 299.7),
)
# How much lower FID is with CTF than without, in the paper: 19 to 24 %.
PAPER_MARGINS = [
    1 - ctf[2] / base[2] for base, ctf in zip(PAPER_TABLE1[::2], PAPER_TABLE1[1::2], strict=True)
]


def findings(space: Workspace) -> list[Row]:
    """Return each claim of the paper, what was found here, and whether it holds."""
    plan = space.plan
    return [
        *(_is_better(space, name, lower=True) for name in score_names(plan, "FID")),
        *(_is_better(space, name, lower=False) for name in score_names(plan, "IS")),
        *(_margin_grows(space, name) for name in score_names(plan, "FID")),
        _is_ahead_early(space),
        _is_as_fast(space),
        *(_is_ahead(space, claim) for claim in experiments.claims(plan)),
    ]


def _is_better(space: Workspace, name: str, *, lower: bool) -> Row:
    codes = space.plan.largest
    claim = f"{name} is {'lower' if lower else 'higher'} with CTF, V = {codes}"
    if lower:
        claim += f"; in the paper by {min(PAPER_MARGINS):.0%} to {max(PAPER_MARGINS):.0%}"
    pairs = table1_pairs(space, codes)
    if not pairs:
        return claim, MISSING, ""
    changes = [-margin for margin in margins(space, codes, name)]
    seeds = f"{len(pairs)} of {len(experiments.table1(space.plan, codes))} seeds"
    here = f"{', '.join(f'{change:+.1%}' for change in changes)} ({seeds})"
    if not all(order(ctf, base, name) > 0 for base, ctf in pairs):
        return claim, here, "no: the intervals of a pair overlap, or the baseline is better"
    if lower and statistics.mean(changes) > -min(PAPER_MARGINS):
        return claim, here, "yes, but by less than in the paper"
    return claim, here, "yes"


def _margin_grows(space: Workspace, name: str) -> Row:
    claim = f"the larger the codebook, the more CTF lowers {name}"
    each = {codes: margins(space, codes, name) for codes in space.plan.codebooks}
    if len(each) < 2 or not all(each.values()):
        return claim, MISSING, ""
    means = {codes: statistics.mean(values) for codes, values in each.items()}
    here = ", ".join(f"V = {codes}: {-mean:+.1%}" for codes, mean in means.items())
    return claim, here, "yes" if [*means.values()] == sorted(means.values()) else "no"


def _is_ahead_early(space: Workspace) -> Row:
    claim = "CTF is ahead at every length of training (Fig. 2)"
    pairs = [scored_pair(space, each) for each in experiments.figure2(space.plan)]
    fid = score_names(space.plan, "FID")[0]
    ahead = [pair[1].value(fid) < pair[0].value(fid) for pair in pairs if pair is not None]
    if len(ahead) < len(pairs):
        return claim, MISSING, ""
    return claim, f"at {sum(ahead)} of {len(ahead)}, by {fid}", "yes" if all(ahead) else "no"


def _is_as_fast(space: Workspace) -> Row:
    claim = "sampling is no slower, though there is one more stage"
    outcome = space.outcome(experiments.table2(space.plan))
    if outcome is None:
        return claim, MISSING, ""
    ratios = {batch: statistics.median(each) for batch, each in speed_ups(outcome).items()}
    here = ", ".join(f"batch {batch}: {ratio:.2f} times as fast" for batch, ratio in ratios.items())
    return claim, here, "yes" if min(ratios.values()) >= 1 else "no"


def _is_ahead(space: Workspace, claim: Claim) -> Row:
    better, worse = scored(space, claim.better.cell), scored(space, claim.worse.cell)
    if better is None or worse is None:
        return claim.text, MISSING, ""
    name = score_names(space.plan, claim.score)[0]
    here = f"{name} {better.value(name):.4g}, {worse.value(name):.4g} with {claim.worse.label}"
    holds = {1: "yes", 0: OVERLAP, -1: "no: the opposite"}
    return claim.text, here, holds[order(better, worse, name)]
