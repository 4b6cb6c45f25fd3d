"""Commands about pipelines: fit one, draw with it, score it, show it, pass it on."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from ctf.cli.common import (
    Device,
    Engine,
    ExecutionOptions,
    Flat,
    LlamaGenSize,
    Positional,
    SamplingOptions,
    Size,
    check_minutes,
    command,
    console,
    open_device,
    open_pictures,
    open_progress,
    parse_classes,
    print_table,
)
from ctf.common import signals
from ctf.common.errors import UserError
from ctf.pipelines.folder import find_pipeline, hash_pipeline


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
    from ctf.training import demo as demonstration
    from ctf.training import fit as fitting

    check_minutes(minutes)
    place = open_device(device)
    if dry_run:
        pictures = open_pictures(demonstration.IMAGES, None, "white", False)
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
    execution: Flat[ExecutionOptions],
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
        device: where to compute; auto takes a GPU if there is one
        dry_run: say what would be done, and write nothing
    """
    from ctf.training import fit as fitting

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("ctf fit is one process; with torchrun, run its stages one by one")
    if minutes is not None and steps is not None:
        raise UserError("got both --minutes and --steps, expected one of them")
    if minutes is not None:
        check_minutes(minutes)
    place = open_device(device)
    pictures = open_pictures(images, image_size, background, skip_bad, preset)
    recipe = fitting.resolve(preset, pictures, steps=steps, views=views, overrides=set)
    how = execution.on(place)
    if dry_run:
        console.print(fitting.describe(pictures, recipe, minutes, execution=how), soft_wrap=True)
        return
    with signals.stop_on_sigterm(out):
        fitting.fit(
            pictures, out, recipe, minutes=minutes, device=place,
            open_progress=open_progress, execution=how,
        )  # fmt: skip
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
    from ctf.models.sizes import SIZES
    from ctf.training import cost as calculation
    from ctf.training import fit as fitting
    from ctf.training.loop import Execution
    from ctf.training.recipes import preset as preset_named

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
    sampling: Flat[SamplingOptions],
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
        resize: pixels a side of the pictures, instead of the tokenizer's
        engine: auto computes as fast as is known here, equal up to rounding; int8 is faster and
            nearly the same; compile compiles the steps; eager takes PyTorch's operators as they are
        device: where to compute; auto takes a GPU if there is one
        dry_run: check everything and say what would be drawn, and write nothing
    """
    from ctf.pipelines import export
    from ctf.pipelines.pipeline import Pipeline

    if settings is not None:
        # The defaults are those of the arguments above.
        others = {"classes": (classes, "all"), "count": (count, 8), "seed": (seed, 0)}
        others["resize"] = (resize, None)
        more = [*sampling, *(name for name, (got, default) in others.items() if got != default)]
        _sample_again(settings, model, more, out, open_device(device), engine, dry_run)
        return
    if model is None:
        raise UserError("got no model, expected e.g. ctf sample fashion-mnist")
    pipe = Pipeline.from_pretrained(model, open_device(device), engine=engine)
    numbers = parse_classes(classes, pipe)
    used = dataclasses.replace(pipe.sampling, **sampling)
    requested = export.Settings(tuple(numbers), count, seed, used, resize)
    if dry_run:
        export.check(out, requested)
        console.print(f"would draw {count} pictures of each of {len(numbers)} classes: {used}")
        return
    with open_progress("sample") as progress:
        written = export.write(pipe, out, requested, progress=progress)
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
    from ctf.pipelines import export
    from ctf.pipelines.pipeline import Pipeline

    if more:
        raise UserError(
            f"--settings {path} says all there is to choose; got --{more[0].replace('_', '-')}, too"
        )
    settings = export.load(path)
    name = settings.model if model is None else model
    if name is None:
        raise UserError(
            f"{path}: names no model, expected e.g. ctf sample fashion-mnist --settings {path}"
        )
    folder = find_pipeline(name)
    if settings.weights not in (None, hash_pipeline(folder)):
        raise UserError(f"{path}: its pictures were drawn by another pipeline than {name}")
    pipe = Pipeline.from_pretrained(folder, device, engine=engine)
    export.check(out, settings)
    if dry_run:
        console.print(f"would draw the pictures of {path}: {settings.sampling}", soft_wrap=True)
        return
    with open_progress("sample") as progress:
        written = export.write(pipe, out, settings, again=True, progress=progress)
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
        from ctf.studio import guard, server
        from ctf.studio.tasks import Limits
    except ImportError:
        raise UserError("the studio is not installed: pip install 'ctf[studio]'") from None

    token = token or os.environ.get("CTF_STUDIO_TOKEN") or None
    place = open_device(device)
    limits = Limits()
    alone = host in guard.LOOPBACK
    for origin in embed_in:
        if not re.fullmatch(r"https?://[\w.:*-]+", origin):
            raise UserError(f"--embed-in {origin}: expected an origin, e.g. https://huggingface.co")
    if not models:
        raise UserError("got no model, expected e.g. ctf studio fashion-mnist")
    listening = server.listen(host, port)
    app = server.create_app(
        server.start_workers(models, place, engine, limits),
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
    server.create_server(app).run(sockets=[listening])


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
    from ctf.pipelines import card, hub
    from ctf.pipelines.pipeline import Pipeline

    folder = find_pipeline(model)
    pipe = Pipeline.from_pretrained(folder, open_device(device))
    own = card.load_edited(folder)
    drawn = picture and (own is None or card.IMAGE in own)
    if dry_run:
        said = "a new README.md" if own is None else f"{folder / card.FILE}"
        console.print(
            f"would push the pipeline, {said}{f' and {card.IMAGE}' * drawn} to {hub.target(to)}",
            soft_wrap=True,
        )
        return
    address = pipe.push_to_hub(
        to,
        half=half,
        license=license,
        image=drawn,
        card=own,
        private=private or None,
        progress=open_progress,
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
    sampling: Flat[SamplingOptions],
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
    from ctf.evaluation import report
    from ctf.evaluation.prepare import prepare

    with open_progress("pictures") as progress:
        evaluation = prepare(
            model,
            reference,
            samples=samples,
            features=features,
            weights=weights,
            classifier=classifier,
            settings=sampling,
            seed=seed,
            balance=balance,
            resize=resize,
            split=split,
            background=background,
            skip_bad=skip_bad,
            search_samples=search_samples if search else None,
            against=against,
            out=out,
            device=open_device(device),
            progress=progress,
        )
    if dry_run:
        console.print(f"would write {evaluation.folder}: {evaluation.config}", soft_wrap=True)
        return
    result = evaluation.run(open_progress)
    print_table(("score", "value", "95 % interval"), report.score_rows(result))
    if evaluation.against is not None:
        columns = (f"minus {against}", "difference", "95 % interval", "may be chance")
        print_table(columns, report.difference_rows(result, evaluation.against))
    written = "report.md, report.json" + (", samples.npz" if evaluation.pipe is not None else "")
    console.print(f"{evaluation.folder}: {written}", soft_wrap=True)


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
    from ctf.pipelines import llamagen

    written = llamagen.convert(vq, gpt, out, size=size, image_size=image_size, dry_run=dry_run)
    console.print(written, soft_wrap=True)
