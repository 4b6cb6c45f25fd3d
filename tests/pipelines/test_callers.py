"""A pipeline in the hands of other programs: copied, pickled, in workers, under other defaults."""

import copy
import multiprocessing
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from ctf import kernels
from ctf.kernels import Engine
from ctf.models.sampling import Sampling
from ctf.pipelines.generation import Samples
from ctf.pipelines.pipeline import Pipeline
from tests.pipelines.helpers import same

CPU = torch.device("cpu")
ENGINES = [
    engine for engine in get_args(Engine) if engine != "compile" and kernels.available(engine, CPU)
]


def sample(pipe: Pipeline) -> Samples:
    return pipe.sample([0, 1, 2], seed=5)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda pipe: pickle.loads(pickle.dumps(pipe))], ids=["copy", "pickle"]
)
def test_a_copy_gives_the_same_samples(
    run: Path, engine: Engine, copied: Callable[[Pipeline], Pipeline]
) -> None:
    pipe = Pipeline.from_pretrained(run, engine=engine)
    assert same(sample(copied(pipe)), sample(pipe))
    twice = copied(copied(pipe))
    del pipe
    assert same(sample(twice), sample(Pipeline.from_pretrained(run, engine=engine)))


def test_a_compiled_backbone_is_pickled_without_what_was_compiled(run: Path) -> None:
    pipe = Pipeline.from_pretrained(run)
    kernels.replace(
        pipe.coarse.backbone, {type(pipe.coarse.backbone): kernels.compiled.CompiledBackbone}
    )
    assert callable(pipe.coarse.backbone._compiled)  # type: ignore[union-attr]
    copied = pickle.loads(pickle.dumps(pipe))
    assert isinstance(copied.coarse.backbone, kernels.compiled.CompiledBackbone)


def test_a_process_that_is_spawned_gives_the_same_samples(run: Path) -> None:
    pipes = [Pipeline.from_pretrained(run, engine=engine) for engine in ENGINES]
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        for pipe, samples in zip(pipes, pool.map(sample, pipes), strict=True):
            assert same(samples, sample(pipe))


class Sampled(Dataset[np.ndarray]):
    """Images that are sampled when they are read."""

    def __init__(self, pipe: Pipeline) -> None:
        self.pipe = pipe

    def __len__(self) -> int:
        return 3

    def __getitem__(self, i: int) -> np.ndarray:
        return np.asarray(self.pipe.sample([i], seed=5 + i).images[0])


@pytest.mark.parametrize("engine", ENGINES)
def test_a_worker_of_a_data_loader_gives_the_same_samples(run: Path, engine: Engine) -> None:
    dataset = Sampled(Pipeline.from_pretrained(run, engine=engine))
    loader = DataLoader(dataset, num_workers=1, batch_size=1)
    for got, expected in zip(loader, dataset, strict=False):
        assert (got[0].numpy() == expected).all()


@pytest.fixture(params=["meta", "float64", "bfloat16"])
def other_default(request: pytest.FixtureRequest) -> Iterator[None]:
    if request.param == "meta":
        torch.set_default_device("meta")
    else:
        torch.set_default_dtype(getattr(torch, request.param))
    try:
        yield
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("engine", ENGINES)
def test_samples_do_not_depend_on_the_callers_defaults(
    pipe: Pipeline, run: Path, engine: Engine, other_default: None, tmp_path: Path
) -> None:
    other = Pipeline.from_pretrained(run, engine=engine)
    samples = sample(other)
    *_, event = other.stream([0, 1, 2], seed=5)
    again = other.refine([0, 1, 2], samples.coarse, seed=5)
    codes_BL = other.encode(samples.images)
    pixels_BCHW = other.decode(samples.codes)
    previews = other.preview(samples.coarse)
    members = other.members(1, samples.coarse[0], 3)
    torch.set_default_device(None)
    torch.set_default_dtype(torch.float32)
    plain = Pipeline.from_pretrained(run, engine=engine)
    expected = sample(plain)
    assert same(samples, expected) and same(again, expected)
    assert event.samples is not None and torch.equal(event.samples.codes, expected.codes)
    assert torch.equal(codes_BL, plain.encode(expected.images))
    assert torch.equal(pixels_BCHW, plain.decode(expected.codes))
    assert [image.tobytes() for image in previews] == [
        image.tobytes() for image in plain.preview(expected.coarse)
    ]
    assert torch.equal(members.codes, plain.members(1, expected.coarse[0], 3).codes)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("temperature", [5e-324, 1e-320, 1e-45, 1e-30])
def test_the_smallest_temperatures_are_greedy(
    run: Path, engine: Engine, temperature: float
) -> None:
    pipe = Pipeline.from_pretrained(run, engine=engine)
    cold = pipe.sample([0, 1], temperature=temperature, fine_temperature=temperature)
    assert same(cold, pipe.sample([0, 1], top_k=1, fine_top_k=1))


def test_the_largest_values_of_settings_are_sampled_with(pipe: Pipeline) -> None:
    for settings in (
        {"temperature": 1e308, "fine_temperature": 1e308},
        {"guidance": 1e6, "fine_guidance": -1e6},
        {"top_k": 2**70, "fine_top_k": 2**70},
        {"top_p": 5e-324, "fine_top_p": 5e-324},
        {"guidance_window": (0.0, 5e-324)},
    ):
        pipe.sample([0], **cast(dict[str, Any], settings))


def test_settings_may_be_numbers_of_numpy_and_torch(pipe: Pipeline, tmp_path: Path) -> None:
    settings = Sampling(
        guidance=np.float32(1.5), temperature=torch.tensor(0.5), top_k=np.int64(3),  # type: ignore[arg-type]
        fine_top_k=torch.tensor(2), guidance_window=(np.float32(0.25), np.float32(0.75)),  # type: ignore[arg-type]
    )  # fmt: skip
    assert settings == Sampling(
        1.5, temperature=0.5, top_k=3, fine_top_k=2, guidance_window=(0.25, 0.75)
    )
    other = copy.copy(pipe)
    other.sampling = settings
    other.save_pretrained(tmp_path / "pipe")
    assert Pipeline.from_pretrained(tmp_path / "pipe").sampling == settings
