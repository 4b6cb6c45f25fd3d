"""Every stage in order, from pictures to a pipeline; each stage a function of a run's folder.

    RUN/fit.json  what the run was asked for, its plan, and the seconds of each stage
    RUN/tokenizer/  tokens/  clusters/  coarse/  fine/  pipeline.json

A stage that is done is loaded, one that was killed goes on, so running the same command again
always leads to the same end.
"""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from ctf.common import claims, config, precision, storage
from ctf.common.distributed import ALONE, World
from ctf.common.errors import UserError
from ctf.common.progress import OpenProgress, Progress, show_progress
from ctf.common.weights import load_strict
from ctf.data import extraction, tokens  # fmt: skip
from ctf.data.image_set import Splits
from ctf.data.tokens import Tokens
from ctf.data.transforms import VIEWS, as_tensor
from ctf.models import clusters, objectives
from ctf.models.clusters import Clusters, ClustersConfig
from ctf.models.coarse import CoarseModel
from ctf.models.fine import FineModel
from ctf.models.tokenizer import VQModel
from ctf.models.transformer import TransformerConfig
from ctf.pipelines.folder import SETTINGS, PipelineSettings, load_settings, load_tokenizer
from ctf.pipelines.pipeline import Pipeline
from ctf.training import cost, loop, metrics_log, state, transformers
from ctf.training import tokenizer as tokenizer_training
from ctf.training.clusters import fit_clusters as write_clusters
from ctf.training.loop import DEFAULT_EXECUTION, Execution
from ctf.training.recipes import Recipe, preset, with_steps
from ctf.training.warm_start import Source, open_source, weights

Kind = Literal["coarse", "fine"]

FIT = "fit.json"
TOKENIZER = "tokenizer/config.json"
FINAL_PICTURES = 2000  # held-out pictures that the finished tokenizer is measured on
STUDY_PICTURES = 256  # held-out pictures that the clusters' redundancy study looks at
TIMED_PICTURES = 256  # pictures that tell how fast tokens are extracted
OVERHEAD = 0.05  # of a stage's time, for evaluating and saving


def fit(
    images: Splits,
    run: Path,
    recipe: Recipe,
    *,
    minutes: float | None = None,
    device: torch.device,
    open_progress: OpenProgress = show_progress,
    execution: Execution = DEFAULT_EXECUTION,
) -> Pipeline:
    """Trains every stage that is not done yet and returns the pipeline.

    Args:
        minutes: a budget for all stages together, shared as `recipe.time_shares` says; the
            steps are then found by timing some. None: the steps of the recipe.

    Raises:
        UserError: `run` was made by another configuration or holds something else, or see
            `check` and the stages.
    """
    check(images, recipe)
    asked = {
        "images": images.train.name,
        "images_fingerprint": images.train.fingerprint,
        "minutes": minutes,
        "recipe": config.to_json(recipe),
    }
    log = _Log.open(run, asked)
    budget = _Budget(recipe, minutes, log)
    world = World(device=device)
    model_config = recipe.tokenizer.config(images.train.image_size)

    def tokenizer_steps() -> int:
        short = with_steps(recipe.tokenizer_training, 100)
        trial = tokenizer_training.TokenizerTrainer(model_config, short, images, world)
        return budget.steps("tokenizer", loop.seconds_per_step(trial))

    steps = log.plan("tokenizer", tokenizer_steps if minutes else None)
    if steps is not None:
        recipe = dataclasses.replace(
            recipe, tokenizer_training=with_steps(recipe.tokenizer_training, steps)
        )
    with log.timed("tokenizer"), open_progress("tokenizer") as progress:
        tokenizer = train_tokenizer(run, images, recipe, world, progress)

    def token_limit() -> int:
        views = len(VIEWS[recipe.tokens.views])
        each = _seconds_per_picture(tokenizer, images, device)
        return budget.pictures("tokens", each, views, len(images.val))

    limit = log.plan("tokens", token_limit if minutes else None)
    with log.timed("tokens"), open_progress("tokens") as progress:
        extract_tokens(run, tokenizer, images, recipe, limit, progress)

    with log.timed("clusters"):
        parts = fit_clusters(run, tokenizer, recipe.clusters)

    kinds: tuple[Kind, ...] = ("coarse", "fine")
    for kind in kinds:
        if kind == "fine" and parts.largest == 1:
            break  # nothing is left to choose

        def model_steps(kind: Kind, recipe: Recipe) -> int:
            trial = make_trainer(run, kind, parts, recipe, world, execution=execution)
            return budget.steps(kind, loop.seconds_per_step(trial))

        steps = log.plan(kind, partial(model_steps, kind, recipe) if minutes else None)
        if steps is not None:
            stage_training = with_steps(getattr(recipe, f"{kind}_training"), steps)
            recipe = dataclasses.replace(recipe, **{f"{kind}_training": stage_training})
        with log.timed(kind), open_progress(kind) as progress:
            train_model(run, kind, parts, recipe, world, progress, execution=execution)
    _describe(run, images, recipe, log.seconds)
    return Pipeline.from_pretrained(run, device)


