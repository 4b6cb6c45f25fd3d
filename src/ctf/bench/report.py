"""What `ctf bench sample` found, for people: sample.md and sample.png."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from ctf.bench.sample import PAPER, RECOMMENDED, Group, Result, Timing, fine_batch
from ctf.common import storage

Table = tuple[Sequence[str], Sequence[Sequence[str]]]  # columns and rows

COLOURS = {"coarse": "#35618f", "fine": "#d98b2b", "decode": "#9aa5ad"}


@dataclasses.dataclass(frozen=True)
class Row:
    """One way of drawing a batch, from classes to images.

    engine: of its transformers; None in the plain way. fine: None where there is no fine stage.
    """

    label: str
    engine: str | None
    coarse: Timing
    fine: Timing | None
    decode: Timing

    @property
    def stages(self) -> dict[str, float]:
        """Seconds of each stage, medians."""
        return {
            "coarse": self.coarse.median,
            "fine": self.fine.median if self.fine else 0.0,
            "decode": self.decode.median,
        }

    @property
    def transformers(self) -> float:
        return self.stages["coarse"] + self.stages["fine"]

    @property
    def floor(self) -> float:
        """Seconds that the transformers would take at the machine's limits."""
        return self.coarse.floor + (self.fine.floor if self.fine else 0.0)

    @property
    def parts(self) -> list[Timing]:
        return [self.coarse, *([self.fine] if self.fine else []), self.decode]


def rows_of(result: Result, size: str, batch: int) -> list[Row]:
    """All ways of drawing a batch with models of one size, the plain one first if it is there."""
    coarse = result.groups[f"coarse {size} {batch}"]
    at_a_time = fine_batch(batch)
    fine = result.groups[f"fine {at_a_time}"]
    images = {timing.name: timing.times(batch) for timing in result.groups["decode"].timings}
    rows = []
    if any(timing.name == "plain" for timing in coarse.timings):
        plain = coarse.timing("plain")
        rows.append(Row("LlamaGen's way, plain", None, plain, None, images["plain"]))
    for how in result.asked.engines:
        own = coarse.timing(f"baseline {how}")
        rows.append(Row(f"baseline, {how}", how, own, None, images[how]))
        for name, said in ((RECOMMENDED, f"fine {RECOMMENDED}"), (PAPER, f"fine {PAPER}")):
            for guided in ("", " guided"):
                if guided and result.asked.guidance == 1:
                    continue
                own = coarse.timing(f"ctf {how}")
                second = fine.timing(f"{name} {how}{guided}").times(batch / at_a_time)
                rows.append(Row(f"CTF, {said}{guided}, {how}", how, own, second, images[how]))
    return rows


def write(result: Result, folder: Path) -> None:
    """Writes sample.md and sample.png beside sample.json."""
    with storage.atomic(folder / "sample.md") as temporary:
        temporary.write_text(markdown(result), encoding="utf-8")
    draw(result, folder / "sample.png")


def markdown(result: Result) -> str:
    asked = result.asked
    parts = [
        "Seconds are medians, in brackets the least and the most of "
        f"{asked.rounds} rounds in turn. Guidance {asked.guidance:g}, {listed(result.where)}.",
        as_markdown(_limits(result)),
    ]
    for size in asked.sizes:
        for batch in asked.batches:
            images = f"{batch} image{'s' * (batch > 1)}"
            parts += [f"### Size {size}, {images}", as_markdown(speed(result, size, batch))]
    parts += ["### CTF beside the baseline", as_markdown(shares(result))]
    parts += ["### The decoder, one image", as_markdown(_decoder(result.groups["decode"]))]
    parts += ["### Memory", as_markdown(_memory(result))]
    start = result.groups["start"].found
    seconds = (("", "s"), [(name, f"{value:.2f}") for name, value in start.items()])
    parts += ["### The shipped pipeline in a new process", as_markdown(seconds)]
    if greedy := _greedy(result):
        parts += ["### Greedy labels", as_markdown(greedy)]
    return "\n\n".join(parts) + "\n"


def speed(result: Result, size: str, batch: int) -> Table:
    """Where the time goes; how much faster than the plain way; how near to the limit."""
    rows = rows_of(result, size, batch)
    plain = rows[0] if rows[0].engine is None else None
    lines = []
    for row in rows:
        baseline = next(r for r in rows if r.engine == row.engine)
        stages = row.stages
        lines.append(
            (
                row.label,
                _range(row.coarse),
                _range(row.fine) if row.fine else "",
                f"{stages['decode']:.2f}",
                f"{sum(stages.values()):.2f}",
                f"{plain.transformers / row.transformers:.2f}" if plain else "",
                f"{sum(plain.stages.values()) / sum(stages.values()):.2f}" if plain else "",
                f"{baseline.transformers / row.transformers:.2f}" if row.engine else "",
                f"{row.floor:.2f}",
                f"{row.floor / row.transformers:.0%}",
            )
        )
    columns = (
        "", "coarse, s", "fine, s", "decode, s", "all, s", "transformers, plain = 1",
        "all, plain = 1", "transformers, baseline = 1", "limit of transformers, s", "reached",
    )  # fmt: skip
    return columns, lines


