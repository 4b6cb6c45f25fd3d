"""One step at any position computes what sampling does; weights are counted."""

import copy
from typing import cast

import pytest
import torch

from ctf import kernels
from ctf.bench.coarse_steps import engine_steps, plain_steps, weight_bytes
from ctf.bench.shapes import Shapes
from ctf.kernels import Engine
from ctf.kernels.graphs import GraphedCoarseModel
from ctf.kernels.replace import replace
from ctf.models.coarse import CoarseModel
from ctf.models.transformer import TransformerConfig

CPU = torch.device("cpu")


@pytest.mark.usefixtures("small_cache")
@pytest.mark.parametrize("engine", ["eager", "auto", "as on a GPU"])
def test_steps_of_both_ways_compute_the_same(shapes: Shapes, engine: str) -> None:
    """What is timed, at any position, is what samples: with equal caches, equal labels."""
    torch.manual_seed(0)
    model = CoarseModel(shapes.transformer("B"), 64).eval().requires_grad_(False)
    torch.nn.init.normal_(model.head.weight)
    own = copy.deepcopy(model)
    if engine == "as on a GPU":
        replace(own, {CoarseModel: GraphedCoarseModel})
    else:
        kernels.for_sampling(own, None, None, cast("Engine", engine))
    classes_B, labels_BL = torch.randint(5, (3,)), torch.randint(64, (3, 16))
    inputs = (2.0, classes_B, labels_BL, torch.arange(3))
    for position in (0, 1, 7, 8, 15):
        ours, theirs = engine_steps(own, *inputs), plain_steps(model, *inputs)
        with torch.inference_mode():
            assert torch.equal(ours(position)(), theirs(position)())


def test_weights_are_counted_as_they_are_held() -> None:
    torch.manual_seed(0)
    config = TransformerConfig(width=48, layers=3, heads=3, grid=4, classes=7)
    model = CoarseModel(config, 40).requires_grad_(False)
    everything = sum(p.numel() for p in model.parameters())
    matrices = sum(p.numel() for n, p in model.named_parameters() if "embedding" not in n)
    assert weight_bytes(model) == 4 * everything
    if kernels.available("auto", CPU):
        kernels.for_sampling(model, None, None, "auto")
        assert weight_bytes(model) == 4 * everything
    if kernels.available("int8", CPU):
        low = CoarseModel(config, 40).requires_grad_(False)
        kernels.for_sampling(low, None, None, "int8")
        size = weight_bytes(low)
        assert 4 * (everything - matrices) + matrices < size < 4 * everything - 2 * matrices
