"""The report of all cells: RESULTS/report.md, its plots, and the claims beside what came out.

Nothing in it is written by hand: what is not computed yet is said to be missing.
"""

from __future__ import annotations

import dataclasses
import shutil
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ctf.common import storage
from ctf.models.sampling import in_words
from ctf.reproduce import figure1, figure2, table1, table2, table3
from ctf.reproduce import plan as planned
from ctf.reproduce.cells import Cell, Desk
from ctf.reproduce.plan import Plan

MISSING = "not computed yet"
OVERLAP = "no: the intervals overlap"
GOAL = 0.2  # how much lower FID is to be, as in the paper

# The paper's tables (arXiv 2503.16194), ImageNet at 256 pixels; FID / IS.
PAPER_TABLE1 = (
    ("LlamaGen-B", "111 M", "5.46 / 193.6"),
    ("+ CTF", "87 M", "4.15 / 255.0"),
    ("LlamaGen-L", "343 M", "3.80 / 248.3"),
    ("+ CTF", "310 M", "2.97 / 291.5"),
    ("LlamaGen-XL", "775 M", "3.39 / 227.1"),
    ("+ CTF", "734 M", "2.76 / 299.7"),
)
PAPER_TABLE2 = "B 13.75 to 12.83, L 7.50 to 8.71, XL 5.32 to 6.26 images a second (A100, batch 64)"
PAPER_FIGURE1 = (
    "within clusters a picture keeps its structure and content; in random ones it falls apart"
)
PAPER_FIGURE2 = "CTF is ahead at every epoch, by FID and IS"
PAPER_TABLE3 = {
    "a: number of clusters K": "128: 11.23 / 98.4; 512: 5.51 / 273.5; 1024: 5.38 / 269.1",
    "b: size of the fine model": "111 M: 5.51 / 273.5; 343 M: 5.33 / 285.2; 775 M: 5.27 / 289.1",
    "c: guidance scale": "1.75: 4.24 / 247.0; 2.0: 5.33 / 285.2; 2.25: 6.71 / 313.1",
    "d: top-k of the fine model": "1: 6.95 / 210.2; 32: 5.35 / 286.7; all: 5.33 / 285.2",
    "e: temperature, coarse": "0.9: 7.30 / 292.7; 1.0: 5.33 / 285.2; 1.1: 4.16 / 259.5",
    "f: temperature, fine": "0.9: 5.55 / 288.0; 1.0: 4.16 / 259.5; 1.1: 4.15 / 255.0",
    "control": "a random clustering makes the method fail",
}


@dataclasses.dataclass(frozen=True)
class Row:
    """A score with what its models cost."""

    found: dict[str, Any]
    parameters: int
    flops: int
    seconds: float

    def value(self, name: str) -> float:
        return float(self.found["scores"][name]["value"])

    def interval(self, name: str) -> tuple[float, float]:
        score = self.found["scores"][name]
        return float(score["low"]), float(score["high"])


def row(desk: Desk, cells: Sequence[Cell]) -> Row | None:
    """That of the last cell, a score; None where it or one before it is not computed yet."""
    job: Any = cells[-1].job
    found = desk.result(cells[-1].name)
    if found is None:
        return None
    names = [job.coarse, job.fine]
    if found["found"]["settings"].get("fine_temperature", 1.0) >= table3.UNIFORM:
        names.remove(job.fine)  # members are equally likely: its model is for nothing
    of: Any = {cell.name: cell.job for cell in cells}
    start = of[job.coarse].warm_start
    results = {name: desk.result(name) for name in (*names, start) if name is not None}
    parts: dict[str, dict[str, Any]] = {
        name: result["found"] for name, result in results.items() if result is not None
    }
    if len(parts) < len(results):
        return None
    return Row(
        found["found"],
        # What a model was started from has cost its training, and is not a part of it.
        parameters=sum(part["parameters"] for name, part in parts.items() if name != start),
        flops=sum(part["flops"] for part in parts.values()),
        seconds=sum(part["seconds_of_training"] for part in parts.values()),
    )