def shares(result: Result) -> Table:
    """What a smaller output layer can save at the most, and what the fine pass costs at the least.

    By the work alone, at the machine's limits; and what was measured.
    """
    lines = []
    for size in result.asked.sizes:
        for batch in result.asked.batches:
            for row in rows_of(result, size, batch):
                if row.fine is None or row.engine is None:
                    continue
                coarse = result.groups[f"coarse {size} {batch}"]
                own = coarse.timing(f"baseline {row.engine}")
                lines.append(
                    (
                        f"{size}, {batch}",
                        row.label,
                        f"{own.work.operations / 1e9:,.0f}",
                        f"{1 - row.coarse.work.operations / own.work.operations:.1%}",
                        f"{row.fine.work.operations / own.work.operations:.1%}",
                        f"{own.work.bytes / 1e9:,.0f}",
                        f"{1 - row.coarse.work.bytes / own.work.bytes:.1%}",
                        f"{own.floor / row.floor:.2f}",
                        f"{own.median / row.transformers:.2f}",
                    )
                )
    columns = (
        "size, images", "", "baseline, 10^9 operations", "saved by the output layer",
        "cost of the fine pass", "baseline, GB read", "saved by the output layer",
        "speed-up at the limits", "speed-up measured",
    )  # fmt: skip
    return columns, lines


def _limits(result: Result) -> Table:
    machines = [group.machine for group in result.groups.values()]

    def span(values: Sequence[float]) -> str:
        return f"{min(values) / 1e9:,.0f} to {max(values) / 1e9:,.0f}"

    return ("the machine reached, before each group", ""), [
        ("products in float32, 10^9 operations/s", span([m.fp32 for m in machines])),
        ("products in bfloat16", span([m.bf16 for m in machines])),
        ("products in int8", span([m.int8 for m in machines])),
        ("reading memory, GB/s", span([m.bandwidth for m in machines])),
    ]


def _decoder(group: Group) -> Table:
    plain = group.timing("plain")
    return ("", "s", "plain = 1", "mean difference of pixels, of 255", "reached"), [
        (
            timing.name,
            _range(timing),
            f"{plain.median / timing.median:.2f}",
            f"{group.found[f'{timing.name} difference']:.4f}",
            f"{timing.floor / timing.median:.0%}",
        )
        for timing in group.timings
    ]


def _memory(result: Result) -> Table:
    lines = []
    for size in result.asked.sizes:
        for batch in result.asked.batches:
            for row in rows_of(result, size, batch):
                weights = sum(part.weights for part in row.parts)
                lines.append(
                    (
                        f"{size}, {batch}",
                        row.label,
                        _megabytes(weights),
                        _megabytes(row.coarse.cache),
                        *(
                            _megabytes(part.working) if part else ""
                            for part in (row.coarse, row.fine)
                        ),
                        _megabytes(row.decode.working),
                    )
                )
    columns = (
        "size, images", "", "weights, MB", "cache, MB",
        "coarse stage, besides, MB", "fine stage", "decoder",
    )  # fmt: skip
    return columns, lines


def _greedy(result: Result) -> Table | None:
    lines = []
    for size in result.asked.sizes:
        found = result.groups[f"greedy {size}"].found
        if found:
            lines.append((size, f"{found['equal']:.0f} of {found['labels']:.0f}"))
    return (("size", "labels equal to those of the plain way"), lines) if lines else None


def _range(timing: Timing) -> str:
    return f"{timing.median:.2f} ({min(timing.seconds):.2f}-{max(timing.seconds):.2f})"


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.0f}"


def listed(where: dict[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in where.items())


def as_markdown(table: Table) -> str:
    columns, rows = table
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def draw(result: Result, path: Path) -> None:
    """A panel for each size and batch, a bar for each way, split by stage."""
    from matplotlib.figure import Figure

    sizes, batches = result.asked.sizes, result.asked.batches
    count = len(rows_of(result, sizes[0], batches[0]))
    figure = Figure(
        figsize=(4.6 * len(batches) + 2, (0.24 * count + 0.9) * len(sizes)), layout="constrained"
    )
    axes = figure.subplots(len(sizes), len(batches), squeeze=False, sharey="row")
    for line, size in zip(axes, sizes, strict=True):
        for axis, batch in zip(line, batches, strict=True):
            rows = rows_of(result, size, batch)[::-1]
            left = [0.0] * len(rows)
            for stage, colour in COLOURS.items():
                widths = [row.stages[stage] for row in rows]
                axis.barh([row.label for row in rows], widths, left=left, color=colour, label=stage)
                left = [a + b for a, b in zip(left, widths, strict=True)]
            for place, row in enumerate(rows):
                axis.plot([row.floor] * 2, [place - 0.4, place + 0.4], color="black", lw=1.2)
            axis.set_title(f"{size}, {batch} image{'s' * (batch > 1)}", fontsize=10)
            axis.tick_params(labelsize=8)
            axis.set_xlabel("seconds", fontsize=8)
            for side in ("top", "right"):
                axis.spines[side].set_visible(False)
    handles, labels = axes[0][0].get_legend_handles_labels()
    axes[0][0].plot([], [], color="black", lw=1.2)
    figure.legend(
        [*handles, axes[0][0].lines[-1]],
        [*labels, "limit of the transformers"],
        loc="outside lower center",
        ncols=4,
        fontsize=9,
        frameon=False,
    )
    with storage.atomic(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
