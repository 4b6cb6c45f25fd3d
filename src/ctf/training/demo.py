"""`ctf demo`: sample the shipped pipeline, train a small one, and compare the two."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from ctf.common import storage
from ctf.common.progress import show_progress
from ctf.data.images import open_images
from ctf.evaluation.classifier import Classifier, shipped_classifier
from ctf.evaluation.evaluate import sample_accuracy
from ctf.evaluation.sample_cache import GenerationConfig
from ctf.pipelines.export import class_sheet
from ctf.pipelines.pipeline import Pipeline
from ctf.training.fit import fit
from ctf.training.recipes import resolve

IMAGES = "fashion-mnist"
PRESET = "tiny"
COLUMNS = 8  # images of each class
SCORED = 400  # samples that the class accuracy is measured on


def demo(out: Path, minutes: float, device: torch.device, console: Console) -> None:
    """Write out/shipped.png, out/fitted.png and the run out/run; print how both compare."""
    shipped = Pipeline.from_pretrained(IMAGES, device)
    sheet = _save_sheet(shipped, out / "shipped.png")
    console.print(f"the shipped pipeline: {sheet}", soft_wrap=True)

    console.print(f"a pipeline from scratch, in about {minutes:g} minutes:")
    began = time.monotonic()
    images = open_images(IMAGES)
    fitted = fit(
        images, out / "run", resolve(PRESET, images), minutes=minutes, device=device,
        open_progress=lambda name: show_progress(name, console),
    )  # fmt: skip
    sheet = _save_sheet(fitted, out / "fitted.png")
    console.print(f"after {time.monotonic() - began:.0f} seconds: {sheet}", soft_wrap=True)
    console.print(_table({"shipped": shipped, "fitted here": fitted}, device, console))


def _save_sheet(pipe: Pipeline, path: Path) -> Path:
    storage.save_png(path, class_sheet(pipe, range(len(pipe.class_names)), COLUMNS))
    return path


def _table(pipelines: dict[str, Pipeline], device: torch.device, console: Console) -> Table:
    """Return a table with a column for each pipeline."""
    table = Table("", *pipelines, title="on held-out images, but for samples")
    classifier = shipped_classifier(device)
    columns = [_column(name, pipe, classifier, console) for name, pipe in pipelines.items()]
    for row in columns[0]:
        table.add_row(row, *(column[row] for column in columns))
    return table


def _column(name: str, pipe: Pipeline, classifier: Classifier, console: Console) -> dict[str, str]:
    """Return how good a pipeline is, and how long its stages took to train."""
    with show_progress(f"scoring {name}", console) as progress:
        accuracy = sample_accuracy(pipe, classifier, GenerationConfig(SCORED), progress)
    metrics, seconds = pipe.origin["metrics"], pipe.origin["seconds"]
    return {
        "codebook usage": f"{metrics['tokenizer']['usage']:.1%}",
        "reconstruction error (mean square)": f"{metrics['tokenizer']['mse']:.4f}",
        "reconstruction PSNR": f"{metrics['tokenizer']['psnr']:.1f} dB",
        "validation loss, coarse (nats a token)": f"{metrics['coarse']['loss']:.3f}",
        "validation loss, fine (nats a token)": f"{metrics['fine']['loss']:.3f}",
        f"class accuracy of {SCORED} samples": f"{accuracy.value:.1%}",
        **{f"seconds, {stage}": f"{value:.0f}" for stage, value in seconds.items()},
    }