def write(desk: Desk, plan: Plan) -> None:
    """Writes RESULTS/report.md and its plots of all cells that are there."""
    desk.results.mkdir(parents=True, exist_ok=True)
    done = sum(desk.result(name) is not None for name in desk.cells)
    seconds = [(desk.result(name) or {}).get("seconds", 0.0) for name in desk.cells]
    wheres = {
        ", ".join(f"{key} {value}" for key, value in result["where"].items())
        for name in desk.cells
        if (result := desk.result(name)) is not None
    }
    budget = "".join(
        f" --budget {name}" for name, known in planned.BUDGETS.items() if known == plan
    )
    lines = [
        "# The paper in miniature",
        "",
        f"Made by `ctf reproduce all{budget}`; do not edit. {done} of {len(desk.cells)} cells are "
        f"computed, together in {sum(seconds) / 3600:.1f} hours of one thread, the longest in "
        f"{max(seconds) / 60:.0f} minutes. The raw numbers of each are in cells/; `--only CELL`, "
        "with another --out and --results, makes one again.",
        "",
        f"Pictures: {plan.source} at {plan.image_size} pixels; of the training split "
        f"{plan.kept_back:,} are kept from all trainings, for the searches. Each score is of "
        f"{plan.samples:,} samples against the held-out pictures. In brackets: 95 % intervals of "
        "the sampling, not of the training. FID-Lite0 and IS-Lite0 are by EfficientNet-Lite0, "
        "FID-fashion and IS-fashion by the shipped classifier; neither is the FID of the paper. "
        "The tokenizers were trained with a perceptual loss by that same EfficientNet-Lite0, which "
        "flatters all FID-Lite0 here alike. Each model has seen "
        f"{plan.training.steps * plan.training.batch_size:,} pictures at the most: its training "
        "is far from where it would end, and which model learns faster counts for much. "
        "GFLOP and seconds are those of training, without the tokenizer.",
        "",
        *[f"Machine: {where}." for where in sorted(wheres)],
        "",
        *_claims(desk, plan),
        *_tokenizers(desk, plan),
        *_table1(desk, plan),
        *_table2(desk, plan),
        *_table3(desk, plan),
        *_figure1(desk, plan),
        *_figure2(desk, plan),
    ]
    with storage.atomic(desk.results / "report.md") as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")


# --- Parts ----------------------------------------------------------------------------------------

SUFFIXES = {"lite0": "-Lite0", "fashion": "-fashion"}  # of the scores by each network


def _names(plan: Plan, *scores: str) -> list[str]:
    """These scores by each network of the plan, e.g. FID-Lite0; the first is what was tuned by."""
    return [f"{score}{SUFFIXES[network]}" for network in plan.features for score in scores]


def _fid(plan: Plan) -> str:
    """What the settings were tuned by."""
    return _names(plan, "FID")[0]


