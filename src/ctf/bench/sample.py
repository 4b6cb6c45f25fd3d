"""`ctf bench sample`: how fast sampling is, compared with LlamaGen's way and the machine's limits.

Models have random weights and the shapes of 256-pixel images. Of the steps of an image those are
timed at which the cache grows, and the ones in the middle between; the others take as long as
these. The fine stage samples 8 images at a time and the decoder one, so no more are timed.

Shapes: B batch, L tokens of an image, K labels of the output layer.
"""

from __future__ import annotations

import copy
import dataclasses
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from ctf import kernels
from ctf.bench import harness, llamagen_reference, windows
from ctf.bench.coarse_steps import Steps, engine_steps, plain_steps, weight_bytes
from ctf.bench.harness import Group, Results, Timing
from ctf.bench.shapes import IMAGENET, PAPER, RECOMMENDED, Shapes
from ctf.bench.work import Machine, Work, coarse_step, fine_pass
from ctf.common.errors import UserError
from ctf.common.precision import supports_bf16
from ctf.common.progress import Progress
from ctf.kernels import Engine
from ctf.kernels.sampling_cpu import GrowingCache
from ctf.models import sampling
from ctf.models.coarse import CoarseModel
from ctf.models.fine import FineModel
from ctf.models.noise import noise_keys
from ctf.models.sampling import Sampling
from ctf.models.tokenizer import VQModel
from ctf.pipelines.pipeline import Pipeline
from ctf.training import cost

FILE = "sample.json"
GREEDY_BATCH = 2

START_SCRIPT = """
import sys, time
began = time.perf_counter()
from ctf import Pipeline
imported = time.perf_counter()
pipe = Pipeline.from_pretrained("fashion-mnist", sys.argv[1])
loaded = time.perf_counter()
pipe.sample([0])
sampled = time.perf_counter()
print(imported - began, loaded - imported, sampled - loaded)
"""


@dataclasses.dataclass(frozen=True)
class SampleBenchmark:
    """What is measured.

    Raises:
        UserError: A value is out of its range.
    """

    sizes: tuple[str, ...] = ("B", "L", "XL")
    batches: tuple[int, ...] = (1, 8, 32)
    engines: tuple[Engine, ...] = ("auto", "int8")
    guidance: float = 2.0
    rounds: int = 3

    def __post_init__(self) -> None:
        harness.check_sizes(self.sizes)
        harness.check_positive(rounds=self.rounds)
        for batch in self.batches:
            if not 1 <= batch <= 1024:
                raise UserError(f"batches: got {batch}, expected 1 to 1024 images")
        if not (self.batches and self.engines):
            raise UserError("batches, engines: expected at least one of each")

    @property
    def halves(self) -> int:
        """How many rows an image has in a batch: two with guidance."""
        return 1 if self.guidance == 1 else 2


@dataclasses.dataclass(frozen=True)
class StageTiming(Timing):
    """One way of computing one stage for one batch.

    Attributes:
        seconds: Of each round.
        floor: The seconds that it takes at the machine's limits.
        weights: Bytes, as is `cache`.
        working: The most bytes that it held besides these.
    """

    seconds: tuple[float, ...]
    floor: float
    work: Work
    weights: int
    cache: int
    working: int

    @property
    def median(self) -> float:
        """Seconds."""
        return statistics.median(self.seconds)

    def times(self, count: float) -> StageTiming:
        """The same, `count` times in a row."""
        return dataclasses.replace(
            self,
            seconds=tuple(count * seconds for seconds in self.seconds),
            floor=count * self.floor,
            work=self.work.times(count),
        )


SampleResults = Results[SampleBenchmark, StageTiming]
StageGroup = Group[StageTiming]


def run(
    benchmark: SampleBenchmark,
    folder: Path,
    device: torch.device,
    progress: Progress,
    shapes: Shapes = IMAGENET,
) -> SampleResults:
    """Measure what is missing in `folder`/sample.json.

    Raises:
        UserError: See `harness.measure`.
    """
    groups = jobs(benchmark, device, shapes)
    return harness.measure(benchmark, StageTiming, groups, folder / FILE, device, progress)


def jobs(
    benchmark: SampleBenchmark, device: torch.device, shapes: Shapes = IMAGENET
) -> dict[str, Callable[[Machine], StageGroup]]:
    """Return what measures each group, given the machine's limits."""
    stages = _Stages(benchmark, device, shapes)
    groups: dict[str, Callable[[Machine], StageGroup]] = {}
    groups |= {"start": stages.start, "decode": stages.decode, "windows": stages.windows}
    for batch in benchmark.batches:
        batch = fine_batch(batch, shapes.length)
        groups[f"fine {batch}"] = partial(stages.fine, batch)
    for size in benchmark.sizes:
        groups[f"passes {size}"] = partial(stages.passes, size)
        groups[f"greedy {size}"] = partial(stages.greedy, size)
        for batch in benchmark.batches:
            groups[f"coarse {size} {batch}"] = partial(stages.coarse, size, batch)
    return groups


