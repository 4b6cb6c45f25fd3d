"""The included pipelines are as good as the documentation says."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

from ctf import Pipeline
from ctf.data.images import open_images
from ctf.evaluation.classifier import load_classifier, shipped_classifiers
from ctf.evaluation.evaluate import sample_accuracy
from ctf.evaluation.reconstruction import reconstruction_metrics
from ctf.evaluation.sample_cache import GenerationConfig
from ctf.models.noise import noise_keys
from ctf.models.parallel import CoarseSampler, sample_coarse
from ctf.pipelines.folder import find_pipeline, shipped_pipelines


class Promise(NamedTuple):
    """What the documentation says of an included pipeline, or a little less."""

    megabytes: float
    codes: int
    psnr: float
    samples: int
    accuracy: float  # of these samples
    passes: float  # of an image


PROMISES = {
    "fashion-mnist": Promise(
        megabytes=25, codes=4096, psnr=25, samples=200, accuracy=0.93, passes=21
    ),
    "eurosat": Promise(megabytes=20, codes=16384, psnr=35, samples=50, accuracy=0.85, passes=70),
}


@pytest.fixture(scope="module", params=PROMISES)
def pipe(request: pytest.FixtureRequest) -> Pipeline:
    return Pipeline.from_pretrained(request.param)


@pytest.fixture
def promise(pipe: Pipeline) -> Promise:
    return PROMISES[pipe.origin["images"]]


def test_every_included_pipeline_is_tested() -> None:
    assert set(PROMISES) == set(shipped_pipelines())


@pytest.mark.parametrize("name", PROMISES)
def test_is_small(name: str) -> None:
    files = [p for p in find_pipeline(name).rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) <= 1e6 * PROMISES[name].megabytes
    assert {p.suffix for p in files} <= {".json", ".safetensors"}


def test_uses_its_codebook(pipe: Pipeline, promise: Promise) -> None:
    measured = reconstruction_metrics(
        pipe.tokenizer, open_images(pipe.origin["images"]).val, limit=500
    )
    assert pipe.tokenizer.config.codebook_size == promise.codes
    assert measured["usage"] >= 0.95
    assert measured["psnr"] > promise.psnr


def test_samples_are_classified_correctly(pipe: Pipeline, promise: Promise) -> None:
    classifier = load_classifier(shipped_classifiers()[pipe.origin["images"]])
    measured = sample_accuracy(pipe, classifier, GenerationConfig(promise.samples))
    assert measured.value >= promise.accuracy


def test_samples_are_not_copies_of_each_other(pipe: Pipeline) -> None:
    codes_BL = pipe.sample([8] * 8).codes
    assert len(codes_BL.unique(dim=0)) == 8


def test_an_image_takes_few_passes(pipe: Pipeline, promise: Promise) -> None:
    """With windows of 16 labels; labels are those of one by one, up to ties."""
    keys_BL = noise_keys(range(8), pipe.coarse.config.length)[:, 0]
    inputs = pipe.coarse, torch.arange(8), keys_BL, pipe.sampling
    sampler = CoarseSampler(*inputs)
    while not sampler.done:
        sampler.advance(16)
    assert sum(sampler.passes) / 8 <= promise.passes
    differs_B = (sampler.labels_BT != sample_coarse(*inputs)).any(1)
    assert int(differs_B.sum()) <= 1


def test_origin_says_how_it_was_made(pipe: Pipeline) -> None:
    assert pipe.origin["license"] == "apache-2.0"
    assert set(pipe.origin["metrics"]) == {"tokenizer", "coarse", "fine"}


def test_a_saved_copy_samples_the_same(pipe: Pipeline, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path / "copy")
    copy = Pipeline.from_pretrained(tmp_path / "copy")
    one, other = pipe.sample([3, 9], seed=5), copy.sample([3, 9], seed=5)
    assert torch.equal(one.codes, other.codes)
    assert np.array_equal(np.asarray(one.images[1]), np.asarray(other.images[1]))
