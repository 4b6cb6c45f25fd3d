"""`ctf bench train`: how fast a training step is, compared with LlamaGen's plain one.

Compared are whole steps, from the batch to the moving average of the weights: LlamaGen's step as
`llamagen_reference` writes it, and those of `ctf train` for the full-vocabulary baseline, the
coarse and the fine model. All have the same dropout, clipping and AdamW; LlamaGen's has no moving
average, as by its defaults. They are in single precision; where a processor multiplies bfloat16,
baseline and coarse model are also timed as with `--precision bf16`. On a GPU all are timed in
that alone, and with `--compile`, too.

In each round the ways take turns, with one model in memory at a time. The first step of each is not
timed: it allocates the moments, and fills what the second finds in memory. On a GPU, a number of
steps is timed without waiting for each of them, as in a training.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ctf.bench import harness, llamagen_reference, tables
from ctf.bench.harness import Group, Results, Timing
from ctf.bench.shapes import IMAGENET, PAPER, RECOMMENDED, Shapes
from ctf.bench.tokens import write_cache
from ctf.bench.work import Machine
from ctf.common import memory, storage
from ctf.common.distributed import World
from ctf.common.markdown import markdown_table
from ctf.common.precision import supports_bf16
from ctf.common.progress import Progress
from ctf.data.tokens import Tokens
from ctf.kernels import compiled
from ctf.models.clusters import Clusters, identity
from ctf.models.coarse import CoarseModel
from ctf.models.fine import FineModel
from ctf.models.objectives import coarse_objective, fine_objective
from ctf.models.sizes import training_flops
from ctf.training import optim
from ctf.training.loop import Execution
from ctf.training.transformers import Trainer, TrainingConfig

FILE = "train.json"
IMAGES = 256  # in the tokens that are read; any number will do
BF16 = ", bf16"  # in the names of ways whose products are in bfloat16
COMPILED = ", compiled"  # ends the names of ways whose blocks are compiled
GPU_WARM_UP, GPU_STEPS = 3, 10  # steps before those that are timed, and those


@dataclasses.dataclass(frozen=True)
class TrainBenchmark:
    """What is measured.

    Raises:
        UserError: A value is out of its range.
    """

    sizes: tuple[str, ...] = ("B", "L")
    batch: int = 8
    rounds: int = 3

    def __post_init__(self) -> None:
        harness.check_sizes(self.sizes)
        harness.check_positive(batch=self.batch, rounds=self.rounds)


@dataclasses.dataclass(frozen=True)
class StepTiming(Timing):
    """One training step, in seconds.

    Attributes:
        forward: Until the output layer has its gradient.
        backward: Until all weights have theirs, and they are clipped.
        update: AdamW, and the moving average where there is one.
        peak: The most bytes that were held.
    """

    forward: float
    backward: float
    update: float
    peak: int
    flops: int

    @property
    def seconds(self) -> float:
        """The whole step."""
        return self.forward + self.backward + self.update


TrainResults = Results[TrainBenchmark, StepTiming]


def run(
    benchmark: TrainBenchmark,
    folder: Path,
    device: torch.device,
    progress: Progress,
    shapes: Shapes = IMAGENET,
) -> TrainResults:
    """Measure what is missing in `folder`/train.json, and write train.md.

    Raises:
        UserError: See `harness.measure`.
    """
    groups = jobs(benchmark, device, shapes)
    results = harness.measure(benchmark, StepTiming, groups, folder / FILE, device, progress)
    storage.save_text(folder / "train.md", "\n\n".join(report(results)) + "\n")
    return results


def jobs(
    benchmark: TrainBenchmark, device: torch.device, shapes: Shapes = IMAGENET
) -> dict[str, Callable[[Machine], Group[StepTiming]]]:
    """Return what measures each group, given the machine's limits: every round is one."""
    return {
        f"{kind} round {number}": partial(_round, benchmark, device, shapes, kind, number)
        for kind in (*benchmark.sizes, "fine")
        for number in range(1, benchmark.rounds + 1)
    }


# --- One step -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Way:
    """A model with what makes its training step, given the step's number."""

    model: CoarseModel | FineModel
    optimizer: torch.optim.Optimizer
    step: Callable[[int], Any]
    flops: int


def _round(
    benchmark: TrainBenchmark,
    device: torch.device,
    shapes: Shapes,
    kind: str,
    number: int,
    machine: Machine,
) -> Group[StepTiming]:
    with tempfile.TemporaryDirectory() as folder:
        write_cache(Path(folder), IMAGES, shapes)
        ways = _ways(kind, Tokens(Path(folder), "train"), benchmark.batch, shapes, device)
        # Backwards in each second round, so that none always follows the same one.
        timings = {
            name: _timed(name, ways[name], device)
            for name in list(ways)[:: 1 if number % 2 else -1]
        }
    return Group(machine, tuple(timings[name] for name in ways))


