"""`ctf bench sample`: how fast drawing is, beside the plain way and the machine's limits.

Models have random weights and the shapes of 256-pixel pictures: 256 tokens, 1000 classes, a
codebook of 16384, for CTF 512 clusters of 32. What is compared is measured in turn, round after
round, in one process. Of the 256 steps of an image those are timed at which the cache grows, and
the ones in the middle between; the others take as long as these. The fine stage draws 8 images at
a time and the decoder one, so no more are timed.

Shapes: B batch, L tokens of an image, N heads, E head width.
"""

from __future__ import annotations

import copy
import dataclasses
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ctf.bench import llamagen_reference, work
from ctf.bench.measuring import measured, timed, working_memory
from ctf.bench.work import Machine, Work
from ctf.common.errors import UserError
from ctf.common.progress import Progress
from ctf.kernels import sampling_cpu
from ctf.kernels.sampling_cpu import Engine
from ctf.models import clusters, sampling
from ctf.models.coarse import CoarseModel
from ctf.models.fine import FineModel
from ctf.models.sampling import Sampling
from ctf.models.sizes import SIZES, TOKENIZERS
from ctf.models.tokenizer import VQModel
from ctf.models.transformer import KVCache

FILE = "sample.json"
CODES, COUNT, CLASSES, GRID = 16384, 512, 1000, 16
LENGTH = GRID**2
PAPER, RECOMMENDED = "L", "S"  # fine models, by size
LAYERS_APART = 12  # layers with a cache of their own when timing: more than any processor's cache
GREEDY_BATCH = 2


@dataclasses.dataclass(frozen=True)
class Asked:
    """What is measured."""

    sizes: tuple[str, ...] = ("B", "L", "XL")
    batches: tuple[int, ...] = (1, 8, 32)
    engines: tuple[Engine, ...] = ("auto", "int8")
    guidance: float = 2.0
    rounds: int = 3

    def __post_init__(self) -> None:
        for size in self.sizes:
            if size not in SIZES:
                raise UserError(f"unknown size {size!r}, expected some of {', '.join(SIZES)}")
        for batch in self.batches:
            if not 1 <= batch <= 1024:
                raise UserError(f"batches: got {batch}, expected 1 to 1024 images")
        if self.rounds < 1:
            raise UserError(f"rounds: got {self.rounds}, expected 1 or more")
        if not (self.sizes and self.batches and self.engines):
            raise UserError("sizes, batches, engines: expected at least one of each")

    @property
    def halves(self) -> int:
        return 1 if self.guidance == 1 else 2


@dataclasses.dataclass(frozen=True)
class Timing:
    """One way of doing one stage for one batch.

    seconds: of each round. floor: the least that the machine of this run could take.
    weights, cache: bytes. working: bytes that it held for a while besides these, at the most.
    """

    name: str
    seconds: tuple[float, ...]
    floor: float
    work: Work
    weights: int
    cache: int
    working: int

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def times(self, count: float) -> Timing:
        """The same, so many times one after another."""
        return dataclasses.replace(
            self,
            seconds=tuple(count * seconds for seconds in self.seconds),
            floor=count * self.floor,
            work=self.work.times(count),
        )


@dataclasses.dataclass(frozen=True)
class Group:
    """What was measured in turn, and what the machine reached just before.

    found: facts beside the times, e.g. whether greedy labels were equal.
    """

    machine: Machine
    timings: tuple[Timing, ...]
    found: dict[str, float] = dataclasses.field(default_factory=dict)

    def timing(self, name: str) -> Timing:
        return next(timing for timing in self.timings if timing.name == name)


@dataclasses.dataclass(frozen=True)
class Result:
    """A whole run; `groups` by name: "coarse B 8", "fine 8", "decode", "greedy B", "start"."""

    asked: Asked
    where: dict[str, str]
    groups: dict[str, Group]


def run(asked: Asked, folder: Path, device: torch.device, progress: Progress) -> Result:
    """Measures what is not in `folder`/sample.json yet; killed, it goes on after the last group.

    Raises:
        UserError: the file there is of another run.
    """
    return measured(Result, asked, _jobs(asked, device), folder / FILE, device, progress)


