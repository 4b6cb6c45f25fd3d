"""Parameters and FLOPs by formula: equal to what PyTorch counts."""

import dataclasses

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ctf.models import sizes
from ctf.models.clusters import Clusters
from ctf.models.coarse import CoarseModel
from ctf.models.fine import FineModel
from ctf.models.sizes import LLAMAGEN_SIZES
from ctf.models.transformer import TransformerConfig

CONFIG = TransformerConfig(width=48, layers=2, heads=2, grid=4, classes=3, ffn_multiple=16)


@pytest.mark.parametrize(
    ("size", "vocab_size", "millions"),
    [("B", 16384, 111), ("L", 16384, 343), ("XL", 16384, 775), ("B", 512, 87), ("XL", 512, 734)],
)
def test_parameters_are_those_of_the_papers(size: str, vocab_size: int, millions: int) -> None:
    config = LLAMAGEN_SIZES[size].config(grid=16, classes=1000)
    assert round(sizes.parameters(config, vocab_size, vocab_size) / 1e6) == millions


def test_parameters_are_those_of_the_models() -> None:
    clusters = Clusters.from_labels(torch.arange(40) % 8)
    for model, outputs in ((CoarseModel(CONFIG, 8), 8), (FineModel(CONFIG, clusters), 40)):
        assert sizes.parameters(CONFIG, 8, outputs) == sum(p.numel() for p in model.parameters())


def test_forward_flops_are_those_that_pytorch_counts() -> None:
    model = CoarseModel(dataclasses.replace(CONFIG, dropout=0.0), 8)
    labels_BL, classes_B = torch.zeros(1, 16, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        model(labels_BL, classes_B)
    assert sizes.forward_flops(CONFIG, CONFIG.length, 8) == counter.get_total_flops()
    assert sizes.training_flops(CONFIG, 16, 8) == 3 * counter.get_total_flops()