def _ways(
    kind: str, tokens: Tokens, batch: int, shapes: Shapes, device: torch.device
) -> dict[str, Callable[[], _Way]]:
    """The ways of a round; each makes its model when it is called."""
    clusters = shapes.make_clusters()

    def coarse(clusters: Clusters, execution: Execution) -> _Way:
        model = CoarseModel(shapes.transformer(kind), clusters.count)
        flops = training_flops(model.config, shapes.length, clusters.count)
        return trained(model, coarse_objective(clusters), flops, execution)

    def fine(size: str, execution: Execution) -> _Way:
        model = FineModel(shapes.transformer(size), clusters)
        flops = training_flops(model.config, 1 + shapes.length, shapes.members)
        return trained(model, fine_objective(clusters), flops, execution)

    def trained(
        model: CoarseModel | FineModel, objective: Any, flops: int, execution: Execution
    ) -> _Way:
        trainer = Trainer(
            model, objective, tokens, tokens, TrainingConfig(batch_size=batch),
            World(device=device), execution,
        )  # fmt: skip
        return _Way(model, trainer.optimizer, trainer.step, batch * flops)

    def plain(execution: Execution) -> _Way:
        model = CoarseModel(shapes.transformer(kind), shapes.codes).to(device).train()
        training = TrainingConfig(batch_size=batch)
        optimizer = optim.make_optimizer(
            model, training.learning_rate, training.betas, training.weight_decay
        )

        bf16 = execution.precision == "bf16"

        def step(number: int) -> float:
            indices_B = optim.batch_indices(len(tokens), batch, 0, number)
            classes_B = torch.from_numpy(tokens.classes_N[indices_B]).to(device)
            codes_BL = tokens.codes(indices_B).to(device)
            loss = llamagen_reference.train_step(model, optimizer, codes_BL, classes_B, bf16=bf16)
            return float(loss)

        flops = training_flops(model.config, shapes.length, shapes.codes)
        return _Way(model, optimizer, step, batch * flops)

    models: dict[str, Callable[[Execution], _Way]]
    if kind == "fine":
        models = {size: partial(fine, size) for size in (RECOMMENDED, PAPER)}
    else:
        models = {
            "plain": plain,
            "baseline": partial(coarse, identity(shapes.codes)),
            "coarse": partial(coarse, clusters),
        }
    return {
        f"{name}{suffix}": partial(model, execution)
        for suffix, execution in _executions(device).items()
        for name, model in models.items()
        if device.type == "cuda" or suffix == "" or name in ("baseline", "coarse")
        if not (execution.compile and name == "plain")
    }


def _executions(device: torch.device) -> dict[str, Execution]:
    """How the ways are computed on a device, by the ends of their names."""
    low, executions = Execution(precision="bf16"), {"": Execution(precision="fp32")}
    if device.type == "cuda" and supports_bf16(device):
        executions = {BF16: low}  # nobody trains these in single precision there
        if compiled.compiles(device.type):
            executions[BF16 + COMPILED] = dataclasses.replace(low, compile=True)
    elif supports_bf16(device):
        executions[BF16] = low
    return executions


def _timed(name: str, make: Callable[[], _Way], device: torch.device) -> StepTiming:
    gc.collect()
    memory.trim()
    held = memory.allocated(device)
    memory.reset_peak(device)
    # As the training loop does.
    with contextlib.nullcontext() if name == "plain" else memory.keep_freed():
        way = make()
        warm_up, steps = (GPU_WARM_UP, GPU_STEPS) if device.type == "cuda" else (1, 1)
        for number in range(warm_up):
            way.step(number)
        marks: list[_Mark] = []

        def mark(*_: object) -> None:
            marks.append(_Mark(device))

        way.model.head.weight.register_post_accumulate_grad_hook(mark)
        way.optimizer.register_step_pre_hook(mark)
        harness.synchronize(device)
        for number in range(warm_up, warm_up + steps):
            mark()
            way.step(number)
        mark()
        harness.synchronize(device)
        # Of each step its start, its first and its last gradient; then the end of all.
        seconds = [one.until(next_) for one, next_ in itertools.pairwise(marks)]
        forward, backward, update = (statistics.mean(seconds[part::3]) for part in range(3))
        peak = max(0, memory.peak(device) - held)
        return StepTiming(name, forward, backward, update, peak, way.flops)


