"""Commands that train whole pipelines, and calculate what that costs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from ctf.cli import options
from ctf.cli.common import check_minutes, command, open_device, open_progress, open_splits, show
from ctf.common import signals
from ctf.common.errors import UserError


@command("demo")
def demo(
    *,
    images: str = "fashion-mnist",
    out: options.Maybe[Path] = None,
    minutes: float = 2.0,
    device: options.Device = "auto",
    dry_run: options.DryRun = False,
) -> None:
    """Sample from the included pipelines, train a small one from scratch, and compare them.

    Example: ctf demo

    Args:
        images: the included images to train on: fashion-mnist or eurosat
        out: folder for the contact sheets and the run; by default ctf-demo, followed by the name of
            other images than fashion-mnist
        minutes: training time of the small pipeline
    """
    from ctf.cli.common import console
    from ctf.common.config import did_you_mean
    from ctf.data.images import INCLUDED
    from ctf.training import demo as demonstration
    from ctf.training import fit as fitting
    from ctf.training.recipes import resolve

    check_minutes(minutes)
    if images not in INCLUDED:
        raise UserError(f"--images {images}: not included{did_you_mean(images, INCLUDED)}")
    torch_device = open_device(device)
    if dry_run:
        splits = open_splits(images, options.ImageOptions())
        recipe = resolve(demonstration.PRESET, splits)
        show(fitting.describe(splits, recipe, minutes))
        return
    folder = out or Path("ctf-demo" if images == "fashion-mnist" else f"ctf-demo-{images}")
    demonstration.demo(folder, minutes, torch_device, console, images)


@command("fit")
def fit(
    images: options.Images,
    /,
    *,
    out: Path,
    from_: options.From = None,
    train_tokenizer: bool = False,
    preset: options.FitPreset = None,
    image_size: options.ImageSize = None,
    minutes: options.Maybe[float] = None,
    steps: options.Maybe[int] = None,
    views: options.Views = None,
    set: options.Overrides = (),
    device: options.Device = "auto",
    dry_run: options.DryRun = False,
    image_options: options.ImageGroup,
    execution: options.ExecutionGroup,
) -> None:
    """Train all stages, from images to a pipeline; run it again to resume after an interruption.

    Example: ctf fit my-images --out run --image-size 64 --minutes 60

    Args:
        out: folder of the run
        from_: pipeline to start from: fashion-mnist, eurosat, the folder of a run or pipeline, or
            org/name[@revision] on the Hugging Face Hub. The run takes over its tokenizer, its
            clusters and its sizes, and its transformers start from its weights
        train_tokenizer: with --from, train its tokenizer on, too, instead of taking it over as it
            is
        minutes: total training time, divided among the stages by their measured speed
        steps: training steps of each stage; by default the preset's
    """
    from ctf.common import distributed
    from ctf.training import few_images, recipes
    from ctf.training import fit as fitting
    from ctf.training.start import DEFAULT_PRESET, open_start

    if distributed.launched_size() > 1:
        raise UserError("ctf fit runs as one process; with torchrun, run its stages one by one")
    if minutes is not None and steps is not None:
        raise UserError("got both --minutes and --steps, expected one of them")
    if minutes is not None:
        check_minutes(minutes)
    if train_tokenizer and from_ is None:
        raise UserError("--train-tokenizer is for --from; without it, the tokenizer is trained")
    torch_device = open_device(device)
    start = None
    if from_ is not None:
        start = open_start(from_, train_tokenizer=train_tokenizer)
        image_size = start.check_image_size(image_size)
    opened = preset or DEFAULT_PRESET
    splits = open_splits(images, image_options, image_size, opened, out=out, full=dry_run)
    chosen = few_images.choose(
        splits, out,
        preset=preset, views=views, overrides=set, minutes=minutes, started=start is not None,
    )  # fmt: skip
    if (advice := few_images.advice(splits, chosen, started=start is not None)) is not None:
        show(advice)
    overrides = [*few_images.assignments(chosen), *set]
    if start is None:
        recipe = recipes.resolve(opened, splits, steps=steps, views=views, overrides=overrides)
    else:
        recipe = start.resolve(splits, preset=preset, steps=steps, views=views, overrides=overrides)
    resolved = execution.resolve(torch_device)
    if dry_run:
        show(fitting.describe(splits, recipe, minutes, execution=resolved, start=start))
        return
    with signals.stop_on_sigterm(out):
        fitting.fit(
            splits, out, recipe, minutes=minutes, device=torch_device,
            open_progress=open_progress, execution=resolved, start=start, chosen=chosen,
        )  # fmt: skip
    show(f"{out}: done; sample from it with ctf sample {out}")


@command("cost")
def cost(
    preset: Annotated[str, Positional, arg(metavar="PRESET")],
    /,
    *,
    size: options.Maybe[options.Size] = None,
    # tyro shows aliases first, so the former name is the one that is not an alias
    images: Annotated[options.Maybe[int], arg(name="pictures", aliases=("--images",))] = None,
    classes: options.Maybe[int] = None,
    image_size: options.Maybe[int] = None,
    devices: int = 8,
    utilisation: options.Maybe[float] = None,
    steps: options.Maybe[int] = None,
    micro_batch: options.Maybe[int] = None,
    set: options.Overrides = (),
) -> None:
    """Estimate what training a recipe costs: FLOPs, hours on A100 and H100 GPUs, memory.

    Example: ctf cost imagenet256-B --devices 8

    Args:
        preset: tiny, small, base, imagenet256-B, imagenet256-L or imagenet256-XL
        size: size of the coarse model, as in LlamaGen and the paper; by default the preset's
        images: number of training images; by default 1281167, as in ImageNet
        classes: number of classes; by default 1000, as in ImageNet
        image_size: side in pixels; by default the preset's
        devices: number of GPUs
        utilisation: share of their peak performance that is reached; by default 0.3, an assumption
        steps: training steps of each stage; by default the preset's
        micro_batch: images that a device computes at a time; by default its share of the batch
    """
    from ctf.models.sizes import SIZES
    from ctf.training import cost as calculation
    from ctf.training import recipes
    from ctf.training.loop import Execution

    recipe = recipes.preset(preset)
    if size is not None:
        recipe = dataclasses.replace(recipe, coarse=SIZES[size])
    recipe = recipes.adjust(recipe, steps, set)
    optional = {"images": images, "classes": classes, "utilization": utilisation}
    setting = calculation.Setting(
        recipe.image_size if image_size is None else image_size,
        devices=devices,
        execution=Execution(micro_batch),
        **{name: value for name, value in optional.items() if value is not None},  # type: ignore[arg-type]
    )
    show(calculation.describe(recipe, setting))
