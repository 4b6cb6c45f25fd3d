"""Passes that are recorded on a GPU sample what others do; here they are computed one by one."""

import copy
import gc
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from ctf import kernels
from ctf.kernels import bf16, compiled
from ctf.kernels.graphs import ENDS, SPARES, GraphedCoarseModel, GraphedSampler
from ctf.kernels.replace import replace
from ctf.kernels.sampling_cpu import GrowingCache
from ctf.models.noise import noise_keys
from ctf.models.parallel import CoarseSampler
from ctf.models.sampling import Sampling
from ctf.models.transformer import Attention
from tests.kernels.conftest import CONFIG, make_coarse
from tests.stalls import no_stalls

L = CONFIG.length
SETTINGS = (
    Sampling(guidance=2.0),
    Sampling(guidance=1.0),
    Sampling(guidance=2.0, top_k=1),
    Sampling(guidance=3.0, guidance_schedule="linear", temperature=0.8, top_k=7),
    Sampling(guidance=1.5, guidance_window=(0.25, 0.75), top_p=0.9),
)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def make_graphed(device: str = "cpu", compile: bool = False) -> GraphedCoarseModel:
    """What an engine makes of a model on a GPU."""
    model = make_coarse().to(device)
    kernels.for_evaluation(model)
    replace(model, {type(model): GraphedCoarseModel, Attention: compiled.Attention})
    assert isinstance(model, GraphedCoarseModel)
    model.compile_layers = compile
    return model


def arguments(count: int, seed: int = 0, device: str = "cpu") -> tuple[Tensor, Tensor]:
    classes_B = torch.arange(seed, seed + count, device=device) % CONFIG.classes
    return classes_B, noise_keys(range(seed, seed + count), L)[:, 0].to(device)


def finished(sampler: CoarseSampler, windows: Sequence[int]) -> tuple[Tensor, list[int]]:
    """Labels and passes after windows of these sizes, the last again and again."""
    for window in windows:
        sampler.advance(window)
    while not sampler.done:
        sampler.advance(windows[-1])
    return sampler.labels_BT, sampler.passes


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("windows", [(1,), (5,), (1, 16, 3)])
@pytest.mark.parametrize("settings", SETTINGS)
def test_labels_and_passes_are_those_of_eager_steps(
    settings: Sampling, windows: Sequence[int], device: str
) -> None:
    eager, graphed = make_coarse().to(device), make_graphed(device)
    for seed in (0, 5):  # a second batch remembers nothing of the first
        inputs = arguments(5, seed, device)
        expected_BL, passes = finished(CoarseSampler(eager, *inputs, settings), windows)
        found = finished(GraphedSampler(graphed, *inputs, settings), windows)
        assert torch.equal(found[0], expected_BL) and found[1] == passes
    assert len(graphed.spares) == 1  # which both took in turn


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("window", [1, 4])
@pytest.mark.parametrize("settings", [SETTINGS[0], SETTINGS[-1]])
def test_known_labels_stay(settings: Sampling, window: int, device: str) -> None:
    generator = torch.Generator().manual_seed(0)
    known_BL = torch.randint(40, (5, L), generator=generator)
    known_BL[torch.rand(5, L, generator=generator) < 0.6] = -1
    inputs = (*arguments(5, 0, device), settings, known_BL)
    sampler = GraphedSampler(make_graphed(device), *inputs)
    found_BL, passes = finished(sampler, [window])
    expected_BL, expected = finished(CoarseSampler(make_coarse().to(device), *inputs), [window])
    assert torch.equal(found_BL, expected_BL) and passes == expected
    # The next batch knows nothing of these.
    inputs = (*arguments(5, 3, device), settings)
    found_BL, _ = finished(GraphedSampler(sampler.model, *inputs), [window])
    expected_BL, _ = finished(CoarseSampler(make_coarse().to(device), *inputs), [window])
    assert torch.equal(found_BL, expected_BL)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("window", [1, 4])
def test_some_images_can_be_left(window: int, device: str) -> None:
    settings, inputs = SETTINGS[0], arguments(5, 0, device)
    expected_BL, _ = finished(CoarseSampler(make_coarse().to(device), *inputs, settings), [1])
    sampler = GraphedSampler(make_graphed(device), *inputs, settings)
    sampler.advance(window)
    sampler.select([0, 2, 3])
    sampler.advance(window)
    sampler.advance(window)
    sampler.select([2, 0])
    found_BL, _ = finished(sampler, [window])
    assert torch.equal(found_BL, expected_BL[[3, 0]])
    assert [key.batch for key in sampler.model.spares] == [5, 3, 2]


def test_samplers_in_turn_do_not_share_what_they_compute_on() -> None:
    model, settings = make_graphed(), SETTINGS[0]
    samplers = [GraphedSampler(model, *arguments(2, seed), settings) for seed in (0, 7)]
    while not samplers[0].done:
        for sampler in samplers:
            sampler.advance()
    for sampler, seed in zip(samplers, (0, 7), strict=True):
        inputs = arguments(2, seed)
        expected_BL, _ = finished(CoarseSampler(make_coarse(), *inputs, settings), [1])
        assert torch.equal(sampler.labels_BT, expected_BL)