class _Mark:
    """A moment of a computation; on a GPU it is noted there, without waiting."""

    def __init__(self, device: torch.device) -> None:
        self.event = torch.cuda.Event(enable_timing=True) if device.type == "cuda" else None
        if self.event is not None:
            self.event.record()
        self.time = time.perf_counter()

    def until(self, other: _Mark) -> float:
        """Seconds; on a GPU, both moments must be over."""
        if self.event is None or other.event is None:
            return other.time - self.time
        return float(self.event.elapsed_time(other.event)) / 1000


# --- The report -----------------------------------------------------------------------------------


def table(results: TrainResults, size: str) -> tables.Table:
    """The ways of one size, and the fine models."""
    models = [
        ("LlamaGen's step, plain", size, "plain"),
        ("baseline", size, "baseline"),
        (f"CTF coarse, K = {IMAGENET.clusters}", size, "coarse"),
        (f"CTF fine {RECOMMENDED}", "fine", RECOMMENDED),
        (f"CTF fine {PAPER}", "fine", PAPER),
    ]
    ways = [
        (label + suffix, kind, name + suffix)
        for label, kind, name in models
        for suffix in ("", BF16, BF16 + COMPILED)
    ]
    rows = []
    for label, kind, name in ways:
        if not (timings := timings_of(results, kind, name)):
            continue  # not on this device, or not yet
        machines = [group.machine for group in results.groups.values()]
        peak = statistics.median(m.bf16 if BF16 in name else m.fp32 for m in machines)
        seconds, flops = statistics.median(t.seconds for t in timings), timings[0].flops
        parts = ("forward", "backward", "update")
        rows.append(
            (
                label,
                tables.spread([timing.seconds for timing in timings]),
                *(f"{statistics.median(getattr(t, part) for t in timings):.2f}" for part in parts),
                f"{results.benchmark.batch * IMAGENET.length / seconds:,.0f}",
                *(
                    tables.spread(speed_ups(results, size, other, name)) if kind == size else ""
                    for other in ("plain", "baseline")
                ),
                f"{flops / 1e12:.2f}",
                f"{flops / seconds / peak:.0%}",
                f"{max(timing.peak for timing in timings) / 1e9:.1f}",
            )
        )
    columns = (
        "", "step, s", "forward", "backward", "update", "tokens/s", "speed, plain = 1",
        "speed, baseline = 1", "10^12 FLOP", "of the peak", "memory, GB",
    )  # fmt: skip
    return columns, rows


def timings_of(results: TrainResults, kind: str, name: str) -> list[StepTiming]:
    """All rounds of a way; `kind` is a size or "fine"."""
    rounds = [group for key, group in results.groups.items() if key.startswith(f"{kind} round ")]
    return [timing for group in rounds for timing in group.timings if timing.name == name]


def speed_ups(results: TrainResults, size: str, other: str, name: str) -> list[float]:
    """How many times as fast as another way one is, in each round."""
    others = timings_of(results, size, other) or timings_of(results, size, other + BF16)
    both = zip(others, timings_of(results, size, name), strict=True)
    return [theirs.seconds / ours.seconds for theirs, ours in both]


def report(results: TrainResults) -> list[str]:
    """The paragraphs and tables of train.md."""
    machines = [group.machine for group in results.groups.values()]
    fp32, bf16 = (tables.span([getattr(m, p) for m in machines]) for p in ("fp32", "bf16"))
    batch, rounds = results.benchmark.batch, results.benchmark.rounds
    on_gpu = results.environment["device"].startswith("cuda")
    side = harness.LIMIT_SIDE_GPU if on_gpu else harness.LIMIT_SIDE
    parts = [
        f"Steps of {batch} images, in single precision unless stated "
        f"otherwise. Medians, in brackets the minimum and the maximum of {rounds} rounds in turn. "
        f"{tables.listed(results.environment)}. Products of "
        f"{side} x {side} reached {fp32} GFLOP/s before the rounds, "
        f"in bfloat16 {bf16}; the medians are the peaks."
    ]
    for size in results.benchmark.sizes:
        parts += [f"### Size {size}", markdown_table(*table(results, size))]
    return parts


def summary(results: TrainResults, size: str) -> str:
    """How fast the steps of one size are, in a sentence."""
    ways = {"plain": "the plain step", "baseline": "the baseline"}

    def compared(name: str, other: str) -> str:
        ratio = statistics.median(speed_ups(results, size, other, name))
        return f"{ratio:.2f} times as fast as {ways[other]}"

    suffix = "" if timings_of(results, size, "plain") else BF16  # all are, on a GPU
    text = (
        f"size {size}: the baseline is {compared(f'baseline{suffix}', 'plain')}, the coarse model "
        f"{compared(f'coarse{suffix}', 'baseline')}"
    )
    if timings_of(results, size, f"baseline{BF16}") and not suffix:
        text += f"; in bfloat16 the baseline is {compared(f'baseline{BF16}', 'plain')}"
    return text
