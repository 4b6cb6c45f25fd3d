"""The included pipeline is as good as the README says."""

from pathlib import Path

import numpy as np
import pytest
import torch

from ctf import Pipeline
from ctf.data.images import open_images
from ctf.evaluation.classifier import shipped_classifier
from ctf.evaluation.evaluate import sample_accuracy
from ctf.evaluation.reconstruction import reconstruction_metrics
from ctf.evaluation.sample_cache import GenerationConfig
from ctf.models.noise import noise_keys
from ctf.models.parallel import CoarseSampler, sample_coarse
from ctf.pipelines.folder import find_pipeline

NAME = "fashion-mnist"


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return Pipeline.from_pretrained(NAME)


def test_is_small() -> None:
    files = [p for p in find_pipeline(NAME).rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) <= 25e6
    assert {p.suffix for p in files} <= {".json", ".safetensors"}


def test_uses_its_codebook(pipe: Pipeline) -> None:
    measured = reconstruction_metrics(pipe.tokenizer, open_images(NAME).val, limit=1000)
    assert pipe.tokenizer.config.codebook_size >= 4096
    assert measured["usage"] >= 0.95
    assert measured["psnr"] > 25


def test_samples_are_classified_correctly(pipe: Pipeline) -> None:
    assert sample_accuracy(pipe, shipped_classifier(), GenerationConfig(200)).value >= 0.93


def test_samples_are_not_copies_of_each_other(pipe: Pipeline) -> None:
    codes_BL = pipe.sample(["bag"] * 8).codes
    assert len(codes_BL.unique(dim=0)) == 8


def test_an_image_takes_at_most_21_passes(pipe: Pipeline) -> None:
    """Of 64, with windows of 16 labels; labels are those of one by one, up to ties."""
    keys_BL = noise_keys(range(16), pipe.coarse.config.length)[:, 0]
    inputs = pipe.coarse, torch.arange(16) % 10, keys_BL, pipe.sampling
    sampler = CoarseSampler(*inputs)
    while not sampler.done:
        sampler.advance(16)
    assert sum(sampler.passes) / 16 <= 21
    differs_B = (sampler.labels_BT != sample_coarse(*inputs)).any(1)
    assert int(differs_B.sum()) <= 1


def test_origin_says_how_it_was_made(pipe: Pipeline) -> None:
    assert pipe.origin["images"] == NAME
    assert pipe.origin["license"] == "apache-2.0"
    assert set(pipe.origin["metrics"]) == {"tokenizer", "coarse", "fine"}


def test_a_saved_copy_samples_the_same(pipe: Pipeline, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path / "copy")
    copy = Pipeline.from_pretrained(tmp_path / "copy")
    one, other = pipe.sample([3, 9], seed=5), copy.sample([3, 9], seed=5)
    assert torch.equal(one.codes, other.codes)
    assert np.array_equal(np.asarray(one.images[1]), np.asarray(other.images[1]))