def resolve(
    preset_name: str,
    images: Splits,
    *,
    steps: int | None = None,
    views: str | None = None,
    overrides: Sequence[str] = (),
) -> Recipe:
    """The recipe of a preset for these pictures, with what the user asked for put in.

    Args:
        steps: of every trained stage; None: the preset's.
        views: of each training picture, a name in `images.VIEWS`; None: the preset's, but plain
            where mirrored pictures would be wrong.
        overrides: as `config.override` takes them.

    Raises:
        UserError: an unknown preset, view or key, or a value out of its range.
    """
    recipe = preset(preset_name)
    if views is None and not images.train.mirrors:
        views = "plain"
    if views is not None:
        overrides = [f"tokens.views={views}", *overrides]
    return adjust(recipe, steps, overrides)


def adjust(recipe: Recipe, steps: int | None, overrides: Sequence[str]) -> Recipe:
    """The recipe with values replaced, and with `steps` steps in every trained stage."""
    recipe = config.override(recipe, overrides)
    if steps is None:
        return recipe
    if steps < 1:
        raise UserError(f"steps: got {steps}, expected 1 or more")
    return recipe.with_steps(steps)


def check(images: Splits, recipe: Recipe) -> None:
    """Finds what would fail in a later stage before there is any work to lose.

    Raises:
        UserError: the image size is not divisible by the tokenizer's factor, there are more
            clusters than codes, or a model of such a shape cannot be built.
    """
    tokenizer_config = recipe.tokenizer.config(images.train.image_size)
    for shape in (recipe.coarse, recipe.fine):
        shape.config(tokenizer_config.grid, len(images.train.class_names))
    count, codes = recipe.clusters.count, tokenizer_config.codebook_size
    if recipe.clusters.method != "identity" and count > codes:
        raise UserError(f"got {count} clusters, expected 1 to {codes}: the number of codes")


def describe(
    images: Splits,
    recipe: Recipe,
    minutes: float | None,
    devices: int = 1,
    execution: Execution = DEFAULT_EXECUTION,
) -> str:
    """What `fit` would do with these pictures, and what each stage costs by calculation.

    Raises:
        UserError: see `check`.
    """
    check(images, recipe)
    classes = len(images.train.class_names)
    tokenizer_config = recipe.tokenizer.config(images.train.image_size)
    lines = [
        f"{len(images.train)} pictures to train on, {len(images.val)} held out, {classes} classes, "
        f"{images.train.image_size} pixels -> {tokenizer_config.grid} x {tokenizer_config.grid} "
        f"of {tokenizer_config.codebook_size} codes in {recipe.clusters.count} clusters"
    ]
    setting = cost.Setting(
        images.train.image_size, len(images.train), classes, devices, execution=execution
    )
    if minutes is None:
        return "\n".join([*lines, cost.describe(recipe, setting)])
    for stage in cost.costs(recipe, setting):
        if stage.parameters:
            millions = stage.parameters / 1e6
            lines.append(f"{stage.name}: {millions:.1f} M parameters, steps by measured speed")
    return "\n".join([*lines, f"about {minutes:g} minutes in all"])


def _describe(run: Path, images: Splits, recipe: Recipe, spent: dict[str, float]) -> None:
    """Writes into pipeline.json what the pipeline was made of and how good its parts are."""
    described = load_settings(run)
    if "metrics" in described.origin:
        return
    tokenizer = load_tokenizer(run / "tokenizer")
    metrics: dict[str, Any] = {
        "tokenizer": tokenizer_training.reconstruction_metrics(
            tokenizer, images.val, limit=FINAL_PICTURES
        )
    }
    kinds = [kind for kind in ("coarse", "fine") if (run / kind).is_dir()]
    for kind in kinds:
        metrics[kind] = {"loss": metrics_log.last_metrics(run / kind, "val")["loss"]}
    for stage in ("tokenizer", *kinds):
        # A training keeps its own time, through all kills; the log lacks attempts that were killed.
        own = metrics_log.last_metrics(run / stage, "val").get("seconds", 0.0)
        spent = {**spent, stage: max(spent.get(stage, 0.0), own)}
    origin = {
        "images": images.train.name,
        "recipe": config.to_json(recipe),
        "metrics": metrics,
        "seconds": spent,
    }
    described = dataclasses.replace(described, origin=origin)
    storage.save_json(run / SETTINGS, config.to_json(described))


