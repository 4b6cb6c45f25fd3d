"""Steps that take nothing from the processor sample the labels of those that do."""

import pytest
import torch

from ctf.kernels import compiled
from ctf.kernels.graphs import GraphedSampler
from ctf.kernels.sampling_cpu import GrowingCache
from ctf.models.noise import noise_keys
from ctf.models.parallel import sample_coarse
from ctf.models.sampling import Sampling
from tests.kernels.conftest import CONFIG, make_coarse

SETTINGS = (
    Sampling(guidance=2.0),
    Sampling(guidance=1.0),
    Sampling(guidance=2.0, top_k=1),
    Sampling(guidance=3.0, guidance_schedule="linear", temperature=0.8, top_k=7),
    Sampling(guidance=1.5, guidance_window=(0.25, 0.75), top_p=0.9),
)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("settings", SETTINGS)
def test_the_labels_are_those_of_the_engine(settings: Sampling, device: str) -> None:
    model = make_coarse().to(device)
    sampler = GraphedSampler(model, 5, settings)
    for seed in (0, 5):  # a second batch remembers nothing of the first
        classes_B = torch.arange(seed, seed + 5, device=device) % CONFIG.classes
        keys_BL = noise_keys(range(seed, seed + 5), CONFIG.length)[:, 0].to(device)
        expected_BL = sample_coarse(model, classes_B, keys_BL, settings)
        found_BL = sampler.sample(classes_B, keys_BL)
        assert torch.equal(found_BL, expected_BL)


@pytest.mark.gpu
def test_nothing_waits_for_the_gpu() -> None:
    model = make_coarse().to("cuda")
    sampler = GraphedSampler(model, 3, SETTINGS[0], compile=compiled.compiles("cuda"))
    classes_B, keys_BL = torch.arange(3).cuda(), noise_keys(range(3), CONFIG.length)[:, 0].cuda()
    expected_BL = sample_coarse(model, classes_B, keys_BL, SETTINGS[0])
    torch.cuda.set_sync_debug_mode("error")
    try:
        found_BL = sampler.sample(classes_B, keys_BL)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(found_BL, expected_BL)


@pytest.mark.skipif(not compiled.compiles("cpu"), reason="there is no compiler here")
def test_compiled_labels_are_the_same() -> None:
    model = make_coarse()
    sampler = GraphedSampler(model, 2, SETTINGS[0], compile=True)
    classes_B, keys_BL = torch.arange(2), noise_keys(range(2), CONFIG.length)[:, 0]
    expected_BL = sample_coarse(model, classes_B, keys_BL, SETTINGS[0])
    assert torch.equal(sampler.sample(classes_B, keys_BL), expected_BL)


def test_a_cache_that_grows_is_refused() -> None:
    model = make_coarse()
    model.backbone.cache_class = GrowingCache  # as a processor's engines have it
    with pytest.raises(ValueError, match="full length"):
        GraphedSampler(model, 2, SETTINGS[0])
