"""Coarse-to-fine token prediction: from a folder of pictures to a model that draws.

Each command reads its arguments, calls what does the work, and prints what came out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tyro
from rich.console import Console

from ctf import stopping
from ctf.errors import Stopped, UserError

app = tyro.extras.SubcommandApp()
groups = {
    name: tyro.extras.SubcommandApp()
    for name in (
        "tokenizer",
        "tokens",
        "clusters",
        "train",
        "runs",
        "classifier",
        "convert",
        "bench",
    )
}
# Standard output for what was asked for, standard error for progress and errors.
console = Console(highlight=False)

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., None])
Positional = Annotated[T, tyro.conf.Positional]
Folder = Annotated[Path, tyro.conf.arg(metavar="RUN")]
Device = Literal["auto", "cpu", "cuda", "mps"]
Precision = Literal["auto", "fp32", "bf16"]
Engine = Literal["auto", "eager", "compile", "int8"]
LlamaGenSize = Literal["B", "L", "XL", "XXL", "3B"]
Size = Literal["S", "B", "L", "XL", "XXL", "3B"]


def command(name: str) -> Callable[[F], F]:
    """Registers a command, e.g. "sample" or "tokens extract"."""
    group, _, inner = name.rpartition(" ")

    def register(function: F) -> F:
        # Parsing only returns what is to be run: the two fail in different ways.
        @functools.wraps(function)
        def later(*args: Any, **kwargs: Any) -> Callable[[], None]:
            return functools.partial(function, *args, **kwargs)

        parent = groups[group] if group else app
        parent.command(name=inner)(later)
        return function

    return register


@command("demo")
def demo(
    *,
    out: Path = Path("ctf-demo"),
    minutes: float = 2.0,
    device: Device = "auto",
    dry_run: bool = False,
) -> None:
    """Samples the shipped pipeline, fits a small one from scratch, and compares both.

    Example: ctf demo

    Args:
        out: folder for two contact sheets and the run
        minutes: how long the small pipeline is trained
        device: where to compute; auto takes a GPU if there is one
        dry_run: say what would be done, and write nothing
    """
    from ctf import demo as demonstration
    from ctf import fit as fitting

    _check_minutes(minutes)
    place = _device(device)
    if dry_run:
        pictures = _open(demonstration.IMAGES, None, "white", False)
        recipe = fitting.resolve(demonstration.PRESET, pictures)
        console.print(fitting.describe(pictures, recipe, minutes), soft_wrap=True)
        return
    demonstration.demo(out, minutes, place, console)


@command("fit")
def fit(
    images: Positional[str],
    /,
    *,
    out: Path,
    preset: str = "small",
    image_size: int | None = None,
    minutes: float | None = None,
    steps: int | None = None,
    views: Literal["plain", "flip", "ten-crop"] | None = None,
    background: str = "white",
    skip_bad: bool = False,
    set: tuple[str, ...] = (),
    micro_batch: int | None = None,
    checkpoint_activations: bool = False,
    compile: bool = False,
    precision: Precision = "auto",
    device: Device = "auto",
    dry_run: bool = False,
) -> None:
    """Trains every stage, from pictures to a pipeline. Run it again to go on after a kill.

    Example: ctf fit my-pictures --out run --image-size 64 --minutes 60

    Args:
        images: fashion-mnist, a folder: one subfolder per class, or flat (one class); or .tar or
            .parquet files: one, a folder of them, or a pattern in quotes
        out: folder of the run
        preset: tiny, small, base, or imagenet256-B, -L, -XL
        image_size: pixels a side; by default 32 for fashion-mnist, the preset's for folders
        minutes: time for all stages together, shared among them by measured speed
        steps: steps of every trained stage, instead of the preset's
        views: of each training picture; by default flip, and plain for fashion-mnist
        background: colour behind transparent pictures, a name or #rrggbb
        skip_bad: leave pictures out that cannot be used
        set: values of the recipe to replace, e.g. coarse.width=256 clusters.count=128
        micro_batch: pictures that a transformer takes at a time; the batch stays the recipe's
        checkpoint_activations: keep less for the backward pass, and compute it again
        compile: let torch.compile fuse what can be fused
        precision: of a transformer's products; auto: bf16 on GPUs that have it, fp32 on CPUs. bf16:
            also on CPUs that multiply bfloat16, and much faster there
        device: where to compute; auto takes a GPU if there is one
        dry_run: say what would be done, and write nothing
    """
    from ctf import fit as fitting

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("ctf fit is one process; with torchrun, run its stages one by one")
    if minutes is not None and steps is not None:
        raise UserError("got both --minutes and --steps, expected one of them")
    if minutes is not None:
        _check_minutes(minutes)
    place = _device(device)
    pictures = _open(images, image_size, background, skip_bad, preset)
    recipe = fitting.resolve(preset, pictures, steps=steps, views=views, overrides=set)
    how = _execution(
        place, micro_batch, checkpoint_activations, compile=compile, precision=precision
    )
    if dry_run:
        console.print(fitting.describe(pictures, recipe, minutes, execution=how), soft_wrap=True)
        return
    with stopping.at_once(out):
        fitting.fit(
            pictures, out, recipe, minutes=minutes, device=place, progress=_progress, execution=how
        )
    console.print(f"{out}: done; ctf sample {out} draws from it", soft_wrap=True)


@command("cost")
def cost(
    preset: Positional[str],
    /,
    *,
    size: Size | None = None,
    pictures: int | None = None,
    classes: int | None = None,
    image_size: int | None = None,
    devices: int = 8,
    utilisation: float | None = None,
    steps: int | None = None,
    micro_batch: int | None = None,
    set: tuple[str, ...] = (),
) -> None:
    """Calculates what a recipe costs: FLOPs, hours on A100 and H100, memory; needs no pictures.

    Example: ctf cost imagenet256-B --devices 8

    Args:
        preset: tiny, small, base, or imagenet256-B, -L, -XL
        size: of the coarse model, as LlamaGen's and the paper's, instead of the preset's
        pictures: how many there are to train on; by default ImageNet's 1281167
        classes: how many there are; by default ImageNet's 1000
        image_size: pixels a side; by default the preset's
        devices: how many compute
        utilisation: share of their peak that they reach; by default an assumed 0.3
        steps: steps of every trained stage, instead of the preset's
        micro_batch: pictures that a device takes at a time; by default its whole share of a batch
        set: values of the recipe to replace, e.g. coarse_training.batch_size=1024
    """
    from ctf import cost as calculation
    from ctf import fit as fitting
    from ctf.loop import Execution
    from ctf.presets import SIZES
    from ctf.presets import preset as preset_named

    recipe = preset_named(preset)
    if size is not None:
        recipe = dataclasses.replace(recipe, coarse=SIZES[size])
    recipe = fitting.adjust(recipe, steps, set)
    given = {"pictures": pictures, "classes": classes, "utilisation": utilisation}
    setting = calculation.Setting(
        recipe.image_size if image_size is None else image_size,
        devices=devices,
        execution=Execution(micro_batch),
        **{name: value for name, value in given.items() if value is not None},  # type: ignore[arg-type]
    )
    console.print(calculation.describe(recipe, setting), soft_wrap=True)


@command("sample")
def sample(
    model: Positional[str | None] = None,
    /,
    *,
    settings: Path | None = None,
    classes: str = "all",
    count: int = 8,
    seed: int = 0,
    out: Path = Path("sheet.png"),
    guidance: float | None = None,
    fine_guidance: float | None = None,
    temperature: float | None = None,
    fine_temperature: float | None = None,
    top_k: int | None = None,
    fine_top_k: int | None = None,
    top_p: float | None = None,
    fine_top_p: float | None = None,
    guidance_window: tuple[float, float] | None = None,
    guidance_schedule: Literal["constant", "linear", "cosine"] | None = None,
    resize: int | None = None,
    engine: Engine = "auto",
    device: Device = "auto",
    dry_run: bool = False,
) -> None:
    """Draws pictures.

    Example: ctf sample fashion-mnist --classes 3,bag --count 16 --out sheet.png

    Args:
        model: fashion-mnist, the folder of a run or pipeline, or org/name[@revision] on the Hub
        settings: a settings.json, of the studio or beside samples: draws its pictures again, and
            nothing else may be chosen; the model is the one that it names, if none is given
        classes: numbers or names with commas between, or all
        count: pictures of each class
        seed: picture i is drawn from seed + i
        out: a file that ends in .png for a contact sheet, or a folder for the pictures,
            their codes and settings.json
        guidance: scale of classifier-free guidance in the coarse stage; 1 is none. This and all
            below: by default what the pipeline was made with
        fine_guidance: the same in the fine stage
        temperature: of the coarse stage; below 1 for the likely, above 1 for variety
        fine_temperature: of the fine stage
        top_k: draw among the k likeliest labels; 1 is greedy, 0 is no limit
        fine_top_k: the same among the members of each cluster
        top_p: draw among the likeliest labels that have this probability together
        fine_top_p: the same among the members of each cluster
        guidance_window: guide between these fractions of the steps of the coarse stage only, e.g.
            0.2 0.8; the others then cost less
        guidance_schedule: how guidance grows from 1 over the steps of the coarse stage
        resize: pixels a side of the pictures, instead of the tokenizer's
        engine: auto computes as fast as is known here, equal up to rounding; int8 is faster and
            nearly the same; compile compiles the steps; eager takes PyTorch's operators as they are
        device: where to compute; auto takes a GPU if there is one
        dry_run: check everything and say what would be drawn, and write nothing
    """
    from ctf import samples
    from ctf.pipeline import Pipeline

    given: dict[str, Any] = {
        "guidance": guidance, "fine_guidance": fine_guidance,
        "temperature": temperature, "fine_temperature": fine_temperature,
        "top_k": top_k, "fine_top_k": fine_top_k, "top_p": top_p, "fine_top_p": fine_top_p,
        "guidance_window": guidance_window, "guidance_schedule": guidance_schedule,
    }  # fmt: skip
    chosen = {name: value for name, value in given.items() if value is not None}
    if settings is not None:
        # The defaults are those of the arguments above.
        others = {"classes": (classes, "all"), "count": (count, 8), "seed": (seed, 0)}
        others["resize"] = (resize, None)
        more = [*chosen, *(name for name, (got, default) in others.items() if got != default)]
        _sample_again(settings, model, more, out, _device(device), engine, dry_run)
        return
    if model is None:
        raise UserError("got no model, expected e.g. ctf sample fashion-mnist")
    pipe = Pipeline.from_pretrained(model, _device(device), engine=engine)
    numbers = _classes(classes, pipe)
    if dry_run:
        samples.check(out, count, len(numbers), seed)
        used = dataclasses.replace(pipe.sampling, **chosen)
        console.print(f"would draw {count} pictures of each of {len(numbers)} classes: {used}")
        return
    with _progress("sample") as report:
        written = samples.write(pipe, out, numbers, count, seed, report, resize, **chosen)
    console.print(written, soft_wrap=True)


def _sample_again(
    path: Path,
    model: str | None,
    more: Sequence[str],
    out: Path,
    device: Any,
    engine: Engine,
    dry_run: bool,
) -> None:
    from ctf import pipeline, samples

    if more:
        raise UserError(
            f"--settings {path} says all there is to choose; got --{more[0].replace('_', '-')}, too"
        )
    settings = samples.load(path)
    name = settings.model if model is None else model
    if name is None:
        raise UserError(
            f"{path}: names no model, expected e.g. ctf sample fashion-mnist --settings {path}"
        )
    folder = pipeline.find(name)
    if settings.weights not in (None, pipeline.hash_of(folder)):
        raise UserError(f"{path}: its pictures were drawn by another pipeline than {name}")
    pipe = pipeline.load(folder, device, engine)
    samples.check(out, settings.count, len(settings.classes), settings.seed)
    if dry_run:
        console.print(f"would draw the pictures of {path}: {settings.sampling}", soft_wrap=True)
        return
    with _progress("sample") as report:
        written = samples.write_again(pipe, out, settings, report)
    console.print(written, soft_wrap=True)


@command("studio")
def studio(
    models: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="MODEL...")],
    /,
    *,
    port: int = 7860,
    host: str = "127.0.0.1",
    token: str | None = None,
    embed_in: tuple[str, ...] = (),
    engine: Literal["auto", "eager"] = "auto",
    device: Device = "auto",
) -> None:
    """Opens a page to watch pictures being made, with an HTTP API beside it.

    Example: ctf studio fashion-mnist --port 7860

    Args:
        models: one or several to compare: fashion-mnist, folders of runs or pipelines, or org/name
            on the Hub
        port: 0 is any that is free
        host: address to listen at; by default this machine alone can ask
        token: what requests to the API must bear; by default $CTF_STUDIO_TOKEN, if that is set
        embed_in: origins of pages that may show it in a frame, e.g. https://huggingface.co
        engine: auto or eager, see ctf sample
        device: where to compute; auto takes a GPU if there is one
    """
    try:
        from ctf.studio import guard, server, worker
    except ImportError:
        raise UserError("the studio is not installed: pip install 'ctf[studio]'") from None

    token = token or os.environ.get("CTF_STUDIO_TOKEN") or None
    place = _device(device)
    limits = worker.Limits()
    alone = host in guard.LOOPBACK
    for origin in embed_in:
        if not re.fullmatch(r"https?://[\w.:*-]+", origin):
            raise UserError(f"--embed-in {origin}: expected an origin, e.g. https://huggingface.co")
    if not models:
        raise UserError("got no model, expected e.g. ctf studio fashion-mnist")
    listening = server.listen(host, port)
    app = server.build(
        server.load(models, place, engine, limits),
        limits,
        hosts=guard.LOOPBACK if alone else None,
        token=token,
        embedders=embed_in,
    )
    shown = f"[{host}]" if ":" in host else host
    console.print(
        f"{', '.join(models)}: http://{shown}:{listening.getsockname()[1]}", soft_wrap=True
    )
    if not alone and token is None:
        console.print("anyone who reaches this address can draw; --token asks them for a word")
    server.server_of(app).run(sockets=[listening])


@command("push")
def push(
    model: Positional[str],
    /,
    *,
    to: str,
    private: bool = False,
    license: str | None = None,
    half: bool = False,
    picture: bool = True,
    device: Device = "auto",
    dry_run: bool = False,
) -> None:
    """Pushes a pipeline to the Hugging Face Hub, with a model card.

    Example: ctf push run --to me/discs --license apache-2.0

    Args:
        model: folder of a run or pipeline, a shipped name, or org/name on the Hub
        to: org/name or org/name@branch, made if there is none
        private: make the repository a private one, if it is made
        license: of the weights, as the Hub calls it; by default what the pipeline says
        half: store weights in half precision
        picture: draw a sheet of samples for the card
        device: where to draw it; auto takes a GPU if there is one
        dry_run: check everything but the Hub, and push nothing
    """
    from ctf import card, hub, pipeline

    folder = pipeline.find(model)
    pipe = pipeline.load(folder, _device(device))
    own = card.edited(folder)
    drawn = picture and (own is None or card.PICTURE in own)
    if dry_run:
        said = "a new README.md" if own is None else f"{folder / card.FILE}"
        console.print(
            f"would push the pipeline, {said}{f' and {card.PICTURE}' * drawn} to {hub.target(to)}",
            soft_wrap=True,
        )
        return
    address = pipe.push_to_hub(
        to,
        half=half,
        license=license,
        picture=drawn,
        card=own,
        private=private or None,
        progress=_progress,
    )
    console.print(address, soft_wrap=True)


@command("evaluate")
def evaluate(
    model: Positional[str],
    /,
    *,
    reference: str | None = None,
    samples: int | None = None,
    features: tuple[str, ...] = (),
    weights: Path | None = None,
    classifier: Path | None = None,
    guidance: float | None = None,
    fine_guidance: float | None = None,
    temperature: float | None = None,
    fine_temperature: float | None = None,
    top_k: int | None = None,
    fine_top_k: int | None = None,
    top_p: float | None = None,
    fine_top_p: float | None = None,
    guidance_window: tuple[float, float] | None = None,
    guidance_schedule: Literal["constant", "linear", "cosine"] | None = None,
    seed: int = 0,
    balance: Literal["balanced", "uniform"] = "balanced",
    resize: int | None = None,
    split: Literal["train", "val", "all"] | None = None,
    background: str = "white",
    skip_bad: bool = False,
    search: bool = False,
    search_samples: int = 1000,
    against: Path | None = None,
    out: Path | None = None,
    device: Device = "auto",
    dry_run: bool = False,
) -> None:
    """Scores what a pipeline draws, or pictures that are there, against a reference.

    Example: ctf evaluate fashion-mnist --samples 5000

    Args:
        model: fashion-mnist, a folder of a run or pipeline, a Hub id, a folder of pictures of one
            size, or an .npz file of pictures (arr_0)
        reference: fashion-mnist, pictures (a folder, .tar, .parquet), or an .npz file of pictures
            or statistics; by default the set that the pipeline was trained on, if it is included
        samples: how many to draw; by default 5000, or the next number that classes can share
        features: one or several of lite0, inception, fashion, and mymodule:factory; by default
            lite0, and fashion for its classes
        weights: file of the Inception network, where it is not in a cache
        classifier: folder of a classifier for the class accuracy; by default the shipped one for
            its classes
        guidance: of the coarse stage. This and all below: by default the pipeline's
        fine_guidance: of the fine stage
        temperature: of the coarse stage
        fine_temperature: of the fine stage
        top_k: of the coarse stage
        fine_top_k: of the fine stage
        top_p: of the coarse stage
        fine_top_p: of the fine stage
        guidance_window: guide between these fractions of the steps of the coarse stage only
        guidance_schedule: how guidance grows from 1 over the steps of the coarse stage
        seed: sample i is drawn from seed + i
        balance: exactly equally many samples of each class, or the class of each one at random
        resize: pixels a side that samples are resized to first, as LlamaGen does from 384 to 256
        split: pictures of the reference; by default val of an included set, all of a folder
        background: colour behind transparent pictures of the reference
        skip_bad: leave pictures of the reference out that cannot be used
        search: find guidance and temperatures first, by a search on fewer samples and other seeds
        search_samples: of each point of the search
        against: report.json of another evaluation: how far the scores differ
        out: folder of the report, or a .json file beside it; by default a folder in evaluations/
            that is named after the model and what is asked
        device: where to compute; auto takes a GPU if there is one
        dry_run: check everything, and draw and write nothing
    """
    from ctf import evaluation, report

    given: dict[str, Any] = {
        "guidance": guidance, "fine_guidance": fine_guidance,
        "temperature": temperature, "fine_temperature": fine_temperature,
        "top_k": top_k, "fine_top_k": fine_top_k, "top_p": top_p, "fine_top_p": fine_top_p,
        "guidance_window": guidance_window, "guidance_schedule": guidance_schedule,
    }  # fmt: skip
    with _progress("pictures") as advance:
        job = evaluation.prepare(
            model,
            reference,
            samples=samples,
            features=features,
            weights=weights,
            classifier=classifier,
            settings={name: value for name, value in given.items() if value is not None},
            seed=seed,
            balance=balance,
            resize=resize,
            split=split,
            background=background,
            skip_bad=skip_bad,
            search_samples=search_samples if search else None,
            against=against,
            out=out,
            device=_device(device),
            advance=advance,
        )
    if dry_run:
        console.print(f"would write {job.folder}: {job.asked}", soft_wrap=True)
        return
    result = job.run(_progress)
    _table(("score", "value", "95 % interval"), report.rows(result))
    if job.against is not None:
        columns = (f"minus {against}", "difference", "95 % interval", "may be chance")
        _table(columns, report.difference_rows(result, job.against))
    written = "report.md, report.json" + (", samples.npz" if job.pipe is not None else "")
    console.print(f"{job.folder}: {written}", soft_wrap=True)


@command("tokenizer train")
def tokenizer_train(
    images: Positional[str],
    /,
    *,
    out: Path,
    preset: str = "small",
    image_size: int | None = None,
    steps: int | None = None,
    background: str = "white",
    skip_bad: bool = False,
    set: tuple[str, ...] = (),
    device: Device = "auto",
    dry_run: bool = False,
) -> None:
    """Trains the tokenizer of a run: pictures to codes and back.

    Example: ctf tokenizer train my-pictures --out run

    Args:
        images: fashion-mnist, a folder of pictures, or .tar or .parquet files
        out: folder of the run; the tokenizer goes into its folder tokenizer/
        preset: tiny, small, base, or imagenet256-B, -L, -XL
        image_size: pixels a side; by default 32 for fashion-mnist, the preset's for folders
        steps: instead of the preset's
        background: colour behind transparent pictures
        skip_bad: leave pictures out that cannot be used
        set: values of the recipe to replace, e.g. tokenizer.codebook_size=16384
        device: where to compute; auto takes a GPU if there is one
        dry_run: say what would be done, and write nothing
    """
    from ctf import distributed
    from ctf import fit as fitting

    with distributed.joined(_device(device)) as world:
        pictures = _open(images, image_size, background, skip_bad, preset, world)
        recipe = fitting.resolve(preset, pictures, steps=steps, overrides=set)
        if dry_run:
            _say(world, fitting.describe(pictures, recipe, None, world.size))
            return
        with stopping.at_once(out), _progress("tokenizer", world) as report:
            fitting.train_tokenizer(out, pictures, recipe, world, report)
        _say(world, f"{out / 'tokenizer'}: done")


@command("tokenizer evaluate")
def tokenizer_evaluate(
    run: Positional[Folder],
    /,
    *,
    images: str,
    features: str | None = None,
    weights: Path | None = None,
    background: str = "white",
    skip_bad: bool = False,
    device: Device = "auto",
) -> None:
    """Reconstruction of held-out pictures, and how much of the codebook is used.

    Example: ctf tokenizer evaluate run --images my-pictures

    Args:
        run: folder of a run or pipeline, fashion-mnist, or org/name[@revision] on the Hub
        images: fashion-mnist, a folder of pictures, or .tar or .parquet files
        features: also the rFID by lite0, inception, fashion, or mymodule:factory
        weights: file of the Inception network, where it is not in a cache
        background: colour behind transparent pictures
        skip_bad: leave pictures out that cannot be used
        device: where to compute; auto takes a GPU if there is one
    """
    from ctf import collection, pipeline, scores, tokenizer_training
    from ctf.extractors import open_extractor

    place = _device(device)
    tokenizer = tokenizer_training.load(pipeline.find(run) / "tokenizer", place)
    pictures = _open(images, tokenizer.config.image_size, background, skip_bad)
    with _progress("evaluate") as report:
        result = tokenizer_training.evaluate(tokenizer, pictures.val, place, report=report)
    units = {"mse": ".5f", "psnr": ".2f", "ssim": ".4f", "usage": ".2%", "perplexity": ".0f"}
    for name, value in result.items():
        console.print(f"{name:<12} {value:{units.get(name, '.0f')}}{' dB' * (name == 'psnr')}")
    if features is None:
        return
    extractor = open_extractor(features, weights=weights, device=place)
    held_out = collection.of_sets(images, (pictures.val,))
    with _progress(f"rFID{extractor.suffix}") as report:
        rfid = scores.reconstruction_distance(tokenizer, held_out, extractor, report)
    console.print(
        f"{f'rFID{extractor.suffix}':<12} {rfid.value:.4g}  "
        f"(95 % interval {rfid.low:.4g} to {rfid.high:.4g})"
    )


@command("tokens extract")
def tokens_extract(
    images: Positional[str],
    /,
    *,
    run: Folder,
    preset: str = "small",
    views: Literal["plain", "flip", "ten-crop"] | None = None,
    limit: int | None = None,
    background: str = "white",
    skip_bad: bool = False,
    set: tuple[str, ...] = (),
    precision: Precision = "auto",
    device: Device = "auto",
    dry_run: bool = False,
) -> None:
    """Encodes all pictures with the tokenizer of a run, once, ahead of training.

    Example: ctf tokens extract my-pictures --run run --views flip

    Args:
        images: fashion-mnist, a folder of pictures, or .tar or .parquet files
        run: folder of the run
        preset: tiny, small, base, or imagenet256-B, -L, -XL
        views: of each training picture; by default flip, and plain for fashion-mnist
        limit: of training pictures, in balanced classes; by default all
        background: colour behind transparent pictures
        skip_bad: leave pictures out that cannot be used
        set: values of the recipe to replace
        precision: of the encoder's convolutions; auto: fp32. bf16: faster on processors that
            multiply bfloat16, and a few codes are others; the manifest says so
        device: where to compute; auto takes a GPU if there is one
        dry_run: say what would be done, and write nothing
    """
    from ctf import distributed, tokenizer_training
    from ctf import fit as fitting

    with distributed.joined(_device(device)) as world:
        tokenizer = tokenizer_training.load(run / "tokenizer", world.device)
        pictures = _open(images, tokenizer.config.image_size, background, skip_bad, world=world)
        recipe = fitting.resolve(preset, pictures, views=views, overrides=set)
        if dry_run:
            _say(world, fitting.describe(pictures, recipe, None, world.size))
            return
        with stopping.at_once(run / "tokens"), _progress("tokens", world) as report:
            fitting.extract_tokens(
                run, tokenizer, pictures, recipe, limit, report, world, precision
            )
        _say(world, f"{run / 'tokens'}: done")


@command("tokens check")
def tokens_check(run: Positional[Folder], /) -> None:
    """Reads all tokens of a run and compares them with their checksums; exits with 2 on damage.

    Example: ctf tokens check run

    Args:
        run: folder of the run
    """
    from ctf import tokens

    with _progress("check") as report:
        found = tokens.check(run / "tokens", report)
    older = f"; {found.without_checksum} of an earlier version have no checksum, and were only read"
    console.print(
        f"{run / 'tokens'}: {found.files} files are whole{older * (found.without_checksum > 0)}",
        soft_wrap=True,
    )


@command("clusters fit")
def clusters_fit(
    run: Positional[Folder],
    /,
    *,
    count: int = 512,
    method: Literal["kmeans", "identity", "random", "average", "balanced"] = "kmeans",
    seed: int = 0,
    out: Path | None = None,
    dry_run: bool = False,
) -> None:
    """Groups similar codes, and studies how redundant they are (Fig. 1b of the paper).

    Example: ctf clusters fit run --count 512

    Args:
        run: folder of the run
        count: number of clusters
        method: kmeans; average, average linkage as MASC has it; balanced, clusters of equal sizes
            as IAR has it; identity, the full-vocabulary baseline; random, the paper's control
        seed: of the restarts
        out: another run for them, with the tokenizer and the tokens of this one; needed where
            this one has clusters already, as a converted pipeline has
        dry_run: check everything, and write nothing
    """
    from ctf import fit as fitting
    from ctf import tokenizer_training
    from ctf.clusters import ClustersConfig

    chosen = ClustersConfig(method=method, count=count, seed=seed)
    tokenizer = tokenizer_training.load(run / "tokenizer")
    if dry_run:
        console.print(f"would put {tokenizer.config.codebook_size} codes into clusters: {chosen}")
        return
    if out is not None:
        fitting.branch(run, out)
        run = out
    with stopping.at_once(run / "clusters"):
        fitting.fit_clusters(run, tokenizer, chosen)
    clusters_show(run)


@command("clusters show")
def clusters_show(run: Positional[Folder], /) -> None:
    """Prints the report of a run's clusters and where its picture is.

    Example: ctf clusters show run

    Args:
        run: folder of a run
    """
    from ctf import checkpoint

    for name, value in checkpoint.load_object(run / "clusters" / "report.json").items():
        console.print(f"{name:<10} {value}", soft_wrap=True)
    console.print(f"picture    {run / 'clusters' / 'swaps.png'}", soft_wrap=True)


def _train(
    kind: Literal["coarse", "fine"],
    run: Path,
    preset: str,
    size: Size | None,
    steps: int | None,
    set: tuple[str, ...],
    how: tuple[int | None, bool, bool, bool, Precision],
    device: Device,
    dry_run: bool,
    start: Path | None = None,
    baseline_of: Path | None = None,
) -> None:
    from ctf import clusters, distributed, tokenizer_training
    from ctf import fit as fitting
    from ctf.presets import SIZES
    from ctf.presets import preset as preset_named
    from ctf.warm_start import open_source

    recipe = preset_named(preset)
    if size is not None:
        recipe = dataclasses.replace(recipe, **{kind: SIZES[size]})  # type: ignore[arg-type]
    recipe = fitting.adjust(recipe, steps, set)
    with distributed.joined(_device(device)) as world:
        execution = _execution(world.device, *how, say=world.main)
        if dry_run:
            if baseline_of is not None:
                _say(world, f"would make {run} with the tokenizer and tokens of {baseline_of}")
                run = baseline_of
                codes = tokenizer_training.load(run / "tokenizer").config.codebook_size
                parts = clusters.identity(codes)
            else:
                parts = clusters.load(run / "clusters" / clusters.FILE)
            source = None if start is None else open_source(start, fitting.tokenizer_hash(run))
            _say(world, fitting.describe_model(run, kind, parts, recipe, world, source, execution))
            return
        if baseline_of is not None:
            of = baseline_of
            world.first(lambda: fitting.make_baseline(of, run))
        parts = clusters.load(run / "clusters" / clusters.FILE)
        with stopping.at_once(run / kind), _progress(kind, world) as report:
            fitting.train_model(run, kind, parts, recipe, world, report, start, execution)
        _say(world, f"{run / kind}: done")


@command("train coarse")
def train_coarse(
    run: Positional[Folder],
    /,
    *,
    preset: str = "small",
    size: Size | None = None,
    steps: int | None = None,
    warm_start: Path | None = None,
    set: tuple[str, ...] = (),
    micro_batch: int | None = None,
    checkpoint_activations: bool = False,
    shard: bool = False,
    compile: bool = False,
    precision: Precision = "auto",
    device: Device = "auto",
    dry_run: bool = False,
) -> None:
    """Trains the coarse model of a run whose tokens and clusters are done.

    Example: ctf train coarse run --preset base --warm-start llamagen-B

    Args:
        run: folder of the run
        preset: tiny, small, base, or imagenet256-B, -L, -XL
        size: of the transformer, as LlamaGen's and the paper's, instead of the preset's
        steps: instead of the preset's
        warm_start: folder of a full-vocabulary pipeline of the same tokenizer, a baseline or a
            converted LlamaGen, whose transformer it starts from; it has the size of that one then
        set: values of the recipe to replace, e.g. coarse.layers=8
        micro_batch: pictures that a process takes at a time; the batch stays the recipe's
        checkpoint_activations: keep less for the backward pass, and compute it again
        shard: cut weights, gradients, moments and averages into parts, one for each process
        compile: let torch.compile fuse what can be fused
        precision: of a transformer's products; auto: bf16 on GPUs that have it, fp32 on CPUs. bf16:
            also on CPUs that multiply bfloat16, and much faster there
        device: where to compute; auto takes a GPU if there is one
        dry_run: say what would be done, and write nothing
    """
    how = (micro_batch, checkpoint_activations, shard, compile, precision)
    _train("coarse", run, preset, size, steps, set, how, device, dry_run, warm_start)


@command("train fine")
def train_fine(
    run: Positional[Folder],
    /,
    *,
    preset: str = "small",
    size: Size | None = None,
    steps: int | None = None,
    set: tuple[str, ...] = (),
    micro_batch: int | None = None,
    checkpoint_activations: bool = False,
    shard: bool = False,
    compile: bool = False,
    precision: Precision = "auto",
    device: Device = "auto",
    dry_run: bool = False,
) -> None:
    """Trains the fine model of a run whose tokens and clusters are done.

    Example: ctf train fine run --preset small

    Args:
        run: folder of the run
        preset: tiny, small, base, or imagenet256-B, -L, -XL
        size: of the transformer, as LlamaGen's and the paper's, instead of the preset's
        steps: instead of the preset's
        set: values of the recipe to replace, e.g. fine_softmax=full
        micro_batch: pictures that a process takes at a time; the batch stays the recipe's
        checkpoint_activations: keep less for the backward pass, and compute it again
        shard: cut weights, gradients, moments and averages into parts, one for each process
        compile: let torch.compile fuse what can be fused
        precision: of a transformer's products; auto: bf16 on GPUs that have it, fp32 on CPUs. bf16:
            also on CPUs that multiply bfloat16, and much faster there
        device: where to compute; auto takes a GPU if there is one
        dry_run: say what would be done, and write nothing
    """
    how = (micro_batch, checkpoint_activations, shard, compile, precision)
    _train("fine", run, preset, size, steps, set, how, device, dry_run)


@command("train baseline")
def train_baseline(
    run: Positional[Folder],
    /,
    *,
    out: Path,
    preset: str = "small",
    size: Size | None = None,
    steps: int | None = None,
    warm_start: Path | None = None,
    set: tuple[str, ...] = (),
    micro_batch: int | None = None,
    checkpoint_activations: bool = False,
    shard: bool = False,
    compile: bool = False,
    precision: Precision = "auto",
    device: Device = "auto",
    dry_run: bool = False,
) -> None:
    """Trains the full-vocabulary baseline on the tokens of a run, as a run of its own.

    The same code with identity clusters and no fine stage; --set coarse.* shapes it.

    Example: ctf train baseline run --out baseline

    Args:
        run: folder of the run whose tokenizer and tokens are used
        out: folder of the baseline
        preset: tiny, small, base, or imagenet256-B, -L, -XL
        size: of the transformer, as LlamaGen's and the paper's, instead of the preset's
        steps: instead of the preset's
        warm_start: folder of a full-vocabulary pipeline of the same tokenizer to start from
        set: values of the recipe to replace, e.g. coarse.layers=8
        micro_batch: pictures that a process takes at a time; the batch stays the recipe's
        checkpoint_activations: keep less for the backward pass, and compute it again
        shard: cut weights, gradients, moments and averages into parts, one for each process
        compile: let torch.compile fuse what can be fused
        precision: of a transformer's products; auto: bf16 on GPUs that have it, fp32 on CPUs. bf16:
            also on CPUs that multiply bfloat16, and much faster there
        device: where to compute; auto takes a GPU if there is one
        dry_run: say what would be done, and write nothing
    """
    how = (micro_batch, checkpoint_activations, shard, compile, precision)
    _train("coarse", out, preset, size, steps, set, how, device, dry_run, warm_start, run)


@command("runs show")
def runs_show(
    folders: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN...")],
    /,
    *,
    out: Path = Path("curves.png"),
    dry_run: bool = False,
) -> None:
    """Draws the curves of runs, trained or in training, and says how their stages stand.

    Example: ctf runs show run baseline --out curves.png

    Args:
        folders: one or several runs; their curves lie upon each other
        out: picture of the curves (.png): loss, gradient norm, learning rate, speed over steps
        dry_run: say how the stages stand, and draw nothing
    """
    from ctf import runs

    if out.suffix != ".png":
        raise UserError(f"--out {out}: expected a name that ends in .png")
    shown = [runs.stages(folder) for folder in folders]
    if not shown:
        raise UserError("got no run, expected at least one")
    console.print(runs.table(shown), soft_wrap=True)
    if dry_run:
        return
    runs.draw(shown, out)
    console.print(out, soft_wrap=True)


@command("runs tensorboard")
def runs_tensorboard(
    run: Positional[Folder],
    /,
    *,
    once: bool = False,
    samples_every: int = 1000,
    dry_run: bool = False,
) -> None:
    """Mirrors a run into event files for TensorBoard, while it trains or afterwards.

    Example: ctf runs tensorboard run

    Args:
        run: folder of a run; the event files go into its folder tensorboard/
        once: write what there is and end, instead of going on until interrupted
        samples_every: draw samples after so many steps of the coarse and the fine model, from what
            a training has saved last; 0 for none until the pipeline is whole
        dry_run: say what would be written, and write nothing
    """
    from ctf import events, runs

    names = ", ".join(folder.name for folder in runs.trained(run))
    folder = run / events.FOLDER
    if dry_run:
        console.print(f"would write {folder}: {names or 'nothing yet'}", soft_wrap=True)
        return
    console.print(f"tensorboard --logdir {folder} shows it", soft_wrap=True)
    events.follow(run, once=once, samples_every=samples_every)


@command("classifier train")
def classifier_train(
    images: Positional[str],
    /,
    *,
    out: Path,
    image_size: int | None = None,
    steps: int | None = None,
    background: str = "white",
    skip_bad: bool = False,
    device: Device = "auto",
    dry_run: bool = False,
) -> None:
    """Trains the small classifier that scores samples; says its accuracy on held-out pictures.

    Example: ctf classifier train fashion-mnist --out classifier

    Args:
        images: fashion-mnist, a folder with a subfolder per class, or .tar or .parquet files
        out: folder of the classifier
        image_size: pixels a side; by default 32 for fashion-mnist, 64 for folders
        steps: instead of the default
        background: colour behind transparent pictures
        skip_bad: leave pictures out that cannot be used
        device: where to compute; auto takes a GPU if there is one
        dry_run: say what would be done, and write nothing
    """
    from ctf import classifier

    pictures = _open(images, image_size, background, skip_bad)
    chosen = classifier.ClassifierConfig()
    if steps is not None:
        if steps < 1:
            raise UserError(f"steps: got {steps}, expected 1 or more")
        chosen = dataclasses.replace(chosen, steps=steps, warm_up=min(chosen.warm_up, steps // 10))
    if dry_run:
        console.print(f"would train a classifier on {len(pictures.train)} pictures: {chosen}")
        return
    with _progress("classifier") as report:
        model = classifier.train_classifier(
            pictures, out, chosen, device=_device(device), report=report
        )
    accuracy = classifier.held_out_accuracy(model, pictures.val)
    console.print(f"{out}: {accuracy:.2%} of {len(pictures.val)} held-out pictures recognised")


@command("bench tokens")
def bench_tokens(
    *,
    images: int = 1_281_167,
    size: Size = "B",
    pictures: int = 4,
    rounds: int = 3,
    device: Device = "auto",
    out: Path | None = None,
) -> None:
    """Reads a synthetic cache of ImageNet's size, and extracts tokens beside LlamaGen's loop.

    Example: ctf bench tokens --out tokens.json

    Args:
        images: pictures of the cache, 512 bytes each, written into a temporary folder
        size: of the coarse model that the reader is compared with
        pictures: of 256 pixels that are encoded in each round, in two views
        rounds: of both ways of extracting, in turn
        device: where to compute; auto takes a GPU if there is one
        out: a .json file for what was measured
    """
    from ctf import checkpoint, tokens_bench

    found = tokens_bench.measure(images, size, pictures, rounds, _device(device))
    _table(("what", "measured", "goal"), tokens_bench.rows(found))
    if out is not None:
        checkpoint.save_json(out, found)


@command("convert llamagen")
def convert_llamagen(
    *,
    vq: Path,
    gpt: Path | None = None,
    out: Path,
    size: LlamaGenSize | None = None,
    image_size: int | None = None,
    dry_run: bool = False,
) -> None:
    """Makes a full-vocabulary pipeline of released LlamaGen weights.

    Example: ctf convert llamagen --vq vq_ds16_c2i.pt --gpt c2i_B_256.pt --out llamagen-B

    Args:
        vq: the tokenizer's file
        gpt: the transformer's file, of a class-conditional one; without it the tokenizer alone is
            converted, for a run of your own pictures
        out: folder of the pipeline
        size: of the transformer; by default what its tensors are those of
        image_size: pixels a side that the transformer was trained for: 256, 384 or 512; by
            default what its file says, else 256
        dry_run: read and check everything, and write nothing
    """
    from ctf import llamagen

    written = llamagen.convert(vq, gpt, out, size=size, image_size=image_size, dry_run=dry_run)
    console.print(written, soft_wrap=True)


@command("bench sample")
def bench_sample(
    *,
    sizes: str = "B,L,XL",
    batches: str = "1,8,32",
    engines: str = "auto,int8",
    guidance: float = 2.0,
    rounds: int = 3,
    out: Path = Path("bench-sample"),
    device: Device = "auto",
    dry_run: bool = False,
) -> None:
    """Measures how fast drawing is, beside LlamaGen's plain way and the machine's limits.

    Example: ctf bench sample --sizes B --batches 1,8

    Random weights, 256 tokens, from classes to images. Run it on a machine that does nothing else;
    killed, the same command goes on.

    Args:
        sizes: of LlamaGen's transformers, with commas between: B, L, XL, XXL, 3B
        batches: images drawn at a time
        engines: auto, eager, compile, int8
        guidance: of the coarse stage, and of the fine one where it is guided
        rounds: how often each is measured, in turn
        out: folder for sample.json, sample.md and sample.png
        device: where to compute; auto takes a GPU if there is one
        dry_run: say what would be measured, and write nothing
    """
    from ctf import bench, bench_report

    try:
        numbers = tuple(int(part) for part in batches.split(","))
    except ValueError:
        raise UserError(f"batches: got {batches!r}, expected numbers, e.g. 1,8,32") from None
    asked = bench.Asked(
        tuple(sizes.split(",")),
        numbers,
        _engines(engines),
        guidance,
        rounds,
    )
    place = _device(device)
    if dry_run:
        console.print(f"would measure {', '.join(bench.describe(asked, place))}", soft_wrap=True)
        return
    with _progress("bench") as report:
        result = bench.run(asked, out, place, report)
    bench_report.write(result, out)
    for size in asked.sizes:
        for batch in asked.batches:
            console.print(f"size {size}, {batch} images")
            _table(*bench_report.speed(result, size, batch))
    console.print(f"{out}: sample.md, sample.png, sample.json", soft_wrap=True)


@command("bench train")
def bench_train(
    *,
    sizes: str = "B,L",
    batch: int = 8,
    rounds: int = 3,
    out: Path = Path("bench-train"),
    device: Device = "auto",
    dry_run: bool = False,
) -> None:
    """Measures how fast a training step is, beside LlamaGen's plain one and the machine's peak.

    Example: ctf bench train --sizes B

    Random weights, 256 tokens. Run it on a machine that does nothing else; killed, the same
    command goes on.

    Args:
        sizes: of LlamaGen's transformers, with commas between: B, L, XL, XXL, 3B
        batch: images of a step
        rounds: how often each is measured, in turn
        out: folder for train.json and train.md
        device: where to compute; auto takes a GPU if there is one
        dry_run: say what would be measured, and write nothing
    """
    from ctf import train_bench

    asked = train_bench.Asked(tuple(sizes.split(",")), batch, rounds)
    place = _device(device)
    if dry_run:
        said = ", ".join(train_bench.describe(asked, place))
        console.print(f"would measure {said}", soft_wrap=True)
        return
    with _progress("bench") as report:
        result = train_bench.run(asked, out, place, report)
    for size in asked.sizes:
        _table(*train_bench.rows(result, size))
        console.print(train_bench.verdict(result, size), soft_wrap=True)
    console.print(f"{out}: train.md, train.json", soft_wrap=True)


@command("bench quality")
def bench_quality(
    model: Positional[str] = "fashion-mnist",
    /,
    *,
    engines: str = "eager,auto,int8",
    samples: int = 5000,
    held_out: int = 10_000,
    device: Device = "auto",
) -> None:
    """Measures what an engine costs in quality: likelihood of held-out codes, class accuracy.

    Example: ctf bench quality fashion-mnist --engines eager,int8

    Args:
        model: a pipeline that was trained on an included set of pictures
        engines: auto, eager, compile, int8; changes are stated against the first
        samples: drawn by each engine, with the same seeds
        held_out: pictures for the likelihood, at most
        device: where to compute; auto takes a GPU if there is one
    """
    from ctf import quality

    for name, given in (("samples", samples), ("held_out", held_out)):
        if given < 1:
            raise UserError(f"{name}: got {given}, expected 1 or more")
    found = quality.compare(model, _engines(engines), samples, held_out, _device(device), _progress)
    first = found[0]
    rows = [
        (
            q.engine,
            f"{q.coarse:.4f}",
            f"{q.fine:.4f}",
            f"{q.nats:.4f}",
            f"{q.nats / first.nats - 1:+.3%}",
            f"{q.accuracy.value:.2%}" if q.accuracy else "",
            f"{100 * (q.accuracy.value - first.accuracy.value):+.2f} points"
            if q.accuracy and first.accuracy
            else "",
        )
        for q in found
    ]
    columns = (
        "engine", "labels, nats a token", "codes given labels", "codes", "change",
        "class accuracy", "change",
    )  # fmt: skip
    _table(columns, rows)


@command("reproduce")
def reproduce(
    what: Positional[
        Literal["all", "table1", "table2", "table3", "figure1", "figure2", "report", "status"]
    ],
    /,
    *,
    budget: Literal["small", "full"] = "full",
    out: Path = Path("runs/reproduce"),
    results: Path = Path("docs/results"),
    only: str | None = None,
    device: Device = "auto",
    dry_run: bool = False,
) -> None:
    """Runs the paper's experiments on the included pictures, and writes a report of them.

    Example: ctf reproduce table1 --budget small --results results

    Each experiment is made of cells. A cell whose result is in --results is not computed again;
    what it made, e.g. weights, is in --out. Killed, the same command goes on.

    Args:
        what: a table or a figure of the paper, or all of them; report writes the report of what
            there is; status lists the cells, and computes nothing
        budget: small takes about an hour on two cores, full six
        out: folder for what the cells make, in a folder of the budget
        results: folder for the report and the cells' results, in a folder of the budget
        only: one cell, by its name, with those that it needs
        device: where to compute; auto takes a GPU if there is one
        dry_run: list the cells that would be computed, and write nothing
    """
    from ctf.reproduce import experiments, report

    plan = experiments.plan_of(budget)
    place = _device(device)
    desk = experiments.open_desk(plan, out / budget, results / budget, place, _progress)
    if what == "status":
        rows = experiments.status(desk)
        _table(("cell", "state", "seconds"), rows)
        done = sum(state.startswith("done") for _, state, _ in rows)
        console.print(f"{done} of {len(rows)} cells are done")
        return
    names = experiments.chosen(plan, "all" if what == "report" else what, only)
    missing = [] if what == "report" else [name for name in names if desk.result(name) is None]
    if dry_run:
        console.print(f"would compute {', '.join(missing) or 'nothing'}", soft_wrap=True)
        return
    experiments.run(desk, plan, missing)
    report.write(desk, plan)
    console.print(f"{desk.results / 'report.md'}: {len(missing)} cells computed", soft_wrap=True)


# --- What the commands share ----------------------------------------------------------------------


def _device(name: Device) -> Any:
    import torch

    has = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        return torch.device("cuda" if has["cuda"] else "cpu")
    if not has[name]:
        raise UserError(f"device {name}: there is none here; expected auto or cpu")
    return torch.device(name)


def _engines(text: str) -> Any:
    from typing import get_args

    from ctf.config import did_you_mean

    engines = tuple(part.strip() for part in text.split(","))
    for name in engines:
        if name not in get_args(Engine):
            raise UserError(f"unknown engine {name!r}{did_you_mean(name, get_args(Engine))}")
    return engines


def _execution(
    device: Any,
    micro_batch: int | None,
    checkpoint_activations: bool,
    shard: bool = False,
    compile: bool = False,
    precision: Precision = "auto",
    say: bool = True,
) -> Any:
    from ctf import engine
    from ctf.loop import Execution

    if compile and not engine.available("compile", device):
        compile = False
        if say:
            print("--compile: PyTorch finds no compiler here; going on without", file=sys.stderr)
    execution = Execution(micro_batch, checkpoint_activations, shard, compile, precision)
    execution.in_bf16(device)  # a mistake is told before there is anything on the disk
    return execution


def _open(
    images: str,
    image_size: int | None,
    background: str,
    skip_bad: bool,
    preset: str | None = None,
    world: Any = None,
) -> Any:
    from ctf.images import INCLUDED, open_images
    from ctf.presets import preset as preset_named

    if image_size is None and preset is not None and images not in INCLUDED:
        image_size = preset_named(preset).image_size

    def opened() -> Any:
        with _progress("pictures", world) as report:
            return open_images(
                images, image_size, background=background, skip_bad=skip_bad, report=report
            )

    if world is not None:
        world.first(opened)  # what it finds out is kept, so that the others know it, too
    pictures = opened()
    if pictures.skipped and (world is None or world.main):
        names = ", ".join(f"{bad.name} ({bad.reason})" for bad in pictures.skipped)
        console.print(f"{len(pictures.skipped)} pictures left out: {names}", soft_wrap=True)
    return pictures


def _progress(name: str, world: Any = None) -> Any:
    from ctf.progress import progress

    if world is not None and not world.main:
        return contextlib.nullcontext()
    return progress(name)


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.measure import Measurement
    from rich.table import Table

    table = Table(*columns)
    for row in rows:
        table.add_row(*row)
    if console.is_terminal:
        console.print(table)
    else:  # a file has no width that the words must be cut to
        width = Measurement.get(console, console.options.update(width=1000), table).maximum
        console.print(table, width=width, crop=False)


def _say(world: Any, text: str) -> None:
    if world.main:
        console.print(text, soft_wrap=True)


def _classes(text: str, pipe: Any) -> list[int]:
    if text == "all":
        return list(range(len(pipe.class_names)))
    numbers: list[int] = pipe.class_numbers([part.strip() for part in text.split(",")])
    return numbers


def _check_minutes(minutes: float) -> None:
    if not 0 < minutes < 1e6:
        raise UserError(f"minutes: got {minutes:g}, expected more than 0")


for _name, _group in groups.items():
    app.command(_group, name=_name)


def _complaint(text: str) -> str:
    """What tyro says in a box of several lines, as one."""
    lines = [line.strip(" │╭╮╰╯─") for line in text.splitlines()]
    return "; ".join(line for line in lines if line)


def main(arguments: list[str] | None = None) -> int:
    """Runs a command; returns its exit code: 0, or 2 for a user's mistake.

    Where several processes say the same, only the first one's message is not empty.
    """
    given = sys.argv[1:] if arguments is None else arguments
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            run: Callable[[], None] = app.cli(
                prog="ctf", args=given or ["--help"], description=(__doc__ or "").splitlines()[0]
            )
    except SystemExit as leaving:
        if said.getvalue():
            print(f"ctf: {_complaint(said.getvalue())}", file=sys.stderr)
        return int(leaving.code or 0)
    try:
        run()
    except Stopped as stopped:
        if str(stopped):
            console.print(stopped, soft_wrap=True)
        return 0
    except UserError as error:
        if str(error):
            print(f"ctf: {error}", file=sys.stderr)
        return 2
    except PermissionError as error:
        print(f"ctf: {error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("ctf: interrupted; run the same command again to go on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
