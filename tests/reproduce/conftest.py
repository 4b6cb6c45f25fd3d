"""A plan of seconds, and Table 1 computed by it once."""

import contextlib
import dataclasses
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from ctf.common import storage
from ctf.common.progress import OpenProgress
from ctf.models.clusters import ClustersConfig
from ctf.models.sizes import TokenizerShape, TransformerShape
from ctf.reproduce import experiments, report, runner
from ctf.reproduce.cells import Cell, Workspace
from ctf.reproduce.plan import FULL, Plan
from ctf.training.recipes import GroupLoss, with_steps
from tests.conftest import SIDE, save_images

COARSE = TransformerShape(width=32, layers=2, heads=2)
CODES, CLUSTERS, STEPS, BATCH = 64, 8, 20, 4


@pytest.fixture(scope="session")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    images = save_images(tmp_path_factory.mktemp("reproduce") / "discs", 40)
    training = dataclasses.replace(with_steps(FULL.training, STEPS), batch_size=BATCH)
    return Plan(
        source=str(images),
        image_size=SIDE,
        features=("fashion",),  # the faster one
        codebooks=(CODES,),
        clusters=(CLUSTERS,),
        other_clusters=(4,),
        seeds=(0,),
        tokenizer=TokenizerShape(channels=8, latent_channels=16, largest_grid=4),
        tokenizer_training=dataclasses.replace(
            with_steps(FULL.tokenizer_training, STEPS), batch_size=8, perceptual_weight=0.0
        ),
        backbone=COARSE,
        baselines=(COARSE,),
        fine=TransformerShape(width=32, layers=1, heads=2),
        other_fines=(TransformerShape(width=16, layers=1, heads=2),),
        training=training,
        fine_training=training,
        samples=12,
        reserved=12,
        search_samples=12,
        search_points=2,
        lengths=(0.5,),
        group_loss=GroupLoss(1.0, ClustersConfig(method="balanced", count=4)),
        details=12,
        fine_clusters=(4, CLUSTERS),
        fine_images=1000,  # all that there are
    )


@contextlib.contextmanager
def silent(name: str) -> Iterator[Callable[..., None]]:
    yield lambda *_: None


def open_workspace(plan: Plan, folder: Path, open_progress: OpenProgress = silent) -> Workspace:
    device = torch.device("cpu")
    work, results = folder / "work", folder / "results"
    return runner.open_workspace(plan, work, results, device, open_progress)


@pytest.fixture(scope="session")
def computed(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Table 1. Tests that change a result take `copied`."""
    folder = tmp_path_factory.mktemp("computed")
    space = open_workspace(plan, folder)
    runner.compute(space, [*experiments.select(plan, "table1").values()])
    report.write(space)
    return folder


@pytest.fixture
def space(plan: Plan, computed: Path) -> Workspace:
    return open_workspace(plan, computed)


@pytest.fixture
def copied(space: Workspace, tmp_path: Path) -> Workspace:
    """The same, with results that a test may add to."""
    shutil.copytree(space.results / "cells", tmp_path / "cells")
    return dataclasses.replace(space, results=tmp_path)


def store(space: Workspace, cell: Cell, like: Cell, **outcome: object) -> None:
    """Stores a result for a cell: that of another one, some numbers replaced."""
    result = storage.load_object(space.results / "cells" / f"{like.name}.json")
    result |= {"cell": cell.name, "asked": cell.to_json()}
    result["found"] |= outcome
    storage.save_json(space.results / "cells" / f"{cell.name}.json", result)
