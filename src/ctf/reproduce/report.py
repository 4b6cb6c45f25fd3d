"""The report of all cells: RESULTS/report.md with its plots, made of stored results alone."""

from __future__ import annotations

import shutil
import statistics
from typing import TYPE_CHECKING

from ctf.bench.tables import listed, spread
from ctf.common import storage
from ctf.common.markdown import markdown_table
from ctf.models.sampling import format_settings
from ctf.reproduce import additions, additions_report, experiments, systems
from ctf.reproduce.cells import Outcome, Workspace
from ctf.reproduce.conclusions import conclusions
from ctf.reproduce.findings import PAPER_TABLE1, findings
from ctf.reproduce.plan import PLANS, Plan
from ctf.reproduce.sampling_cells import IN_PARALLEL, SpeedCell
from ctf.reproduce.scored import (
    MISSING,
    Scored,
    columns,
    margins,
    missing,
    row,
    score_names,
    scored,
    speed_ups,
    table1_pairs,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# What the paper reports (arXiv 2503.16194), on ImageNet at 256 pixels.
PAPER_TABLE2 = "B 13.75 to 12.83, L 7.50 to 8.71, XL 5.32 to 6.26 images a second (A100, batch 64)"
PAPER_FIGURE1 = (
    "within clusters an image keeps its structure and content; in random ones it falls apart"
)
PAPER_FIGURE2 = "CTF is ahead at every epoch, by FID and IS"
PAPER_TABLE3 = {  # by the part; FID / IS
    "a: number of clusters K": "128: 11.23 / 98.4; 512: 5.51 / 273.5; 1024: 5.38 / 269.1",
    "b: size of the fine model": "111 M: 5.51 / 273.5; 343 M: 5.33 / 285.2; 775 M: 5.27 / 289.1",
    "c: guidance scale": "1.75: 4.24 / 247.0; 2.0: 5.33 / 285.2; 2.25: 6.71 / 313.1",
    "d: top-k of the fine model": "1: 6.95 / 210.2; 32: 5.35 / 286.7; all: 5.33 / 285.2",
    "e: temperature, coarse": "0.9: 7.30 / 292.7; 1.0: 5.33 / 285.2; 1.1: 4.16 / 259.5",
    "f: temperature, fine": "0.9: 5.55 / 288.0; 1.0: 4.16 / 259.5; 1.1: 4.15 / 255.0",
    "control": "a random clustering makes the method fail",
}


def write(space: Workspace) -> None:
    """Write RESULTS/report.md and its plots of all results that are stored."""
    space.results.mkdir(parents=True, exist_ok=True)
    parts = [
        "# The paper's experiments in small",
        "\n".join(f"- {line}" for line in conclusions(space)),
        *_head(space),
        "## What holds here",
        markdown_table(("claim", "here", "holds"), findings(space)),
        *_tokenizers(space),
        *_table1(space),
        *_table2(space),
        *_table3(space),
        *_figure1(space),
        *_figure2(space),
        *additions_report.geometry(space),
        *additions_report.fine_stage(space),
        *additions_report.passes(space),
    ]
    storage.save_text(space.results / "report.md", "\n\n".join(parts) + "\n")


def _head(space: Workspace) -> list[str]:
    plan, cells = space.plan, experiments.select(space.plan)
    results = [result for cell in cells.values() if (result := space.result(cell)) is not None]
    seconds = [result["seconds"] for result in results] or [0.0]
    machines = {listed(result["where"]) for result in results}
    each, total = plan.training.steps * plan.training.batch_size, len(space.images.train)
    longest = max(1.0, *plan.lengths) * each
    longer = f", for Figure 2 on up to {longest:,.0f} ({longest / total:.2g} epochs)"
    return [
        f"Made by `{_command(plan)}`; do not edit. {len(results)} of {len(cells)} cells "
        f"are computed, together in {sum(seconds) / 3600:.1f} hours of one thread, the longest in "
        f"{max(seconds) / 60:.0f} minutes. The raw numbers of each are in cells/; `--only CELL`, "
        "with another --out and --results, computes one again.",
        f"Images: {plan.source} at {plan.image_size} pixels; {plan.reserved:,} of the training "
        "split are reserved for the searches, and no model is trained on them. Each score is of "
        f"{plan.samples:,} samples against the held-out images. In brackets: 95 % intervals of "
        "the sampling, not of the training. FID-Lite0 and IS-Lite0 are by EfficientNet-Lite0, "
        f"{_second_network(space)}; neither is the FID of the paper. "
        "The tokenizers were trained with a perceptual loss by that same EfficientNet-Lite0, which "
        "flatters all FID-Lite0 here alike. Each model was trained on "
        f"{each:,} images ({each / total:.2g} epochs){longer * (longest > each)}: far from "
        "convergence, where it matters much which model learns faster. GFLOP and seconds are those "
        "of training, without the tokenizer.",
        *[f"Machine: {machine}." for machine in sorted(machines)],
    ]


def _command(plan: Plan) -> str:
    for images, budgets in PLANS.items():
        for budget, known in budgets.items():
            if known == plan:
                return f"ctf reproduce all --images {images} --budget {budget}"
    return "ctf reproduce all"


def _second_network(space: Workspace) -> str:
    network = score_names(space.plan, "")[-1]
    names = f"FID{network} and IS{network}"
    cell = systems.classifier(space.plan)
    if cell is None:
        return f"{names} by the shipped classifier"
    outcome = space.outcome(cell)
    accuracy = "" if outcome is None else f" ({outcome['accuracy']:.1%} of the held-out images)"
    return f"{names} by a classifier trained on the same training images{accuracy}"


# --- Tables and figures ---------------------------------------------------------------------------


def _tokenizers(space: Workspace) -> list[str]:
    plan, rows = space.plan, []
    header = ("V", "PSNR", "SSIM", "codes used", *score_names(plan, "rFID"), "seconds")
    for codes in plan.codebooks:
        outcome = space.outcome(systems.tokenizer(plan, codes))
        if outcome is None:
            rows.append([str(codes), *missing(len(header) - 1)])
            continue
        decoded = space.outcome(additions.true_codes(plan, codes)) or {}
        known = {**{f"r{name}": score for name, score in decoded.items()}, **outcome}
        distances = [
            f"{known[name]['value']:.4g}" if name in known else MISSING
            for name in score_names(plan, "rFID")
        ]
        rows.append(
            [
                str(codes), f"{outcome['psnr']:.2f} dB", f"{outcome['ssim']:.3f}",
                f"{outcome['usage']:.1%}", *distances, f"{outcome['seconds_of_training']:.0f}",
            ]
        )  # fmt: skip
    return ["## Tokenizers", "Trained alike; on the held-out images.", markdown_table(header, rows)]


def _table1(space: Workspace) -> list[str]:
    plan, rows, searches = space.plan, [], []
    for codes in plan.codebooks:
        for pair in experiments.table1(plan, codes):
            name = f"CTF, K = {plan.clusters_of(codes)}"
            for label, cell in (("baseline", pair.baseline), (name, pair.ctf)):
                rows.append([str(codes), str(pair.seed), label, *row(space, cell)])
        settings = []
        for label in ("baseline", "CTF"):
            outcome = space.outcome(systems.search(plan, codes, ctf=label == "CTF"))
            if outcome is not None:
                settings.append(f"{label} {format_settings(outcome['best'])}")
        if len(settings) == 2:
            searches.append(f"Found by the search at V = {codes}: {'; '.join(settings)}.")
    paper = [(model, size, f"{fid:.2f} / {score}") for model, size, fid, score in PAPER_TABLE1]
    return [
        "## Table 1: the baseline against CTF",
        "Same tokenizer, same optimiser, same training images for each model; the baseline has at "
        "least as many parameters as both models of CTF together. Guidance and temperatures are "
        "from the same search with the same number of points for both, on other seeds and against "
        "the reserved images.",
        markdown_table(("V", "seed", "model", *columns(plan)), rows),
        *searches,
        markdown_table(("the paper's, ImageNet 256", "parameters", "FID / IS"), paper),
        *_plot_margins(space),
    ]


def _plot_margins(space: Workspace) -> list[str]:
    plan = space.plan
    known = [codes for codes in plan.codebooks if table1_pairs(space, codes)]
    if not known:
        return []
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5, 3.5), layout="constrained")
    axes = figure.subplots()
    for name in score_names(plan, "FID"):
        percent = [[100 * margin for margin in margins(space, codes, name)] for codes in known]
        (line,) = axes.plot(known, list(map(statistics.mean, percent)), marker="o", label=name)
        for codes, values in zip(known, percent, strict=True):
            axes.plot([codes] * len(values), values, ".", color=line.get_color(), alpha=0.5)
    axes.axhline(0, color="grey", lw=0.8)
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(plan.codebooks), [str(codes) for codes in plan.codebooks])
    axes.set_xlabel("codes in the codebook, V")
    axes.set_ylabel("CTF's FID is lower by, %")
    axes.legend()
    return [_image(space, figure, "table1.png", "How much lower CTF's FID is, by codebook size")]


