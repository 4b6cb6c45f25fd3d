"""Curves of held-out loss for ways of letting a transformer know the codebook (models/points.py).

    python scripts/points.py RUN coarse --way free --way linear --steps 300
    python scripts/points.py RUN fine --way free --way both-64

RUN is a run with tokens and clusters, which is not changed. Each way trains one model with the
recipe of a preset, stopped after `--steps`, and prints a line of Markdown: the held-out loss of the
averaged weights in nats a token every `--every` steps, and the median of the seconds of a step.
"full" is the full-vocabulary model: identity clusters.

    torchrun --nproc-per-node 2 scripts/points.py RUN coarse --way free --way linear --rounds 20

With `--rounds`, only the seconds of a step are measured, the ways in turn: the median of the
ratios to the first way, and its quartiles. With torchrun by DDP, with `--shard` by FSDP.

The ways, for coarse and full-vocabulary models, whose points are the centres or codes:

    free            plain rows
    linear          both layers know the points, by linear maps
    input, output   one of them does
    network-N       both, by networks with N hidden units
    tied            one linear map for both
    square          linear, with the squared length of the point as one feature more
    damped          linear, the maps times F^-0.5, as Adam moves a row by the sum over F features
    shared          damped, and the free rows times 0.1

and for the fine model, whose embedding knows the centres (but with "free"), its output layer

    residual-N      the difference from the centre, by a network with N units; 0 for linear
    both-N          the difference and the vector; both-64 is what `geometry` uses
    square-N        the difference, the vector and their squared lengths
    output-64       both-64, with a free embedding
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import operator
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils import parametrize

from ctf.common.distributed import World, init_world
from ctf.models import clusters as clustering
from ctf.models import points
from ctf.models.clusters import Clusters
from ctf.models.fine import FineModel
from ctf.models.points import FREE, PointRows, standardize
from ctf.models.transformer import INITIAL_STD
from ctf.pipelines.folder import CLUSTERS, load_clusters
from ctf.training import recipes
from ctf.training.loop import Execution
from ctf.training.model_stage import ModelStage
from ctf.training.recipes import Kind
from ctf.training.transformers import Model, Trainer


class Damped(PointRows):
    """A linear map that Adam moves no faster than a free row."""

    def __init__(
        self, points_RF: Tensor, width: int, *, hidden: int, std: float, free: float
    ) -> None:
        super().__init__(points_RF, width, hidden=hidden, std=std * points_RF.shape[1] ** 0.5)
        self.free, self.scale = free, points_RF.shape[1] ** -0.5

    def forward(self, free_RD: Tensor) -> Tensor:
        """The rows: (R, D)."""
        with torch.autocast(free_RD.device.type, enabled=False):
            return self.free * free_RD + self.scale * self.points_RF @ self.outer.weight.T

    def right_inverse(self, rows_RD: Tensor) -> Tensor:
        """As `PointRows.right_inverse`."""
        return rows_RD / self.free


def use(way: str, model: Model, codebook_VC: Tensor, clusters: Clusters, *, warm: bool) -> None:
    """Let a model know the codebook in one of the ways; stands in for `points.use_points`."""
    codebook_VC = codebook_VC.detach().float()
    centers_KC = clustering.centers(codebook_VC, clusters)
    kind, _, hidden = way.partition("-")
    units = int(hidden or 0)
    make: Callable[..., PointRows] = PointRows
    if kind in ("damped", "shared"):
        make = functools.partial(Damped, free=FREE if kind == "shared" else 1.0)
    inputs, outputs = kind not in ("free", "output"), kind not in ("free", "input")
    points_KF = standardize(centers_KC)
    if isinstance(model, FineModel):
        residuals_VC = codebook_VC - centers_KC[clusters.labels_V]
        features = [residuals_VC] if kind == "residual" else [residuals_VC, codebook_VC]
        if kind == "square":
            features += [x.square().sum(1, keepdim=True) for x in features]
        ordered_VF = torch.cat([standardize(x) for x in features], 1)
        head_RF = torch.empty_like(ordered_VF)
        head_RF[model.rows_V] = ordered_VF
    else:
        head_RF = points_KF
        if kind == "square":
            head_RF = torch.cat(
                [head_RF, standardize(centers_KC.square().sum(1, keepdim=True))], dim=1
            )
    width = model.config.width
    embedding: PointRows | None = None
    if inputs:
        inner = 0 if isinstance(model, FineModel) else units
        embedding = make(points_KF, width, hidden=inner, std=INITIAL_STD)
        layer = model.backbone.label_embedding
        parametrize.register_parametrization(layer, "weight", embedding)
    if outputs:
        head = make(head_RF, width, hidden=units, std=0.0)
        if kind == "tied" and embedding is not None:
            head.outer = embedding.outer  # one module with two names
        parametrize.register_parametrization(model.head, "weight", head)


def main() -> None:
    """Train one model for each way."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("kind", choices=("coarse", "fine", "full"))
    parser.add_argument("--way", action="append", required=True)
    parser.add_argument("--preset", default="small")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--every", type=int, default=100)
    parser.add_argument("--schedule", type=int, default=2000, help="steps of the schedule")
    parser.add_argument("--rounds", type=int, default=0, help="steps of each way, in turn")
    parser.add_argument("--shard", action="store_true")
    args = parser.parse_args()
    with init_world(torch.device("cpu")) as world:
        run(args, world)


def run(args: argparse.Namespace, world: World) -> None:
    """Train in this process, which may be one of several."""
    clusters = load_clusters(args.run / "clusters" / CLUSTERS)
    if args.kind == "full":
        clusters = clustering.identity(clusters.codebook_size)
    recipe = dataclasses.replace(recipes.preset(args.preset), geometry=True)
    recipe = recipe.with_steps(args.schedule)
    kind: Kind = "fine" if args.kind == "fine" else "coarse"
    stage = ModelStage(args.run, kind, recipe, clusters, world, Execution(shard=args.shard))

    def make(way: str) -> Trainer:
        points.use_points = functools.partial(use, way)
        return stage.make_trainer()

    if args.rounds:
        compare_steps({way: make(way) for way in args.way}, args.rounds, world)
        return
    for way in args.way:
        trainer = make(way)
        losses, seconds = [], []
        for step in range(args.steps):
            start = time.process_time()
            trainer.step(step)
            seconds.append(time.process_time() - start)
            if (step + 1) % args.every == 0:
                losses.append(f"{trainer.evaluate()['loss']:.3f}")
        row = [args.run.name, args.kind, way, *losses, f"{statistics.median(seconds):.3f}"]
        print("|", " | ".join(row), "|", flush=True)


def compare_steps(trainers: dict[str, Trainer], rounds: int, world: World) -> None:
    """Print the seconds of a step of each way by those of the first, from so many rounds."""
    seconds: dict[str, list[float]] = {way: [] for way in trainers}
    for step in range(rounds + 2):  # the first two are to warm up
        for way, trainer in trainers.items():
            world.barrier()
            start = time.perf_counter()
            trainer.step(step)
            seconds[way].append(time.perf_counter() - start)
    first = next(iter(seconds.values()))[2:]
    for way, each in seconds.items():
        low, middle, high = statistics.quantiles(map(operator.truediv, each[2:], first), n=4)
        if world.is_main:
            print(f"| {way} | {middle:.3f} ({low:.3f} to {high:.3f}) |", flush=True)


if __name__ == "__main__":
    main()