# --- The stages -----------------------------------------------------------------------------------


def tokenizer_hash(run: Path) -> str:
    """What names a tokenizer to the stages after it: the SHA-256 of its weights."""
    return storage.hash_file(run / "tokenizer" / "model.safetensors")


def train_tokenizer(
    run: Path, images: Splits, recipe: Recipe, world: World, progress: Progress | None
) -> VQModel:
    """Trains the tokenizer of a run, or goes on, or loads it if it is done.

    Raises:
        UserError: `run` holds something else, or see `loop.begin`.
    """

    world.on_main(lambda: claims.is_ours(run, FIT, TOKENIZER, what="a run of ctf"))
    return tokenizer_training.train(
        recipe.tokenizer.config(images.train.image_size),
        recipe.tokenizer_training,
        images,
        run / "tokenizer",
        world,
        progress,
    )


def extract_tokens(
    run: Path,
    tokenizer: VQModel,
    images: Splits,
    recipe: Recipe,
    limit: int | None,
    progress: Progress | None,
    world: World = ALONE,
    precision: precision.Precision = "auto",
) -> None:
    extraction.extract(
        tokenizer, tokenizer_hash(run), images, run / "tokens", recipe.tokens,
        limit=limit, precision=precision, progress=progress, world=world,
    )  # fmt: skip


def fit_clusters(run: Path, tokenizer: VQModel, wanted: ClustersConfig) -> Clusters:
    name = tokenizer_hash(run)
    val = Tokens(run / "tokens", "val", name)
    codes_BL = val.codes(np.arange(min(len(val), STUDY_PICTURES)))
    return write_clusters(run / "clusters", tokenizer, codes_BL, wanted, name)


def open_tokens(run: Path) -> tuple[Tokens, Tokens]:
    """Those to train on and those held out. Raises UserError where they are another tokenizer's."""
    name = tokenizer_hash(run)
    return Tokens(run / "tokens", "train", name), Tokens(run / "tokens", "val", name)


def model_config(
    run: Path, kind: Kind, parts: Clusters, recipe: Recipe, train: Tokens, source: Source | None
) -> TransformerConfig:
    """The shape of the coarse or fine model of a run.

    Args:
        source: what a coarse model is to start from; it gets that one's shape.

    Raises:
        UserError: a fine model has nothing to choose, or the source was made for another grid.
    """
    grid = round(train.manifest.length**0.5)
    classes = len(train.manifest.class_names)
    if kind == "fine":
        if parts.largest == 1:
            raise UserError(
                f"{run}: each code is a cluster of its own, which leaves a fine model nothing to "
                "choose"
            )
        return recipe.fine.config(grid, classes)
    if source is None:
        return recipe.coarse.config(grid, classes)
    if source.model.config.grid != grid:
        raise UserError(
            f"the model to start from was made for a grid of {source.model.config.grid}, "
            f"the tokens are of {grid} x {grid}"
        )
    return dataclasses.replace(source.model.config, classes=classes, dropout=recipe.coarse.dropout)


def describe_model(
    run: Path,
    kind: Kind,
    parts: Clusters,
    recipe: Recipe,
    world: World,
    source: Source | None = None,
    execution: Execution = DEFAULT_EXECUTION,
) -> str:
    """What `train_model` would do, and what it costs by calculation. Raises UserError as that."""
    train, _ = open_tokens(run)
    shape = model_config(run, kind, parts, recipe, train, source)
    manifest = train.manifest
    setting = cost.Setting(
        manifest.image_size, len(train), shape.classes, world.size, execution=execution
    )
    t = recipe.coarse_training if kind == "coarse" else recipe.fine_training
    world.share(t.batch_size, "batch_size")
    if kind == "coarse":
        stage = cost.coarse_cost(shape, t, setting, parts.count)
    else:
        stage = cost.fine_cost(
            shape, t, setting, parts.count, parts.codebook_size, parts.largest, recipe.fine_softmax
        )
    said = f"would train {stage.parameters / 1e6:.1f} M parameters: {t}"
    return "\n".join([said, *cost.lines(stage, setting)])


