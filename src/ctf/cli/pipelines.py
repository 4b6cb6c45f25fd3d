"""Commands for whole pipelines: train, sample, evaluate, serve, publish and convert them."""

from __future__ import annotations

import dataclasses
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, UseAppendAction, arg

from ctf.cli import options
from ctf.cli.common import (
    check_minutes,
    command,
    open_device,
    open_progress,
    open_splits,
    print_table,
    show,
)
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
    """Sample from the included pipeline, train a small one from scratch, and compare them.

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
    from_: Annotated[options.Maybe[str], arg(name="from", metavar="MODEL")] = None,
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
        from_: pipeline to start from: fashion-mnist, the folder of a run or pipeline, or
            org/name[@revision] on the Hugging Face Hub. The run takes over its tokenizer, its
            clusters and its sizes, and its transformers start from its weights
        train_tokenizer: with --from, train its tokenizer on, too, instead of taking it over as it
            is
        minutes: total training time, divided among the stages by their measured speed
        steps: training steps of each stage; by default the preset's
    """
    from ctf.common import distributed
    from ctf.training import fit as fitting
    from ctf.training.recipes import resolve
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
    if start is None:
        recipe = resolve(opened, splits, steps=steps, views=views, overrides=set)
    else:
        recipe = start.resolve(splits, preset=preset, steps=steps, views=views, overrides=set)
    resolved = execution.resolve(torch_device)
    if dry_run:
        show(fitting.describe(splits, recipe, minutes, execution=resolved, start=start))
        return
    with signals.stop_on_sigterm(out):
        fitting.fit(
            splits, out, recipe, minutes=minutes, device=torch_device,
            open_progress=open_progress, execution=resolved, start=start,
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


@command("sample")
def sample(
    model: Annotated[options.Maybe[str], Positional, arg(metavar="[MODEL]")] = None,
    /,
    *,
    classes: Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="NAMES")] = (),
    count: int = 8,
    seed: int = 0,
    out: Path = Path("sheet.png"),
    resize: options.Maybe[int] = None,
    settings: options.Maybe[Path] = None,
    engine: options.Engine = "auto",
    window: options.Window = "auto",
    device: options.Device = "auto",
    dry_run: options.DryRun = False,
    sampling: options.SamplingGroup,
) -> None:
    """Sample images from a pipeline.

    Example: ctf sample fashion-mnist --classes 3,bag --count 16 --out sheet.png

    Args:
        model: fashion-mnist, the folder of a run or pipeline, or org/name[@revision] on the Hugging
            Face Hub
        classes: names of classes, separated by commas, or all; a number that is no class's name is
            the position among the classes, from 0. Can be given several times
        count: images per class
        seed: image i is sampled from seed + i
        out: .png file for a contact sheet, or any other name for a folder with single images, codes
            and settings.json
        resize: side of the images in pixels; by default the tokenizer's
        settings: settings.json from a folder of samples, an evaluation or the studio, to sample its
            images again, by default from the pipeline that it names; excludes other options of
            sampling
        engine: auto is the fastest, equal up to rounding; int8 (on a processor) and bf16 (on a GPU)
            are faster but not quite equal; compile uses torch.compile, and CUDA graphs on a GPU;
            eager uses plain PyTorch operators
    """
    from ctf.pipelines import export
    from ctf.pipelines.arguments import check_window
    from ctf.pipelines.folder import find_pipeline, hash_pipeline, lasting_name
    from ctf.pipelines.pipeline import Pipeline

    if settings is not None:
        defaults = sample.__kwdefaults__ or {}
        values = {"classes": classes, "count": count, "seed": seed, "resize": resize}
        changed = [n for n, value in values.items() if value != defaults[n]]
        request, folder = _load_settings(settings, model, [*changed, *sampling])
        pipe = Pipeline.from_pretrained(folder, open_device(device), engine=engine)
    else:
        if model is None:
            raise UserError("got no model, expected e.g. ctf sample fashion-mnist")
        folder = find_pipeline(model)
        pipe = Pipeline.from_pretrained(folder, open_device(device), engine=engine)
        numbers = _choose_classes(pipe.class_names, classes)
        used = dataclasses.replace(pipe.sampling, **sampling)
        request = export.Settings(
            tuple(numbers), count, seed, used, resize,
            model=lasting_name(model), weights=hash_pipeline(folder),
        )  # fmt: skip
    pipe.window = check_window(window)
    export.check(out, request)
    if dry_run:
        number = f"{request.count} images of each of {len(request.classes)} classes"
        show(f"would sample {number}: {request.sampling}")
        return
    with signals.stop_on_sigterm(out), open_progress("sample") as progress:
        written = export.write(
            pipe, out, request,
            again=settings is not None, weights=hash_pipeline(folder), progress=progress,
        )  # fmt: skip
    show(written)


