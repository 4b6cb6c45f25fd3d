"""A studio with the shared run, for all tests of the API."""

from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
import torch

from ctf import Pipeline
from ctf.studio import server
from ctf.studio.worker import Worker
from tests.serving import LIMITS, serving


@pytest.fixture(scope="session")
def worker(run: Path) -> Worker:
    # With the window "auto", the passes of an image would depend on time.
    (worker,) = server.start_workers([str(run)], torch.device("cpu"), "eager", LIMITS, window=4)
    for model in (worker.model.pipe.coarse, worker.model.pipe.fine):
        assert model is not None
        model.head.weight.mul_(8)  # after seconds of training, logits hardly depend on the input
    return worker


@pytest.fixture(scope="session")
def pipe(worker: Worker) -> Pipeline:
    return worker.model.pipe


@pytest.fixture(scope="session")
def url(worker: Worker) -> Iterator[str]:
    with serving([worker]) as url:
        yield url


@pytest.fixture(scope="session")
def client(url: str) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=url, timeout=60) as client:
        yield client