def _table(header: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    return [
        f"| {' | '.join(header)} |",
        "|---" * len(header) + "|",
        *(f"| {' | '.join(cells)} |" for cells in body),
        "",
    ]


def _scores(plan: Plan, found: Row | None) -> list[str]:
    names = _names(plan, "FID", "IS")
    if found is None:
        return [MISSING, *[""] * (len(names) + 3)]
    cells = []
    for name in names:
        score = found.found["scores"][name]
        cells.append(f"{score['value']:.4g} ({score['low']:.4g} to {score['high']:.4g})")
    accuracy = found.found["accuracy"]
    cells.append("" if accuracy is None else f"{accuracy['value']:.1%}")
    cells.append(f"{found.parameters / 1e6:.2f} M")
    cells.append(f"{found.flops / 1e9:.0f}")
    cells.append(f"{found.seconds:.0f}")
    return cells


def _header(plan: Plan) -> list[str]:
    """Of what `_scores` gives."""
    return [*_names(plan, "FID", "IS"), "class accuracy", "parameters", "GFLOP", "seconds"]


def _tokenizers(desk: Desk, plan: Plan) -> list[str]:
    body = []
    for codes in plan.codebooks:
        result = desk.result(planned.tokenizer(plan, codes).name)
        if result is None:
            body.append([str(codes), MISSING, *[""] * (len(plan.features) + 3)])
            continue
        found = result["found"]
        distances = [f"{found[name]['value']:.4g}" for name in _names(plan, "rFID")]
        body.append(
            [
                str(codes), f"{found['psnr']:.2f} dB", f"{found['ssim']:.3f}",
                f"{found['usage']:.1%}", *distances, f"{found['seconds_of_training']:.0f}",
            ]
        )  # fmt: skip
    header = ("V", "PSNR", "SSIM", "codes used", *_names(plan, "rFID"), "seconds")
    return [
        "## Tokenizers",
        "",
        "Trained alike; on the held-out pictures.",
        "",
        *_table(header, body),
    ]


def _table1(desk: Desk, plan: Plan) -> list[str]:
    body = []
    for codes in plan.codebooks:
        for seed in table1.seeds(plan, codes):
            for ctf in (False, True):
                found = row(desk, table1.row(plan, codes, seed, ctf=ctf))
                name = f"CTF, K = {plan.count(codes)}" if ctf else "baseline"
                body.append([str(codes), str(seed), name, *_scores(plan, found)])
    lines = [
        "## Table 1: the baseline against CTF",
        "",
        "Same tokenizer, same optimiser, same pictures seen by each model; the baseline has at "
        "least as many parameters as both models of CTF together. Guidance and temperatures are "
        "by the same search with the same number of points for both, on other seeds and against "
        "the pictures that were kept back.",
        "",
        *_table(("V", "seed", "model", *_header(plan)), body),
    ]
    for codes in plan.codebooks:
        settings = [
            desk.result(planned.search(plan, codes, ctf=ctf)[-1].name) for ctf in (False, True)
        ]
        if None not in settings:
            said = "; ".join(
                f"{name} {in_words(result['found']['best'])}"
                for name, result in zip(("baseline", "CTF"), settings, strict=True)
                if result is not None
            )
            lines += [f"Found by the search at V = {codes}: {said}.", ""]
    paper = _table(("the paper's, ImageNet 256", "parameters", "FID / IS"), PAPER_TABLE1)
    return [*lines, *paper, *_gap_plot(desk, plan)]


def _margins(desk: Desk, plan: Plan, codes: int, name: str) -> list[float]:
    """Of each seed that is computed: how much lower CTF's score is than the baseline's, 0 to 1."""
    found = []
    for seed in table1.seeds(plan, codes):
        base, ctf = (row(desk, table1.row(plan, codes, seed, ctf=ctf)) for ctf in (False, True))
        if base is not None and ctf is not None:
            found.append(1 - ctf.value(name) / base.value(name))
    return found


def _gap_plot(desk: Desk, plan: Plan) -> list[str]:
    known = [codes for codes in plan.codebooks if _margins(desk, plan, codes, _fid(plan))]
    if not known:
        return []
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5, 3.5), layout="constrained")
    axes = figure.subplots()
    for name in _names(plan, "FID"):
        margins = [_margins(desk, plan, codes, name) for codes in known]
        if all(margins):
            means = [100 * statistics.mean(values) for values in margins]
            (line,) = axes.plot(known, means, marker="o", label=name)
            for codes, values in zip(known, margins, strict=True):
                points = [100 * value for value in values]
                axes.plot([codes] * len(points), points, ".", color=line.get_color(), alpha=0.5)
    axes.axhline(0, color="grey", lw=0.8)
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(plan.codebooks), [str(codes) for codes in plan.codebooks])
    axes.set_xlabel("codes in the codebook, V")
    axes.set_ylabel("CTF's FID is lower by, %")
    axes.legend()
    _save(figure, desk.results / "table1.png")
    return ["![How much lower CTF's FID is, by the size of the codebook](table1.png)", ""]


