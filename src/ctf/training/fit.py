"""All stages in order, from images to a pipeline, by a recipe or within a time budget.

    RUN/fit.json  the request, what was chosen for few images, how the images were understood, the
                  planned steps, and the seconds of each stage

Finished stages are loaded and stopped ones resume, so running the same command again always leads
to the same result.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ctf.common import claims, config, storage
from ctf.common.defaults import with_torch_defaults
from ctf.common.distributed import World
from ctf.common.errors import UserError
from ctf.common.progress import OpenProgress, show_progress
from ctf.data import summary
from ctf.data.image_set import Splits
from ctf.data.transforms import VIEWS, as_tensor
from ctf.evaluation.reconstruction import reconstruction_metrics
from ctf.models.tokenizer import VQModel
from ctf.pipelines.folder import SETTINGS, load_settings, load_tokenizer
from ctf.pipelines.pipeline import Pipeline
from ctf.training import cost, loop, metrics_log, stages
from ctf.training.few_images import Choices
from ctf.training.loop import DEFAULT_EXECUTION, Execution, Trainable
from ctf.training.model_stage import ModelStage
from ctf.training.recipes import KINDS, STAGES, Recipe, as_recorded, check_recipe
from ctf.training.stages import FIT
from ctf.training.start import Start
from ctf.training.tokenizer import TokenizerTrainer

MEASURED_IMAGES = 2000  # held-out images that the finished tokenizer is measured on
TIMED_IMAGES = 256  # images by which the speed of encoding is measured
WHAT = "a run of ctf fit"
OVERHEAD = 0.05  # of a stage's time, for evaluating and saving


@with_torch_defaults
def fit(
    images: Splits,
    run: Path,
    recipe: Recipe,
    *,
    minutes: float | None = None,
    device: torch.device,
    open_progress: OpenProgress = show_progress,
    execution: Execution = DEFAULT_EXECUTION,
    start: Start | None = None,
    chosen: Choices | None = None,
) -> Pipeline:
    """Train every stage that is not finished yet, and return the pipeline.

    Args:
        images: What to train on.
        run: Folder of the run; may be missing.
        recipe: Shapes and training of every stage; see `recipes.resolve`.
        minutes: Time budget of all stages together, divided as `recipe.time_shares` says; the
            numbers of steps then follow from measured speed. None: the steps of the recipe.
        device: Where to compute.
        open_progress: Shows the progress of a stage.
        execution: How steps are computed; for the tokenizer, its precision and compilation count.
        start: A pipeline to start from, see `open_start`; the recipe is then `start.resolve`'s.
        chosen: What was chosen for the number of images, which the recipe has already: for
            fit.json, from where a run that is continued takes it. See `few_images.choose`.

    Raises:
        UserError: `run` was made by another configuration or holds something else, or see
            `check_recipe`, `Start.check` and the stages.
        Stopped: See `loop.run`.
    """
    if start is not None:
        start.check(images, recipe)
        if start.folder.resolve() == run.resolve():
            raise UserError(f"--from {start.name} is the folder of the run; choose another --out")
    check_recipe(images, recipe)
    images = images.as_recorded_in(run / FIT, "asked", "images_fingerprint")
    recipe = as_recorded(recipe, run / FIT, "asked", "recipe")
    with claims.hold(run, FIT, what=WHAT):
        return _fit(images, run, recipe, minutes, device, open_progress, execution, start, chosen)


def _fit(
    images: Splits,
    run: Path,
    recipe: Recipe,
    minutes: float | None,
    device: torch.device,
    open_progress: OpenProgress,
    execution: Execution,
    start: Start | None,
    chosen: Choices | None,
) -> Pipeline:
    world = World(device=device)
    request = {
        "images": images.train.name,
        "images_fingerprint": images.train.fingerprint,
        "minutes": minutes,
        "recipe": config.to_json(recipe),
    }
    if start is not None:
        request["from"] = start.to_json()
    log = _Log.open(run, request, summary.to_json(images), chosen or {})
    budget = None if minutes is None else _Budget(recipe, minutes, log)

    if start is not None and not start.train_tokenizer:
        with log.timed("tokenizer"):
            stages.take_tokenizer(run, start.folder)
            tokenizer = load_tokenizer(run / "tokenizer", device)
    else:
        source = None if start is None else start.folder
        if budget is not None:
            shape = recipe.tokenizer.config(images.train.image_size)
            shape = shape if start is None else start.tokenizer
            short = recipe.with_steps(100, ["tokenizer"]).tokenizer_training
            steps = budget.steps(
                "tokenizer", lambda: TokenizerTrainer(shape, short, images, world, execution)
            )
            recipe = recipe.with_steps(steps, ["tokenizer"])
        with log.timed("tokenizer"), open_progress("tokenizer") as progress:
            tokenizer = stages.train_tokenizer(
                run, images, recipe, world, progress, execution, source
            )

    limit = None if budget is None else budget.images(tokenizer, images, device)
    with log.timed("tokens"), open_progress("tokens") as progress:
        stages.extract_tokens(run, tokenizer, images, recipe, limit=limit, progress=progress)

    with log.timed("clusters"):
        taken_over = None if start is None else start.clusters
        clusters = stages.fit_clusters(run, tokenizer, recipe.clusters, taken_over)

    for kind in KINDS[: 2 if clusters.largest > 1 else 1]:  # identity clusters have no fine model
        warm_start_from = None if start is None else start.folder
        stage = ModelStage.open(run, kind, recipe, world, execution, warm_start_from, clusters)
        if budget is not None:
            recipe = recipe.with_steps(budget.steps(kind, stage.make_trainer), [kind])
            stage = dataclasses.replace(stage, recipe=recipe)
        with log.timed(kind), open_progress(kind) as progress:
            stage.train(progress)
    save_origin(run, images, recipe, log.seconds, start)
    return Pipeline.from_pretrained(run, device)


def save_origin(
    run: Path,
    images: Splits,
    recipe: Recipe,
    seconds: dict[str, float],
    start: Start | None = None,
) -> None:
    """Write into pipeline.json how the pipeline was made and how good its parts are."""
    settings = load_settings(run)
    if "metrics" in settings.origin:
        return
    tokenizer = load_tokenizer(run / "tokenizer")
    metrics: dict[str, Any] = {
        "tokenizer": reconstruction_metrics(tokenizer, images.val, limit=MEASURED_IMAGES)
    }
    for stage in STAGES:
        if not (last := metrics_log.last_metrics(run / stage, "val")):
            continue
        if stage != "tokenizer":
            metrics[stage] = _kept_metrics(run / stage, last)
    origin = {
        "images": images.train.name,
        "recipe": config.to_json(recipe),
        "metrics": metrics,
        "seconds": seconds,
    }
    if start is not None:
        origin["from"] = start.origin()
    settings = dataclasses.replace(settings, origin=settings.origin | origin)
    storage.save_json(run / SETTINGS, config.to_json(settings))


def _kept_metrics(folder: Path, last: dict[str, Any]) -> dict[str, Any]:
    """Return the held-out loss of the weights that a stage kept, and of which step, if not last."""
    if storage.load_object(folder / "config.json").get("keep") != "best":
        return {"loss": last["loss"]}
    lines = [line for line in metrics_log.read_metrics(folder) if line["split"] == "val"]
    best = min(lines, key=lambda line: line["loss"])
    earlier = {"step": best["step"]} if best["step"] < last["step"] else {}
    return {"loss": best["loss"], **earlier}


def describe(
    images: Splits,
    recipe: Recipe,
    minutes: float | None,
    devices: int = 1,
    execution: Execution = DEFAULT_EXECUTION,
    start: Start | None = None,
) -> str:
    """Return what `fit` would do with these images, and what each stage costs by calculation.

    Raises:
        UserError: See `check_recipe` and `Start.check`.
    """
    if start is not None:
        start.check(images, recipe)
    check_recipe(images, recipe)
    size, classes = images.train.image_size, len(images.train.class_names)
    tokenizer = recipe.tokenizer.config(size)
    identity = recipe.clusters.method == "identity"
    clusters = tokenizer.codebook_size if identity else recipe.clusters.count
    lines = [
        *([] if start is None else [start.describe(images)]),
        f"{size} pixels -> {tokenizer.grid} x {tokenizer.grid} "
        f"of {tokenizer.codebook_size} codes in {clusters} clusters",
    ]
    setting = cost.Setting(size, len(images.train), classes, devices, execution=execution)
    for stage in cost.costs(recipe, setting):
        if stage.name == "tokenizer" and start is not None and not start.train_tokenizer:
            continue
        if minutes is None:
            lines += cost.describe_cost(stage, setting)
        elif stage.parameters:
            millions = stage.parameters / 1e6
            lines.append(f"{stage.name}: {millions:.1f} M parameters, steps by measured speed")
    if minutes is not None:
        lines.append(f"about {minutes:g} minutes in all")
    return "\n".join(lines)


# --- The log and the time budget ------------------------------------------------------------------


class _Log:
    """RUN/fit.json: the request, the plan, and how long each stage took."""

    def __init__(self, path: Path, content: dict[str, Any]) -> None:
        self.path, self.content = path, content

    @classmethod
    def open(
        cls, run: Path, request: dict[str, Any], data: dict[str, Any], chosen: Choices
    ) -> _Log:
        """Open the log of a run, or begin it; `data` is how the images were understood."""
        path = run / FIT
        if path.is_file():
            content = storage.load_object(path)
            asked, before = content.get("asked"), content.get("data")
            fingerprints = [(x or {}).get("images_fingerprint") for x in (asked, request)]
            if before is not None and fingerprints[0] != fingerprints[1]:  # says more than these
                told = ("options", "train", "val", "classes")
                stored, now = ({key: each.get(key) for key in told} for each in (before, data))
                claims.check_same(run, {"data": stored}, {"data": now}, what=WHAT)
            log = cls(path, content)
            _check_same_start(run, *((each or {}).get("from") for each in (asked, request)))
            renamed = (asked or {}).get("images"), request["images"]
            # What may be renamed or moved: fingerprint and hash cover what matters.
            names = {key: request[key] for key in ("images", "from") if key in request}
            claims.check_same(run, {**(asked or {}), **names}, request, what=WHAT)
            storage.remove_temporaries(run)
            if asked != request:
                content["asked"] = request
                log._save()
            if renamed[0] != renamed[1]:
                print(f"{run}: the images of {renamed[0]} are now in {renamed[1]}", flush=True)
            return log
        content = {"asked": request, "chosen": dict(chosen), "data": data}
        log = cls(path, {**content, "plan": {}, "seconds": {}, "done": []})
        log._save()
        return log

    def _save(self) -> None:
        storage.save_json(self.path, self.content)

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds that each stage has taken, through all kills."""
        spent: dict[str, float] = dict(self.content["seconds"])
        for stage in STAGES:  # a training keeps its own time; the log lacks killed attempts
            for last in metrics_log.read_metrics(self.path.parent / stage)[-1:]:
                spent[stage] = max(spent.get(stage, 0.0), last["seconds"])
        return spent

    def plan(self, stage: str, measure: Callable[[], int]) -> int:
        """Return the number planned for a stage: measured once, and the same ever after."""
        plan: dict[str, int] = self.content["plan"]
        if stage not in plan:
            began = time.monotonic()
            plan[stage] = measure()
            self._add_seconds(stage, time.monotonic() - began)
            self._save()
        return plan[stage]

    @contextlib.contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the duration of the block to a stage's, unless it was done already."""
        began = time.monotonic()
        try:
            yield
        except Exception:
            raise  # e.g. a full disk, where writing the log would fail, too
        except BaseException:
            self._finish(stage, time.monotonic() - began, done=False)
            raise
        else:
            self._finish(stage, time.monotonic() - began, done=True)

    def _finish(self, stage: str, seconds: float, *, done: bool) -> None:
        if stage in self.content["done"]:
            return  # it took only the time to find that out
        self._add_seconds(stage, seconds)
        if done:
            self.content["done"].append(stage)
        self._save()

    def _add_seconds(self, stage: str, seconds: float) -> None:
        spent: dict[str, float] = self.content["seconds"]
        spent[stage] = round(spent.get(stage, 0.0) + seconds, 2)


