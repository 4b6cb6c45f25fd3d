"""`ctf bench train`: how fast a training step is, beside LlamaGen's plain one.

Models have random weights and the shapes of 256-pixel pictures: 256 tokens, 1000 classes, a
codebook of 16384, for CTF 512 clusters of 32. Compared are whole steps, from the batch to the
moving average of the weights: LlamaGen's step as `plain` writes it, and those that `ctf train`
makes of the full-vocabulary baseline, of the coarse and of the fine model. All have the same
dropout, clipping and AdamW; LlamaGen's has no moving average, as by its defaults. They are in
single precision; where a processor multiplies bfloat16, baseline and coarse model are also timed
as with `--precision bf16`.

In each round the ways take turns, one model in memory at a time. The first step of each is not
timed: it makes the moments, and fills what the second finds in memory.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ctf.bench import llamagen_reference, measuring
from ctf.bench import report as bench_report
from ctf.bench import tokens as tokens_bench
from ctf.bench.measuring import measured
from ctf.bench.sample import CLASSES, CODES, COUNT, GRID, LENGTH, PAPER, RECOMMENDED
from ctf.bench.work import Machine
from ctf.common import memory, storage
from ctf.common.distributed import World
from ctf.common.errors import UserError
from ctf.common.precision import supports_bf16
from ctf.common.progress import Progress
from ctf.data.tokens import Tokens
from ctf.models.clusters import Clusters, identity
from ctf.models.coarse import CoarseModel
from ctf.models.fine import FineModel
from ctf.models.sizes import SIZES
from ctf.training import cost, optim
from ctf.training.loop import Execution
from ctf.training.transformers import Trainer, TrainingConfig, coarse_objective, fine_objective

FILE = "train.json"
PICTURES = 256  # in the tokens that are read; any number will do
BF16 = ", bf16"  # ends the names of ways whose products are in bfloat16
GOAL = 1.3  # LlamaGen's plain step / the baseline's

SINGLE = Execution(precision="fp32")

Step = Callable[[int], Any]


@dataclasses.dataclass(frozen=True)
class Asked:
    """What is measured."""

    sizes: tuple[str, ...] = ("B", "L")
    batch: int = 8
    rounds: int = 3

    def __post_init__(self) -> None:
        for size in self.sizes:
            if size not in SIZES:
                raise UserError(f"unknown size {size!r}, expected some of {', '.join(SIZES)}")
        if not self.sizes:
            raise UserError("sizes: expected at least one")
        for name in ("batch", "rounds"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}: got {getattr(self, name)}, expected 1 or more")


@dataclasses.dataclass(frozen=True)
class Timing:
    """One step of one way, in seconds.

    forward: until the output layer has its gradient. backward: until all have, and they are
    clipped. update: AdamW, and the moving average where there is one. peak: bytes held at the most.
    """

    name: str
    forward: float
    backward: float
    update: float
    peak: int
    flops: int

    @property
    def seconds(self) -> float:
        return self.forward + self.backward + self.update


@dataclasses.dataclass(frozen=True)
class Group:
    """One round: the ways in turn, and what the machine reached just before."""

    machine: Machine
    timings: tuple[Timing, ...]


@dataclasses.dataclass(frozen=True)
class Result:
    """A whole run; `groups` by name: "B round 1", "fine round 1"."""

    asked: Asked
    where: dict[str, str]
    groups: dict[str, Group]

    def of(self, kind: str, name: str) -> list[Timing]:
        """All rounds of a way; `kind` is a size or "fine"."""
        return [
            timing
            for group_name, group in self.groups.items()
            for timing in group.timings
            if group_name.startswith(f"{kind} round ") and timing.name == name
        ]


def run(asked: Asked, folder: Path, device: torch.device, progress: Progress) -> Result:
    """Measures what is not in `folder`/train.json yet; killed, it goes on after the last round.

    Raises:
        UserError: the file there is of another run.
    """
    result = measured(Result, asked, _jobs(asked, device), folder / FILE, device, progress)
    with storage.atomic(folder / "train.md") as temporary:
        temporary.write_text(markdown(result), encoding="utf-8")
    return result


def describe(asked: Asked, device: torch.device) -> list[str]:
    """The names of the groups that would be measured."""
    return list(_jobs(asked, device))


def _jobs(asked: Asked, device: torch.device) -> dict[str, Callable[[Machine], Group]]:
    jobs = {}
    for kind in (*asked.sizes, "fine"):
        for number in range(1, asked.rounds + 1):
            jobs[f"{kind} round {number}"] = _round(kind, number, asked, device)
    return jobs


def _round(
    kind: str, number: int, asked: Asked, device: torch.device
) -> Callable[[Machine], Group]:
    def measure(machine: Machine) -> Group:
        with tempfile.TemporaryDirectory() as temporary:
            tokens_bench.write_cache(Path(temporary), PICTURES, CODES, LENGTH, CLASSES)
            tokens = Tokens(Path(temporary), "train")
            given = tokens, asked, device
            ways: dict[str, Callable[[], _Way]] = {
                "plain": lambda: _plain(kind, *given),
                "baseline": lambda: _coarse(kind, identity(CODES), *given),
                "coarse": lambda: _coarse(kind, _clusters(), *given),
            }
            if device.type == "cpu" and supports_bf16(device):
                low = Execution(precision="bf16")
                ways |= {
                    f"baseline{BF16}": lambda: _coarse(kind, identity(CODES), *given, low),
                    f"coarse{BF16}": lambda: _coarse(kind, _clusters(), *given, low),
                }
            if kind == "fine":
                ways = {
                    RECOMMENDED: lambda: _fine(RECOMMENDED, *given),
                    PAPER: lambda: _fine(PAPER, *given),
                }
            turned = list(ways) if number % 2 else list(ways)[::-1]  # none always follows the same
            timings = {}
            for name in turned:
                with (
                    contextlib.nullcontext() if name == "plain" else memory.keep_freed()
                ):  # as `loop.run`
                    timings[name] = _timed(name, ways[name], device)
        return Group(machine, tuple(timings[name] for name in ways))

    return measure


@dataclasses.dataclass(frozen=True)
class _Way:
    model: CoarseModel | FineModel
    optimizer: torch.optim.Optimizer
    step: Step
    flops: int


def _timed(name: str, make: Callable[[], _Way], device: torch.device) -> Timing:
    gc.collect()
    memory.trim()
    held = memory.allocated(device)
    memory.reset_peak(device)
    way = make()
    way.step(0)
    marks: dict[str, float] = {}

    def mark(what: str) -> Callable[..., None]:
        def now(*_: object) -> None:
            measuring.wait(device)
            marks.setdefault(what, time.perf_counter())

        return now

    way.model.head.weight.register_post_accumulate_grad_hook(mark("forward"))
    way.optimizer.register_step_pre_hook(mark("backward"))
    began = time.perf_counter()
    seconds, _ = measuring.timed(lambda: way.step(1), device)
    forward, backward = marks["forward"] - began, marks["backward"] - marks["forward"]
    peak = max(0, memory.peak(device) - held)
    return Timing(name, forward, backward, seconds - forward - backward, peak, way.flops)


def _plain(size: str, tokens: Tokens, asked: Asked, device: torch.device) -> _Way:
    config, t = SIZES[size].config(GRID, CLASSES), TrainingConfig(batch_size=asked.batch)
    model = CoarseModel(config, CODES).to(device).train()
    optimizer = optim.make_optimizer(model, t.learning_rate, t.betas, t.weight_decay)

    def step(number: int) -> float:
        indices_B = optim.batch_indices(len(tokens), asked.batch, 0, number)
        classes_B = torch.from_numpy(tokens.classes_N[indices_B]).to(device)
        codes_BL = tokens.codes(indices_B).to(device)
        return float(llamagen_reference.train_step(model, optimizer, codes_BL, classes_B))

    flops = asked.batch * cost.transformer_flops(config, LENGTH, CODES)
    return _Way(model, optimizer, step, flops)


def _coarse(
    size: str,
    clusters: Clusters,
    tokens: Tokens,
    asked: Asked,
    device: torch.device,
    execution: Execution = SINGLE,
) -> _Way:
    config = SIZES[size].config(GRID, CLASSES)
    model = CoarseModel(config, clusters.count)
    trainer = _trainer(model, coarse_objective(clusters), tokens, asked, device, execution)
    flops = asked.batch * cost.transformer_flops(config, LENGTH, clusters.count)
    return _Way(model, trainer.optimizer, trainer.step, flops)


def _fine(size: str, tokens: Tokens, asked: Asked, device: torch.device) -> _Way:
    config = SIZES[size].config(GRID, CLASSES)
    model = FineModel(config, _clusters())
    trainer = _trainer(model, fine_objective(_clusters()), tokens, asked, device)
    flops = asked.batch * cost.transformer_flops(config, 1 + LENGTH, CODES // COUNT)
    return _Way(model, trainer.optimizer, trainer.step, flops)


def _trainer(
    model: CoarseModel | FineModel,
    objective: Any,
    tokens: Tokens,
    asked: Asked,
    device: torch.device,
    execution: Execution = SINGLE,
) -> Trainer:
    training = TrainingConfig(batch_size=asked.batch)
    return Trainer(model, objective, tokens, tokens, training, World(device=device), execution)


def _clusters() -> Clusters:
    return Clusters.from_labels(torch.arange(CODES) % COUNT)


# --- For people -----------------------------------------------------------------------------------


def rows(result: Result, size: str) -> bench_report.Table:
    """The ways of one size, and the fine models."""
    ways = [
        ("LlamaGen's step, plain", size, "plain"),
        ("baseline", size, "baseline"),
        ("baseline, bf16", size, f"baseline{BF16}"),
        (f"CTF coarse, K = {COUNT}", size, "coarse"),
        (f"CTF coarse, K = {COUNT}, bf16", size, f"coarse{BF16}"),
        (f"CTF fine {RECOMMENDED}", "fine", RECOMMENDED),
        (f"CTF fine {PAPER}", "fine", PAPER),
    ]
    machines = [group.machine for group in result.groups.values()]
    lines = []
    for label, kind, name in ways:
        timings = result.of(kind, name)
        if not timings:
            continue  # a processor without bfloat16
        reached = statistics.median(m.bf16 if name.endswith(BF16) else m.fp32 for m in machines)
        seconds = statistics.median(timing.seconds for timing in timings)
        flops = timings[0].flops
        lines.append(
            (
                label,
                _spread([timing.seconds for timing in timings]),
                *(
                    f"{statistics.median(getattr(timing, part) for timing in timings):.2f}"
                    for part in ("forward", "backward", "update")
                ),
                f"{result.asked.batch * LENGTH / seconds:,.0f}",
                *(
                    _spread(ratios(result, size, other, name)) if kind == size else ""
                    for other in ("plain", "baseline")
                ),
                f"{flops / 1e12:.2f}",
                f"{flops / seconds / reached:.0%}",
                f"{max(timing.peak for timing in timings) / 1e9:.1f}",
            )
        )
    columns = (
        "", "step, s", "forward", "backward", "update", "tokens/s", "speed, plain = 1",
        "speed, baseline = 1", "10^12 FLOP", "of the peak", "memory, GB",
    )  # fmt: skip
    return columns, lines


def ratios(result: Result, size: str, other: str, name: str) -> list[float]:
    """How many times faster than the other one a way is, in each round."""
    both = zip(result.of(size, other), result.of(size, name), strict=True)
    return [theirs.seconds / ours.seconds for theirs, ours in both]


def markdown(result: Result) -> str:
    asked = result.asked
    machines = [group.machine for group in result.groups.values()]
    fp32, bf16 = [m.fp32 / 1e9 for m in machines], [m.bf16 / 1e9 for m in machines]
    parts = [
        f"Steps of {asked.batch} images, single precision where not said otherwise. Medians, in "
        f"brackets the least and the most of {asked.rounds} rounds in turn. "
        f"{bench_report.listed(result.where)}. Products of {measuring.SIDE} x {measuring.SIDE} "
        f"reached {min(fp32):,.0f} to {max(fp32):,.0f} GFLOP/s before the rounds, in bfloat16 "
        f"{min(bf16):,.0f} to {max(bf16):,.0f}; the medians are the peaks.",
    ]
    for size in asked.sizes:
        parts += [f"### Size {size}", bench_report.as_markdown(rows(result, size))]
    return "\n\n".join(parts) + "\n"


def verdict(result: Result, size: str) -> str:
    """The goal, and whether it is reached."""
    ratio = statistics.median(ratios(result, size, "plain", "baseline"))
    coarse = statistics.median(ratios(result, size, "baseline", "coarse"))
    said = (
        f"size {size}: the baseline is {ratio:.2f} times as fast as the plain step (goal: >= "
        f"{GOAL:g}), the coarse model {coarse:.2f} times as fast as the baseline"
    )
    if result.of(size, f"baseline{BF16}"):
        low = statistics.median(ratios(result, size, "plain", f"baseline{BF16}"))
        said += f"; in bfloat16 the baseline is {low:.2f} times as fast as the plain step"
    return said


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})"