def _choose_classes(names: Sequence[str], texts: Sequence[str]) -> list[int]:
    """Return the numbers of the classes that --classes names; by default, all."""
    from ctf.pipelines import arguments

    if not texts or (list(texts) == ["all"] and "all" not in names):
        return list(range(len(names)))
    chosen = [name for text in texts for name in arguments.split_class_names(names, text)]
    for name in chosen:
        if name.isdecimal() and int(name) < len(names) and arguments.ambiguous(names, int(name)):
            number = names.index(name)
            print(
                f"class {name}: the one of that name, number {number}; not number {int(name)}, "
                f"which is {names[int(name)]!r}",
                file=sys.stderr,
            )
    return arguments.class_numbers(names, chosen)


def _load_settings(path: Path, model: str | None, others: list[str]) -> tuple[Any, Path]:
    """Load a settings file and find its pipeline; it excludes all other settings."""
    from ctf.models import noise
    from ctf.pipelines import export
    from ctf.pipelines.folder import find_pipeline, hash_pipeline, lasting_name

    if others:
        option = others[0].replace("_", "-")
        raise UserError(f"--settings {path} sets all options of sampling; remove --{option}")
    settings = export.load(path)
    if model is None and settings.model is None:
        raise UserError(
            f"{path}: names no model, expected e.g. ctf sample fashion-mnist --settings {path}"
        )
    try:
        folder = find_pipeline(model or settings.model or "")
    except UserError as error:
        if model is not None:
            raise
        raise UserError(
            f"{path}: {str(error).splitlines()[0]}\n"
            f"say where it is now: ctf sample MODEL --settings {path}"
        ) from None
    weights = hash_pipeline(folder)
    if settings.weights not in (None, weights):
        if model is None or settings.codes is not None or settings.coarse is not None:
            raise UserError(
                f"{path}: its images were sampled from another pipeline than {model or folder}"
            )
        show(f"{path}: its images were sampled from another pipeline than {model}")
    if settings.noise_version != noise.VERSION:
        show(
            f"{path}: its images were sampled with the random numbers of another version of ctf; "
            "the new images will be others"
        )
    name = lasting_name(model) if model is not None else settings.model
    settings = dataclasses.replace(
        settings, model=name, weights=weights, noise_version=noise.VERSION
    )
    return settings, folder


@command("evaluate")
def evaluate(
    model: Annotated[str, Positional, arg(metavar="MODEL")],
    /,
    *,
    evaluation: options.Flat[options.EvaluateOptions],
    sampling: options.SamplingGroup,
    image_options: options.ImageGroup,
) -> None:
    """Score the samples of a pipeline, or existing images, against a reference set.

    Example: ctf evaluate fashion-mnist --samples 5000

    Args:
        model: fashion-mnist, the folder of a run or pipeline, org/name[@revision] on the Hugging
            Face Hub, a folder of images of one size, or an .npz file of images (arr_0)
    """
    from ctf.evaluation import nearest, report
    from ctf.evaluation.prepare import prepare
    from ctf.evaluation.reference_sets import ImageCollection

    with open_progress("images") as progress:
        prepared = prepare(
            model,
            evaluation,
            settings=sampling,
            device=open_device(evaluation.device),
            progress=progress,
            **vars(image_options),
        )
    for collection in (prepared.images, prepared.reference):
        if isinstance(collection, ImageCollection) and collection.summary is not None:
            show(collection.summary(evaluation.dry_run))
    if evaluation.dry_run:
        show(f"would write {prepared.folder}: {prepared.config}")
        return
    with signals.stop_on_sigterm(prepared.folder):
        result = prepared.run(open_progress)
    print_table(("score", "value", "95 % interval"), report.score_rows(result))
    if prepared.against is not None:
        columns = (f"minus {evaluation.against}", "difference", "95 % interval", "may be chance")
        print_table(columns, report.difference_rows(result, prepared.against))
    written = "report.md, report.json" + (", samples.npz" if prepared.pipe is not None else "")
    if result.nearest is not None:
        print_table(nearest.columns(), nearest.rows(result.nearest))
        show(nearest.describe(result.nearest))
        written += ", nearest.png"
    show(f"{prepared.folder}: {written}")


