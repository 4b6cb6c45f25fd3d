"""Embeddings and output layers made of free rows and a function of the codebook."""

import copy
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ctf.models import clusters as clustering
from ctf.models import points
from ctf.models.clusters import Clusters
from ctf.models.coarse import CoarseModel
from ctf.models.fine import FineModel
from ctf.models.transformer import TransformerConfig

CONFIG = TransformerConfig(width=48, layers=2, heads=2, grid=4, classes=3, ffn_multiple=16)
LABELS_V = torch.tensor([0, 2, 0, 4, 1, 0, 2, 2, 0, 3, 0, 4, 2, 0])
CLUSTERS = Clusters.from_labels(LABELS_V)
CODEBOOK_VC = torch.randn(len(LABELS_V), 3, generator=torch.Generator().manual_seed(2))

Model = CoarseModel | FineModel
Make = Callable[[], tuple[Model, Clusters]]


def coarse() -> tuple[Model, Clusters]:
    return CoarseModel(CONFIG, CLUSTERS.count), CLUSTERS


def full_vocabulary() -> tuple[Model, Clusters]:
    return CoarseModel(CONFIG, len(LABELS_V)), clustering.identity(len(LABELS_V))


def fine() -> tuple[Model, Clusters]:
    return FineModel(CONFIG, CLUSTERS), CLUSTERS


def full_softmax() -> tuple[Model, Clusters]:
    return FineModel(CONFIG, CLUSTERS, "full"), CLUSTERS


every_model = pytest.mark.parametrize("make", [coarse, full_vocabulary, fine, full_softmax])


def inputs(clusters: Clusters) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    codes_BL = torch.randint(len(LABELS_V), (2, CONFIG.length), generator=generator)
    return clusters.labels_V[codes_BL], torch.tensor([0, 2])


def with_points(make: Make, *, warm: bool = False) -> tuple[Model, Clusters]:
    torch.manual_seed(0)
    model, clusters = make()
    torch.nn.init.normal_(model.head.weight, std=0.2)
    points.use_points(model, CODEBOOK_VC, clusters, warm=warm)
    return model.eval(), clusters


def randomize(model: Model) -> None:
    """Give all parameters values, as a training does."""
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)


@every_model
@torch.no_grad()
def test_a_folded_state_is_that_of_the_plain_model(make: Make) -> None:
    model, clusters = with_points(make)
    randomize(model)
    plain, _ = make()
    plain.load_state_dict(points.fold(model.state_dict()))  # strict: no other tensor is left
    given_inputs = inputs(clusters)
    torch.testing.assert_close(plain.eval()(*given_inputs), model(*given_inputs))
    state = plain.state_dict()
    assert all(torch.equal(points.fold(state)[name], state[name]) for name in state)


@every_model
@torch.no_grad()
def test_a_warm_start_begins_with_the_outputs_of_its_weights(make: Make) -> None:
    torch.manual_seed(0)
    plain, clusters = make()
    torch.nn.init.normal_(plain.head.weight, std=0.2)
    expected = plain.eval()(*inputs(clusters))
    model, _ = with_points(make, warm=True)
    assert torch.equal(model(*inputs(clusters)), expected)


@every_model
def test_the_first_predictions_are_uniform_and_every_parameter_learns(make: Make) -> None:
    torch.manual_seed(0)
    model, clusters = make()
    points.use_points(model, CODEBOOK_VC, clusters)
    labels_BL, classes_B = inputs(clusters)
    logits = model(labels_BL, classes_B)
    assert bool((logits[logits > -torch.inf] == 0).all())
    randomize(model)
    model(labels_BL, classes_B).clamp(min=-10).square().sum().backward()
    assert all(bool((p.grad != 0).any()) for p in model.parameters() if p.grad is not None)
    assert all(p.grad is not None for p in model.parameters())


@torch.no_grad()
def test_equal_vectors_get_the_same_function_and_near_ones_near_rows() -> None:
    codebook_VC = CODEBOOK_VC.clone()
    codebook_VC[5] = codebook_VC[0]  # both of cluster 0
    codebook_VC[8] = codebook_VC[0] + 1e-4
    torch.manual_seed(0)
    model = FineModel(CONFIG, CLUSTERS)
    points.use_points(model, codebook_VC, CLUSTERS)
    randomize(model)
    model.head.parametrizations.weight.original.zero_()
    rows_VD = model.code_rows()
    assert torch.equal(rows_VD[0], rows_VD[5])
    distances_V = (rows_VD - rows_VD[0]).norm(dim=1)
    assert 0 < float(distances_V[8]) < float(distances_V[2])


@given(scale=st.floats(1e-3, 1e3), shift=st.floats(-10, 10))
def test_scale_and_origin_of_the_codebook_do_not_matter(scale: float, shift: float) -> None:
    codebook_VC = CODEBOOK_VC.double()
    torch.testing.assert_close(
        points.standardize(codebook_VC * scale + shift),
        points.standardize(codebook_VC),
        atol=1e-6, rtol=1e-6,
    )  # fmt: skip


def test_a_codebook_of_equal_vectors_has_points_at_zero() -> None:
    assert not points.standardize(torch.ones(4, 3)).any()


@torch.no_grad()
def test_a_copy_averages_and_computes_the_same() -> None:
    model, clusters = with_points(coarse)
    randomize(model)
    other = copy.deepcopy(model)
    assert torch.equal(other(*inputs(clusters)), model(*inputs(clusters)))
    randomize(other)
    assert not torch.equal(other(*inputs(clusters)), model(*inputs(clusters)))
