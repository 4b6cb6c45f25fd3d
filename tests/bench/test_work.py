"""Operations and bytes are counted right."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ctf.bench.work import Machine, Work, coarse_step, fine_pass
from ctf.models.clusters import Clusters
from ctf.models.coarse import CoarseModel
from ctf.models.fine import FineModel
from ctf.models.tokenizer import VQModel
from ctf.models.transformer import TransformerConfig
from ctf.training import cost
from tests.bench.conftest import VQ

CONFIG = TransformerConfig(width=48, layers=3, heads=3, grid=4, classes=7)


def flops(call) -> int:
    # Of attention it counts the plain products only, not those within other kernels.
    plain = sdpa_kernel(SDPBackend.MATH)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), plain:
        call()
    return counter.get_total_flops()


@pytest.mark.parametrize("labels", [5, 40])
def test_operations_of_a_step_are_those_of_pytorchs_counter(labels: int) -> None:
    model = CoarseModel(CONFIG, labels).eval()
    cache = model.backbone.cache(6)
    for position in range(15):  # the cache has room for 16, all of which the last step reads
        model.step(torch.zeros(6, 1, dtype=torch.int64), position, cache)
    counted = flops(lambda: model.step(torch.zeros(6, 1, dtype=torch.int64), 15, cache))
    step = coarse_step(CONFIG, labels, 6, 15, int8=False, cached=torch.float32)
    assert step.operations == counted


def test_operations_of_the_fine_pass_are_those_of_pytorchs_counter() -> None:
    model = FineModel(CONFIG, Clusters.from_labels(torch.arange(40) % 8)).eval()
    labels_BL = torch.zeros(6, 16, dtype=torch.int64)
    counted = flops(
        lambda: model.backbone(labels_BL, torch.zeros(6, dtype=torch.int64), causal=False)
    )
    assert fine_pass(CONFIG, 6, 0, int8=False).operations == counted
    head = fine_pass(CONFIG, 6, 5, int8=False) + Work(fp32=-counted)
    assert head.operations == flops(lambda: torch.zeros(6 * 16, 48) @ torch.zeros(48, 5))


def test_bytes_of_a_step_are_the_weights_and_what_is_in_the_cache() -> None:
    model = CoarseModel(CONFIG, 40)
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embedding" not in n]
    cache = 2 * 3 * 6 * 11 * 48 * 4  # keys and values, layers, images, positions, width, float32
    single = coarse_step(CONFIG, 40, 6, 10, int8=False, cached=torch.float32)
    low = coarse_step(CONFIG, 40, 6, 10, int8=True, cached=torch.bfloat16)
    assert single.bytes == sum(p.numel() for p in matrices) * 4 + cache
    assert low.bytes == sum(p.numel() for p in matrices) + cache / 2
    assert low.operations == single.operations and low.fp32 == 0


def test_operations_of_decoding_are_those_of_pytorchs_counter() -> None:
    decoding = flops(lambda: VQModel(VQ).decode(torch.zeros(1, 256).long()))
    assert cost.tokenizer_flops(VQ)[1] == decoding


def test_the_floor_is_the_longer_of_computing_and_reading() -> None:
    machine = Machine(fp32=100, bf16=200, int8=400, bandwidth=10)
    assert Work(fp32=100, bf16=100, int8=100, bytes=17).floor(machine) == 1.75
    assert Work(fp32=100, bf16=100, int8=100, bytes=18).floor(machine) == 1.8
