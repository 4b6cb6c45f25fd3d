"""A run for TensorBoard: its metrics, and samples, as event files in RUN/tensorboard.

A training writes metrics.jsonl and nothing else. Another process reads that and writes the event
files, so no training waits for TensorBoard or fails with it, and finished runs can be shown, too.
A training that resumes drops lines, since it repeats their steps; then, and when this process is
started again, everything is written again, after a mark that makes TensorBoard forget what it has
read. No step is shown twice.
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
from ctf.models import points
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
from ctf.training import loop, monitoring, state
from ctf.training.metrics_log import read_metrics
from ctf.training.recipes import KINDS, Kind

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

FOLDER = "tensorboard"
POLL_SECONDS = 5.0
SAMPLES_EVERY = 1000  # steps


def follow(run: Path, *, once: bool, samples_every: int = SAMPLES_EVERY) -> None:
    """Write event files of a run to RUN/tensorboard until interrupted.

    Each stage has a folder there, with train/loss and so on, and val/loss. The image of the
    clusters and samples of the finished pipeline are in pictures/, samples of the coarse and the
    fine model in training in samples-coarse/ and samples-fine/.

    Args:
        run: Folder of the run.
        once: Write what there is, and return.
        samples_every: Steps of a training after which samples are generated from its newest state;
            0 for never.

    Raises:
        UserError: There is no such folder, or TensorBoard is not installed.
    """
    scalars: dict[Path, ScalarEvents] = {}
    images = ImageEvents(run)
    samples = [SampleEvents(run, kind, samples_every) for kind in KINDS if samples_every]
    while True:
        for folder in monitoring.find_stages(run):
            if folder not in scalars:
                scalars[folder] = ScalarEvents(folder, run)
            scalars[folder].update()
        images.update()
        for events in samples:
            events.update()
        if once:
            return
        time.sleep(POLL_SECONDS)


class ScalarEvents:
    """The metrics of one stage."""

    def __init__(self, folder: Path, run: Path) -> None:
        self.folder, self.out = folder, run / FOLDER / folder.name
        self.lines: list[dict[str, Any]] = []  # that are written
        self.writer = _open_writer(self.out)

    def update(self) -> None:
        """Write the lines that are new; all of them if a resumed training has dropped some."""
        lines = read_metrics(self.folder)
        if lines[: len(self.lines)] != self.lines:
            self.writer.close()
            self.lines, self.writer = [], _open_writer(self.out)
        # The time of a line is when it was logged, for TensorBoard's axis of relative time.
        began = (self.folder / "config.json").stat().st_mtime
        for line in lines[len(self.lines) :]:
            for name, value in line.items():
                if name not in ("step", "split", "seconds"):
                    self.writer.add_scalar(
                        f"{line['split']}/{name}", value, line["step"], began + line["seconds"]
                    )
        self.lines = lines
        self.writer.flush()


class ImageEvents:
    """The image of the clusters and samples of the pipeline, each written when it is new."""

    def __init__(self, run: Path) -> None:
        self.run = run
        # Opened later: its file would make the folder of a run that is yet to begin not vacant.
        self.writer: SummaryWriter | None = None
        self.versions: dict[str, list[int]] = {}

    def update(self) -> None:
        """Write the images whose files have changed since the last call."""
        swaps = self.run / "clusters" / "swaps.png"
        if self._has_changed("clusters", [swaps]):
            self._add("clusters", Image.open(swaps))
        models = [self.run / kind / "model.safetensors" for kind in KINDS]
        if self._has_changed("samples", models):
            try:
                pipe = Pipeline.from_pretrained(self.run)
            except UserError:
                return  # not complete yet
            self._add("samples", card.sample_sheet(pipe))

    def _has_changed(self, name: str, paths: list[Path]) -> bool:
        versions = [path.stat().st_mtime_ns for path in paths if path.is_file()]
        before, self.versions[name] = self.versions.get(name, []), versions
        return versions != before

    def _add(self, name: str, image: Image.Image) -> None:
        self.writer = self.writer or _open_writer(self.run / FOLDER / "pictures")
        self.writer.add_image(name, np.asarray(image.convert("RGB")), 0, dataformats="HWC")
        self.writer.flush()


class SampleEvents:
    """Samples of a model in training, an event file for each time that some are generated."""

    def __init__(self, run: Path, kind: Kind, every: int) -> None:
        self.run, self.kind, self.every = run, kind, every
        self.sampled_at = 0  # step

    def update(self) -> None:
        """Generate samples if the newest state is `every` steps or more ahead."""
        step = state.newest_step(self.run / self.kind / "state")
        due = step // self.every != self.sampled_at // self.every
        if not due or loop.is_finished(self.run / self.kind):
            return
        try:
            image = card.sample_sheet(load_unfinished(self.run))
        except UserError:
            return  # a part is missing, or the training has just replaced this state
        self.sampled_at = step
        writer = _open_writer(self.run / FOLDER / f"samples-{self.kind}", step)
        writer.add_image("samples", np.asarray(image.convert("RGB")), step, dataformats="HWC")
        writer.close()


def load_unfinished(run: Path) -> Pipeline:
    """Return the pipeline of a run in training.

    Models whose training is not finished have the averaged weights of their newest state. Before
    there is a fine model, all members of a cluster are equally likely.

    Raises:
        UserError: There is no state of a coarse model yet.
    """
    cpu = torch.device("cpu")
    settings = load_settings(run)
    clusters = load_clusters(run / "clusters" / CLUSTERS)
    tokenizer = load_tokenizer(run / "tokenizer", cpu)
    coarse = load_coarse(run / "coarse", clusters, cpu, _averaged_weights(run / "coarse"))
    fine = None
    if clusters.largest > 1:
        folder = run / "fine"
        if loop.is_finished(folder) or state.newest_step(folder / "state"):
            fine = load_fine(folder, clusters, cpu, _averaged_weights(folder))
        else:
            smallest = dataclasses.replace(coarse.config, width=4, layers=1, heads=1)
            fine = FineModel(smallest, clusters).eval()  # with an output layer of zeros
    kernels.for_sampling(coarse, fine, tokenizer, "eager")
    return Pipeline(tokenizer, clusters, coarse, fine, **vars(settings))


def _averaged_weights(stage: Path) -> dict[str, Tensor] | None:
    """Return the averaged weights of the newest state; None if the stage is finished."""
    if loop.is_finished(stage):
        return None
    states = stage / "state"
    tensors = state.load_state(states, state.newest_step(states))
    return points.fold(state.without_prefix(tensors, "ema."))


def _open_writer(folder: Path, step: int = 0) -> SummaryWriter:
    """Open a new event file, at whose mark readers forget older ones' steps from `step` on.

    The older files stay: an open TensorBoard whose file disappears reads no other.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("TensorBoard is not installed: pip install 'ctf[tensorboard]'") from None
    return SummaryWriter(folder, purge_step=step)
