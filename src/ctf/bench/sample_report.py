"""Show the results of `ctf bench sample`: sample.md and sample.png."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

from ctf.bench.sample import SampleResults, StageTiming, fine_batch
from ctf.bench.shapes import PAPER, RECOMMENDED
from ctf.bench.tables import Table, listed, span, spread
from ctf.bench.work import Work
from ctf.common import storage
from ctf.common.markdown import markdown_table

COLOURS = {"coarse": "#35618f", "fine": "#d98b2b", "decode": "#9aa5ad"}

NO_FINE = StageTiming("none", (0.0,), 0.0, Work(), 0, 0, 0)  # takes no time and no memory


@dataclasses.dataclass(frozen=True)
class Sampler:
    """One way of sampling a batch, from classes to images.

    Attributes:
        engine: Of its transformers; None in LlamaGen's way.
        baseline: The full-vocabulary model with the same engine.
        fine: `NO_FINE` where there is no fine stage.
    """

    label: str
    engine: str | None
    baseline: StageTiming
    coarse: StageTiming
    fine: StageTiming
    decode: StageTiming

    @property
    def transformers(self) -> float:
        """Seconds of the coarse and the fine stage, medians."""
        return self.coarse.median + self.fine.median

    @property
    def seconds(self) -> float:
        """Seconds of all stages, medians."""
        return self.transformers + self.decode.median

    @property
    def floor(self) -> float:
        """Seconds that the transformers take at the machine's limits."""
        return self.coarse.floor + self.fine.floor


def samplers(results: SampleResults, size: str, batch: int) -> list[Sampler]:
    """Return all ways of sampling a batch with models of one size, LlamaGen's first."""
    at_a_time = fine_batch(batch)
    coarse, fine = results.groups[f"coarse {size} {batch}"], results.groups[f"fine {at_a_time}"]
    images = {timing.name: timing.times(batch) for timing in results.groups["decode"].timings}
    ways = []
    if any(timing.name == "plain" for timing in coarse.timings):
        plain, label = coarse.timing("plain"), "LlamaGen's way, plain"
        ways.append(Sampler(label, None, plain, plain, NO_FINE, images["plain"]))
    for engine in results.benchmark.engines:
        base, own = coarse.timing(f"baseline {engine}"), coarse.timing(f"ctf {engine}")
        decode = images[engine]
        ways.append(Sampler(f"baseline, {engine}", engine, base, base, NO_FINE, decode))
        for name in (RECOMMENDED, PAPER):
            for guided in ("", " guided") if results.benchmark.guidance != 1 else ("",):
                second = fine.timing(f"{name} {engine}{guided}").times(batch / at_a_time)
                label = f"CTF, fine {name}{guided}, {engine}"
                ways.append(Sampler(label, engine, base, own, second, decode))
    return ways


def write(results: SampleResults, folder: Path) -> None:
    """Write sample.md and sample.png."""
    benchmark = results.benchmark
    parts = [
        "Seconds are medians, in brackets the minimum and the maximum of "
        f"{benchmark.rounds} rounds in turn. Guidance {benchmark.guidance:g}, "
        f"{listed(results.environment)}.",
        markdown_table(*_limits(results)),
    ]
    for size in benchmark.sizes:
        for batch in benchmark.batches:
            title = f"### Size {size}, {_images(batch)}"
            parts += [title, markdown_table(*speed(results, size, batch))]
    start = [(part, f"{seconds:.2f}") for part, seconds in results.groups["start"].facts.items()]
    for title, table in (
        ("CTF and the baseline", _shares(results)),
        ("The decoder, one image", _decoder(results)),
        ("Memory", _memory(results)),
        ("The shipped pipeline in a new process", (("", "s"), start)),
        ("Greedy labels", _greedy(results)),
        ("Windows: passes and time of the coarse stage, shipped pipeline", _windows(results)),
        ("Windows: time of a pass", _passes(results)),
    ):
        if table[1]:
            parts += [f"### {title}", markdown_table(*table)]
    storage.save_text(folder / "sample.md", "\n\n".join(parts) + "\n")
    _plot(results, folder / "sample.png")


