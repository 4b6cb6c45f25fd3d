"""Commands for benchmarks and for the paper's experiments."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from ctf.cli import options
from ctf.cli.common import command, open_device, open_progress, parse_engines, print_table, show
from ctf.common import signals
from ctf.common.errors import UserError

Sizes = Annotated[
    str, arg(help="LlamaGen's sizes of transformers, separated by commas: B, L, XL, XXL, 3B")
]
Rounds = Annotated[int, arg(help="number of measurements of each, taken in turn")]
Engines = Annotated[str, arg(help="engines, separated by commas: auto, eager, compile, int8, bf16")]


@command("bench sample")
def bench_sample(
    *,
    sizes: Sizes = "B,L,XL",
    batches: str = "1,8,32",
    engines: Engines = "auto,int8",
    guidance: float = 2.0,
    rounds: Rounds = 3,
    out: Path = Path("bench-sample"),
    device: options.Device = "auto",
    dry_run: options.DryRun = False,
) -> None:
    """Measure how fast images are sampled, compared with LlamaGen's code and the hardware's limits.

    The models have random weights and sample 256 tokens, from classes to images. Use a machine that
    does nothing else. If it is interrupted, run the same command again to resume.

    Example: ctf bench sample --sizes B --batches 1,8

    Args:
        batches: batch sizes, separated by commas
        guidance: guidance scale of the coarse stage, and of the fine stage where it is guided
        out: folder for sample.json, sample.md and sample.png
    """
    from ctf.bench import sample, sample_report

    try:
        numbers = tuple(int(part) for part in batches.split(","))
    except ValueError:
        raise UserError(f"batches: got {batches!r}, expected numbers, e.g. 1,8,32") from None
    benchmark = sample.SampleBenchmark(
        tuple(sizes.split(",")), numbers, parse_engines(engines), guidance, rounds
    )
    torch_device = open_device(device)
    if dry_run:
        show(f"would measure {', '.join(sample.jobs(benchmark, torch_device))}")
        return
    with open_progress("bench") as progress:
        result = sample.run(benchmark, out, torch_device, progress)
    sample_report.write(result, out)
    for size in benchmark.sizes:
        for batch in benchmark.batches:
            show(f"size {size}, {batch} images")
            print_table(*sample_report.speed(result, size, batch))
    show(f"{out}: sample.md, sample.png, sample.json")


@command("bench train")
def bench_train(
    *,
    sizes: Sizes = "B,L",
    batch: int = 8,
    rounds: Rounds = 3,
    out: Path = Path("bench-train"),
    device: options.Device = "auto",
    dry_run: options.DryRun = False,
) -> None:
    """Measure how fast training steps are, compared with LlamaGen's code and the hardware's peak.

    The models have random weights and are trained on 256 tokens. Use a machine that does nothing
    else. If it is interrupted, run the same command again to resume.

    Example: ctf bench train --sizes B

    Args:
        batch: images per step
        out: folder for train.json and train.md
    """
    from ctf.bench import train

    benchmark = train.TrainBenchmark(tuple(sizes.split(",")), batch, rounds)
    torch_device = open_device(device)
    if dry_run:
        show(f"would measure {', '.join(train.jobs(benchmark, torch_device))}")
        return
    with open_progress("bench") as progress:
        result = train.run(benchmark, out, torch_device, progress)
    for size in benchmark.sizes:
        print_table(*train.table(result, size))
        show(train.summary(result, size))
    show(f"{out}: train.md, train.json")


@command("bench tokens")
def bench_tokens(
    *,
    out: options.Maybe[Path] = None,
    images: int = 1_281_167,
    size: options.Size = "B",
    # tyro shows aliases first, so the former name is the one that is not an alias
    encoded: Annotated[int, arg(name="pictures", aliases=("--encoded",))] = 4,
    rounds: Rounds = 3,
    device: options.Device = "auto",
) -> None:
    """Measure reading of synthetic tokens, and extraction of tokens compared with LlamaGen's code.

    Example: ctf bench tokens --out tokens.json

    Args:
        out: .json file for the results
        images: images of the tokens, by default as many as ImageNet has; they are written to a
            temporary folder, 512 bytes each
        size: size of the coarse model whose training speed the reader is compared with
        encoded: images of 256 pixels that are encoded per round, in two views
    """
    from ctf.bench import tokens
    from ctf.common import storage

    result = tokens.measure(images, size, encoded, rounds, open_device(device))
    print_table(("what", "measured"), tokens.rows(result))
    if out is not None:
        storage.save_json(out, result)


@command("bench quality")
def bench_quality(
    model: Annotated[str, Positional, arg(metavar="[MODEL]")] = "fashion-mnist",
    /,
    *,
    engines: Engines = "eager,auto,int8",
    samples: int = 5000,
    held_out: int = 10_000,
    device: options.Device = "auto",
) -> None:
    """Measure what engines cost in quality: likelihood of held-out codes, and class accuracy.

    Changes are relative to the first engine.

    Example: ctf bench quality fashion-mnist --engines eager,int8

    Args:
        model: a pipeline that was trained on an included set of images
        samples: number of samples per engine, with the same seeds
        held_out: maximum number of images for the likelihood
    """
    from ctf.bench import quality

    results = quality.compare(
        model, parse_engines(engines), samples, held_out, open_device(device), open_progress
    )
    print_table(quality.COLUMNS, quality.rows(results))


@command("bench fit")
def bench_fit(
    *,
    images: str = "fashion-mnist,eurosat",
    minutes: str = "2,10,30,60",
    preset: str = "small",
    peers: options.Maybe[str] = None,
    samples: int = 1000,
    out: Path = Path("bench-fit"),
    device: options.Device = "auto",
    dry_run: options.DryRun = False,
) -> None:
    """Measure how good the samples of ctf fit are after some minutes of training.

    Each number of minutes is a training of its own, since schedules depend on it. Scores are
    FID-Lite0 and, for sets with a classifier, its FID and the class accuracy. Use a machine that
    does nothing else. If it is interrupted, run the same command again to resume; other minutes,
    images, presets and peers can be added in the same folder.

    Example: ctf bench fit --minutes 2,10 --peers diffusers

    Args:
        images: included images to train on, separated by commas
        minutes: minutes of training, separated by commas
        preset: recipes of ctf fit, separated by commas
        peers: other libraries to compare with: diffusers (pip install 'ctf[peers]')
        samples: number of samples that are scored
        out: folder for bench-fit.json, bench-fit.md and bench-fit.png, and for all trainings
    """
    from ctf.bench import fit, fit_report

    try:
        numbers = tuple(float(part) for part in minutes.split(","))
    except ValueError:
        raise UserError(f"minutes: got {minutes!r}, expected numbers, e.g. 2,10") from None
    torch_device = open_device(device)
    benchmark = fit.FitBenchmark(
        _names(images), numbers, _names(preset), _names(peers or ""), samples
    )
    points = fit.points(benchmark)
    if dry_run:
        left = [point for point in points if not fit.is_done(point, out)]
        show("\n".join(["would measure", *(point.name for point in left)] if left else ["done"]))
        show(f"{sum(point.minutes for point in left):g} minutes of training in all")
        return
    with signals.stop_on_sigterm(out):
        results = fit.run(points, out, torch_device, open_progress, show)
    for name in fit_report.sets(results):
        show(name)
        print_table(*fit_report.scores_table(results, name))
    show(f"{out}: {fit_report.TABLE}, {fit_report.PLOT}, {fit_report.FILE}")


def _names(text: str) -> tuple[str, ...]:
    """Split names at commas."""
    return tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


@command("reproduce")
def reproduce(
    what: Annotated[
        Literal[
            "all",
            "table1",
            "table2",
            "table3",
            "figure1",
            "figure2",
            "geometry",
            "fine",
            "passes",
            "report",
            "status",
        ],
        Positional,
    ],
    /,
    *,
    images: Literal["fashion-mnist", "eurosat"] = "fashion-mnist",
    budget: Literal["small", "full"] = "full",
    out: Path = Path("runs/reproduce"),
    results: Path = Path("docs/results"),
    only: options.Maybe[str] = None,
    jobs: int = 1,
    device: options.Device = "auto",
    dry_run: options.DryRun = False,
) -> None:
    """Run the paper's experiments on the included images, and write a report.

    Each experiment consists of cells. A cell is not computed again if its result is in --results;
    its other files, such as weights, are in --out. If it is interrupted, run the same command again
    to resume.

    Example: ctf reproduce table1 --budget small --results results

    Args:
        what: table or figure of the paper; geometry compares models that know the codebook with
            those that don't; fine is the fine stage alone; passes is how many passes of the coarse
            model an image takes in exact parallel sampling; all is everything; report writes the
            report of the present results; status lists the cells without computing any
        images: the included set to run them on; eurosat is in colour, with 256 tokens an image
        budget: with two jobs on two cores, small takes about an hour, full about six; on eurosat
            about two, and a day
        out: folder for the files of the cells; each budget and set of images has a folder of its
            own in it
        results: folder for the report and the results of the cells, with the same folders in it
        only: name of a single cell to compute, with the cells that it depends on
        jobs: processes that share the cells; each needs one core and 1 GB of memory
    """
    from ctf.reproduce import experiments, report, runner
    from ctf.reproduce.plan import folder_of, plan_of

    if jobs < 1:
        raise UserError(f"jobs: got {jobs}, expected 1 or more")
    folder = folder_of(budget, images)
    space = runner.open_workspace(
        plan_of(budget, images),
        out / folder,
        results / folder,
        open_device(device),
        open_progress,
    )
    if what == "status":
        rows = runner.status(space)
        print_table(("cell", "state", "seconds"), rows)
        done = sum(state.startswith("done") for _, state, _ in rows)
        show(f"{done} of {len(rows)} cells are done")
        return
    cells = experiments.select(space.plan, "all" if what == "report" else what, only)
    missing = [] if what == "report" else [c for c in cells.values() if space.result(c) is None]
    if dry_run:
        show(f"would compute {', '.join(cell.name for cell in missing) or 'nothing'}")
        return
    options = (
        "--images", images, "--budget", budget, "--out", out, "--results", results,
        "--device", device,
    )  # fmt: skip
    again = [*map(str, ("reproduce", what, *options)), *(["--only", only] if only else [])]
    helpers = jobs - 1 if missing else 0
    with signals.stop_on_sigterm(space.work), runner.helpers(helpers, again, space.work):
        runner.compute(space, missing, lambda: report.write(space))
    report.write(space)
    show(f"{space.results / 'report.md'}: {len(missing)} cells computed")
