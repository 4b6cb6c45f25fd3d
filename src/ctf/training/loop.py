"""The training loop, for whatever is trained: resumable to the bit, logged, stopped if not finite.

A `Trainable` knows how to make one step; the loop knows when to log, evaluate, save and stop.
Every step draws its randomness from (seed, step) alone, so a state on disk is tensors and nothing
else, and a run that was killed ends with the same bits as one that was not.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from ctf.common import claims, memory, signals, storage
from ctf.common.distributed import ALONE, World, full_tensor
from ctf.common.errors import Stopped, UserError
from ctf.common.precision import Precision
from ctf.common.progress import Progress
from ctf.common.rng import generator
from ctf.training import state

LOG_EVERY = 20  # steps averaged into one line of metrics.jsonl
COUNTED = ("images", "tokens")  # of what a step returns: logged per second, not as a mean
SAVE_SECONDS = 20.0  # a kill loses at most about this much work
NAMED = 8  # pictures of a batch that are named


@dataclasses.dataclass(frozen=True)
class Execution:
    """How a step is computed. What it computes stays the same, up to rounding.

    Args:
        micro_batch: pictures that a process takes at a time; None: its whole share of the batch.
        checkpoint_activations: keep the input of each block only, and compute the rest again.
        shard: cut weights, gradients, moments and averages into parts, one for each process.
        compile: let torch.compile fuse what can be fused.
        precision: of a transformer's products. "auto": bf16 on GPUs that have it, else fp32.
            "bf16": also on a processor that multiplies bfloat16. Weights, moments, averages, norms
            and the loss are in single precision always.

    Raises:
        UserError: a micro-batch of no pictures.
    """

    micro_batch: int | None = None
    checkpoint_activations: bool = False
    shard: bool = False
    compile: bool = False
    precision: Precision = "auto"

    def __post_init__(self) -> None:
        if self.micro_batch is not None and self.micro_batch < 1:
            raise UserError(f"micro-batch: got {self.micro_batch}, expected 1 or more")


PLAINLY = Execution()


class Trainable(Protocol):
    """What the loop asks of a thing that is trained."""

    def step(self, step: int) -> Mapping[str, Tensor | float]:
        """Makes one optimiser step, number `step` (from 0); returns what is to be logged.

        "images" and "tokens" are how many all processes saw; they are logged per second.
        """

    def evaluate(self) -> Mapping[str, float]:
        """Metrics on held-out data."""

    def state(self) -> Mapping[str, Tensor]:
        """Everything that must survive a kill; no name begins with "loop."."""

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of `state`."""


def run(
    trainable: Trainable,
    folder: Path,
    steps: int,
    *,
    evaluate_every: int,
    evaluate_first: bool = False,
    progress: Progress | None = None,
    world: World = ALONE,
) -> None:
    """Trains up to `steps`, going on from the newest state in `folder`/state if there is one.

    Writes `folder`/metrics.jsonl: a line for each LOG_EVERY steps with the mean of what the steps
    returned ("split": "train"), and one for each evaluation ("split": "val"), the first of them
    before the first step if `evaluate_first`. A state is saved where a line ends, now and then, and
    upon SIGTERM with what the line has so far; so a resumed run logs the same means. Of several
    processes, all train and the first one writes.

    Raises:
        Stopped: by SIGTERM, which any of the processes got; what was trained is saved.
    """
    log = _Metrics(folder / "metrics.jsonl", world)
    start, sums = _load_state(trainable, folder / "state", world)
    seconds_before = log.forget_after(start) + sums.get("seconds", 0.0)
    began = last_saved = time.monotonic()
    if evaluate_first and start == 0:
        log.append(0, "val", trainable.evaluate(), 0.0)
    with signals.termination_requested() as requested, memory.keep_freed():
        for step in range(start, steps):
            _step(trainable, step, sums)
            done = step + 1
            save = False
            if done % LOG_EVERY == 0 or done == steps:
                count = (done - 1) % LOG_EVERY + 1
                means = _means(sums, count)
                sums = {}
                seconds = seconds_before + time.monotonic() - began
                log.append(done, "train", means, seconds)
                if progress is not None:
                    progress(done, steps, means)
                if done % _whole_lines(evaluate_every) == 0 or done == steps:
                    log.append(done, "val", trainable.evaluate(), seconds)
                save = world.any(time.monotonic() - last_saved > SAVE_SECONDS) or done == steps
            stop = world.any(requested.is_set()) and done < steps
            if save or stop:
                line = {f"loop.{k}": torch.tensor(v, dtype=torch.double) for k, v in sums.items()}
                tensors = {**trainable.state(), **line}
                state.save_state(folder / "state", done, tensors, world)
                last_saved = time.monotonic()
            if stop:
                message = f"{folder}: stopped after step {done} and saved; run it again to resume"
                raise Stopped(message if world.is_main else "")