def _table2(desk: Desk, plan: Plan) -> list[str]:
    lines = ["## Table 2: the speed of sampling", ""]
    result = desk.result(table2.cells(plan)[-1].name)
    if result is None:
        return [*lines, MISSING, ""]
    seconds = result["found"]["seconds"]
    body = []
    for batch, ratios in _speedups(result).items():
        each = [
            _spread([int(batch) / taken for taken in seconds[name][batch]])
            for name in ("baseline", "CTF")
        ]
        body.append([batch, *each, _spread(ratios)])
    return [
        *lines,
        "Images a second, from classes to pictures, each with its tuned guidance. Medians, in "
        f"brackets the least and the most of {result['asked']['rounds']} rounds in turn; the last "
        "column is of each round's own ratio.",
        "",
        *_table(("batch", "baseline", "CTF", "how many times as fast"), body),
        f"The paper: {PAPER_TABLE2}.",
        "",
    ]


def _speedups(result: dict[str, Any]) -> dict[str, list[float]]:
    """For each batch, how many times as fast as the baseline CTF was in each round."""
    seconds = result["found"]["seconds"]
    return {
        batch: [a / b for a, b in zip(seconds["baseline"][batch], times, strict=True)]
        for batch, times in seconds["CTF"].items()
    }


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def _table3(desk: Desk, plan: Plan) -> list[str]:
    lines = [
        "## Table 3: one choice at a time",
        "",
        f"V = {plan.largest}. Everything else as the CTF of Table 1, with its tuned settings; "
        "those were not searched again for each line.",
        "",
    ]
    parts: dict[str, list[list[str]]] = {}
    for line in table3.lines(plan):
        found, choice = row(desk, line.cells), line.choice
        if found is not None and line.setting is not None:
            choice = f"{found.found['settings'][line.setting]:g}, {choice}"
        parts.setdefault(line.part, []).append([choice, *_scores(plan, found)])
    for part, body in parts.items():
        lines += [f"### {part}", "", *_table(("choice", *_header(plan)), body)]
        if part in PAPER_TABLE3:
            lines += [f"The paper (FID / IS): {PAPER_TABLE3[part]}.", ""]
    return lines


def _figure1(desk: Desk, plan: Plan) -> list[str]:
    body = []
    shown: dict[str, Cell] = {}
    for cell in figure1.cells(plan):
        if cell.name.startswith("clusters"):
            shown[cell.name] = cell
    for name in shown:
        result = desk.result(name)
        if result is None:
            body.append([name, MISSING, "", ""])
            continue
        found = result["found"]
        swaps = found["swap_psnr"]
        sizes = "{min} / {median:g} / {max}".format(**found["sizes"])
        body.append([name, sizes, *(f"{swaps[way]:.1f} dB" for way in ("clusters", "random"))])
    header = ("clusters", "sizes: least / median / most", "swapped within", "in random clusters")
    lines = [
        "## Figure 1: codes of a cluster draw nearly the same",
        "",
        "PSNR of held-out pictures whose codes were all swapped for random members of their "
        "clusters, against the pictures of the true codes.",
        "",
        *_table(header, body),
        f"The paper: {PAPER_FIGURE1}.",
        "",
    ]
    name = planned.clusters(plan, plan.largest, plan.count(plan.largest))[-1].name
    picture = desk.work / name / "run" / "clusters" / "swaps.png"
    if picture.is_file():
        with storage.atomic(desk.results / "figure1.png") as temporary:
            shutil.copyfile(picture, temporary)
    if (desk.results / "figure1.png").is_file():
        lines += ["![Pictures whose codes were swapped](figure1.png)", ""]
    names = _names(plan, "FID")
    body = []
    for way, cell in figure1.details(plan).items():
        result = desk.result(cell.name)
        if result is None:
            body.append([way, MISSING, *[""] * (len(names) - 1)])
        else:
            body.append([way, *(f"{result['found'][name]['value']:.4g}" for name in names)])
    return [
        *lines,
        "The fine stage alone: held-out pictures, codes drawn anew from their true labels.",
        "",
        *_table(("codes", *names), body),
    ]


