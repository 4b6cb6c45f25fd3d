"""The main job in five minutes: sample what is shipped, fit something small, compare both."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from ctf.common import storage
from ctf.common.progress import show_progress
from ctf.data.images import open_images
from ctf.evaluation.classifier import shipped_classifier
from ctf.evaluation.evaluate import sample_accuracy
from ctf.evaluation.sample_cache import GenerationConfig
from ctf.pipelines.export import class_sheet
from ctf.pipelines.folder import find_pipeline
from ctf.pipelines.pipeline import Pipeline
from ctf.training.fit import fit
from ctf.training.recipes import resolve

IMAGES = "fashion-mnist"
PRESET = "tiny"
COLUMNS = 8  # pictures of each class
SCORED = 400  # samples that the class accuracy is measured on


def demo(out: Path, minutes: float, device: torch.device, console: Console) -> None:
    """Writes out/shipped.png, out/fitted.png and the run out/run; prints their table."""
    shipped = Pipeline.from_pretrained(IMAGES, device)
    console.print(f"the shipped pipeline: {_sheet(shipped, out / 'shipped.png')}", soft_wrap=True)

    console.print(f"a pipeline from scratch, in about {minutes:g} minutes:")
    began = time.monotonic()
    images = open_images(IMAGES)
    recipe = resolve(PRESET, images)
    run = out / "run"
    fitted = fit(
        images, run, recipe, minutes=minutes, device=device,
        open_progress=lambda name: show_progress(name, console),
    )  # fmt: skip
    console.print(
        f"after {time.monotonic() - began:.0f} seconds: {_sheet(fitted, out / 'fitted.png')}",
        soft_wrap=True,
    )
    console.print(_table({"shipped": find_pipeline(IMAGES), "fitted here": run}, device, console))


def _sheet(pipe: Pipeline, path: Path) -> Path:
    with storage.atomic(path) as temporary:
        class_sheet(pipe, range(len(pipe.class_names)), COLUMNS).save(temporary, format="PNG")
    return path


def _table(folders: dict[str, Path], device: torch.device, console: Console) -> Table:
    """A column for each pipeline: how good it is, and how long its stages took."""
    table = Table("", *folders, title="held-out pictures, unless it says samples")
    columns = []
    classifier = shipped_classifier(device)
    for name, folder in folders.items():
        pipe = Pipeline.from_pretrained(folder, device)
        with show_progress(f"scoring {name}", console) as progress:
            accuracy = sample_accuracy(pipe, classifier, GenerationConfig(SCORED), progress)
        metrics = pipe.origin["metrics"]
        spent = pipe.origin["seconds"]
        columns.append(
            {
                "codebook usage": f"{metrics['tokenizer']['usage']:.1%}",
                "reconstruction error (mean square)": f"{metrics['tokenizer']['mse']:.4f}",
                "reconstruction PSNR": f"{metrics['tokenizer']['psnr']:.1f} dB",
                "validation loss, coarse (nats a token)": f"{metrics['coarse']['loss']:.3f}",
                "validation loss, fine (nats a token)": f"{metrics['fine']['loss']:.3f}",
                f"class accuracy of {SCORED} samples": f"{accuracy.value:.1%}",
                **{f"seconds, {stage}": f"{value:.0f}" for stage, value in spent.items()},
            }
        )
    for row in columns[0]:
        table.add_row(row, *(column[row] for column in columns))
    return table