def make_trainer(
    run: Path,
    kind: Kind,
    parts: Clusters,
    recipe: Recipe,
    world: World,
    source: Source | None = None,
    execution: Execution = DEFAULT_EXECUTION,
    *,
    resumed: bool = False,
) -> transformers.Trainer:
    """A trainer for the coarse or fine model of a run whose tokens and clusters are done.

    Args:
        source: what a coarse model starts from.
        resumed: a state will be loaded, so it needs no first weights.

    Raises:
        UserError: the tokens are another tokenizer's, or see `model_config`.
    """
    train, val = open_tokens(run)
    shape = model_config(run, kind, parts, recipe, train, source)
    training_objective: objectives.Objective | None = None
    if kind == "coarse":
        t = recipe.coarse_training
        torch.manual_seed(t.seed)
        model: transformers.Model = (coarse := CoarseModel(shape, parts.count))
        if source is not None and not resumed:
            first = weights(source, parts, train, coarse, world.device)
            first = {name: tensor.cpu() for name, tensor in first.items()}
            load_strict(coarse, first, "the first weights")
        objective = objectives.coarse_objective(parts)
        if (weight := recipe.group_loss.weight) > 0:
            if parts.largest > 1:
                raise UserError(
                    "group_loss: is for the full-vocabulary baseline, where each code is a cluster "
                    "of its own"
                )
            codebook_VC = load_tokenizer(run / "tokenizer").codebook()
            groups = clusters.fit(codebook_VC, recipe.group_loss.clusters)
            training_objective = objectives.grouped_objective(groups, weight)
    else:
        t = recipe.fine_training
        torch.manual_seed(t.seed)
        model = FineModel(shape, parts, recipe.fine_softmax)
        objective = objectives.fine_objective(parts)
        if recipe.fine_corruption > 0:
            training_objective = objectives.corrupted_objective(parts, recipe.fine_corruption)
    return transformers.Trainer(
        model, objective, train, val, t, world, execution, training_objective
    )


def train_model(
    run: Path,
    kind: Kind,
    parts: Clusters,
    recipe: Recipe,
    world: World,
    progress: Progress | None,
    warm_start: Path | None = None,
    execution: Execution = DEFAULT_EXECUTION,
) -> None:
    """Trains the coarse or the fine model of a run, or goes on, or finds that it is done.

    Args:
        warm_start: folder of a full-vocabulary pipeline that a coarse model starts from. The loss
            that it starts with is the first line of its metrics.jsonl.
    """
    source = None if warm_start is None else open_source(warm_start, tokenizer_hash(run))
    folder = run / kind
    train, _ = open_tokens(run)
    t = recipe.coarse_training if kind == "coarse" else recipe.fine_training
    world.share(t.batch_size, "batch_size")  # said before anything is written
    stored: dict[str, Any] = {
        "model": config.to_json(model_config(run, kind, parts, recipe, train, source)),
        "clusters": clusters.fingerprint(parts),
        "training": config.to_json(t),
        "tokens": storage.hash_file(run / "tokens" / tokens.MANIFEST),
    }
    if kind == "fine":
        stored["softmax"] = recipe.fine_softmax
        if recipe.fine_corruption > 0:
            stored["corruption"] = recipe.fine_corruption
    elif recipe.group_loss.weight > 0:
        stored["group_loss"] = config.to_json(recipe.group_loss)
    if source is not None:
        stored["warm_start"] = source.hash
    if not loop.begin(folder, stored, world):
        return
    settings = PipelineSettings(
        train.manifest.class_names,
        recipe.sampling,
        {"images": train.manifest.train.images, "recipe": config.to_json(recipe)},
    )
    world.on_main(lambda: storage.save_json(run / SETTINGS, config.to_json(settings)))
    begun = world.broadcast(state.latest_state(folder / "state") if world.is_main else 0)
    trainer = make_trainer(run, kind, parts, recipe, world, source, execution, resumed=bool(begun))
    loop.run(
        trainer,
        folder,
        t.steps,
        evaluate_every=t.evaluate_every,
        evaluate_first=source is not None,
        progress=progress,
        world=world,
    )
    loop.finish(folder, trainer.averaged.state_dict(), {}, world)


def branch(run: Path, out: Path) -> None:
    """Makes `out` a run with the tokenizer and the tokens of `run`: for other clusters or models.

    Raises:
        UserError: `run` has no tokenizer or tokens, or `out` holds something else.
    """
    Tokens(run / "tokens", "train", tokenizer_hash(run))
    files = ("config.json", "model.safetensors")
    if not (out / "tokenizer" / files[-1]).is_file():
        claims.is_ours(out, TOKENIZER, what=f"a run with the tokens of {run}")
        for name in files:
            with storage.atomic(out / "tokenizer" / name) as temporary:
                shutil.copyfile(run / "tokenizer" / name, temporary)
    if not (out / "tokens").exists():
        # A link: tokens may be large, and are only needed for training.
        (out / "tokens").symlink_to((run / "tokens").resolve(), target_is_directory=True)