def _image(space: Workspace, figure: Figure, name: str, text: str) -> str:
    storage.save_plot(space.results / name, figure)
    return f"![{text}]({name})"


def _table2(space: Workspace) -> list[str]:
    title, cell = "## Table 2: the speed of sampling", experiments.table2(space.plan)
    return [
        title,
        "Images a second, from classes to images, each with its tuned guidance. Medians, in "
        f"brackets the minimum and the maximum of {cell.rounds} rounds in turn; the last column is "
        "the ratio within each round.",
        *_speeds(space, cell, [("baseline", "CTF")]),
        f"The paper: {PAPER_TABLE2}.",
        "### With several labels in a pass",
        "Not in the paper: exact parallel sampling gives the same images, up to rounding. All four "
        "samplers are timed in turn, one label at a time and in parallel.",
        *_speeds(
            space,
            experiments.table2(space.plan, parallel=True),
            [
                ("baseline", "baseline" + IN_PARALLEL),
                ("CTF", "CTF" + IN_PARALLEL),
                ("baseline" + IN_PARALLEL, "CTF" + IN_PARALLEL),
            ],
        ),
    ]


def _speeds(space: Workspace, cell: SpeedCell, pairs: list[tuple[str, str]]) -> list[str]:
    """A table of two samplers a row, the second of which may be faster."""
    if (outcome := space.outcome(cell)) is None:
        return [MISSING]

    def rate(name: str, batch: str) -> str:
        seconds = outcome["seconds"][name][batch]
        return spread([int(batch) / each for each in seconds], " to ")

    tables = []
    for slower, faster in pairs:
        rows = [
            [batch, rate(slower, batch), rate(faster, batch), spread(ratios, " to ")]
            for batch, ratios in speed_ups(outcome, faster, slower).items()
        ]
        tables.append(markdown_table(("batch", slower, faster, "how many times as fast"), rows))
    return [*tables, *_passes(outcome)]