@command("studio")
def studio(
    models: Annotated[tuple[str, ...], Positional, arg(metavar="MODEL ...", help_behavior_hint="")],
    /,
    *,
    port: int = 7860,
    host: str = "127.0.0.1",
    token: options.Maybe[str] = None,
    allowed_hosts: Annotated[tuple[str, ...], arg(metavar="NAME ...", help_behavior_hint="")] = (),
    root_path: str = "",
    embed_in: Annotated[tuple[str, ...], arg(metavar="ORIGIN ...", help_behavior_hint="")] = (),
    engine: Literal["auto", "eager"] = "auto",
    window: options.Window = "auto",
    device: options.Device = "auto",
) -> None:
    """Open a web page that shows images while they are generated, with an HTTP API.

    Example: ctf studio fashion-mnist --port 7860

    Args:
        models: one or several to compare: fashion-mnist, folders of runs or pipelines, or
            org/name[@revision] on the Hugging Face Hub
        port: port to listen on; 0 is any free one
        host: address to listen on; by default, only this machine can connect
        token: secret that requests to the API must contain; by default $CTF_STUDIO_TOKEN, if set
        allowed_hosts: names under which the studio is reached behind a proxy, e.g.
            studio.example.org; *.example.org is any subdomain, '*' any name
        root_path: path that a proxy puts before all others without removing it, e.g. /ctf
        embed_in: origins of web pages that may show the studio in a frame, e.g.
            https://huggingface.co
        engine: auto is the fastest, equal up to rounding; eager uses plain PyTorch operators
    """
    from ctf.pipelines.arguments import check_window

    try:
        from ctf.studio import guard, server
        from ctf.studio.tasks import Limits
    except ImportError:
        raise UserError("the studio is not installed: pip install 'ctf[studio]'") from None

    for origin in embed_in:
        if not re.fullmatch(r"https?://[\w.:*-]+", origin):
            raise UserError(f"--embed-in {origin}: expected an origin, e.g. https://huggingface.co")
    if root_path and not re.fullmatch(r"(/[^/?#]+)+/?", root_path):
        raise UserError(f"--root-path {root_path}: expected a path, e.g. /ctf")
    allowed = [guard.allowed_host(name) for name in allowed_hosts]
    if not models:
        raise UserError("got no model, expected e.g. ctf studio fashion-mnist")
    token = token or os.environ.get("CTF_STUDIO_TOKEN") or None
    limits, is_local, torch_device = Limits(), host in guard.LOOPBACK, open_device(device)
    listening = server.listen(host, port)
    any_host = "*" in allowed or not (allowed or is_local)
    workers = server.start_workers(models, torch_device, engine, limits, check_window(window))
    app = server.create_app(
        workers,
        limits,
        hosts=None if any_host else {*guard.LOOPBACK, host, *allowed},
        token=token,
        embedders=embed_in,
        root_path=root_path,
    )
    running = server.create_server(app)
    with running.capture_signals():
        address = f"[{host}]" if ":" in host else host
        show(f"{', '.join(models)}: http://{address}:{listening.getsockname()[1]}")
        if not is_local and token is None:
            show("anyone who can reach this address can generate images; --token restricts access")
        server.serve(running, workers, listening)


