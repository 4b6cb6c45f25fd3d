"""The training loop: logs, evaluates and saves, and resumes to the bit.

A `Trainable` makes single steps; the loop decides when to log, evaluate, save and stop. Every step
draws its random numbers from (seed, step) alone, so a state is nothing but tensors, and a training
that was killed and resumed ends with the same bits as one that was not.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ctf.common import claims, locks, memory, signals, storage, threads
from ctf.common.distributed import ALONE, Vote, World, full_tensor
from ctf.common.errors import Stopped, UserError
from ctf.common.precision import Precision
from ctf.common.progress import Progress
from ctf.training import state
from ctf.training.metrics_log import Split, append_metrics, drop_metrics, read_metrics

LOG_EVERY = 20  # steps averaged into one line of metrics.jsonl
COUNTS = ("images", "tokens")  # of the metrics of a step: logged per second, not averaged
WHAT = "a training run"
SAVE_SECONDS = 20.0  # a kill loses about this much work


@dataclasses.dataclass(frozen=True)
class Execution:
    """How a transformer's step is computed; what it computes is the same, up to rounding.

    The precision is that of matrix products: "auto" is bf16 on GPUs that support it, else fp32.
    Weights, moments, averages, norms and the loss are always in float32.

    Raises:
        UserError: The micro-batch is below 1.
    """

    micro_batch: int | None = None  # images that a process takes at a time; None: all of its share
    checkpoint_activations: bool = False  # store only the input of each block, recompute the rest
    shard: bool = False  # weights, gradients, moments and averages over the processes (FSDP2)
    compile: bool = False  # the blocks, with torch.compile
    precision: Precision = "auto"

    def __post_init__(self) -> None:
        if self.micro_batch is not None and self.micro_batch < 1:
            raise UserError(f"micro-batch: got {self.micro_batch}, expected 1 or more")


DEFAULT_EXECUTION = Execution()


class Trainable(Protocol):
    """What the loop trains.

    in_parts: Whether steps and evaluation use `threads.over_parts`, and want a team.
    """

    in_parts: bool

    def step(self, step: int) -> Mapping[str, Tensor | float]:
        """Take the optimizer step number `step`, counted from 0, and return its metrics.

        "images" and "tokens" are how many all processes saw; they are logged per second. Metrics
        stay on the device: reading a number from a GPU waits until it has nothing left to do.
        """

    def check(self) -> None:
        """Raise a UserError if a step since the last call went wrong; see `optim.Checks`."""

    def evaluate(self) -> Mapping[str, float]:
        """Return metrics on held-out data."""

    def parts(self) -> Mapping[str, state.Part]:
        """Return all that resuming needs, by names other than "loop"."""


OnEvaluation = Callable[[int, Mapping[str, float]], None]  # the step, and the metrics after it


@contextlib.contextmanager
def hold(folder: Path, config: Mapping[str, Any], world: World = ALONE) -> Iterator[bool]:
    """Hold the folder of a training of `config`, unless it is finished; yield what `begin` returns.

    Raises:
        UserError: Another process trains in the folder, or see `begin`.
    """
    is_left_alone = is_finished(folder) and not (folder / locks.NAME).exists()
    if world.broadcast(is_left_alone):
        yield begin(folder, config, world)
        return
    with claims.hold(folder, "config.json", what=WHAT, world=world):
        yield begin(folder, config, world)


def begin(folder: Path, config: Mapping[str, Any], world: World = ALONE) -> bool:
    """Claim the folder of a training of `config`; return whether it is yet to be finished.

    Raises:
        UserError: The folder belongs to another configuration, or holds something else.
    """
    claims.claim(folder, config, what=WHAT, world=world)
    if not is_finished(folder):
        return True
    # `finish` may have been killed after it wrote the weights.
    world.on_main(lambda: shutil.rmtree(folder / "state", ignore_errors=True))
    return False


def run(
    trainable: Trainable,
    folder: Path,
    steps: int,
    *,
    evaluate_every: int,
    evaluate_first: bool = False,
    on_evaluation: OnEvaluation | None = None,
    progress: Progress | None = None,
    world: World = ALONE,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Train up to `steps` steps, from the newest state in `folder`/state if there is one.

    Writes `folder`/metrics.jsonl: every LOG_EVERY steps their mean metrics ("split": "train"), and
    the metrics of each evaluation ("split": "val"): every `evaluate_every` steps, rounded to whole
    lines, at the end, and with `evaluate_first` before the first step. States are saved every
    SAVE_SECONDS where a line ends, and on SIGTERM together with the sums of the line that it
    interrupts, so a resumed training logs the same means. All processes call `on_evaluation` with
    the step and the metrics of each evaluation.

    Raises:
        UserError: The folder was removed.
        Stopped: One of the processes got SIGTERM; the training is saved.
    """

    def log(split: Split, metrics: Mapping[str, float], step: int, seconds: float) -> None:
        world.on_main(check_folder)
        world.on_main(lambda: append_metrics(folder, step, split, metrics, seconds))
        if split == "val" and on_evaluation is not None:
            on_evaluation(step, metrics)

    check_folder = functools.partial(_check_folder, folder, folder.is_dir())

    start, sums = _resume(trainable, folder / "state", world)
    world.on_main(lambda: drop_metrics(folder, start))
    seconds_before = sum(line["seconds"] for line in read_metrics(folder)[-1:])
    seconds_before += sums.get("seconds", 0.0)
    evaluate_every = max(1, round(evaluate_every / LOG_EVERY)) * LOG_EVERY
    began = last_saved = clock()
    stopping = Vote(world)
    if evaluate_first and start == 0:
        log("val", trainable.evaluate(), 0, 0.0)
    with (
        signals.termination_requested() as requested,
        memory.keep_freed(),
        threads.team(trainable.in_parts),
    ):
        for done in range(start + 1, steps + 1):
            _step(trainable, done - 1, sums, clock)
            save = False
            if done % LOG_EVERY == 0 or done == steps:
                means = _means(_read(trainable, sums, clock), (done - 1) % LOG_EVERY + 1)
                sums = {}
                seconds = seconds_before + clock() - began
                log("train", means, done, seconds)
                if progress is not None:
                    progress(done, steps, means)
                if done % evaluate_every == 0 or done == steps:
                    log("val", trainable.evaluate(), done, seconds)
                save = world.any(clock() - last_saved > SAVE_SECONDS) or done == steps
            stop = stopping(requested.is_set()) and done < steps
            if save or stop:
                line = {
                    f"loop.{name}": torch.tensor(value, dtype=torch.double)
                    for name, value in _read(trainable, sums, clock).items()
                }
                tensors = state.collect(trainable.parts()) | line
                world.on_main(check_folder)
                state.save_state(folder / "state", done, tensors, world)
                last_saved = clock()
            if stop:
                message = f"{folder}: stopped after step {done} and saved; run it again to resume"
                raise Stopped(message if world.is_main else "")