def test_recordings_are_used_again_and_few_are_kept() -> None:
    model, settings = make_graphed(), SETTINGS[0]
    for count in (1, 2, 3, 4, 3):
        finished(GraphedSampler(model, *arguments(count), settings), [1])
    assert [key.batch for key in model.spares] == [2, 4, 3]
    assert len(model.spares) == SPARES
    assert model.spare_bytes() == 2 * (2 + 4 + 3) * model.backbone.cache_bytes()
    left = GraphedSampler(model, *arguments(3), settings)
    left.advance()
    assert [key.batch for key in model.spares] == [2, 4]
    del left  # a stream that is closed
    gc.collect()
    assert [key.batch for key in model.spares] == [2, 4, 3]
    assert copy.deepcopy(model).spares == {}


def test_labels_of_a_batch_that_is_done_stay() -> None:
    model, settings = make_graphed(), SETTINGS[0]
    labels_BL, _ = finished(GraphedSampler(model, *arguments(2), settings), [1])
    before_BL = labels_BL.clone()
    finished(GraphedSampler(model, *arguments(2, 5), settings), [1])
    assert torch.equal(labels_BL, before_BL)
    assert not labels_BL.is_inference()  # a model can be trained on them


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_pass_has_one_shape_and_waits_for_nothing(settings: Sampling) -> None:
    """What is recorded: nothing in it depends on values, but on window, end and halves alone."""
    sampler = GraphedSampler(make_graphed(), *arguments(3), settings)
    sampler.advance(4)
    passes = sampler._passes
    assert passes is not None
    shapes = [(window, end, 2) for window in (1, 4) for end in (L // ENDS * 2, L)]
    if settings.guidance == 1:
        shapes = [(window, end, 1) for window, end, _ in shapes]
    addresses = [tensor.data_ptr() for tensor in (*passes.cache.k, *passes.cache.v)]
    with torch.inference_mode(), no_stalls():
        for shape in shapes:
            passes.compute(sampler.model, *shape)
    assert addresses == [tensor.data_ptr() for tensor in (*passes.cache.k, *passes.cache.v)]


@pytest.mark.gpu
def test_nothing_waits_for_the_gpu() -> None:
    model = make_graphed("cuda", compile=compiled.compiles("cuda"))
    inputs = arguments(3, 0, "cuda")
    finished(GraphedSampler(model, *inputs, SETTINGS[0]), [1])  # records
    sampler = GraphedSampler(model, *inputs, SETTINGS[0])
    sampler.advance()
    torch.cuda.set_sync_debug_mode("error")
    try:
        while not sampler.done:
            sampler.advance()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected_BL, _ = finished(CoarseSampler(make_coarse().cuda(), *inputs, SETTINGS[0]), [1])
    assert torch.equal(sampler.labels_BT, expected_BL)


@pytest.mark.skipif(not compiled.compiles("cpu"), reason="there is no compiler here")
def test_compiled_labels_are_the_same() -> None:
    model, settings = make_graphed(compile=True), SETTINGS[0]
    inputs = arguments(2)
    found_BL, _ = finished(GraphedSampler(model, *inputs, settings), [4])
    expected_BL, _ = finished(CoarseSampler(make_coarse(), *inputs, settings), [1])
    assert torch.equal(found_BL, expected_BL)


@pytest.mark.parametrize("device", DEVICES)
def test_in_bfloat16_passes_are_recorded_alike(device: str) -> None:
    """Logits are near, in float32, and labels mostly the same."""
    models = [make_coarse().to(device), make_graphed(device)]
    for model in models:
        bf16.convert(model.backbone)
        assert not kernels.is_exact(model) and model.backbone.cache(1).k[0].dtype == torch.bfloat16
    inputs, settings = arguments(5, 0, device), SETTINGS[0]
    plain = make_coarse().to(device)
    labels_BL, _ = finished(CoarseSampler(plain, *inputs, settings), [1])
    logits_BLK = models[0](labels_BL, inputs[0])
    assert logits_BLK.dtype == torch.float32
    expected_BLK = plain(labels_BL, inputs[0])
    assert float((logits_BLK - expected_BLK).norm() / expected_BLK.norm()) < 0.02
    for model, kind in zip(models, (CoarseSampler, GraphedSampler), strict=True):
        found_BL, _ = finished(kind(model, *inputs, settings), [1])
        assert float((found_BL == labels_BL).double().mean()) > 0.6


def test_a_cache_that_grows_is_refused() -> None:
    model = make_graphed()
    model.backbone.cache_class = GrowingCache  # as a processor's engines have it
    with pytest.raises(ValueError, match="full length"):
        GraphedSampler(model, *arguments(2), SETTINGS[0]).advance()
