"""Commands that train the transformers of a run and the classifier, and that follow runs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from ctf.cli import options
from ctf.cli.common import command, open_device, open_progress, open_splits, show
from ctf.common import signals
from ctf.common.errors import UserError


@command("train coarse")
def train_coarse(
    run: options.Run,
    /,
    *,
    warm_start: options.WarmStart = None,
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
    warm_start: options.WarmStart = None,
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
    warm_start: options.WarmStart = None,
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