def _check_folder(folder: Path, existed: bool) -> None:
    """Raise a UserError if a training's folder is gone: no command would recognise the rest."""
    if existed and not folder.is_dir():
        raise UserError(f"{folder} was removed during the training; run the command again")


Sums = dict[str, Tensor | float]  # of the metrics of a line, each where its values are


def _resume(trainable: Trainable, folder: Path, world: World) -> tuple[int, Sums]:
    """Load the newest state; return its step, 0 if there is none, and the sums of its line."""
    # The first process decides, since it removes damaged states.
    start = world.broadcast(state.latest_state(folder) if world.is_main else 0)
    if not start:
        return 0, {}
    tensors = state.load_state(folder, start, like=state.collect(trainable.parts()))
    state.restore(trainable.parts(), tensors)
    sums = state.without_prefix(tensors, "loop.")
    return start, {name: float(value) for name, value in sums.items()}


def _step(trainable: Trainable, step: int, sums: Sums, clock: Callable[[], float]) -> None:
    """Take a step; add its metrics and its duration to the sums of a line."""
    began = clock()
    for name, value in trainable.step(step).items():
        value = value.double() if isinstance(value, Tensor) else value
        sums[name] = sums.get(name, 0.0) + value
    sums["seconds"] = sums.get("seconds", 0.0) + clock() - began


def _read(trainable: Trainable, sums: Sums, clock: Callable[[], float]) -> dict[str, float]:
    """Return the sums of a line as numbers, all read at once; check the steps behind them.

    Only then has a GPU finished these steps, so the time that it takes counts as theirs.
    """
    began = clock()
    tensors = {name: value for name, value in sums.items() if isinstance(value, Tensor)}
    read: list[float] = torch.stack([*tensors.values()]).tolist() if tensors else []
    values = sums | dict(zip(tensors, read, strict=True))
    numbers = {name: float(value) for name, value in values.items()}
    trainable.check()
    if "seconds" in numbers:
        numbers["seconds"] += clock() - began
    return numbers


def _means(sums: Mapping[str, float], count: int) -> dict[str, float]:
    """Return the metrics of a line of `count` steps."""
    seconds = max(sums["seconds"], 1e-9)
    means = {}
    for name, total in sums.items():
        if name in COUNTS:
            means[f"{name}_per_second"] = round(total / seconds, 1)
        elif name != "seconds":
            means[name] = total / count
    return means


def finish(folder: Path, tensors: Mapping[str, Tensor], world: World = ALONE) -> None:
    """Write the trained weights, which mark a stage as finished, and remove its states.

    Sharded weights are written in full; all processes must call this.
    """
    full = {name: full_tensor(tensor) for name, tensor in tensors.items()}

    def write() -> None:
        storage.save_tensors(folder / "model.safetensors", full)
        shutil.rmtree(folder / "state", ignore_errors=True)

    world.on_main(write)


def is_finished(folder: Path) -> bool:
    """Return whether a stage's training is finished."""
    return (folder / "model.safetensors").is_file()


def seconds_per_step(
    trainable: Trainable,
    *,
    warm_up: int = 2,
    timed: int = 6,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Return the median duration of a step in seconds; the trainable is changed by it."""
    durations = []
    with memory.keep_freed(), threads.team(trainable.in_parts):
        for step in range(warm_up + timed):
            sums: Sums = {}
            began = clock()
            _step(trainable, step, sums, clock)
            _read(trainable, sums, clock)
            durations.append(clock() - began)
    return statistics.median(durations[warm_up:])