def _step(trainable: Trainable, step: int, sums: dict[str, float]) -> None:
    """Makes a step, and adds what it returns and how long it took to the sums of a line."""
    began = time.monotonic()
    logged = trainable.step(step)
    for name, value in logged.items():
        sums[name] = sums.get(name, 0.0) + float(value)
    # After the values were read: a GPU has then made the step.
    sums["seconds"] = sums.get("seconds", 0.0) + time.monotonic() - began


def _means(sums: Mapping[str, float], count: int) -> dict[str, float]:
    """The line of `count` steps: means, and of what is counted how many a second of the steps."""
    seconds = max(sums["seconds"], 1e-9)
    return {
        f"{name}_per_second" if name in COUNTED else name: (
            round(total / seconds, 1) if name in COUNTED else total / count
        )
        for name, total in sums.items()
        if name != "seconds"
    }


def _load_state(trainable: Trainable, folder: Path, world: World) -> tuple[int, dict[str, float]]:
    """Loads the newest state, if there is one: the steps it is after, and the sums of its line."""
    # The first process decides, since it is the one that drops a damaged state.
    start = world.broadcast(state.latest_state(folder) if world.is_main else 0)
    if not start:
        return 0, {}
    tensors = state.load_state(folder, start, trainable.state())
    trainable.load_state(tensors)
    return start, {
        name: float(sum_) for name, sum_ in state.without_prefix(tensors, "loop.").items()
    }


def finish(
    folder: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    world: World = ALONE,
) -> None:
    """Writes the trained weights, the mark of a finished stage, and drops what resuming needed.

    Weights that are cut into parts among processes are put together.
    """
    found = {name: full_tensor(tensor) for name, tensor in tensors.items()}

    def write() -> None:
        storage.save_tensors(folder / "model.safetensors", found, metadata)
        shutil.rmtree(folder / "state", ignore_errors=True)

    world.on_main(write)


def begin(folder: Path, config: Mapping[str, Any], world: World = ALONE) -> bool:
    """Claim the folder of a stage that `config` describes; return whether it is still to train.

    Raises:
        UserError: The folder belongs to another configuration, or holds something else.
    """
    claims.claim(folder, config, what="a training run", world=world)
    if not is_finished(folder):
        return True
    # A kill may have come between the weights and the end of the states.
    world.on_main(lambda: shutil.rmtree(folder / "state", ignore_errors=True))
    return False


def is_finished(folder: Path) -> bool:
    return (folder / "model.safetensors").is_file()


def seconds_per_step(trainable: Trainable, *, warm_up: int = 2, timed: int = 6) -> float:
    """Median duration of a step in seconds. The trainable is changed: use one to throw away."""
    durations = []
    with memory.keep_freed():
        for step in range(warm_up + timed):
            began = time.perf_counter()
            trainable.step(step)
            durations.append(time.perf_counter() - began)
    return float(np.median(durations[warm_up:]))


def last_metrics(folder: Path, split: Literal["train", "val"]) -> dict[str, float]:
    """The newest line of a stage's metrics.jsonl of that split; {} if there is none."""
    lines = read_metrics(folder)
    return next((line for line in reversed(lines) if line["split"] == split), {})


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """All lines of a stage's metrics.jsonl; [] if there is none."""
    return _read_metrics(folder / "metrics.jsonl")


def _whole_lines(evaluate_every: int) -> int:
    return max(1, round(evaluate_every / LOG_EVERY)) * LOG_EVERY


class _Metrics:
    """The file metrics.jsonl; of several processes, the first one writes it."""

    def __init__(self, path: Path, world: World) -> None:
        self.path, self.world = path, world

    def append(self, step: int, split: str, metrics: Mapping[str, float], seconds: float) -> None:
        line = {"step": step, "split": split, **metrics, "seconds": round(seconds, 3)}

        def write() -> None:
            with storage.user_errors(self.path):
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with open(self.path, "a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")

        self.world.on_main(write)

    def forget_after(self, step: int) -> float:
        """Drops lines of steps that will be made again; returns the seconds spent up to `step`."""
        kept: list[dict[str, Any]] = []

        def forget() -> None:
            if not self.path.is_file():
                return
            kept.extend(line for line in _read_metrics(self.path) if 0 < step >= line["step"])
            with storage.atomic(self.path) as temporary:
                lines = (json.dumps(line) + "\n" for line in kept)
                temporary.write_text("".join(lines), encoding="utf-8")

        self.world.on_main(forget)
        return float(kept[-1]["seconds"]) if kept else 0.0