def _passes(outcome: Outcome) -> list[str]:
    """A line with the passes that an image takes, where they are recorded."""
    passes = {
        name: next(iter(each.values()))
        for name, each in outcome.get("passes", {}).items()
        if name.endswith(IN_PARALLEL)
    }
    if not passes:
        return []
    listed = ", ".join(f"{name.removesuffix(IN_PARALLEL)} {n:.0f}" for name, n in passes.items())
    return [f"Passes of the coarse model for an image, in parallel at batch 1: {listed}."]


def _table3(space: Workspace) -> list[str]:
    plan = space.plan
    parts = [
        "## Table 3: one choice at a time",
        f"V = {plan.largest}. Everything else is as in the CTF of Table 1, with its tuned "
        "settings; no row has a search of its own.",
    ]
    for title, choices in experiments.table3(plan).items():
        rows = []
        for choice in choices:
            label, outcome = choice.label, space.outcome(choice.cell)
            if outcome is not None and choice.setting is not None:
                label = f"{outcome['settings'][choice.setting]:g}, {label}"
            rows.append([label, *row(space, choice.cell)])
        parts += [f"### {title}", markdown_table(("choice", *columns(plan)), rows)]
        if title in PAPER_TABLE3:
            parts.append(f"The paper (FID / IS): {PAPER_TABLE3[title]}.")
    return parts