def _figure2(desk: Desk, plan: Plan) -> list[str]:
    lines = [
        "## Figure 2: quality over training",
        "",
        "Each point is a training of its own length, at the settings that were tuned at the full "
        "length.",
        "",
    ]
    points: dict[bool, list[tuple[int, Row]]] = {False: [], True: []}
    body = []
    for share in (*plan.lengths, 1.0):
        steps = round(share * plan.training.steps)
        for ctf in (False, True):
            found = row(desk, figure2.point(plan, share, ctf=ctf))
            if found is not None:
                points[ctf].append((steps, found))
            body.append([str(steps), "CTF" if ctf else "baseline", *_scores(plan, found)])
    lines += [
        *_table(("steps", "model", *_header(plan)), body),
        f"The paper: {PAPER_FIGURE2}.",
        "",
    ]
    if not (points[False] and points[True]):
        return lines
    from matplotlib.figure import Figure

    names = _names(plan, "FID")
    figure = Figure(figsize=(4.5 * len(names), 3.5), layout="constrained")
    panels = figure.subplots(1, len(names), squeeze=False)[0]
    for axes, name in zip(panels, names, strict=True):
        for ctf, label in ((False, "baseline"), (True, "CTF")):
            axes.plot(
                [found.flops / 1e12 for _, found in points[ctf]],
                [found.value(name) for _, found in points[ctf]],
                marker="o",
                label=label,
            )
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("TFLOP of training, by calculation")
        axes.set_ylabel(f"{name}, lower is better")
        axes.legend()
    _save(figure, desk.results / "figure2.png")
    return [*lines, "![FID over the FLOPs of training](figure2.png)", ""]


