"""The report in five lines: what holds, what doesn't, and what follows for those who choose."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from ctf.reproduce import additions, experiments
from ctf.reproduce.cells import Outcome, Workspace
from ctf.reproduce.sampling_cells import ScoreCell
from ctf.reproduce.scored import (
    Scored,
    compare,
    margins,
    order,
    recovered,
    score_names,
    scored,
    scored_pair,
    speed_ups,
    table1_pairs,
)


def conclusions(space: Workspace) -> list[str]:
    """Return five lines; one whose cells are missing says which experiment computes them."""
    return [
        _plain_or_ctf(space),
        _codebooks(space),
        _training(space),
        _fine_stage(space),
        _choice(space),
    ]


def _missing(experiment: str) -> str:
    return f"not computed yet (`{experiment}`)."


def _lower(margin: float) -> str:
    return f"{abs(margin):.0%} {'lower' if margin > 0 else 'higher'}"


def _plain_or_ctf(space: Workspace) -> str:
    codes, start = space.plan.largest, "**CTF against a plain model:** "
    pairs = table1_pairs(space, codes)
    if not pairs:
        return start + _missing("table1")
    names = score_names(space.plan, "FID")
    means = [f"{name} {_lower(statistics.mean(margins(space, codes, name)))}" for name in names]
    orders = [order(ctf, base, name) for base, ctf in pairs for name in names]
    seeds = f"{len(pairs)} seed{'s' * (len(pairs) > 1)}"
    if min(orders) > 0:
        verdict = "It is better outside the intervals, by each network and for each seed."
    elif max(orders) > 0:
        verdict = "It is not better outside the intervals by each network and for each seed."
    else:
        verdict = "It is not better."
    return f"{start}at V = {codes}, CTF has {' and '.join(means)} (mean of {seeds}). {verdict}"


def _codebooks(space: Workspace) -> str:
    plan, start = space.plan, "**Size of the codebook:** "
    name = score_names(plan, "FID")[0]
    each = {codes: margins(space, codes, name) for codes in plan.codebooks}
    if len(each) < 2 or not all(each.values()):
        return start + _missing("table1")
    means = {codes: statistics.mean(values) for codes, values in each.items()}
    listed = ", ".join(f"{_lower(mean)} with {codes} codes" for codes, mean in means.items())
    grows = [*means.values()] == sorted(means.values())
    verdict = "The gain grows with the codebook." if grows else "The gain doesn't simply grow."
    return f"{start}{name} of CTF is {listed}. {verdict}"


def _training(space: Workspace) -> str:
    plan, start = space.plan, "**Length of training:** "
    name = score_names(plan, "FID")[0]
    pairs = {each.steps: scored_pair(space, each) for each in experiments.figure2(plan)}
    known = {steps: pair for steps, pair in pairs.items() if pair is not None}
    if len(known) < len(pairs):
        return start + _missing("figure2")
    leads = {steps: 1 - ctf.value(name) / base.value(name) for steps, (base, ctf) in known.items()}
    listed = ", ".join(f"{_lower(lead)} after {steps} steps" for steps, lead in leads.items())
    first, *_, last = leads.values()
    ahead = "is ahead at every length" if min(leads.values()) > 0 else "is not always ahead"
    trend = "shrinks" if last < first else "does not shrink"
    return f"{start}{name} of CTF is {listed}: it {ahead}, and the lead {trend}."


def _fine_stage(space: Workspace) -> str:
    parts = _alone(space) or [f"with true labels {_missing('fine')}"]
    return " ".join(["**The fine stage:**", *parts, *_in_the_whole(space)])


def _alone(space: Workspace) -> list[str]:
    """How much the best fine model recovers with true labels, of all K."""
    name = score_names(space.plan, "FID")[0]
    found = []
    for count, cells in additions.fine_stage(space.plan).items():
        outcomes = {label: space.outcome(cell) for label, cell in cells.items()}
        true, random = outcomes[additions.TRUE], outcomes[additions.RANDOM]
        for label, cell in cells.items():
            chosen = outcomes[label]
            if true is None or random is None or chosen is None or cell.fine is None:
                continue
            if (part := recovered(true, random, chosen, name)) is not None:
                found.append((part.value, part, f"K = {count}, {label}"))
    if not found:
        return []
    _, best, label = max(found, key=lambda each: each[0])
    half = "at least half" if best.low >= 0.5 else "not surely half"
    return [
        f"with true labels, the best one ({label}) recovers {best.value:.0%} "
        f"({best.low:.0%} to {best.high:.0%}) of what random members lose by {name}, {half}."
    ]


def _in_the_whole(space: Workspace) -> list[str]:
    """CTF against itself with random members, with knowledge of the codebook if computed."""
    name = score_names(space.plan, "FID")[0]
    _, ctf, member = additions.geometry(space.plan).values()
    for index in (1, 0):
        one, other = scored(space, ctf[index]), scored(space, member[index])
        if one is not None and other is not None:
            change = compare(one, other, name)
            return [f"In the whole, {name} with it is {change}, compared with random members."]
    return []


def _choice(space: Workspace) -> str:
    """What to choose: the best plain model against the best CTF, whatever helps either."""
    plan, start = space.plan, "**To choose:** "
    name = score_names(plan, "FID")[0]
    (base, knowing), (ctf, ctf_knowing), _ = additions.geometry(plan).values()
    grouped = next(
        row.cell for row in experiments.table3(plan)["beyond the paper"] if "of IAR" in row.label
    )
    plain_models = {
        "the baseline": base,
        "the baseline with IAR's cluster loss": grouped,
        "the baseline that knows the codebook": knowing,
    }
    ctf_models = {"CTF": ctf, "CTF that knows the codebook": ctf_knowing}
    plain, best = _best(space, plain_models, name), _best(space, ctf_models, name)
    if plain is None or best is None:
        return start + _missing("table1")
    (plain_label, plain_score), (label, score) = plain, best
    names = score_names(plan, "FID")
    better = {each: order(score, plain_score, each) for each in names}
    better["class accuracy"] = _recognised(score, plain_score)
    cells = {**plain_models, **ctf_models}.items()
    without = [label for label, cell in cells if scored(space, cell) is None]
    return (
        f"{start}trained on the same images, the best plain model here ({plain_label}) has "
        f"{_scores(plain_score, names)}, the best CTF ({label}) {_scores(score, names)}: "
        f"{_advice(better)}."
        f"{_speed(space)}" + (f" Not compared yet: {', '.join(without)}." if without else "")
    )


def _advice(better: Mapping[str, int]) -> str:
    """What to take: by each score, 1 where CTF is better, -1 where it is worse, 0 if not sure."""
    ctf, plain = ([score for score, sign in better.items() if sign == s] for s in (1, -1))
    if ctf and plain:
        return f"CTF is better by {' and '.join(ctf)}, the plain model by {' and '.join(plain)}"
    if ctf or plain:
        return "take CTF" if ctf else "take the plain model"
    return "neither is better, and the plain model is simpler"


def _best(space: Workspace, cells: Mapping[str, ScoreCell], name: str) -> tuple[str, Scored] | None:
    """The label and score of lowest FID; None if the first isn't computed yet."""
    known = {label: score for label, cell in cells.items() if (score := scored(space, cell))}
    if next(iter(cells)) not in known:
        return None
    best = min(known, key=lambda label: known[label].value(name))
    return best, known[best]


def _recognised(one: Scored, other: Scored) -> int:
    """1 where more samples of the first are recognised, -1 where fewer, 0 if it isn't sure."""
    accuracy, reference = one.outcome["accuracy"], other.outcome["accuracy"]
    if accuracy is None or reference is None:
        return 0
    return int(accuracy["low"] > reference["high"]) - int(accuracy["high"] < reference["low"])


def _scores(score: Scored, names: Sequence[str]) -> str:
    accuracy: Outcome | None = score.outcome["accuracy"]
    known = [f"{name} {score.value(name):.4g}" for name in names]
    known += [] if accuracy is None else [f"class accuracy {accuracy['value']:.1%}"]
    return " and ".join(known)


def _speed(space: Workspace) -> str:
    outcome = space.outcome(experiments.table2(space.plan))
    if outcome is None:
        return ""
    ratios = {batch: statistics.median(each) for batch, each in speed_ups(outcome).items()}
    listed = " and ".join(f"{ratio:.2f} (batch {batch})" for batch, ratio in ratios.items())
    return f" CTF samples {listed} times as fast as the plain baseline."
