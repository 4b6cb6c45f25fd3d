"""A run for TensorBoard: its metrics.jsonl mirrored into event files, while it trains or after.

The training itself writes metrics.jsonl and nothing else. Another process reads that and writes
RUN/tensorboard, so no training waits for TensorBoard, fails with it or has to be asked for it
beforehand; runs that are long finished can be shown; and resuming is not a case of its own. Where
lines were dropped, since their steps are made again, and where the mirror is started again,
everything is written anew, behind a mark upon which TensorBoard forgets what it had read: no step
is shown twice.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ctf import kernels
from ctf.common.errors import UserError
from ctf.models.fine import FineModel
from ctf.pipelines import card
from ctf.pipelines.folder import (
    CLUSTERS,
    load_clusters,
    load_coarse,
    load_fine,
    load_settings,
    load_tokenizer,
)
from ctf.pipelines.pipeline import Pipeline
from ctf.training import loop, metrics_log, runs, state

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

FOLDER = "tensorboard"
SECONDS = 5.0  # between two looks at the run
SAMPLES_EVERY = 1000  # steps
SAMPLED = ("coarse", "fine")


def follow(run: Path, *, once: bool, samples_every: int = SAMPLES_EVERY) -> None:
    """Mirrors a run into RUN/tensorboard, until interrupted.

    Each stage has its own folder there: training lines as train/loss and so on, held-out ones as
    val/loss. The picture of the clusters, and samples once the pipeline is whole, are in pictures/;
    samples of the coarse and the fine model in training are in samples-coarse/ and samples-fine/.

    Args:
        once: write what there is, and return.
        samples_every: steps of a training after which samples are drawn from its newest state; 0
            for never.

    Raises:
        UserError: there is no such folder, or no TensorBoard.
    """
    if samples_every < 0:
        raise UserError(f"samples_every: got {samples_every}, expected 0 or more")
    stages: dict[Path, _Stage] = {}
    pictures = _Pictures(run)
    samples = [_TrainingSamples(run, stage, samples_every) for stage in SAMPLED if samples_every]
    while True:
        for folder in runs.trained(run):
            stages.setdefault(folder, _Stage(folder, run)).update()
        pictures.update()
        for stage in samples:
            stage.update()
        if once:
            return
        time.sleep(SECONDS)


class _Stage:
    """The event file of one stage, and the lines that are in it."""

    def __init__(self, folder: Path, run: Path) -> None:
        self.folder, self.out = folder, run / FOLDER / folder.name
        self.lines: list[dict[str, Any]] = []
        self.writer = _begin(self.out)

    def update(self) -> None:
        lines = metrics_log.read_metrics(self.folder)
        if lines[: len(self.lines)] != self.lines:  # a resumed training dropped some
            self.writer.close()
            self.lines, self.writer = [], _begin(self.out)
        # When the line was written, so that the axis of relative time is that of the training.
        began = (self.folder / "config.json").stat().st_mtime
        for line in lines[len(self.lines) :]:
            for name, value in line.items():
                if name not in ("step", "split", "seconds"):
                    self.writer.add_scalar(
                        f"{line['split']}/{name}", value, line["step"], began + line["seconds"]
                    )
        self.lines = lines
        self.writer.flush()


class _Pictures:
    """The event file of a run's pictures; each is written again when what it shows has changed."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self.writer: SummaryWriter | None = None  # a file in it would make a new run look taken
        self.shown: dict[str, object] = {}

    def update(self) -> None:
        swaps = self.run / "clusters" / "swaps.png"
        if self._is_new("clusters", [swaps]):
            self._add("clusters", Image.open(swaps))
        models = [self.run / name / "model.safetensors" for name in ("coarse", "fine")]
        if self._is_new("samples", models):
            try:
                pipe = Pipeline.from_pretrained(self.run)
            except UserError:
                return  # not whole yet
            self._add("samples", card.sample_sheet(pipe))

    def _is_new(self, name: str, paths: list[Path]) -> bool:
        """Whether files are there that were not when it was asked before."""
        there = [path.stat().st_mtime_ns for path in paths if path.is_file()]
        before, self.shown[name] = self.shown.get(name, []), there
        return there != before

    def _add(self, name: str, picture: Image.Image) -> None:
        self.writer = self.writer or _begin(self.run / FOLDER / "pictures")
        self.writer.add_image(name, np.asarray(picture.convert("RGB")), 0, dataformats="HWC")
        self.writer.flush()


class _TrainingSamples:
    """The event files of samples of a stage in training, one for each time that some are drawn."""

    def __init__(self, run: Path, stage: str, every: int) -> None:
        self.run, self.stage, self.every = run, stage, every
        self.drawn = 0  # steps

    def update(self) -> None:
        step = _newest(self.run / self.stage)
        if step // self.every == self.drawn // self.every or loop.is_finished(
            self.run / self.stage
        ):
            return
        try:
            picture = card.sample_sheet(in_training(self.run))
        except UserError:
            return  # a part is missing, or the training has just replaced this state
        self.drawn = step
        writer = _begin(self.run / FOLDER / f"samples-{self.stage}", step)
        writer.add_image("samples", np.asarray(picture.convert("RGB")), step, dataformats="HWC")
        writer.close()


def in_training(run: Path) -> Pipeline:
    """The pipeline as far as it is trained: averaged weights of the newest states where a stage is
    not finished. While there is no fine model, each member of a cluster is as likely.

    Raises:
        UserError: not even a coarse model has been saved.
    """
    cpu = torch.device("cpu")
    settings = load_settings(run)
    parts = load_clusters(run / "clusters" / CLUSTERS)
    tokenizer = load_tokenizer(run / "tokenizer", cpu)
    coarse = load_coarse(run / "coarse", parts, cpu, _averaged(run / "coarse"))
    fine = None
    if parts.largest > 1:
        folder = run / "fine"
        if loop.is_finished(folder) or _newest(folder):
            fine = load_fine(folder, parts, cpu, _averaged(folder))
        else:
            smallest = dataclasses.replace(coarse.config, width=4, layers=1, heads=1)
            fine = FineModel(smallest, parts).eval()  # its head is zero
    kernels.for_sampling(coarse, fine, tokenizer, "eager")
    return Pipeline(tokenizer, parts, coarse, fine, **vars(settings))


def _averaged(stage: Path) -> dict[str, Tensor] | None:
    """The averaged weights of the newest state; None where the stage is finished."""
    if loop.is_finished(stage):
        return None
    return state.without_prefix(state.load_state(stage / "state", _newest(stage)), "ema.")


def _newest(stage: Path) -> int:
    return state.newest_step(stage / "state")


def _begin(folder: Path, step: int = 0) -> SummaryWriter:
    """A new event file, with a mark that makes readers forget the steps from `step` on of those
    before it.

    These stay: an open TensorBoard that finds the file gone that it was reading reads no other.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("TensorBoard is not installed: pip install 'ctf[tensorboard]'") from None
    return SummaryWriter(folder, purge_step=step)
