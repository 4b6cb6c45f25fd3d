"""Sections of the report about what the paper does not have."""

from __future__ import annotations

from ctf.common import storage
from ctf.common.markdown import markdown_table
from ctf.reproduce import additions
from ctf.reproduce.cells import Outcome, Workspace
from ctf.reproduce.fine_cells import FineStageCell
from ctf.reproduce.sampling_cells import PassesCell
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
    for label, one, other in (("the baseline", known_base, base), ("CTF", known_ctf, ctf)):
        changes = " and ".join(f"{name} {compare(one, other, name)}" for name in names)
        assert one.loss is not None and other.loss is not None
        loss = f"held-out loss {other.loss:.3f} before, {one.loss:.3f} after"
        lines.append(f"With knowledge of the codebook, {label} has {changes}; {loss}.")
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


# --- Exact parallel sampling ----------------------------------------------------------------------

Way = tuple[int, float, float, bool]  # of sampling: window, guidance, temperature, with drafts


def passes(space: Workspace) -> list[str]:
    """Return the section about the passes of an image in exact parallel sampling."""
    cells = additions.passes(space.plan)
    found = {
        key: outcome for key, cell in cells.items() if (outcome := space.outcome(cell)) is not None
    }
    text = (
        "Not in the paper: how many passes of the coarse model an image takes if a pass computes "
        "a window of labels and keeps those that were guessed right; one by one it takes as many "
        "as it has labels. Means of {images} images, in brackets the standard error; the models "
        "are those of the first seed. Labels that enter the window are copies of those above; "
        "drafts are by tables of the labels left and above, which many labels are too many for."
    )
    title, first = "## Passes of an image", next(iter(cells.values()))
    parts = [title, text.format(images=first.images)]
    if not found:
        return [*parts, f"{MISSING}."]
    means = {key: _means(outcome) for key, outcome in found.items()}
    g, t = first.guidances[0], first.temperatures[0]
    by_window = {f"W = {w}": (w, g, t, False) for w in first.windows}
    with_drafts = {f"W = {w}, drafts": (w, g, t, True) for w in first.windows}
    by_setting = {
        f"g = {g:g}, T = {t:g}": (first.window, g, t, False)
        for g in first.guidances
        for t in first.temperatures
    }
    for caption, ways in (
        (f"By the window W, at guidance {g:g} and temperature {t:g}:", by_window | with_drafts),
        (f"By guidance g and temperature T, at W = {first.window}:", by_setting),
    ):
        rows = [
            [_system(key), *(_cell(means[key], way) for way in ways.values())]
            if key in means
            else [_system(key), *missing(len(ways))]
            for key in cells
        ]
        parts += [caption, markdown_table(("model", *ways), rows)]
    usual = (first.window, g, t, False)
    return [*parts, *_fewer_passes(space, means, usual), *_plot_passes(space, means, first)]


def _means(outcome: Outcome) -> dict[Way, tuple[float, float]]:
    return {
        (each["window"], each["guidance"], each["temperature"], each["drafts"]): (
            each["mean"],
            each["standard_error"],
        )
        for each in outcome["passes"]
    }


def _system(key: tuple[int, int]) -> str:
    codes, labels = key
    return f"baseline, V = {codes}" if labels == codes else f"CTF, V = {codes}, K = {labels}"


def _cell(means: dict[Way, tuple[float, float]], way: Way) -> str:
    return "{:.1f} ({:.1f})".format(*means[way]) if way in means else ""


def _fewer_passes(
    space: Workspace, means: dict[tuple[int, int], dict[Way, tuple[float, float]]], way: Way
) -> list[str]:
    """A line for each V: how many times as many passes its baseline takes as CTF."""
    parts = []
    for codes in space.plan.codebooks:
        usual = (codes, space.plan.clusters_of(codes))
        if (codes, codes) in means and usual in means:
            ratio = means[codes, codes][way][0] / means[usual][way][0]
            parts.append(f"{ratio:.2f} at V = {codes}")
    if not parts:
        return []
    return [
        f"Passes of the baseline by those of CTF, at W = {way[0]}: {', '.join(parts)}. With passes "
        "that take equally long, CTF's coarse stage is as many times as fast. Few passes are no "
        "merit of a model: the less it has learnt of how labels depend on those before them, the "
        "more guesses are right, and one that has learnt nothing takes a pass for each window."
    ]


def _plot_passes(
    space: Workspace,
    means: dict[tuple[int, int], dict[Way, tuple[float, float]]],
    cell: PassesCell,
) -> list[str]:
    """Passes by the number of labels, a line for each guidance scale, baseline and CTF."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5, 3.5), layout="constrained")
    axes, ticks = figure.subplots(), set()
    for style, marker, name, keys in (
        ("--", "s", "baseline", [key for key in means if key[0] == key[1]]),
        ("-", "o", "CTF", [k for k in means if k[0] == space.plan.largest and k[0] != k[1]]),
    ):
        keys.sort(key=lambda key: key[1])
        ticks |= {labels for _, labels in keys}
        for number, guidance in enumerate(sorted(cell.guidances)):
            way = (cell.window, guidance, cell.temperatures[0], False)
            each = [means[key][way] for key in keys]
            axes.errorbar(
                [labels for _, labels in keys],
                [mean for mean, _ in each],
                [1.96 * error for _, error in each],
                linestyle=style,
                marker=marker,
                color=f"C{number}",
                label=f"{name}, guidance {guidance:g}",
            )
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(ticks), [str(labels) for labels in sorted(ticks)])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("labels to choose from: V of the baseline, K of CTF")
    axes.set_ylabel(f"passes of an image, W = {cell.window}")
    axes.legend(fontsize=8)
    storage.save_plot(space.results / "passes.png", figure)
    return ["![Passes of an image by the number of labels](passes.png)"]
