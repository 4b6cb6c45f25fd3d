"""Commands that sample from a pipeline, and score its samples."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, UseAppendAction, arg

from ctf.cli import options
from ctf.cli.common import command, open_device, open_progress, print_table, show
from ctf.common import signals
from ctf.common.errors import UserError


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
        model: fashion-mnist, eurosat, the folder of a run or pipeline, or org/name[@revision] on
            the Hugging Face Hub
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
        model: fashion-mnist, eurosat, the folder of a run or pipeline, org/name[@revision] on the
            Hugging Face Hub, a folder of images of one size, or an .npz file of images (arr_0)
    """
    from ctf.evaluation import nearest, report
    from ctf.evaluation.image_collection import ImageCollection
    from ctf.evaluation.prepare import prepare

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