def _images(batch: int) -> str:
    return f"{batch} image{'s' * (batch > 1)}"


def _batches(results: SampleResults) -> Iterator[tuple[str, Sampler]]:
    """Each way of sampling for each size and batch, with a name of these two."""
    for size in results.benchmark.sizes:
        for batch in results.benchmark.batches:
            for each in samplers(results, size, batch):
                yield f"{size}, {batch}", each


def speed(results: SampleResults, size: str, batch: int) -> Table:
    """Where the time goes; how much faster than LlamaGen's way; how near to the limits."""
    rows, ways = [], samplers(results, size, batch)
    plain = ways[0] if ways[0].engine is None else None
    for each in ways:
        rows.append(
            (
                each.label,
                spread(each.coarse.seconds),
                "" if each.fine is NO_FINE else spread(each.fine.seconds),
                f"{each.decode.median:.2f}",
                f"{each.seconds:.2f}",
                f"{plain.transformers / each.transformers:.2f}" if plain else "",
                f"{plain.seconds / each.seconds:.2f}" if plain else "",
                f"{each.baseline.median / each.transformers:.2f}" if each.engine else "",
                f"{each.floor:.2f}",
                f"{each.floor / each.transformers:.0%}",
            )
        )
    columns = (
        "", "coarse, s", "fine, s", "decode, s", "all, s", "transformers, plain = 1",
        "all, plain = 1", "transformers, baseline = 1", "limit of transformers, s", "reached",
    )  # fmt: skip
    return columns, rows


def _shares(results: SampleResults) -> Table:
    """The most that a smaller output layer can save and the least that the fine pass costs.

    By the work alone, at the machine's limits; and what was measured.
    """
    rows = []
    for name, each in _batches(results):
        if each.fine is NO_FINE:
            continue
        base, coarse = each.baseline.work, each.coarse.work
        rows.append(
            (
                name,
                each.label,
                f"{base.operations / 1e9:,.0f}",
                f"{1 - coarse.operations / base.operations:.1%}",
                f"{each.fine.work.operations / base.operations:.1%}",
                f"{base.bytes / 1e9:,.0f}",
                f"{1 - coarse.bytes / base.bytes:.1%}",
                f"{each.baseline.floor / each.floor:.2f}",
                f"{each.baseline.median / each.transformers:.2f}",
            )
        )
    columns = (
        "size, images", "", "baseline, 10^9 operations", "saved by the output layer",
        "cost of the fine pass", "baseline, GB read", "saved by the output layer",
        "speed-up at the limits", "speed-up measured",
    )  # fmt: skip
    return columns, rows


def _limits(results: SampleResults) -> Table:
    machines = [group.machine for group in results.groups.values()]
    return ("the machine reached, before each group", ""), [
        ("products in float32, 10^9 operations/s", span([m.fp32 for m in machines])),
        ("products in bfloat16", span([m.bf16 for m in machines])),
        ("products in int8", span([m.int8 for m in machines])),
        ("reading memory, GB/s", span([m.bandwidth for m in machines])),
    ]


def _decoder(results: SampleResults) -> Table:
    group = results.groups["decode"]
    plain = group.timing("plain")
    return ("", "s", "plain = 1", "mean difference of pixels, of 255", "reached"), [
        (
            timing.name,
            spread(timing.seconds),
            f"{plain.median / timing.median:.2f}",
            f"{group.facts[f'{timing.name} difference']:.4f}",
            f"{timing.floor / timing.median:.0%}",
        )
        for timing in group.timings
    ]


