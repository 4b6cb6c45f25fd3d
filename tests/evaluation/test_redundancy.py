"""The redundancy study of Fig. 1b, against plain computations."""

import json
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from ctf.evaluation.redundancy import redundancy_study, swap_sheet
from ctf.models import clusters
from ctf.models.clusters import Clusters
from ctf.models.tokenizer import TokenizerConfig, VQModel

CONFIG = TokenizerConfig(
    image_size=8, codebook_size=64, channels=8, multipliers=(1, 2), blocks=1, latent_channels=8,
    groups=4,
)  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer() -> VQModel:
    torch.manual_seed(0)
    return VQModel(CONFIG)


@pytest.fixture(scope="module")
def codes_BL() -> Tensor:
    return torch.randint(64, (12, 16), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def kmeans(tokenizer: VQModel) -> Clusters:
    return clusters.fit_kmeans(tokenizer.codebook(), 8, restarts=2)


@pytest.fixture(scope="module")
def control(kmeans: Clusters) -> Clusters:
    return clusters.random_like(kmeans, 1)


def test_study_equals_plain_computation(
    tokenizer: VQModel, kmeans: Clusters, control: Clusters, codes_BL: Tensor
) -> None:
    study = redundancy_study(tokenizer, kmeans, control, codes_BL, seed=5)
    generator = torch.Generator().manual_seed(5)
    for name, partition in (("clusters", kmeans), ("random", control)):
        with torch.no_grad():
            swapped = tokenizer.decode(clusters.swap(codes_BL, partition, generator))
            error_B = (swapped - tokenizer.decode(codes_BL)).square().mean((1, 2, 3))
        expected = float((10 * torch.log10(4 / error_B)).mean())
        assert study["swap_psnr"][name] == pytest.approx(expected, abs=1e-3)
    assert study["swap_psnr"]["clusters"] > study["swap_psnr"]["random"]
    assert study["inertia"]["clusters"] < study["inertia"]["random"]
    assert (study["codes"], study["clusters"], study["pictures"]) == (64, 8, 12)
    assert study["sizes"]["min"] == int(kmeans.sizes_K.min())
    assert study["sizes"]["max"] == int(kmeans.sizes_K.max())


def test_equal_sizes_and_identity_clusters(tokenizer: VQModel, codes_BL: Tensor) -> None:
    equal = Clusters.from_labels(torch.arange(64) % 16)
    sizes = redundancy_study(tokenizer, equal, equal, codes_BL)["sizes"]
    assert sizes == {"min": 4, "median": 4.0, "max": 4, "entropy_bits": 4.0}
    identity = clusters.identity(64)
    study = redundancy_study(tokenizer, identity, identity, codes_BL)
    assert study["swap_psnr"] == {"clusters": None, "random": None}
    assert "Infinity" not in json.dumps(study)


def test_entropy_is_at_most_that_of_equal_sizes(
    tokenizer: VQModel, kmeans: Clusters, control: Clusters, codes_BL: Tensor
) -> None:
    study = redundancy_study(tokenizer, kmeans, control, codes_BL)
    p = kmeans.sizes_K.numpy() / 64
    assert study["sizes"]["entropy_bits"] == pytest.approx(-(p * np.log2(p)).sum())
    assert study["sizes"]["entropy_bits"] <= math.log2(8)


def test_sheet_shows_the_original_images_in_whole_pixels(
    tokenizer: VQModel, kmeans: Clusters, control: Clusters, codes_BL: Tensor
) -> None:
    sheet = swap_sheet(tokenizer, kmeans, control, codes_BL[:5])
    assert sheet.size == (4 + 5 * (64 + 4), 4 + 3 * (20 + 64 + 4))
    with torch.no_grad():
        image_CHW = tokenizer.decode(codes_BL[:1])[0]
    tile = np.asarray(sheet.crop((4, 24, 68, 88)))[::8, ::8]  # 8 pixels, each 8 x 8
    assert np.abs(tile / 127.5 - 1 - image_CHW.permute(1, 2, 0).numpy()).max() < 0.01