def _jobs(asked: Asked, device: torch.device) -> dict[str, Callable[[Machine], Group]]:
    jobs: dict[str, Callable[[Machine], Group]] = {}

    def add(name: str, measure: Callable[..., Group], *given: Any) -> None:
        without_gradients = torch.inference_mode()(measure)
        jobs[name] = lambda machine: without_gradients(machine, asked, device, *given)

    add("start", _start)
    add("decode", _decoding)
    for batch in dict.fromkeys(map(fine_batch, asked.batches)):
        add(f"fine {batch}", _fine, batch)
    for size in asked.sizes:
        add(f"greedy {size}", _greedy, size)
        for batch in asked.batches:
            add(f"coarse {size} {batch}", _coarse, size, batch)
    return jobs


def fine_batch(batch: int) -> int:
    """How many images of a batch the fine stage draws at a time."""
    return min(batch, sampling.FINE_TOKENS // LENGTH)


# --- The stages -----------------------------------------------------------------------------------


def _bytes(*models: nn.Module | None) -> int:
    """Of the weights as they are held, packed or not."""
    total = 0
    for model in models:
        for part in () if model is None else model.modules():
            total += sum(p.numel() * p.element_size() for p in part.parameters(recurse=False))
            if isinstance(part, sampling_cpu.Packed):
                total += part.packed.numel() * 4
            elif isinstance(part, sampling_cpu.Int8):
                total += part.size
            elif isinstance(part, sampling_cpu.PackedSwiGLU):
                total += _bytes(part.first[0])
    return total


def _coarse_model(size: str, labels: int, device: torch.device) -> CoarseModel:
    with device:
        model = CoarseModel(SIZES[size].config(GRID, CLASSES), labels)
    nn.init.normal_(model.head.weight, std=0.02)
    return model.eval().requires_grad_(False)


class _Steps:
    """A coarse model in our engine, put to any position of a batch."""

    def __init__(self, model: CoarseModel, batch: int, asked: Asked, device: torch.device) -> None:
        self.model, self.settings = model, Sampling(guidance=asked.guidance)
        self.guided = asked.halves == 2
        self.classes_B = torch.randint(CLASSES, (batch,), device=device)
        self.labels_BL = torch.randint(model.count, (batch, LENGTH), device=device)
        self.uniforms_B = torch.rand(batch, dtype=torch.float64, device=device)

    def at(self, position: int) -> Callable[[], Tensor]:
        """What takes the step at `position`; what is before is in the cache."""
        decoder = sampling.Decoder(self.model, self.classes_B, guided=self.guided)
        decoder.cached = [position, position]
        room = min(-(-position // KVCache.BLOCK) * KVCache.BLOCK, LENGTH)
        for stored in (decoder.cache.k, decoder.cache.v):
            apart = stored[:LAYERS_APART]
            if apart[0].shape[2] < room:
                apart = [
                    k.new_full((*k.shape[:2], room, k.shape[3]), 0.01) for k in apart
                ]  # any numbers will do
            stored[:] = [apart[layer % len(apart)] for layer in range(len(stored))]

        def take() -> Tensor:
            logits_BK = decoder.logits(self.labels_BL, position, self.settings.guidance)
            return sampling.choose(logits_BK, self.uniforms_B, 1.0, 0, 1.0)

        return take


class _PlainSteps:
    """The same in the plain way."""

    def __init__(self, model: CoarseModel, batch: int, asked: Asked) -> None:
        self.model, self.guidance = model, asked.guidance
        self.inputs = torch.randint(CLASSES, (asked.halves * batch,))
        self.uniforms_B = torch.rand(batch, dtype=torch.float64)
        shallow = dataclasses.replace(model.config, layers=min(LAYERS_APART, model.config.layers))
        apart, self.masks = llamagen_reference.make_caches(shallow, len(self.inputs))
        apart.fill_(0.01)
        self.caches = [apart[layer % len(apart)] for layer in range(model.config.layers)]

    def at(self, position: int) -> Callable[[], Tensor]:
        def take() -> Tensor:
            logits_BK = llamagen_reference.step(
                self.model, self.inputs, position, self.caches, self.masks
            )
            if self.guidance != 1:
                cond, uncond = logits_BK.chunk(2)
                logits_BK = uncond + (cond - uncond) * self.guidance
            return sampling.choose(logits_BK, self.uniforms_B, 1.0, 0, 1.0)

        return take


def _coarse(machine: Machine, asked: Asked, device: torch.device, size: str, batch: int) -> Group:
    rows = asked.halves * batch
    shape = SIZES[size].config(GRID, CLASSES)
    models: dict[str, CoarseModel] = {}
    ways: dict[str, _Steps | _PlainSteps] = {}
    for kind, labels in (("baseline", CODES), ("ctf", COUNT)):
        model = _coarse_model(size, labels, device)
        for how in asked.engines:
            models[f"{kind} {how}"] = own = copy.deepcopy(model)
            sampling_cpu.prepare(own, None, None, how)
            ways[f"{kind} {how}"] = _Steps(own, batch, asked, device)
        if kind == "baseline" and device.type == "cpu":
            models["plain"], ways["plain"] = model, _PlainSteps(model, batch, asked)
        del model
    # Where the cache grows there is one step, between two such places 31.
    block = KVCache.BLOCK
    positions = {p: n for s in range(0, LENGTH, block) for p, n in ((s, 1), (s + block // 2, 31))}
    working = {}
    for name, way in ways.items():
        way.at(LENGTH - 1)()
        working[name] = working_memory(way.at(LENGTH - 1), device)
    seconds = {name: [0.0] * asked.rounds for name in ways}
    for turn in range(asked.rounds):
        for position, count in positions.items():
            for name, way in ways.items():
                take = way.at(position)
                seconds[name][turn] += count * timed(take, device)[0]
                del take
    timings = []
    for name, model in models.items():
        low = name.endswith("int8")
        dtype = model.trunk.cached_as()[1]
        each = work.steps(shape, model.count, rows, low, dtype)
        total = sum(each, Work())
        floor = sum(one.floor(machine) for one in each)
        length = LENGTH
        if name == "plain":
            length = -(-(1 + LENGTH) // 8) * 8
        cache = 2 * dtype.itemsize * shape.layers * rows * shape.width * length
        timings.append(
            Timing(name, tuple(seconds[name]), floor, total, _bytes(model), cache, working[name])
        )
    return Group(machine, tuple(timings))


def _greedy(machine: Machine, asked: Asked, device: torch.device, size: str) -> Group:
    """Whole images, greedily: how many labels are those of the plain way."""
    if device.type != "cpu":
        return Group(machine, ())
    model = _coarse_model(size, CODES, device)
    classes_B = torch.arange(GREEDY_BATCH)
    settings = Sampling(guidance=asked.guidance, top_k=1)
    numbers_BL = sampling.uniforms(range(GREEDY_BATCH), LENGTH)[:, 0]
    seconds, expected_BL = timed(
        lambda: llamagen_reference.sample(model, classes_B, numbers_BL, settings), device
    )
    found = {"labels": float(expected_BL.numel()), "plain seconds": seconds}
    sampling_cpu.prepare(model, None, None, "auto")
    seconds, labels_BL = timed(
        lambda: sampling.sample_coarse(model, classes_B, numbers_BL, settings), device
    )
    found["auto seconds"] = seconds
    found["equal"] = float((labels_BL == expected_BL).sum())
    return Group(machine, (), found)


def _fine(machine: Machine, asked: Asked, device: torch.device, batch: int) -> Group:
    parts = clusters.Clusters.from_labels(torch.arange(CODES) % COUNT).to(device)
    labels_BL = torch.randint(COUNT, (batch, LENGTH), device=device)
    classes_B = torch.randint(CLASSES, (batch,), device=device)
    numbers_BL = sampling.uniforms(range(batch), LENGTH)[:, 1]
    models: dict[str, FineModel] = {}
    ways: dict[str, Callable[[], Tensor]] = {}
    for size in (RECOMMENDED, PAPER):
        with device:
            model = FineModel(SIZES[size].config(GRID, CLASSES), parts)
        nn.init.normal_(model.head.weight, std=0.02)
        model.eval().requires_grad_(False)
        for how in asked.engines:
            own = copy.deepcopy(model)
            sampling_cpu.prepare(None, own, None, how)
            for guidance in dict.fromkeys((1.0, asked.guidance)):
                way = f"{size} {how}{'' if guidance == 1 else ' guided'}"
                models[way] = own
                ways[way] = _call(
                    sampling.sample_fine,
                    own,
                    parts,
                    labels_BL,
                    classes_B,
                    numbers_BL,
                    Sampling(fine_guidance=guidance),
                )
    seconds, working = _in_turn(ways, asked.rounds, device)
    timings = []
    for name, model in models.items():
        rows = batch * (asked.halves if name.endswith("guided") else 1)
        total = work.fine(model.config, rows, CODES / COUNT, "int8" in name)
        floor = total.floor(machine)
        timings.append(Timing(name, seconds[name], floor, total, _bytes(model), 0, working[name]))
    return Group(machine, tuple(timings))


def _decoding(machine: Machine, asked: Asked, device: torch.device) -> Group:
    """One image, from codes."""
    model = VQModel(TOKENIZERS["VQ-16"]).eval().requires_grad_(False).to(device)
    codes_BL = torch.randint(CODES, (1, LENGTH), device=device)
    models = {"plain": model}
    for how in asked.engines:
        models[str(how)] = own = copy.deepcopy(model)
        sampling_cpu.prepare(None, None, own, how)
    images = {name: own.decode(codes_BL) for name, own in models.items()}
    found = {
        f"{name} difference": float((image - images["plain"]).abs().mean()) * 127.5
        for name, image in images.items()
    }
    ways = {name: _call(own.decode, codes_BL) for name, own in models.items()}
    seconds, working = _in_turn(ways, asked.rounds, device)
    operations = work.decoding(model)
    timings = []
    for name, own in models.items():
        low = name == "int8" and sampling_cpu.multiplies_bfloat16()
        total = Work(bf16=operations) if low else Work(fp32=operations)
        floor = total.floor(machine)
        timings.append(Timing(name, seconds[name], floor, total, _bytes(own), 0, working[name]))
    return Group(machine, tuple(timings), found)


_STARTED = """
import sys, time
began = time.perf_counter()
from ctf import Pipeline
imported = time.perf_counter()
pipe = Pipeline.from_pretrained("fashion-mnist", sys.argv[1])
loaded = time.perf_counter()
pipe.sample([0])
drawn = time.perf_counter()
print(imported - began, loaded - imported, drawn - loaded)
"""


def _start(machine: Machine, asked: Asked, device: torch.device) -> Group:
    """The shipped pipeline in a new process, from nothing to the first image."""
    rounds = []
    for _ in range(1 + asked.rounds):  # the first one reads files that the system then remembers
        began = time.perf_counter()
        said = subprocess.run(
            [sys.executable, "-c", _STARTED, str(device)],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        rounds.append((*map(float, said.split()), time.perf_counter() - began))
    names = ("import", "load", "first image", "all, with Python's own start and end")
    columns = zip(*rounds[1:], strict=True)
    found = {name: statistics.median(c) for name, c in zip(names, columns, strict=True)}
    return Group(machine, (), found)


def _call(function: Callable[..., Tensor], *given: Any) -> Callable[[], Tensor]:
    return lambda: function(*given)


def _in_turn(
    ways: Mapping[str, Callable[[], Tensor]], rounds: int, device: torch.device
) -> tuple[dict[str, tuple[float, ...]], dict[str, int]]:
    """Seconds of each round, and bytes held for a while, after a first call that is not timed."""
    working = {name: working_memory(way, device) for name, way in ways.items()}
    turns: list[dict[str, float]] = [
        {name: timed(way, device)[0] for name, way in ways.items()} for _ in range(rounds)
    ]
    return {name: tuple(turn[name] for turn in turns) for name in ways}, working


def describe(asked: Asked, device: torch.device) -> Sequence[str]:
    """The names of the groups that would be measured."""
    return list(_jobs(asked, device))