def fine_batch(batch: int, length: int = IMAGENET.length) -> int:
    """How many images of a batch the fine stage samples at a time."""
    return min(batch, sampling.FINE_TOKENS // length)


# --- The stages -----------------------------------------------------------------------------------

Model = TypeVar("Model", CoarseModel, FineModel, VQModel)
Transformer = TypeVar("Transformer", CoarseModel, FineModel)


@dataclasses.dataclass(frozen=True)
class _Way:
    """One way of computing a stage: its step at a position, and the works that add up to it."""

    name: str
    model: nn.Module
    steps: Steps
    works: Sequence[Work]
    cache: int = 0


@dataclasses.dataclass(frozen=True)
class _Stages:
    """Measures each group, given the machine's limits."""

    benchmark: SampleBenchmark
    device: torch.device
    shapes: Shapes

    @torch.inference_mode()
    def coarse(self, size: str, batch: int, machine: Machine) -> StageGroup:
        """A whole image, by some of its steps."""
        shapes, length, ways = self.shapes, self.shapes.length, []
        for kind, labels in (("baseline", shapes.codes), ("ctf", shapes.clusters)):
            model = self._coarse_model(size, labels)
            inputs = (
                self.benchmark.guidance,
                torch.randint(shapes.classes, (batch,), device=self.device),
                torch.randint(labels, (batch, length), device=self.device),
                noise_keys(range(batch), 1)[:, 0, 0].to(self.device),
            )
            for engine, own in self._prepared(model).items():
                steps = engine_steps(own, *inputs)
                ways.append(self._coarse_way(f"{kind} {engine}", own, steps, batch, length))
            if kind == "baseline":
                rounded = -(-(1 + length) // 8) * 8
                steps = plain_steps(model, *inputs)
                ways.append(self._coarse_way("plain", model, steps, batch, rounded))
            del model
        # Where the cache grows there is one step, between two such positions 31.
        block = GrowingCache.BLOCK
        starts = range(0, length, block)
        counts = {p: n for s in starts for p, n in ((s, 1), (s + block // 2, block - 1))}
        return self._measure(machine, ways, counts, last=length - 1)

    def _coarse_way(
        self, name: str, model: CoarseModel, steps: Steps, batch: int, cached: int
    ) -> _Way:
        config, rows = model.config, self.benchmark.halves * batch
        dtype, int8 = model.backbone.cache(1).k[0].dtype, "int8" in name
        works = [
            coarse_step(config, model.vocab_size, rows, position, int8=int8, cached=dtype)
            for position in range(config.length)
        ]
        numbers = 2 * config.layers * rows * config.width * cached
        return _Way(name, model, steps, works, dtype.itemsize * numbers)

    @torch.inference_mode()
    def fine(self, batch: int, machine: Machine) -> StageGroup:
        """A pass over images, without and with guidance."""
        shapes, ways = self.shapes, []
        clusters = shapes.make_clusters().to(self.device)
        labels_BL = torch.randint(shapes.clusters, (batch, shapes.length), device=self.device)
        classes_B = torch.randint(shapes.classes, (batch,), device=self.device)
        keys_BL = noise_keys(range(batch), shapes.length)[:, 1]
        for size in (RECOMMENDED, PAPER):
            with self.device:
                model = _random(FineModel(shapes.transformer(size), clusters))
            for engine, own in self._prepared(model).items():
                for guidance in dict.fromkeys((1.0, self.benchmark.guidance)):
                    name = f"{size} {engine}{' guided' * (guidance != 1)}"
                    call = partial(
                        sampling.sample_fine, own, clusters, labels_BL, classes_B, keys_BL,
                        Sampling(fine_guidance=guidance),
                    )  # fmt: skip
                    rows = batch * (1 if guidance == 1 else 2)
                    work = fine_pass(own.config, rows, shapes.members, int8=engine == "int8")
                    ways.append(_Way(name, own, _always(call), [work]))
        return self._measure(machine, ways)

    @torch.inference_mode()
    def decode(self, machine: Machine) -> StageGroup:
        """One image, from codes."""
        plain = VQModel(self.shapes.tokenizer).to(self.device).eval().requires_grad_(False)
        codes_BL = torch.randint(self.shapes.codes, (1, self.shapes.length), device=self.device)
        operations, plain_BCHW = cost.tokenizer_flops(plain.config)[1], plain.decode(codes_BL)
        facts, ways = {}, []
        for name, own in {"plain": plain, **self._prepared(plain)}.items():
            call = partial(own.decode, codes_BL)
            facts[f"{name} difference"] = float((call() - plain_BCHW).abs().mean()) * 127.5
            low = name == "int8" and supports_bf16(self.device)
            work = Work(bf16=operations) if low else Work(fp32=operations)
            ways.append(_Way(name, own, _always(call), [work]))
        return self._measure(machine, ways, facts=facts)

    def _measure(
        self,
        machine: Machine,
        ways: Sequence[_Way],
        counts: Mapping[int, int] | None = None,
        last: int = 0,
        facts: dict[str, float] | None = None,
    ) -> StageGroup:
        """Time the ways in turn, and measure the memory of the step at position `last`.

        `counts` holds the positions whose steps are timed, and how many steps each stands for.
        """
        counts, working = counts or {0: 1}, {}
        for way in ways:
            way.steps(last)()  # what only a first call allocates
            working[way.name] = harness.working_memory(way.steps(last), self.device)
        turns = {
            (position, way.name): (lambda _, way=way, position=position: way.steps(position))
            for position in counts
            for way in ways
        }
        seconds = harness.in_turn(turns, self.benchmark.rounds, self.device)
        timings = []
        for way in ways:
            each = [[n * s for s in seconds[position, way.name]] for position, n in counts.items()]
            timings.append(
                StageTiming(
                    way.name,
                    seconds=tuple(map(sum, zip(*each, strict=True))),
                    floor=sum(work.floor(machine) for work in way.works),
                    work=sum(way.works, Work()),
                    weights=weight_bytes(way.model),
                    cache=way.cache,
                    working=working[way.name],
                )
            )
        return Group(machine, tuple(timings), facts or {})

    @torch.inference_mode()
    def greedy(self, size: str, machine: Machine) -> StageGroup:
        """How many greedily sampled labels are those of LlamaGen's way."""
        model = self._coarse_model(size, self.shapes.codes)
        keys_BL = noise_keys(range(GREEDY_BATCH), self.shapes.length)[:, 0]
        settings = Sampling(guidance=self.benchmark.guidance, top_k=1)
        classes_B = torch.arange(GREEDY_BATCH, device=self.device)
        inputs = (model, classes_B, keys_BL, settings)
        plain = harness.timed(lambda: llamagen_reference.sample(*inputs), self.device)
        kernels.for_sampling(model, None, None, "auto")
        ours = harness.timed(lambda: windows.sample(inputs).labels_BT, self.device)
        facts = {
            "labels": float(plain[1].numel()),
            "plain seconds": plain[0],
            "auto seconds": ours[0],
            "equal": float((ours[1] == plain[1]).sum()),
        }
        return Group(machine, (), facts)

    def start(self, machine: Machine) -> StageGroup:
        """The shipped pipeline in a new process, from nothing to the first image."""
        names = ("import", "load", "first image", "all, with Python's own start and end")
        command = [sys.executable, "-c", START_SCRIPT, str(self.device)]
        start = partial(subprocess.run, command, check=True, capture_output=True, text=True)
        rounds = []
        for _ in range(1 + self.benchmark.rounds):  # the first one fills the system's cache
            seconds, process = harness.timed(start, self.device)
            rounds.append((*map(float, process.stdout.split()), seconds))
        medians = map(statistics.median, zip(*rounds[1:], strict=True))
        return Group(machine, (), dict(zip(names, medians, strict=True)))

    def windows(self, machine: Machine) -> StageGroup:
        """The coarse stage of the shipped pipeline, whole images, by the window of a pass."""
        facts: windows.Facts = {}
        for engine in self.benchmark.engines:
            pipe = Pipeline.from_pretrained("fashion-mnist", self.device, engine=engine)
            facts |= windows.whole_images(engine, pipe, self.benchmark.rounds)
        return Group(machine, (), facts)

    def passes(self, size: str, machine: Machine) -> StageGroup:
        """Passes of a size, by the window."""
        facts: windows.Facts = {}
        settings = Sampling(guidance=self.benchmark.guidance)
        model = self._coarse_model(size, self.shapes.clusters)
        for engine, own in self._prepared(model).items():
            facts |= windows.single_passes(engine, own, settings, self.benchmark.rounds)
        return Group(machine, (), facts)

    def _coarse_model(self, size: str, labels: int) -> CoarseModel:
        with self.device:
            return _random(CoarseModel(self.shapes.transformer(size), labels))

    def _prepared(self, model: Model) -> dict[str, Model]:
        """A copy of the model for each engine."""
        copies = {}
        for engine in self.benchmark.engines:
            copies[str(engine)] = own = copy.deepcopy(model)
            kernels.for_sampling(
                own if isinstance(own, CoarseModel) else None,
                own if isinstance(own, FineModel) else None,
                own if isinstance(own, VQModel) else None,
                engine,
            )
        return copies


def _always(call: Callable[[], Tensor]) -> Steps:
    return lambda position: call


def _random(model: Transformer) -> Transformer:
    nn.init.normal_(model.head.weight, std=0.02)
    return model.eval().requires_grad_(False)
