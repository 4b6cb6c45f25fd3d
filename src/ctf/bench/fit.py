"""`ctf bench fit`: how good a model is after some minutes of training, from images to samples.

OUT/bench-fit.json          all results; bench-fit.md and bench-fit.png show them
OUT/IMAGES/WAY-MINUTESmin/  one point: a training of its own, since schedules depend on the minutes
    point.json              everything that decides the result, and the machine
    run/                    the training
    clock.json              its seconds of time, and of processors
    samples.npz             samples of the model, and evaluation/ with their scores
    result.json             the result; a point that has it is done
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from ctf.bench import fit_report, harness
from ctf.bench.fit_report import Result
from ctf.bench.ways import CtfFit, Way
from ctf.common import claims, config, storage
from ctf.common.config import did_you_mean
from ctf.common.errors import UserError
from ctf.common.progress import OpenProgress
from ctf.data.image_set import Splits
from ctf.data.images import INCLUDED, open_images
from ctf.evaluation.intervals import GROUPS
from ctf.evaluation.options import EvaluationOptions
from ctf.evaluation.prepare import prepare
from ctf.evaluation.sample_cache import GenerationConfig, cached_samples
from ctf.training import recipes

POINT, RESULT, CLOCK = "point.json", "result.json", "clock.json"
WHAT, WHAT_POINT = "a run of ctf bench fit", "a point of ctf bench fit"
PEERS = ("diffusers",)


@dataclasses.dataclass(frozen=True)
class FitBenchmark:
    """What is measured: a point for each set of images, number of minutes and way.

    Raises:
        UserError: A value is unknown or out of its range.
    """

    images: tuple[str, ...] = ("fashion-mnist", "eurosat")
    minutes: tuple[float, ...] = (2, 10, 30, 60)
    presets: tuple[str, ...] = ("small",)
    peers: tuple[str, ...] = ()
    samples: int = 1000

    def __post_init__(self) -> None:
        if not (self.images and self.minutes and (self.presets or self.peers)):
            raise UserError("images, minutes, preset or peers: expected at least one of each")
        for name, values, known in (
            ("images", self.images, INCLUDED), ("peers", self.peers, PEERS),
        ):  # fmt: skip
            for value in values:
                if value not in known:
                    raise UserError(f"{name}: unknown {value!r}{did_you_mean(value, known)}")
        for preset in self.presets:
            recipes.preset(preset)
        for minutes in self.minutes:
            if not 0 < minutes < math.inf:
                raise UserError(f"minutes: got {minutes:g}, expected more than 0")
        if self.samples < GROUPS:
            raise UserError(f"samples: got {self.samples}, expected {GROUPS} or more")


@dataclasses.dataclass(frozen=True)
class Point:
    """One training and the scores of its samples."""

    images: Splits
    way: Way
    minutes: float
    samples: int

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.images.train.name}, {self.way.name}, {self.minutes:g} min"

    def folder(self, out: Path) -> Path:
        """Where its files are."""
        name = f"{self.way.name.replace(' ', '-')}-{self.minutes:g}min"
        return out / self.images.train.name / name

    def to_json(self, device: torch.device) -> dict[str, Any]:
        """Return everything that decides the result."""
        return {
            "images": self.images.train.name,
            "images_fingerprint": self.images.train.fingerprint,
            "way": self.way.name,
            "minutes": self.minutes,
            "samples": self.samples,
            "settings": self.way.describe(self.images),
            "where": environment(device),
        }


def points(benchmark: FitBenchmark) -> list[Point]:
    """Return all points, short trainings first: each way in turn on each set of images.

    Raises:
        UserError: A peer is not installed, or the samples cannot be divided among the classes.
    """
    ways: list[Way] = [*map(CtfFit, benchmark.presets), *map(open_peer, benchmark.peers)]
    splits = {name: open_images(name) for name in benchmark.images}
    for images in splits.values():
        GenerationConfig(benchmark.samples).classes(len(images.train.class_names))
    return [
        Point(images, way, minutes, benchmark.samples)
        for minutes in sorted({*benchmark.minutes})
        for images in splits.values()
        for way in ways
    ]


def open_peer(name: str) -> Way:
    """Return another library as a way.

    Raises:
        UserError: It is not installed.
    """
    try:
        import diffusers  # noqa: F401  only to see whether it is there

        from ctf.bench.peers.diffusers import Diffusers
    except ImportError:
        raise UserError(f"{name} is not installed: pip install 'ctf[peers]'") from None
    return Diffusers()


def run(
    measured: Sequence[Point],
    out: Path,
    device: torch.device,
    open_progress: OpenProgress,
    tell: Callable[[str], None],
) -> list[Result]:
    """Measure the points that have no result, each after the other; show all results so far.

    Args:
        measured: In this order.
        out: Folder of all points; may have others, which are shown, too.
        device: Where to compute.
        open_progress: Shows the progress of a stage.
        tell: Is told which point comes next.

    Returns:
        The results of all points in the folder.

    Raises:
        UserError: A point was begun with other settings; there are points of another number of
            samples, another version or machine; or the folder holds something else.
        Stopped: See `loop.run`.
    """
    with claims.hold(out, fit_report.FILE, what=WHAT):
        if not (out / fit_report.FILE).is_file():
            fit_report.write(out, [])
        for point in measured:  # all, before any is trained
            _check(point, out, device)
        for number, point in enumerate(measured, 1):
            folder = point.folder(out)
            claims.claim(folder, point.to_json(device), marker=POINT, what=WHAT_POINT)
            if not (folder / RESULT).is_file():
                tell(f"point {number} of {len(measured)}: {point.name}")
                result = measure(point, folder, device, open_progress)
                storage.save_json(folder / RESULT, config.to_json(result))
            results = results_in(out)
            fit_report.write(out, results)
    return results


def _check(point: Point, out: Path, device: torch.device) -> None:
    """Raise a UserError if a point was begun otherwise, or is not comparable to others in `out`."""
    asked, folder = point.to_json(device), point.folder(out)
    if claims.is_ours(folder, POINT, what=WHAT_POINT):
        claims.check_same(folder, storage.load_json(folder / POINT), asked, what=WHAT_POINT)
    here = {key: asked[key] for key in ("samples", "where")}
    for other in results_in(out):
        claims.check_same(out, {"samples": other.samples, "where": other.where}, here, what=WHAT)


def is_done(point: Point, out: Path) -> bool:
    """Return whether a point has its result."""
    return (point.folder(out) / RESULT).is_file()


def results_in(out: Path) -> list[Result]:
    """Return the results of all points in a folder, in the order of tables."""
    paths = sorted(out.glob(f"*/*/{RESULT}"))
    results = [config.from_json(Result, storage.load_json(path), str(path)) for path in paths]
    return sorted(results, key=lambda result: (result.images, result.minutes, result.way))


def measure(
    point: Point, folder: Path, device: torch.device, open_progress: OpenProgress
) -> Result:
    """Train, sample and score one point, from where an earlier attempt was stopped."""
    machine = harness.limits(device)
    with _clock(folder / CLOCK):
        trained = point.way.train(
            point.images, folder / "run", point.minutes, device, open_progress
        )
    with open_progress("samples") as progress:
        cached_samples(trained.model, GenerationConfig(point.samples), folder, progress)
    # All ways alike: as images, with no regard to what they are from.
    options = EvaluationOptions(reference=point.images.train.name, out=folder / "evaluation")
    report = prepare(str(folder / "samples.npz"), options, device=device).run(open_progress)
    return Result(
        point.images.train.name,
        point.way.name,
        point.minutes,
        trained.seconds,
        _processor_share(folder / CLOCK, device),
        trained.steps,
        trained.parameters,
        point.samples,
        report.scores,
        report.accuracy,
        environment(device),
        machine,
    )


def environment(device: torch.device) -> dict[str, str]:
    """Describe the machine and the software."""
    return {**harness.environment(device), "cores": str(os.cpu_count())}


@contextlib.contextmanager
def _clock(path: Path) -> Iterator[None]:
    """Add the seconds of the block, and those of processors, to a file; a kill loses them."""
    before = storage.load_object(path) if path.is_file() else {}
    began, processor_began = time.monotonic(), time.process_time()
    try:
        yield
    finally:
        now = {
            "seconds": time.monotonic() - began,
            "processor_seconds": time.process_time() - processor_began,
        }
        storage.save_json(path, {key: before.get(key, 0.0) + now[key] for key in now})


def _processor_share(path: Path, device: torch.device) -> float | None:
    """Return the processor time of a training per thread and time; None on a GPU."""
    if device.type != "cpu":
        return None
    clock = storage.load_object(path)
    return float(clock["processor_seconds"] / clock["seconds"] / torch.get_num_threads())