def _figure1(space: Workspace) -> list[str]:
    cells, rows = experiments.figure1(space.plan), []
    for cell in cells:
        if (outcome := space.outcome(cell)) is None:
            rows.append([cell.name, *missing(3)])
            continue
        sizes = "{min} / {median:g} / {max}".format(**outcome["sizes"])
        swaps = [f"{outcome['swap_psnr'][way]:.1f} dB" for way in ("clusters", "random")]
        rows.append([cell.name, sizes, *swaps])
    swaps_png, copy = space.run(cells[0]) / "clusters" / "swaps.png", space.results / "figure1.png"
    if swaps_png.is_file():
        with storage.atomic(copy) as temporary:
            shutil.copyfile(swaps_png, temporary)
    names, details = score_names(space.plan, "FID"), []
    for label, detail in experiments.details(space.plan).items():
        outcome = space.outcome(detail)
        values = missing(len(names))
        if outcome is not None:
            values = [f"{outcome[name]['value']:.4g}" for name in names]
        details.append([label, *values])
    header = ("clusters", "sizes: min / median / max", "swapped within", "in random clusters")
    return [
        "## Figure 1: codes of a cluster look nearly the same",
        "PSNR of held-out images whose codes were all swapped for random members of their "
        "clusters, against the images of the true codes.",
        markdown_table(header, rows),
        f"The paper: {PAPER_FIGURE1}.",
        *(["![Images whose codes were swapped](figure1.png)"] if copy.is_file() else []),
        "The fine stage alone: held-out images, codes resampled from their true labels.",
        markdown_table(("codes", *names), details),
    ]


def _figure2(space: Workspace) -> list[str]:
    plan, rows = space.plan, []
    points: dict[str, list[Scored]] = {"baseline": [], "CTF": []}
    for each in experiments.figure2(plan):
        for label, cell in (("baseline", each.baseline), ("CTF", each.ctf)):
            rows.append([str(each.steps), label, *row(space, cell)])
            if (score := scored(space, cell)) is not None:
                points[label].append(score)
    return [
        "## Figure 2: quality over training",
        "Each point is a training run of its own length, with the settings that were tuned at the "
        "full length.",
        markdown_table(("steps", "model", *columns(plan)), rows),
        f"The paper: {PAPER_FIGURE2}.",
        *(_plot_training(space, points) if all(points.values()) else []),
    ]


def _plot_training(space: Workspace, points: dict[str, list[Scored]]) -> list[str]:
    from matplotlib.figure import Figure

    names = score_names(space.plan, "FID")
    figure = Figure(figsize=(4.5 * len(names), 3.5), layout="constrained")
    panels = figure.subplots(1, len(names), squeeze=False)[0]
    for axes, name in zip(panels, names, strict=True):
        for label, scores in points.items():
            flops = [score.flops / 1e12 for score in scores]
            axes.plot(flops, [score.value(name) for score in scores], marker="o", label=label)
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("TFLOP of training, by calculation")
        axes.set_ylabel(f"{name}, lower is better")
        axes.legend()
    return [_image(space, figure, "figure2.png", "FID over the FLOPs of training")]
