"""Pipelines for the tests of this folder."""

import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from ctf.models import clusters
from ctf.models.coarse import CoarseModel
from ctf.pipelines.generation import Samples
from ctf.pipelines.pipeline import Pipeline
from tests.pipelines.helpers import CLASSES, PARTS, SEED


@pytest.fixture
def parts(run: Path, tmp_path: Path) -> Path:
    """A copy of those files of the run that make a pipeline, to be changed."""
    for part in PARTS:
        (tmp_path / "parts" / part).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(run / part, tmp_path / "parts" / part)
    return tmp_path / "parts"


@pytest.fixture(scope="session")
def sharp(run: Path) -> Pipeline:
    """The pipeline of the run with larger logits, which depend on classes and labels; not to be
    changed."""
    pipe = Pipeline.from_pretrained(run)
    assert pipe.fine is not None
    for model in (pipe.coarse, pipe.fine):
        model.head.weight.mul_(8)
    pipe.window = 1  # unless a test says otherwise
    return pipe


@pytest.fixture(scope="session")
def baseline(sharp: Pipeline) -> Pipeline:
    """A full-vocabulary baseline: the same tokenizer, and a coarse model of random weights."""
    identity = clusters.identity(sharp.clusters.codebook_size)
    model = CoarseModel(sharp.coarse.config, identity.count).eval().requires_grad_(False)
    nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(0))
    return dataclasses.replace(sharp, clusters=identity, coarse=model, fine=None)


@pytest.fixture(scope="session")
def samples(sharp: Pipeline) -> Samples:
    """What `sharp` samples of CLASSES from SEED."""
    return sharp.sample(CLASSES, SEED)


@pytest.fixture
def steps(sharp: Pipeline) -> Iterator[list[int]]:
    """The batch size of each step of the coarse model of `sharp`."""
    taken: list[int] = []
    hook = sharp.coarse.head.register_forward_hook(lambda _, x, __: taken.append(len(x[0])))
    yield taken
    hook.remove()