def _save(figure: Any, path: Path) -> None:
    with storage.atomic(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


# --- What holds -----------------------------------------------------------------------------------


def _claims(desk: Desk, plan: Plan) -> list[str]:
    """Each claim of the paper, what was found here, and whether it holds."""
    body = [
        *(_better(desk, plan, name, lower=True) for name in _names(plan, "FID")),
        *(_better(desk, plan, name, lower=False) for name in _names(plan, "IS")),
        *(_grows(desk, plan, name) for name in _names(plan, "FID")),
        _sooner(desk, plan),
        _as_fast(desk, plan),
        *_between_lines(desk, plan),
    ]
    return [
        "## What holds here",
        "",
        *_table(("claim", "here", "holds"), [list(line) for line in body]),
    ]


def _better(desk: Desk, plan: Plan, name: str, *, lower: bool) -> tuple[str, str, str]:
    codes = plan.largest
    claim = f"{name} is {'lower' if lower else 'higher'} with CTF, V = {codes}"
    if lower:
        claim += f"; the goal is by {GOAL:.0%}"
    apart, changes = [], []
    for seed in table1.seeds(plan, codes):
        base, ctf = (row(desk, table1.row(plan, codes, seed, ctf=ctf)) for ctf in (False, True))
        if base is None or ctf is None:
            continue
        changes.append(ctf.value(name) / base.value(name) - 1)
        (low, high), (base_low, base_high) = ctf.interval(name), base.interval(name)
        apart.append(high < base_low if lower else low > base_high)
    if not changes:
        return claim, MISSING, ""
    seeds = f"{len(changes)} of {len(table1.seeds(plan, codes))} seeds"
    here = f"{', '.join(f'{change:+.1%}' for change in changes)} ({seeds})"
    if not all(apart):
        return claim, here, "no: the intervals of a pair overlap, or it is the other way"
    if lower and statistics.mean(changes) > -GOAL:
        return claim, here, "yes, but by less than the goal"
    return claim, here, "yes"


def _grows(desk: Desk, plan: Plan, name: str) -> tuple[str, str, str]:
    claim = f"{name} is the lower with CTF, the larger the codebook"
    margins = [_margins(desk, plan, codes, name) for codes in plan.codebooks]
    if len(margins) < 2 or not all(margins):
        return claim, MISSING, ""
    means = [statistics.mean(values) for values in margins]
    here = ", ".join(
        f"V = {codes}: {-mean:+.1%}" for codes, mean in zip(plan.codebooks, means, strict=True)
    )
    return claim, here, "yes" if means == sorted(means) else "no"


def _sooner(desk: Desk, plan: Plan) -> tuple[str, str, str]:
    claim = "CTF is ahead at every length of training (Fig. 2)"
    ahead = []
    for share in (*plan.lengths, 1.0):
        base, ctf = (row(desk, figure2.point(plan, share, ctf=ctf)) for ctf in (False, True))
        if base is None or ctf is None:
            return claim, MISSING, ""
        ahead.append(ctf.value(_fid(plan)) < base.value(_fid(plan)))
    return claim, f"at {sum(ahead)} of {len(ahead)}, by {_fid(plan)}", "yes" if all(ahead) else "no"


def _as_fast(desk: Desk, plan: Plan) -> tuple[str, str, str]:
    claim = "sampling is no slower, though a stage was added"
    result = desk.result(table2.cells(plan)[-1].name)
    if result is None:
        return claim, MISSING, ""
    ratios = {batch: statistics.median(each) for batch, each in _speedups(result).items()}
    here = ", ".join(f"batch {batch}: {ratio:.2f} times as fast" for batch, ratio in ratios.items())
    return claim, here, "yes" if min(ratios.values()) >= 1 else "no"


def _between_lines(desk: Desk, plan: Plan) -> list[tuple[str, str, str]]:
    """Line against line of Table 3, first the one that the claim has as the better."""
    of: dict[str, list[table3.Line]] = {}
    for line in table3.lines(plan):
        of.setdefault(line.part, []).append(line)
    counts, sizes, guidances, top_ks, temperatures, _, control, beyond = of.values()
    usual = top_ks[-1]
    (member,) = (line for line in beyond if line.choice == table3.MEMBER)
    fid, inception = _names(plan, "FID", "IS")[:2]
    pairs = (
        ("more clusters than a few are better", fid, usual, counts[0]),
        ("a larger fine model is better", fid, sizes[-1], sizes[0]),
        ("guidance raises IS", inception, guidances[-2], guidances[0]),
        ("drawing details beats taking the likeliest", fid, usual, top_ks[0]),
        ("a temperature above 1 is better", fid, temperatures[-2], temperatures[0]),
        ("random clusters make it fail", fid, usual, control[0]),
        ("the fine model beats a random member", fid, usual, member),
    )
    return [_ahead(desk, *pair) for pair in pairs]


def _ahead(
    desk: Desk, claim: str, name: str, better: table3.Line, worse: table3.Line
) -> tuple[str, str, str]:
    """Whether a line is ahead of another, beyond the intervals of both."""
    found, other = row(desk, better.cells), row(desk, worse.cells)
    if found is None or other is None:
        return claim, MISSING, ""
    here = f"{name} {found.value(name):.4g}, {other.value(name):.4g} with {worse.choice}"
    (low, high), (other_low, other_high) = found.interval(name), other.interval(name)
    if name.startswith("IS"):
        ahead, behind = low > other_high, high < other_low
    else:
        ahead, behind = high < other_low, low > other_high
    return claim, here, "yes" if ahead else "no: the contrary" if behind else OVERLAP
