"""Scores of systems, read from stored results, with what the models of a system cost; as rows."""

from __future__ import annotations

import dataclasses

import numpy as np

from ctf.evaluation.intervals import Estimate, estimate
from ctf.reproduce.cells import Outcome, Workspace
from ctf.reproduce.experiments import table1
from ctf.reproduce.plan import Plan
from ctf.reproduce.sampling_cells import ScoreCell
from ctf.reproduce.systems import UNIFORM, Pair

MISSING = "not computed yet"


def score_names(plan: Plan, *scores: str) -> list[str]:
    """Return these scores by each feature network, e.g. FID-Lite0; searches use the first."""
    networks = [*plan.features, *([] if plan.classifier is None else ["classifier"])]
    suffixes = ["-Lite0" if network == "lite0" else f"-{network}" for network in networks]
    return [f"{score}{suffix}" for suffix in suffixes for score in scores]


@dataclasses.dataclass(frozen=True)
class Scored:
    """A score with what its models cost.

    Attributes:
        loss: Cross-entropy of held-out codes, in nats a token: of the coarse model and of the fine
            model together. None where random members take the place of the fine model.
    """

    outcome: Outcome
    parameters: int
    flops: int
    seconds: float
    loss: float | None

    def value(self, name: str) -> float:
        """A score by its name, e.g. FID-Lite0."""
        return float(self.outcome["scores"][name]["value"])

    def interval(self, name: str) -> tuple[float, float]:
        """The 95 % interval of a score."""
        score = self.outcome["scores"][name]
        return float(score["low"]), float(score["high"])


def scored(space: Workspace, cell: ScoreCell) -> Scored | None:
    """Return a score; None where it or one of its models is not computed yet."""
    outcome = space.outcome(cell)
    if outcome is None:
        return None
    # Where all members are equally likely, the fine model does nothing.
    uniform = outcome["settings"].get("fine_temperature", 1.0) >= UNIFORM
    models = [cell.coarse] if cell.fine is None or uniform else [cell.coarse, cell.fine]
    costs = [space.outcome(model) for model in models]
    # The model that another was started from cost its training, and is not part of the sampler.
    start = cell.coarse.warm_start
    started = [*costs, space.outcome(start)] if start is not None else costs
    if None in started:
        return None
    known = [cost for cost in started if cost is not None]
    return Scored(
        outcome,
        sum(cost["parameters"] for cost in known[: len(models)]),
        sum(cost["flops"] for cost in known),
        sum(cost["seconds_of_training"] for cost in known),
        None if uniform else sum(cost["loss"] for cost in known[: len(models)]),
    )


def scored_pair(space: Workspace, pair: Pair) -> tuple[Scored, Scored] | None:
    """Return the scores of baseline and CTF; None where one is missing."""
    base, ctf = scored(space, pair.baseline), scored(space, pair.ctf)
    return None if base is None or ctf is None else (base, ctf)


def table1_pairs(space: Workspace, codes: int) -> list[tuple[Scored, Scored]]:
    """Return the scores of baseline and CTF for V codes, for each seed that is computed."""
    pairs = [scored_pair(space, each) for each in table1(space.plan, codes)]
    return [pair for pair in pairs if pair is not None]


def margins(space: Workspace, codes: int, name: str) -> list[float]:
    """Return how much lower CTF's score is than the baseline's, 0 to 1, for each seed."""
    return [1 - ctf.value(name) / base.value(name) for base, ctf in table1_pairs(space, codes)]


def order(one: Scored, other: Scored, name: str) -> int:
    """1 where the first is better beyond both intervals, -1 where it is worse, else 0."""
    (low, high), (other_low, other_high) = one.interval(name), other.interval(name)
    higher = (low > other_high) - (high < other_low)
    return higher if name.startswith("IS") else -higher


def recovered(true: Outcome, random: Outcome, chosen: Outcome, name: str) -> Estimate | None:
    """Return which part of what random members lose is recovered by chosen ones: 1 is all of it.

    None where random members lose nothing. The interval is of the same groups of images in all.
    """
    lost = random[name]["value"] - true[name]["value"]
    if lost <= 0:
        return None
    true_G, random_G, chosen_G = (
        np.array(outcome[name]["without_group"]) for outcome in (true, random, chosen)
    )
    value = (random[name]["value"] - chosen[name]["value"]) / lost
    without_G = (random_G - chosen_G) / (random_G - true_G)
    return estimate(value, without_G, chosen[name]["count"])


def speed_ups(
    outcome: Outcome, faster: str = "CTF", than: str = "baseline"
) -> dict[str, list[float]]:
    """Return how many times as fast as another sampler one was in each round, by batch."""
    base, other = outcome["seconds"][than], outcome["seconds"][faster]
    return {b: [x / y for x, y in zip(base[b], other[b], strict=True)] for b in other}


# --- Rows of the report's tables ------------------------------------------------------------------


def columns(plan: Plan) -> list[str]:
    """Return the names of the columns of a score."""
    return [*score_names(plan, "FID", "IS"), "class accuracy", "parameters", "GFLOP", "seconds"]


def row(space: Workspace, cell: ScoreCell) -> list[str]:
    """Return the columns of a score."""
    if (score := scored(space, cell)) is None:
        return missing(len(columns(space.plan)))
    accuracy = score.outcome["accuracy"]
    return [
        *(
            "{value:.4g} ({low:.4g} to {high:.4g})".format(**score.outcome["scores"][name])
            for name in score_names(space.plan, "FID", "IS")
        ),
        "" if accuracy is None else f"{accuracy['value']:.1%}",
        f"{score.parameters / 1e6:.2f} M",
        f"{score.flops / 1e9:.0f}",
        f"{score.seconds:.0f}",
    ]


def missing(count: int) -> list[str]:
    """Return that many columns of a cell that isn't computed yet."""
    return [MISSING, *[""] * (count - 1)]


def compare(one: Scored, other: Scored, name: str) -> str:
    """Return how much lower or higher the first score is, and whether beyond both intervals."""
    change = one.value(name) / other.value(name) - 1
    beyond = "" if order(one, other, name) else ", within the intervals"
    return f"{abs(change):.1%} {'higher' if change > 0 else 'lower'}{beyond}"
