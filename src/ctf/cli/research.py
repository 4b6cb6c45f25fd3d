"""Commands that measure: benchmarks, and the paper's experiments."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from ctf.cli.common import (
    Device,
    Positional,
    Size,
    command,
    console,
    open_device,
    open_progress,
    parse_engines,
    print_table,
)
from ctf.common import signals
from ctf.common.errors import UserError


@command("bench sample")
def bench_sample(
    *,
    sizes: str = "B,L,XL",
    batches: str = "1,8,32",
    engines: str = "auto,int8",
    guidance: float = 2.0,
    rounds: int = 3,
    out: Path = Path("bench-sample"),
    device: Device = "auto",
    dry_run: bool = False,
) -> None:
    """Measures how fast drawing is, beside LlamaGen's plain way and the machine's limits.

    Example: ctf bench sample --sizes B --batches 1,8

    Random weights, 256 tokens, from classes to images. Run it on a machine that does nothing else;
    killed, the same command goes on.

    Args:
        sizes: of LlamaGen's transformers, with commas between: B, L, XL, XXL, 3B
        batches: images drawn at a time
        engines: auto, eager, compile, int8
        guidance: of the coarse stage, and of the fine one where it is guided
        rounds: how often each is measured, in turn
        out: folder for sample.json, sample.md and sample.png
        device: where to compute; auto takes a GPU if there is one
        dry_run: say what would be measured, and write nothing
    """
    from ctf.bench import sample, sample_report

    try:
        numbers = tuple(int(part) for part in batches.split(","))
    except ValueError:
        raise UserError(f"batches: got {batches!r}, expected numbers, e.g. 1,8,32") from None
    benchmark = sample.SampleBenchmark(
        tuple(sizes.split(",")),
        numbers,
        parse_engines(engines),
        guidance,
        rounds,
    )
    place = open_device(device)
    if dry_run:
        console.print(f"would measure {', '.join(sample.jobs(benchmark, place))}", soft_wrap=True)
        return
    with open_progress("bench") as progress:
        result = sample.run(benchmark, out, place, progress)
    sample_report.write(result, out)
    for size in benchmark.sizes:
        for batch in benchmark.batches:
            console.print(f"size {size}, {batch} images")
            print_table(*sample_report.speed(result, size, batch))
    console.print(f"{out}: sample.md, sample.png, sample.json", soft_wrap=True)


@command("bench train")
def bench_train(
    *,
    sizes: str = "B,L",
    batch: int = 8,
    rounds: int = 3,
    out: Path = Path("bench-train"),
    device: Device = "auto",
    dry_run: bool = False,
) -> None:
    """Measures how fast a training step is, beside LlamaGen's plain one and the machine's peak.

    Example: ctf bench train --sizes B

    Random weights, 256 tokens. Run it on a machine that does nothing else; killed, the same
    command goes on.

    Args:
        sizes: of LlamaGen's transformers, with commas between: B, L, XL, XXL, 3B
        batch: images of a step
        rounds: how often each is measured, in turn
        out: folder for train.json and train.md
        device: where to compute; auto takes a GPU if there is one
        dry_run: say what would be measured, and write nothing
    """
    from ctf.bench import train

    benchmark = train.TrainBenchmark(tuple(sizes.split(",")), batch, rounds)
    place = open_device(device)
    if dry_run:
        said = ", ".join(train.jobs(benchmark, place))
        console.print(f"would measure {said}", soft_wrap=True)
        return
    with open_progress("bench") as progress:
        result = train.run(benchmark, out, place, progress)
    for size in benchmark.sizes:
        print_table(*train.table(result, size))
        console.print(train.summary(result, size), soft_wrap=True)
    console.print(f"{out}: train.md, train.json", soft_wrap=True)


@command("bench tokens")
def bench_tokens(
    *,
    images: int = 1_281_167,
    size: Size = "B",
    pictures: int = 4,
    rounds: int = 3,
    device: Device = "auto",
    out: Path | None = None,
) -> None:
    """Reads a synthetic cache of ImageNet's size, and extracts tokens beside LlamaGen's loop.

    Example: ctf bench tokens --out tokens.json

    Args:
        images: pictures of the cache, 512 bytes each, written into a temporary folder
        size: of the coarse model that the reader is compared with
        pictures: of 256 pixels that are encoded in each round, in two views
        rounds: of both ways of extracting, in turn
        device: where to compute; auto takes a GPU if there is one
        out: a .json file for what was measured
    """
    from ctf.bench import tokens
    from ctf.common import storage

    found = tokens.measure(images, size, pictures, rounds, open_device(device))
    print_table(("what", "measured"), tokens.rows(found))
    if out is not None:
        storage.save_json(out, found)


@command("bench quality")
def bench_quality(
    model: Positional[str] = "fashion-mnist",
    /,
    *,
    engines: str = "eager,auto,int8",
    samples: int = 5000,
    held_out: int = 10_000,
    device: Device = "auto",
) -> None:
    """Measures what an engine costs in quality: likelihood of held-out codes, class accuracy.

    Example: ctf bench quality fashion-mnist --engines eager,int8

    Args:
        model: a pipeline that was trained on an included set of pictures
        engines: auto, eager, compile, int8; changes are stated against the first
        samples: drawn by each engine, with the same seeds
        held_out: pictures for the likelihood, at most
        device: where to compute; auto takes a GPU if there is one
    """
    from ctf.bench import quality

    found = quality.compare(
        model, parse_engines(engines), samples, held_out, open_device(device), open_progress
    )
    print_table(quality.COLUMNS, quality.rows(found))


@command("reproduce")
def reproduce(
    what: Positional[
        Literal["all", "table1", "table2", "table3", "figure1", "figure2", "report", "status"]
    ],
    /,
    *,
    budget: Literal["small", "full"] = "full",
    out: Path = Path("runs/reproduce"),
    results: Path = Path("docs/results"),
    only: str | None = None,
    jobs: int = 1,
    device: Device = "auto",
    dry_run: bool = False,
) -> None:
    """Runs the paper's experiments on the included pictures, and writes a report of them.

    Example: ctf reproduce table1 --budget small --results results

    Each experiment is made of cells. A cell whose result is in --results is not computed again;
    what it made, e.g. weights, is in --out. Killed, the same command goes on.

    Args:
        what: a table or a figure of the paper, or all of them; report writes the report of what
            there is; status lists the cells, and computes nothing
        budget: with two jobs on two cores, full takes less than six hours, small less than one
        out: folder for what the cells make, in a folder of the budget
        results: folder for the report and the cells' results, in a folder of the budget
        only: one cell, by its name, with those that it needs
        jobs: processes that share the cells; each takes one core and 1 GB
        device: where to compute; auto takes a GPU if there is one
        dry_run: list the cells that would be computed, and write nothing
    """
    from ctf.reproduce import experiments, report, runner
    from ctf.reproduce.plan import plan_of

    if jobs < 1:
        raise UserError(f"jobs: got {jobs}, expected 1 or more")
    space = runner.open_workspace(
        plan_of(budget), out / budget, results / budget, open_device(device), open_progress
    )
    if what == "status":
        rows = runner.status(space)
        print_table(("cell", "state", "seconds"), rows)
        done = sum(state.startswith("done") for _, state, _ in rows)
        console.print(f"{done} of {len(rows)} cells are done")
        return
    cells = experiments.select(space.plan, "all" if what == "report" else what, only)
    missing = [] if what == "report" else [c for c in cells.values() if space.result(c) is None]
    if dry_run:
        names = ", ".join(cell.name for cell in missing)
        console.print(f"would compute {names or 'nothing'}", soft_wrap=True)
        return
    same = ("reproduce", what, "--budget", budget, "--out", out, "--results", results)
    again = [*map(str, same), "--device", device, *(["--only", only] if only else [])]
    helpers = jobs - 1 if missing else 0
    with signals.stop_on_sigterm(space.work), runner.helpers(helpers, again, space.work):
        runner.compute(space, missing, lambda: report.write(space))
    report.write(space)
    console.print(f"{space.results / 'report.md'}: {len(missing)} cells computed", soft_wrap=True)