def _read_metrics(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break  # the line that a kill cut short
    return lines


# --- What one step is made of ---------------------------------------------------------------------


def check(training: Any) -> None:
    """Checks what the configuration of every training has.

    Raises:
        UserError: names the first value that is out of its range.
    """
    for name in ("steps", "batch_size", "evaluate_every", "evaluate_images"):
        if getattr(training, name) < 1:
            raise UserError(f"{name}: got {getattr(training, name)}, expected 1 or more")
    for name in ("learning_rate", "clip"):
        if not 0 < getattr(training, name) < math.inf:
            raise UserError(f"{name}: got {getattr(training, name)}, expected more than 0")
    for name in ("warm_up", "weight_decay"):
        if not 0 <= getattr(training, name) < math.inf:
            raise UserError(f"{name}: got {getattr(training, name)}, expected 0 or more")
    if len(training.betas) != 2 or not all(0 <= beta < 1 for beta in training.betas):
        raise UserError(f"betas: got {list(training.betas)}, expected two from 0 to below 1")


@functools.lru_cache(maxsize=2)
def _epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    return generator(seed, epoch).permutation(count)


def batch_indices(count: int, batch_size: int, seed: int, step: int) -> np.ndarray:
    """Which of `count` items step `step` sees: every epoch is a permutation, none is cut short."""
    first = step * batch_size
    positions = np.arange(first, first + batch_size)
    return np.concatenate(
        [
            _epoch_order(count, seed, int(epoch))[positions[positions // count == epoch] % count]
            for epoch in np.unique(positions // count)
        ]
    )


Schedule = Literal["constant", "cosine"]


def learning_rate(
    step: int, steps: int, peak: float, warm_up: int, schedule: Schedule, final: float
) -> float:
    """Linear warm-up over `warm_up` steps, then constant, or half a cosine to `final` * peak."""
    if step < warm_up:
        return peak * (step + 1) / warm_up
    if schedule == "constant":
        return peak
    part = min(1.0, (step - warm_up) / max(1, steps - warm_up))
    return peak * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * part)))


def make_optimizer(
    module: nn.Module, rate: float, betas: Sequence[float], weight_decay: float
) -> torch.optim.AdamW:
    """AdamW that decays matrices (and convolutions) only, as LlamaGen does."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(betas[0], betas[1]), fused=True)
    for parameter in parameters:  # as its first step would: so a state has the same names always
        optimizer.state[parameter] = {
            "step": torch.zeros((), device=parameter.device),
            "exp_avg": torch.zeros_like(parameter.detach()),
            "exp_avg_sq": torch.zeros_like(parameter.detach()),
        }
    return optimizer


def update(
    optimizer: torch.optim.Optimizer,
    loss: Tensor,
    rate: float,
    clip: float,
    step: int,
    name: str,
    pictures: np.ndarray,
    world: World = ALONE,
) -> Tensor:
    """One step of the optimiser along the gradients; returns their norm before clipping.

    Args:
        loss: whose gradients they are, the mean over all processes.
        pictures: the numbers of those in the batch, to name where something went wrong.

    Raises:
        UserError: the loss or the gradient is not finite, in all processes alike; neither weights
            nor optimiser have been changed then.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    value = float(loss)
    if not math.isfinite(value):
        raise world.error(_not_finite(step, name, value, pictures))
    norm = full_tensor(nn.utils.clip_grad_norm_(parameters, clip))
    if not math.isfinite(float(norm)):
        raise world.error(_not_finite(step, f"gradient norm of the {name}", float(norm), pictures))
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    return norm


def _not_finite(step: int, name: str, value: float, pictures: np.ndarray) -> str:
    named = ", ".join(map(str, pictures[:NAMED])) + ", ..." * (len(pictures) > NAMED)
    return (
        f"step {step}: {name} is {value} on a batch of {len(pictures)}, the pictures {named}; "
        "stopped before the update, and the last state is good\n"
        "a lower learning rate usually helps: --set ...learning_rate=..., in a new folder"
    )


def update_ema(ema: Mapping[str, Tensor], module: nn.Module, decay: float, step: int) -> None:
    """Moves `ema` towards the parameters; the decay grows with the step, so short runs work too."""
    decay = min(decay, (1 + step) / (10 + step))
    own = dict(module.named_parameters())
    with torch.no_grad():
        torch._foreach_lerp_(list(ema.values()), [own[name] for name in ema], 1 - decay)
