"""Commands for single stages of a run, and for following runs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from ctf.cli import options
from ctf.cli.common import command, open_device, open_progress, open_splits, show
from ctf.common import signals
from ctf.common.errors import UserError


@command("tokenizer train")
def tokenizer_train(
    images: options.Images,
    /,
    *,
    out: Path,
    from_: Annotated[options.Maybe[str], arg(name="from", metavar="MODEL")] = None,
    preset: options.Preset = "small",
    image_size: options.ImageSize = None,
    steps: options.Steps = None,
    set: options.Overrides = (),
    precision: options.Precision = "auto",
    compile: bool = False,
    device: options.Device = "auto",
    dry_run: options.DryRun = False,
    image_options: options.ImageGroup,
) -> None:
    """Train the tokenizer of a run, which encodes images as codes and decodes them.

    Example: ctf tokenizer train my-images --out run

    Args:
        out: folder of the run; the tokenizer is saved in its folder tokenizer/
        from_: pipeline whose tokenizer is trained on: fashion-mnist, the folder of a run or
            pipeline, or org/name[@revision] on the Hugging Face Hub; it also sets the size
        precision: precision of the convolutions; auto is bf16 on GPUs that support it, else fp32
        compile: use torch.compile
    """
    from ctf.common import distributed
    from ctf.training import fit as fitting
    from ctf.training import stages
    from ctf.training.recipes import resolve
    from ctf.training.start import open_start

    with distributed.init_world(open_device(device)) as world:
        start = None if from_ is None else open_start(from_)
        image_size = image_size if start is None else start.check_image_size(image_size)
        splits = open_splits(
            images, image_options, image_size, preset, world, out=out, full=dry_run
        )
        recipe = resolve(preset, splits, steps=steps, overrides=set)
        if dry_run:
            show(fitting.describe(splits, recipe, None, world.size), world)
            return
        execution = options.ExecutionOptions(compile=compile, precision=precision)
        resolved = execution.resolve(world.device, warn=world.is_main)
        with signals.stop_on_sigterm(out), open_progress("tokenizer", world) as progress:
            source = None if start is None else start.folder
            stages.train_tokenizer(out, splits, recipe, world, progress, resolved, source)
        show(f"{out / 'tokenizer'}: done", world)


@command("tokenizer evaluate")
def tokenizer_evaluate(
    run: Annotated[Path, Positional, arg(metavar="RUN")],
    /,
    *,
    images: str,
    features: options.Maybe[str] = None,
    weights: options.Weights = None,
    device: options.Device = "auto",
    image_options: options.ImageGroup,
) -> None:
    """Measure how well held-out images are reconstructed, and how much of the codebook is used.

    Example: ctf tokenizer evaluate run --images my-images

    Args:
        run: fashion-mnist, the folder of a run or pipeline, or org/name[@revision] on the Hugging
            Face Hub
        images: fashion-mnist, eurosat, a folder of images, or .tar, .zip or .parquet files
        features: feature network to compute the rFID with: lite0, inception, fashion, or
            mymodule:factory; by default no rFID is computed
    """
    from ctf.evaluation import reference_sets, scores
    from ctf.evaluation.extractors import open_extractor
    from ctf.evaluation.reconstruction import reconstruction_metrics
    from ctf.pipelines.folder import find_pipeline, load_tokenizer

    torch_device = open_device(device)
    tokenizer = load_tokenizer(find_pipeline(run) / "tokenizer", torch_device)
    held_out = open_splits(images, image_options, tokenizer.config.image_size).val
    with open_progress("evaluate") as progress:
        result = reconstruction_metrics(tokenizer, held_out, torch_device, progress=progress)
    formats = {"mse": ".5f", "psnr": ".2f", "ssim": ".4f", "usage": ".2%", "perplexity": ".0f"}
    for name, value in result.items():
        show(f"{name:<12} {value:{formats.get(name, '.0f')}}{' dB' * (name == 'psnr')}")
    if features is None:
        return
    extractor = open_extractor(features, weights=weights, device=torch_device)
    reference, name = reference_sets.from_image_sets(images, (held_out,)), f"rFID{extractor.suffix}"
    with open_progress(name) as progress:
        rfid = scores.reconstruction_fid(tokenizer, reference, extractor, progress)
    show(f"{name:<12} {rfid.value:.4g}  (95 % interval {rfid.low:.4g} to {rfid.high:.4g})")


@command("tokens extract")
def tokens_extract(
    images: options.Images,
    /,
    *,
    run: Annotated[Path, arg(metavar="RUN")],
    from_: Annotated[options.Maybe[str], arg(name="from", metavar="MODEL")] = None,
    preset: options.Preset = "small",
    views: options.Views = None,
    limit: options.Maybe[int] = None,
    set: options.Overrides = (),
    precision: options.Precision = "auto",
    device: options.Device = "auto",
    dry_run: options.DryRun = False,
    image_options: options.ImageGroup,
) -> None:
    """Encode all images with the tokenizer of a run, once, ahead of training.

    Example: ctf tokens extract my-images --run run --views flip

    Args:
        run: folder of the run
        from_: pipeline whose tokenizer a new run takes over as it is: fashion-mnist, the folder of
            a run or pipeline, or org/name[@revision] on the Hugging Face Hub
        limit: number of training images, with balanced classes; by default all
        precision: precision of the encoder's convolutions; auto is fp32; bf16 is faster on devices
            with bfloat16 instructions, but changes a few codes, which the manifest records
    """
    from ctf.common import claims, distributed
    from ctf.pipelines.folder import find_pipeline, load_tokenizer
    from ctf.training import fit as fitting
    from ctf.training import stages
    from ctf.training.recipes import resolve

    with distributed.init_world(open_device(device)) as world:
        source = run if from_ is None else find_pipeline(from_)
        if source != run and not dry_run:
            with claims.hold(run, stages.TOKENIZER, what="a run of ctf", world=world):
                world.on_main(lambda: stages.take_tokenizer(run, source))
        tokenizer = load_tokenizer(source / "tokenizer", world.device)
        splits = open_splits(
            images, image_options, tokenizer.config.image_size, world=world, full=dry_run
        )
        recipe = resolve(preset, splits, views=views, overrides=set)
        classes = len(splits.train.class_names)
        if limit is not None and limit < classes:
            show(f"--limit {limit}: {classes - limit} of {classes} classes are left out", world)
        if dry_run:
            show(fitting.describe(splits, recipe, None, world.size), world)
            return
        with signals.stop_on_sigterm(run / "tokens"), open_progress("tokens", world) as progress:
            stages.extract_tokens(
                run, tokenizer, splits, recipe,
                limit=limit, precision=precision, world=world, progress=progress,
            )  # fmt: skip
        show(f"{run / 'tokens'}: done", world)


@command("tokens check")
def tokens_check(run: options.Run, /) -> None:
    """Verify all tokens of a run by their checksums; the exit code is 2 if any file is damaged.

    Example: ctf tokens check run
    """
    from ctf.data import tokens
    from ctf.training.stages import tokens_folder

    with open_progress("check") as progress:
        result = tokens.check(tokens_folder(run), progress)
    older = f"; {result.without_checksum} of them, from an earlier version, have no checksum"
    show(
        f"{run / 'tokens'}: {result.files} files are intact{older * (result.without_checksum > 0)}"
    )


@command("clusters fit")
def clusters_fit(
    run: options.Run,
    /,
    *,
    from_: Annotated[options.Maybe[str], arg(name="from", metavar="MODEL")] = None,
    count: int = 512,
    method: Literal["kmeans", "identity", "random", "average", "balanced"] = "kmeans",
    seed: int = 0,
    out: options.Maybe[Path] = None,
    dry_run: options.DryRun = False,
) -> None:
    """Cluster similar codes, and measure how redundant codes are (Fig. 1b of the paper).

    Example: ctf clusters fit run --count 512

    Args:
        from_: pipeline whose clusters are taken over, after its tokenizer: fashion-mnist, the
            folder of a run or pipeline, or org/name[@revision] on the Hugging Face Hub
        count: number of clusters
        method: kmeans, average (average linkage, as in MASC), balanced (clusters of equal size, as
            in IAR), identity (one cluster per code: the full-vocabulary baseline) or random (the
            paper's control)
        seed: random seed
        out: folder of another run for the clusters, with the tokenizer and the tokens of this one;
            required if this run already has clusters, as converted pipelines have
    """
    from ctf.models.clusters import ClustersConfig
    from ctf.pipelines.folder import load_tokenizer
    from ctf.training import stages, warm_start

    config = ClustersConfig(method=method, count=count, seed=seed)
    tokenizer, taken_over = load_tokenizer(run / "tokenizer"), None
    if from_ is not None:
        if (count, method) != (512, "kmeans"):
            raise UserError("got --from with --count or --method, expected one of them")
        taken_over = warm_start.open_clusters(from_, stages.tokenizer_hashes(run))
    if dry_run and taken_over is not None:
        show(f"would take over {taken_over.count} clusters of {from_}")
        return
    if dry_run:
        show(f"would cluster {tokenizer.config.codebook_size} codes: {config}")
        return
    if out is not None:
        stages.branch(run, out)
        run = out
    with signals.stop_on_sigterm(run / "clusters"):
        stages.fit_clusters(run, tokenizer, config, taken_over)
    clusters_show(run)


@command("clusters show")
def clusters_show(run: options.Run, /) -> None:
    """Print the report of a run's clusters, and the path of its image of swapped codes.

    Example: ctf clusters show run
    """
    from ctf.common import storage

    for name, value in storage.load_object(run / "clusters" / "report.json").items():
        show(f"{name:<10} {value}")
    show(f"{'image':<10} {run / 'clusters' / 'swaps.png'}")


@command("train coarse")
def train_coarse(
    run: options.Run,
    /,
    *,
    warm_start: options.From = None,
    training: options.Flat[options.TransformerOptions],
    execution: options.ExecutionGroup,
) -> None:
    """Train the coarse model of a run that has tokens and clusters.

    Example: ctf train coarse run --preset base --warm-start llamagen-B

    Args:
        warm_start: pipeline with the same tokenizer whose model it starts from: one with the same
            clusters, or a full-vocabulary one, e.g. a baseline or a converted LlamaGen; it also
            sets the size
    """
    _train("coarse", run, training, execution, warm_start)


@command("train fine")
def train_fine(
    run: options.Run,
    /,
    *,
    warm_start: options.From = None,
    training: options.Flat[options.TransformerOptions],
    execution: options.ExecutionGroup,
) -> None:
    """Train the fine model of a run that has tokens and clusters.

    Example: ctf train fine run --preset small

    Args:
        warm_start: pipeline with the same tokenizer and clusters whose model it starts from; it
            also sets the size
    """
    _train("fine", run, training, execution, warm_start)


@command("train baseline")
def train_baseline(
    run: options.Run,
    /,
    *,
    out: Path,
    warm_start: options.From = None,
    training: options.Flat[options.TransformerOptions],
    execution: options.ExecutionGroup,
) -> None:
    """Train the full-vocabulary baseline on the tokens of a run, as a run of its own.

    It is the coarse model with identity clusters and without a fine stage; its settings are those
    of the coarse model, e.g. --set coarse.layers=8.

    Example: ctf train baseline run --out baseline

    Args:
        out: folder of the baseline
        warm_start: full-vocabulary pipeline with the same tokenizer, e.g. a converted LlamaGen, to
            start from its transformer; it also sets the size
    """
    _train("coarse", out, training, execution, warm_start, baseline_of=run)


def _train(
    kind: Literal["coarse", "fine"],
    run: Path,
    training: options.TransformerOptions,
    execution: options.ExecutionOptions,
    warm_start: str | None = None,
    baseline_of: Path | None = None,
) -> None:
    from ctf.common import distributed
    from ctf.models.clusters import identity
    from ctf.models.sizes import SIZES
    from ctf.pipelines.folder import load_tokenizer
    from ctf.training import recipes, stages
    from ctf.training.model_stage import ModelStage

    recipe = recipes.preset(training.preset)
    if training.size is not None:
        recipe = dataclasses.replace(recipe, **{kind: SIZES[training.size]})  # type: ignore[arg-type]
    recipe = recipes.adjust(recipe, training.steps, training.set)
    with distributed.init_world(open_device(training.device)) as world:
        resolved = execution.resolve(world.device, shard=training.shard, warn=world.is_main)
        if training.dry_run:
            clusters = None
            if baseline_of is not None:
                show(f"would create {run} with the tokenizer and tokens of {baseline_of}", world)
                run = baseline_of
                clusters = identity(load_tokenizer(run / "tokenizer").config.codebook_size)
            stage = ModelStage.open(run, kind, recipe, world, resolved, warm_start, clusters)
            show(stage.describe(), world)
            return
        if baseline_of is not None:
            tokens_run = baseline_of
            world.on_main(lambda: stages.make_baseline(tokens_run, run))
        stage = ModelStage.open(run, kind, recipe, world, resolved, warm_start)
        with signals.stop_on_sigterm(run / kind), open_progress(kind, world) as progress:
            stage.train(progress)
        show(f"{run / kind}: done", world)


@command("runs show")
def runs_show(
    folders: Annotated[tuple[Path, ...], Positional, arg(metavar="RUN ...", help_behavior_hint="")],
    /,
    *,
    out: Path = Path("curves.png"),
    dry_run: options.DryRun = False,
) -> None:
    """Plot the training curves of runs, finished or not, and print the state of their stages.

    Example: ctf runs show run baseline --out curves.png

    Args:
        folders: folders of one or several runs, which are plotted together
        out: .png file for the plot of loss, gradient norm, learning rate and speed
    """
    from ctf.training import monitoring

    if out.suffix != ".png":
        raise UserError(f"--out {out}: expected a name that ends in .png")
    runs = [monitoring.load_trainings(folder) for folder in folders]
    if not runs:
        raise UserError("got no run, expected at least one")
    show(monitoring.table(runs))
    if dry_run:
        return
    monitoring.plot(runs, out)
    show(out)


@command("runs tensorboard")
def runs_tensorboard(
    run: options.Run,
    /,
    *,
    once: bool = False,
    samples_every: int = 1000,
    dry_run: options.DryRun = False,
) -> None:
    """Write the metrics of a run as event files for TensorBoard, during training or afterwards.

    Example: ctf runs tensorboard run

    Args:
        once: write what there is and exit, instead of following the run until interrupted
        samples_every: sample images each time the coarse or the fine model has trained for so many
            more steps; with 0, only when the pipeline is complete
    """
    from ctf.training import monitoring, tensorboard

    if samples_every < 0:
        raise UserError(f"samples-every: got {samples_every}, expected 0 or more")
    names = ", ".join(folder.name for folder in monitoring.find_stages(run))
    folder = run / tensorboard.FOLDER
    if dry_run:
        show(f"would write {folder}: {names or 'nothing yet'}")
        return
    show(f"run tensorboard --logdir {folder} to see it")
    tensorboard.follow(run, once=once, samples_every=samples_every)


@command("classifier train")
def classifier_train(
    images: options.Images,
    /,
    *,
    out: Path,
    image_size: Annotated[
        options.Maybe[int], arg(help="side in pixels; by default 32 for fashion-mnist, else 64")
    ] = None,
    steps: Annotated[options.Maybe[int], arg(help="training steps; by default 7000")] = None,
    device: options.Device = "auto",
    dry_run: options.DryRun = False,
    image_options: options.ImageGroup,
) -> None:
    """Train a small image classifier for scoring samples, and print its held-out accuracy.

    Example: ctf classifier train fashion-mnist --out classifier

    Args:
        out: folder of the classifier
    """
    from ctf.evaluation import classifier
    from ctf.training.classifier import held_out_accuracy, train_classifier
    from ctf.training.recipes import with_steps

    splits = open_splits(images, image_options, image_size, out=out, full=dry_run)
    config = classifier.ClassifierConfig()
    if steps is not None:
        config = with_steps(config, steps)
    if dry_run:
        show(f"would train a classifier on {len(splits.train)} images: {config}")
        return
    with open_progress("classifier") as progress:
        model = train_classifier(splits, out, config, device=open_device(device), progress=progress)
    accuracy = held_out_accuracy(model, splits.val)
    show(f"{out}: {accuracy:.2%} of {len(splits.val)} held-out images classified correctly")