def _check_same_start(run: Path, before: dict[str, Any] | None, now: dict[str, Any] | None) -> None:
    """Raise a UserError unless a run is continued from the pipeline that it was begun from."""

    def what(start: dict[str, Any] | None) -> tuple[Any, ...] | None:
        return None if start is None else (start.get("weights"), start.get("train_tokenizer"))

    def words(start: dict[str, Any] | None) -> str:
        if start is None:
            return "without --from"
        options = " --train-tokenizer" * bool(start.get("train_tokenizer"))
        return f"with --from {start.get('pipeline')}{options}"

    if what(before) != what(now):
        other = ""
        if before is not None and now is not None and words(before) == words(now):
            other = ", whose files have changed since"
        raise UserError(
            f"{run} was begun {words(before)}, and is now continued {words(now)}{other}\n"
            "choose another folder to start anew, or the same pipeline to continue"
        )


class _Budget:
    """Divides the time that is left among the stages that are left."""

    def __init__(self, recipe: Recipe, minutes: float, log: _Log) -> None:
        self.recipe, self.minutes, self.log = recipe, minutes, log

    def steps(self, stage: str, make_trial: Callable[[], Trainable]) -> int:
        """Return the steps of a stage, whose speed is measured with a trainable to throw away.

        At least one, and whole lines of the log if there is time for some.
        """

        def measure() -> int:
            seconds = loop.seconds_per_step(make_trial())
            steps = max(1, int(self._seconds(stage) / seconds))
            return max(steps // loop.LOG_EVERY * loop.LOG_EVERY, min(steps, loop.LOG_EVERY))

        return self.log.plan(stage, measure)

    def images(self, tokenizer: VQModel, images: Splits, device: torch.device) -> int:
        """Return how many training images are encoded, and at most as many held-out ones."""
        views = len(VIEWS[self.recipe.tokens.views])

        def measure() -> int:
            encoded = self._seconds("tokens") / seconds_per_image(tokenizer, images, device)
            count = int(max(encoded / (views + 1), (encoded - len(images.val)) / views))
            return max(len(images.train.class_names), count)  # one of each class, at least

        return self.log.plan("tokens", measure)

    def _seconds(self, stage: str) -> float:
        shares: dict[str, float] = dataclasses.asdict(self.recipe.time_shares)
        stages = list(shares)
        still_to_come: float = sum(shares[name] for name in stages[stages.index(stage) :])
        left = self.minutes * 60 - sum(self.log.seconds.values())
        return max(1.0, left * shares[stage] / still_to_come) * (1 - OVERHEAD)


def seconds_per_image(tokenizer: VQModel, images: Splits, device: torch.device) -> float:
    """Return how long reading and encoding an image takes."""
    indices = np.arange(min(len(images.train), TIMED_IMAGES))
    began = time.perf_counter()
    with torch.inference_mode():
        tokenizer.encode(as_tensor(images.train.read(indices), device))
    return (time.perf_counter() - began) / len(indices)
