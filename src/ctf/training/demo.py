"""`ctf demo`: sample a shipped pipeline, train a small one, and compare the two."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from ctf.common import storage
from ctf.common.progress import show_progress
from ctf.data import fashion_mnist
from ctf.data.images import open_images
from ctf.evaluation.classifier import Classifier, load_classifier, shipped_classifiers
from ctf.evaluation.evaluate import sample_accuracy
from ctf.evaluation.sample_cache import GenerationConfig
from ctf.pipelines.export import class_sheet
from ctf.pipelines.folder import shipped_pipelines
from ctf.pipelines.pipeline import Pipeline
from ctf.training.fit import fit
from ctf.training.recipes import resolve

PRESET = "tiny"
COLUMNS = 8  # images of each class
SCORED = 400  # samples that the class accuracy is measured on


def demo(
    out: Path,
    minutes: float,
    device: torch.device,
    console: Console,
    images: str = fashion_mnist.NAME,
) -> None:
    """Write out/shipped.png, out/fitted.png and the run out/run; print how both compare.

    Beside an included set of images, out/NAME.png has samples of each other shipped pipeline.

    Args:
        out: Folder to write into.
        minutes: Training time of the small pipeline.
        device: Where to compute.
        console: Where to print.
        images: What to train on, see `open_images`. Without a shipped pipeline for these, or a
            classifier, there is no comparison, or no class accuracy.
    """
    pipelines = {}
    if images in shipped_pipelines():
        pipelines["shipped"] = Pipeline.from_pretrained(images, device)
        sheet = _save_sheet(pipelines["shipped"], out / "shipped.png")
        console.print(f"the shipped pipeline: {sheet}", soft_wrap=True)
        for name in shipped_pipelines():
            if name != images:
                other = Pipeline.from_pretrained(name, device)
                sheet = _save_sheet(other, out / f"{name}.png")
                console.print(f"the shipped pipeline of {name}: {sheet}", soft_wrap=True)

    console.print(f"a pipeline from scratch, in about {minutes:g} minutes:")
    began = time.monotonic()
    splits = open_images(images)
    fitted = pipelines["fitted here"] = fit(
        splits, out / "run", resolve(PRESET, splits), minutes=minutes, device=device,
        open_progress=lambda name: show_progress(name, console),
    )  # fmt: skip
    sheet = _save_sheet(fitted, out / "fitted.png")
    console.print(f"after {time.monotonic() - began:.0f} seconds: {sheet}", soft_wrap=True)
    folder = shipped_classifiers().get(images)
    classifier = None if folder is None else load_classifier(folder, device)
    console.print(_table(pipelines, classifier, console))


def _save_sheet(pipe: Pipeline, path: Path) -> Path:
    storage.save_png(path, class_sheet(pipe, range(len(pipe.class_names)), COLUMNS))
    return path


def _table(
    pipelines: dict[str, Pipeline], classifier: Classifier | None, console: Console
) -> Table:
    """Return a table with a column for each pipeline."""
    table = Table("", *pipelines, title="on held-out images, but for samples")
    columns = [_column(name, pipe, classifier, console) for name, pipe in pipelines.items()]
    for row in columns[0]:
        table.add_row(row, *(column[row] for column in columns))
    return table


def _column(
    name: str, pipe: Pipeline, classifier: Classifier | None, console: Console
) -> dict[str, str]:
    """Return how good a pipeline is, and how long its stages took to train."""
    accuracy = {}
    if classifier is not None:
        with show_progress(f"scoring {name}", console) as progress:
            correct = sample_accuracy(pipe, classifier, GenerationConfig(SCORED), progress)
        accuracy[f"class accuracy of {SCORED} samples"] = f"{correct.value:.1%}"
    metrics, seconds = pipe.origin["metrics"], pipe.origin["seconds"]
    return {
        "codebook usage": f"{metrics['tokenizer']['usage']:.1%}",
        "reconstruction error (mean square)": f"{metrics['tokenizer']['mse']:.4f}",
        "reconstruction PSNR": f"{metrics['tokenizer']['psnr']:.1f} dB",
        "validation loss, coarse (nats a token)": f"{metrics['coarse']['loss']:.3f}",
        "validation loss, fine (nats a token)": f"{metrics['fine']['loss']:.3f}",
        **accuracy,
        **{f"seconds, {stage}": f"{value:.0f}" for stage, value in seconds.items()},
    }
