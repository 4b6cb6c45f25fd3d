"""Commands for the stages of a run before its models: tokenizer, tokens, clusters."""

from __future__ import annotations

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
    from_: options.From = None,
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
        from_: pipeline whose tokenizer is trained on: fashion-mnist, eurosat, the folder of a run
            or pipeline, or org/name[@revision] on the Hugging Face Hub; it also sets the size
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
        run: fashion-mnist, eurosat, the folder of a run or pipeline, or org/name[@revision] on the
            Hugging Face Hub
        images: fashion-mnist, eurosat, a folder of images, or .tar, .zip or .parquet files
        features: feature network to compute the rFID with: lite0, inception, fashion, eurosat
            or mymodule:factory; by default no rFID is computed
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
    from_: options.From = None,
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
        from_: pipeline whose tokenizer a new run takes over as it is: fashion-mnist, eurosat, the
            folder of a run or pipeline, or org/name[@revision] on the Hugging Face Hub
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
    from_: options.From = None,
    count: int = 512,
    method: Literal["kmeans", "identity", "random", "average", "balanced"] = "kmeans",
    seed: int = 0,
    out: options.Maybe[Path] = None,
    dry_run: options.DryRun = False,
) -> None:
    """Cluster similar codes, and measure how redundant codes are (Fig. 1b of the paper).

    Example: ctf clusters fit run --count 512

    Args:
        from_: pipeline whose clusters are taken over, after its tokenizer: fashion-mnist, eurosat,
            the folder of a run or pipeline, or org/name[@revision] on the Hugging Face Hub
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