def make_baseline(run: Path, out: Path) -> Clusters:
    """Makes `out` a run like `run` with identity clusters. Raises UserError: see `branch`."""
    tokenizer = load_tokenizer(run / "tokenizer")
    branch(run, out)
    return fit_clusters(out, tokenizer, ClustersConfig(method="identity"))


# --- Plans and budgets ----------------------------------------------------------------------------


class _Log:
    """RUN/fit.json: what was asked for, what was planned, how long each stage took."""

    def __init__(self, path: Path, content: dict[str, Any]) -> None:
        self.path, self.content = path, content

    @classmethod
    def open(cls, run: Path, asked: dict[str, Any]) -> _Log:
        path = run / FIT
        if claims.is_ours(run, FIT, what="a run of ctf fit"):
            content = storage.load_object(path)
            claims.check_same(run, content.get("asked"), asked, what="a run of ctf fit")
            storage.remove_temporaries(run)
            return cls(path, content)
        log = cls(path, {"asked": asked, "plan": {}, "seconds": {}, "done": []})
        log.save()
        return log

    def save(self) -> None:
        storage.save_json(self.path, self.content)

    def plan(self, stage: str, find: Callable[[], int] | None) -> int | None:
        """The number planned for a stage: found once, the same ever after."""
        plan: dict[str, int] = self.content["plan"]
        if find is not None and stage not in plan:
            began = time.monotonic()
            plan[stage] = find()
            self._add_seconds(stage, time.monotonic() - began)
            self.save()
        return plan.get(stage)

    def timed(self, stage: str) -> _Timer:
        return _Timer(self, stage)

    def _add_seconds(self, stage: str, seconds: float) -> None:
        spent: dict[str, float] = self.content["seconds"]
        spent[stage] = round(spent.get(stage, 0.0) + seconds, 2)

    def spend(self, stage: str, seconds: float, *, done: bool) -> None:
        """Notes how long a stage took so far; finding later that it is done is not worth a note."""
        if stage not in self.content["done"]:
            self._add_seconds(stage, seconds)
            if done:
                self.content["done"].append(stage)
            self.save()

    @property
    def seconds(self) -> dict[str, float]:
        return dict(self.content["seconds"])


class _Timer:
    def __init__(self, log: _Log, stage: str) -> None:
        self.log, self.stage = log, stage

    def __enter__(self) -> None:
        self.began = time.monotonic()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # A stage that was asked to stop has taken its time too. A failure, e.g. of a full disk, is
        # told as it is, without another attempt to write.
        if kind is None or not issubclass(kind, Exception):
            self.log.spend(self.stage, time.monotonic() - self.began, done=kind is None)


class _Budget:
    """Shares what is left of the time among the stages that are left."""

    def __init__(self, recipe: Recipe, minutes: float | None, log: _Log) -> None:
        self.shares: dict[str, float] = dataclasses.asdict(recipe.time_shares)
        self.minutes, self.log = minutes, log

    def seconds(self, stage: str) -> float:
        assert self.minutes is not None
        left = self.minutes * 60 - sum(self.log.seconds.values())
        stages = list(self.shares)
        to_come = sum(self.shares[s] for s in stages[stages.index(stage) :])
        return max(1.0, left * self.shares[stage] / to_come) * (1 - OVERHEAD)

    def steps(self, stage: str, seconds_per_step: float) -> int:
        """At least one step, in whole lines of the log where there is time for some."""
        steps = max(1, int(self.seconds(stage) / seconds_per_step))
        return max(steps // loop.LOG_EVERY * loop.LOG_EVERY, min(steps, loop.LOG_EVERY))

    def pictures(self, stage: str, seconds_each: float, views: int, held_out: int) -> int:
        """How many training pictures; as many held-out ones are encoded too, if there are."""
        encoded = self.seconds(stage) / seconds_each
        return max(1, int(max(encoded / (views + 1), (encoded - held_out) / views)))


def _seconds_per_picture(tokenizer: VQModel, images: Splits, device: torch.device) -> float:
    indices = np.arange(min(len(images.train), TIMED_PICTURES))
    began = time.perf_counter()
    with torch.inference_mode():
        tokenizer.encode(as_tensor(images.train.read(indices), device))
    return (time.perf_counter() - began) / len(indices)