def _memory(results: SampleResults) -> Table:
    rows = []
    for name, each in _batches(results):
        weights = each.coarse.weights + each.fine.weights + each.decode.weights
        fine = "" if each.fine is NO_FINE else _megabytes(each.fine.working)
        rows.append(
            (
                name,
                each.label,
                *map(_megabytes, (weights, each.coarse.cache, each.coarse.working)),
                fine,
                _megabytes(each.decode.working),
            )
        )
    columns = (
        "size, images", "", "weights, MB", "cache, MB",
        "coarse stage, besides, MB", "fine stage", "decoder",
    )  # fmt: skip
    return columns, rows


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.0f}"


def _greedy(results: SampleResults) -> Table:
    facts = {size: results.groups[f"greedy {size}"].facts for size in results.benchmark.sizes}
    rows = [(size, f"{f['equal']:.0f} of {f['labels']:.0f}") for size, f in facts.items() if f]
    return ("size", "labels equal to those of LlamaGen's way"), rows


def _windows(results: SampleResults) -> Table:
    facts = results.groups["windows"].facts
    rows = []
    for name, passes in facts.items():
        engine, batch, window, kind = name.split()
        if kind == "passes":
            seconds, one = (facts[f"{engine} {batch} {w} seconds"] for w in (window, "1"))
            numbers = (f"{passes:.1f}", f"{1000 * seconds:.0f} ms", f"{one / seconds:.2f}")
            rows.append((engine, batch, window, *numbers))
    return ("engine", "batch", "window", "passes", "batch takes", "times as fast as 1"), rows


def _passes(results: SampleResults) -> Table:
    """What a pass costs, and how many times as fast an image is with the passes of the pipeline."""
    rows, taken = [], results.groups["windows"].facts
    for size in results.benchmark.sizes:
        facts = results.groups[f"passes {size}"].facts
        for name, seconds in facts.items():
            engine, batch, window, _ = name.split()
            times = seconds / facts[f"{engine} {batch} 1 seconds"]
            one, own = (taken[f"{engine} {batch} {w} passes"] for w in ("1", window))
            ms = f"{1000 * seconds:.1f} ms"
            rows.append(
                (size, engine, batch, window, ms, f"{times:.2f}", f"{one / own / times:.2f}")
            )
    columns = (
        "size", "engine", "batch", "window", "a pass takes", "window 1 = 1",
        "times as fast as 1, with the passes of the shipped pipeline",
    )  # fmt: skip
    return columns, rows


def _plot(results: SampleResults, path: Path) -> None:
    """A panel for each size and batch, a bar for each way, split by stage."""
    from matplotlib.figure import Figure

    sizes, batches = results.benchmark.sizes, results.benchmark.batches
    height = 0.24 * len(samplers(results, sizes[0], batches[0])) + 0.9
    figure = Figure(figsize=(4.6 * len(batches) + 2, height * len(sizes)), layout="constrained")
    panels = figure.subplots(len(sizes), len(batches), squeeze=False, sharey="row")
    for line, size in zip(panels, sizes, strict=True):
        for axes, batch in zip(line, batches, strict=True):
            ways = samplers(results, size, batch)[::-1]
            left = [0.0] * len(ways)
            for stage, colour in COLOURS.items():
                widths = [getattr(each, stage).median for each in ways]
                labels = [each.label for each in ways]
                axes.barh(labels, widths, left=left, color=colour, label=stage)
                left = [a + b for a, b in zip(left, widths, strict=True)]
            for y, each in enumerate(ways):
                axes.plot([each.floor] * 2, [y - 0.4, y + 0.4], color="black", lw=1.2)
            axes.set_title(f"{size}, {_images(batch)}", fontsize=10)
            axes.tick_params(labelsize=8)
            axes.set_xlabel("seconds", fontsize=8)
            axes.spines[["top", "right"]].set_visible(False)
    first = panels[0][0]
    handles, labels = first.get_legend_handles_labels()
    (limit,) = first.plot([], [], color="black", lw=1.2)
    figure.legend(
        [*handles, limit],
        [*labels, "limit of the transformers"],
        loc="outside lower center",
        ncols=4,
        fontsize=9,
        frameon=False,
    )
    storage.save_plot(path, figure)