@command("push")
def push(
    model: options.Model,
    /,
    *,
    to: str,
    license: options.Maybe[str] = None,
    private: bool = False,
    half: bool = False,
    sheet: Annotated[bool, arg(name="picture", aliases=("--sheet",))] = True,
    evaluation: options.Maybe[Path] = None,
    device: options.Device = "auto",
    dry_run: options.DryRun = False,
) -> None:
    """Push a pipeline to the Hugging Face Hub, with a model card.

    Example: ctf push run --to me/discs --license apache-2.0

    Args:
        to: org/name or org/name@branch; created if it does not exist
        license: identifier of the license of the weights, as on the Hub; by default the pipeline's
        private: make the repository private if it is created
        half: store the weights in half precision
        sheet: sample a contact sheet for the model card
        evaluation: report.json of an evaluation, or its folder, whose scores the model card shows;
            by default the newest of this pipeline in evaluations/, if there is one
    """
    from ctf.pipelines import card, hub
    from ctf.pipelines.folder import find_pipeline, hash_pipeline
    from ctf.pipelines.pipeline import Pipeline

    folder = find_pipeline(model)
    pipe = Pipeline.from_pretrained(folder, open_device(device))
    edited = card.load_edited(folder)
    sheet = sheet and (edited is None or card.IMAGE in edited)
    section = _evaluation_section(evaluation, model, hash_pipeline(folder), edited is not None)
    if dry_run:
        files = "a new README.md" if edited is None else f"{folder / card.FILE}"
        files += f" and {card.IMAGE}" if sheet else ""
        show(f"would push the pipeline, {files} to {hub.target(to)}")
        return
    address = pipe.push_to_hub(
        to,
        half=half,
        license=license,
        image=sheet,
        card=edited,
        evaluation=section,
        private=private or None,
        progress=open_progress,
    )
    show(address)


def _evaluation_section(
    path: Path | None, model: str, pipeline_hash: str, edited: bool
) -> str | None:
    """Return what a new model card says about an evaluation of the pipeline, if there is one."""
    from ctf.evaluation import report

    if edited:
        if path is not None:
            raise UserError(
                f"--evaluation {path}: the model card was edited, and is pushed as it is"
            )
        return None
    path = path or report.find(pipeline_hash)
    if path is None:
        return None
    result = report.load(path)
    if result.subject.hash != pipeline_hash:
        raise UserError(f"--evaluation {path}: of {result.subject.name}, not of {model} as it is")
    show(f"the model card has the scores of {path}")
    return report.card_section(result)


@command("convert llamagen")
def convert_llamagen(
    *,
    vq: Path,
    gpt: options.Maybe[Path] = None,
    out: Path,
    size: options.Maybe[options.LlamaGenSize] = None,
    image_size: options.Maybe[int] = None,
    grid: options.Maybe[int] = None,
    heads: options.Maybe[int] = None,
    groups: options.Maybe[int] = None,
    codebook_norm: options.Maybe[Literal["l2", "none"]] = None,
    vq_weights: options.Maybe[options.LlamaGenWeights] = None,
    gpt_weights: options.Maybe[options.LlamaGenWeights] = None,
    dry_run: options.DryRun = False,
) -> None:
    """Convert LlamaGen weights, released or your own, to a full-vocabulary pipeline.

    Example: ctf convert llamagen --vq vq_ds16_c2i.pt --gpt c2i_B_256.pt --out llamagen-B

    Files may be .pt or .safetensors, of any size; --dry-run shows what was understood.

    Args:
        vq: file of the tokenizer
        gpt: file of a class-conditional transformer; without it, only the tokenizer is converted,
            for runs on images of your own
        out: folder of the pipeline
        size: check that the transformer is of this released size
        image_size: side in pixels of the images that the transformer was trained on; by default
            inferred from its file, else 256 for the released sizes
        grid: codes per side of these images, instead of --image-size
        heads: heads of the transformer; by default inferred from its file, else as in the released
            sizes, else width / 64
        groups: groups of the tokenizer's normalization; by default 32, as in LlamaGen
        codebook_norm: l2 looks codes up by cosine, none by distance; by default as in the
            arguments of the training, else l2
        vq_weights: which weights of the tokenizer's file, e.g. ema; by default model
        gpt_weights: which weights of the transformer's file, e.g. ema; by default model
    """
    from ctf.pipelines import llamagen

    show(
        llamagen.convert(
            vq, gpt, out, size=size, image_size=image_size, grid=grid, heads=heads, groups=groups,
            codebook_norm=codebook_norm, vq_weights=vq_weights, gpt_weights=gpt_weights,
            dry_run=dry_run,
        )
    )  # fmt: skip
