"""Commands about single stages of a run, and about how a run stands."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ctf.cli.common import (
    Device,
    Flat,
    Folder,
    Positional,
    Precision,
    TrainOptions,
    command,
    console,
    open_device,
    open_pictures,
    open_progress,
    say,
)
from ctf.common import signals
from ctf.common.errors import UserError
from ctf.pipelines.folder import CLUSTERS, find_pipeline, load_clusters, load_tokenizer


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
    from ctf.common import distributed
    from ctf.training import fit as fitting

    with distributed.init_world(open_device(device)) as world:
        pictures = open_pictures(images, image_size, background, skip_bad, preset, world)
        recipe = fitting.resolve(preset, pictures, steps=steps, overrides=set)
        if dry_run:
            say(world, fitting.describe(pictures, recipe, None, world.size))
            return
        with signals.stop_on_sigterm(out), open_progress("tokenizer", world) as progress:
            fitting.train_tokenizer(out, pictures, recipe, world, progress)
        say(world, f"{out / 'tokenizer'}: done")


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
    from ctf.evaluation import reference_sets, scores
    from ctf.evaluation.extractors import open_extractor
    from ctf.training import tokenizer as tokenizer_training

    place = open_device(device)
    tokenizer = load_tokenizer(find_pipeline(run) / "tokenizer", place)
    pictures = open_pictures(images, tokenizer.config.image_size, background, skip_bad)
    with open_progress("evaluate") as progress:
        result = tokenizer_training.reconstruction_metrics(
            tokenizer, pictures.val, place, progress=progress
        )
    units = {"mse": ".5f", "psnr": ".2f", "ssim": ".4f", "usage": ".2%", "perplexity": ".0f"}
    for name, value in result.items():
        console.print(f"{name:<12} {value:{units.get(name, '.0f')}}{' dB' * (name == 'psnr')}")
    if features is None:
        return
    extractor = open_extractor(features, weights=weights, device=place)
    held_out = reference_sets.from_image_sets(images, (pictures.val,))
    with open_progress(f"rFID{extractor.suffix}") as progress:
        rfid = scores.reconstruction_fid(tokenizer, held_out, extractor, progress)
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
    from ctf.common import distributed
    from ctf.training import fit as fitting

    with distributed.init_world(open_device(device)) as world:
        tokenizer = load_tokenizer(run / "tokenizer", world.device)
        pictures = open_pictures(
            images, tokenizer.config.image_size, background, skip_bad, world=world
        )
        recipe = fitting.resolve(preset, pictures, views=views, overrides=set)
        if dry_run:
            say(world, fitting.describe(pictures, recipe, None, world.size))
            return
        with signals.stop_on_sigterm(run / "tokens"), open_progress("tokens", world) as progress:
            fitting.extract_tokens(
                run, tokenizer, pictures, recipe, limit, progress, world, precision
            )
        say(world, f"{run / 'tokens'}: done")


@command("tokens check")
def tokens_check(run: Positional[Folder], /) -> None:
    """Reads all tokens of a run and compares them with their checksums; exits with 2 on damage.

    Example: ctf tokens check run

    Args:
        run: folder of the run
    """
    from ctf.data import tokens

    with open_progress("check") as progress:
        result = tokens.check(run / "tokens", progress)
    older = f"; {result.without_checksum} of them, from an earlier version, have no checksum"
    console.print(
        f"{run / 'tokens'}: {result.files} files are intact{older * (result.without_checksum > 0)}",
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
    from ctf.models.clusters import ClustersConfig
    from ctf.training import fit as fitting

    chosen = ClustersConfig(method=method, count=count, seed=seed)
    tokenizer = load_tokenizer(run / "tokenizer")
    if dry_run:
        console.print(f"would put {tokenizer.config.codebook_size} codes into clusters: {chosen}")
        return
    if out is not None:
        fitting.branch(run, out)
        run = out
    with signals.stop_on_sigterm(run / "clusters"):
        fitting.fit_clusters(run, tokenizer, chosen)
    clusters_show(run)


@command("clusters show")
def clusters_show(run: Positional[Folder], /) -> None:
    """Prints the report of a run's clusters and where its picture is.

    Example: ctf clusters show run

    Args:
        run: folder of a run
    """
    from ctf.common import storage

    for name, value in storage.load_object(run / "clusters" / "report.json").items():
        console.print(f"{name:<10} {value}", soft_wrap=True)
    console.print(f"picture    {run / 'clusters' / 'swaps.png'}", soft_wrap=True)


def _train(
    kind: Literal["coarse", "fine"],
    run: Path,
    options: TrainOptions,
    start: Path | None = None,
    baseline_of: Path | None = None,
) -> None:
    from ctf.common import distributed
    from ctf.models import clusters
    from ctf.models.sizes import SIZES
    from ctf.training import fit as fitting
    from ctf.training.recipes import preset as preset_named
    from ctf.training.warm_start import open_source

    recipe = preset_named(options.preset)
    if options.size is not None:
        recipe = dataclasses.replace(recipe, **{kind: SIZES[options.size]})  # type: ignore[arg-type]
    recipe = fitting.adjust(recipe, options.steps, options.set)
    with distributed.init_world(open_device(options.device)) as world:
        execution = options.on(world.device, shard=options.shard, say=world.is_main)
        if options.dry_run:
            if baseline_of is not None:
                say(world, f"would make {run} with the tokenizer and tokens of {baseline_of}")
                run = baseline_of
                codes = load_tokenizer(run / "tokenizer").config.codebook_size
                parts = clusters.identity(codes)
            else:
                parts = load_clusters(run / "clusters" / CLUSTERS)
            source = None if start is None else open_source(start, fitting.tokenizer_hash(run))
            say(world, fitting.describe_model(run, kind, parts, recipe, world, source, execution))
            return
        if baseline_of is not None:
            of = baseline_of
            world.on_main(lambda: fitting.make_baseline(of, run))
        parts = load_clusters(run / "clusters" / CLUSTERS)
        with signals.stop_on_sigterm(run / kind), open_progress(kind, world) as progress:
            fitting.train_model(run, kind, parts, recipe, world, progress, start, execution)
        say(world, f"{run / kind}: done")


@command("train coarse")
def train_coarse(
    run: Positional[Folder],
    /,
    *,
    warm_start: Path | None = None,
    options: Flat[TrainOptions],
) -> None:
    """Trains the coarse model of a run whose tokens and clusters are done.

    Example: ctf train coarse run --preset base --warm-start llamagen-B

    Args:
        run: folder of the run
        warm_start: folder of a full-vocabulary pipeline of the same tokenizer, a baseline or a
            converted LlamaGen, whose transformer it starts from; it has the size of that one then
    """
    _train("coarse", run, options, warm_start)


@command("train fine")
def train_fine(run: Positional[Folder], /, *, options: Flat[TrainOptions]) -> None:
    """Trains the fine model of a run whose tokens and clusters are done.

    Example: ctf train fine run --preset small

    Args:
        run: folder of the run
    """
    _train("fine", run, options)


@command("train baseline")
def train_baseline(
    run: Positional[Folder],
    /,
    *,
    out: Path,
    warm_start: Path | None = None,
    options: Flat[TrainOptions],
) -> None:
    """Trains the full-vocabulary baseline on the tokens of a run, as a run of its own.

    The same code with identity clusters and no fine stage; --set coarse.* shapes it.

    Example: ctf train baseline run --out baseline

    Args:
        run: folder of the run whose tokenizer and tokens are used
        out: folder of the baseline
        warm_start: folder of a full-vocabulary pipeline of the same tokenizer to start from
    """
    _train("coarse", out, options, warm_start, run)


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
    from ctf.training import runs

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
    from ctf.training import runs, tensorboard

    names = ", ".join(folder.name for folder in runs.trained(run))
    folder = run / tensorboard.FOLDER
    if dry_run:
        console.print(f"would write {folder}: {names or 'nothing yet'}", soft_wrap=True)
        return
    console.print(f"tensorboard --logdir {folder} shows it", soft_wrap=True)
    tensorboard.follow(run, once=once, samples_every=samples_every)


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
    from ctf.evaluation import classifier
    from ctf.training.classifier import held_out_accuracy, train_classifier

    pictures = open_pictures(images, image_size, background, skip_bad)
    chosen = classifier.ClassifierConfig()
    if steps is not None:
        if steps < 1:
            raise UserError(f"steps: got {steps}, expected 1 or more")
        chosen = dataclasses.replace(chosen, steps=steps, warm_up=min(chosen.warm_up, steps // 10))
    if dry_run:
        console.print(f"would train a classifier on {len(pictures.train)} pictures: {chosen}")
        return
    with open_progress("classifier") as progress:
        model = train_classifier(
            pictures, out, chosen, device=open_device(device), progress=progress
        )
    accuracy = held_out_accuracy(model, pictures.val)
    console.print(f"{out}: {accuracy:.2%} of {len(pictures.val)} held-out pictures recognised")
