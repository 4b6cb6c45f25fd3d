import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ctf.models import clusters as clustering
from ctf.models.clusters import Clusters
from ctf.models.fine import FineModel
from ctf.models.transformer import TransformerConfig

CONFIG = TransformerConfig(width=48, layers=2, heads=2, grid=4, classes=3, ffn_multiple=16)
# Sizes 6, 1, 4, 1, 2: the codes of a cluster lie apart in the codebook.
LABELS_V = torch.tensor([0, 2, 0, 4, 1, 0, 2, 2, 0, 3, 0, 4, 2, 0])
CLUSTERS = Clusters.from_labels(LABELS_V)


def make_model(clusters: Clusters = CLUSTERS, softmax: str = "members") -> FineModel:
    torch.manual_seed(0)
    model = FineModel(CONFIG, clusters, softmax).eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.2)
    return model


def make_inputs(batch: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    codes_BL = torch.randint(len(LABELS_V), (batch, CONFIG.length), generator=generator)
    classes_B = torch.randint(CONFIG.classes, (batch,), generator=generator)
    return codes_BL, LABELS_V[codes_BL], classes_B


@torch.no_grad()
def test_every_label_changes_the_logits_everywhere():
    model = make_model(softmax="full")  # so that positions have the same choices
    _, labels_BL, classes_B = make_inputs(2)
    before = model(labels_BL, classes_B)
    for j in range(CONFIG.length):
        changed_BL = labels_BL.clone()
        changed_BL[:, j] = (labels_BL[:, j] + 1) % CLUSTERS.count
        difference_BL = (model(changed_BL, classes_B) - before).abs().amax(-1)
        assert bool((difference_BL > 1e-5).all())


@torch.no_grad()
def test_logits_are_at_the_position_of_their_label():
    model = make_model(softmax="full")
    for layer in model.backbone.layers:
        layer.attention.out.weight.zero_()  # so that positions do not interact
    _, labels_BL, classes_B = make_inputs(2)
    before = model(labels_BL, classes_B)
    for j in range(CONFIG.length):
        changed_BL = labels_BL.clone()
        changed_BL[:, j] = (labels_BL[:, j] + 1) % CLUSTERS.count
        difference_BL = (model(changed_BL, classes_B) - before).abs().amax(-1)
        assert (difference_BL > 1e-5).nonzero().tolist() == [[0, j], [1, j]]


@torch.no_grad()
def test_class_changes_all_logits():
    model = make_model(softmax="full")
    _, labels_BL, classes_B = make_inputs(2)
    without = model(labels_BL, torch.full_like(classes_B, model.no_class))
    assert bool(((model(labels_BL, classes_B) - without).abs().amax(-1) > 1e-5).all())


@torch.no_grad()
def test_each_token_has_the_logits_of_its_members_and_then_minus_infinity():
    _, labels_BL, classes_B = make_inputs(3)
    logits_BLS = make_model()(labels_BL, classes_B)
    full_BLV = make_model(softmax="full")(labels_BL, classes_B)
    assert logits_BLS.shape == (3, CONFIG.length, 6)
    assert full_BLV.shape == (3, CONFIG.length, len(LABELS_V))
    members_BLS = CLUSTERS.members_KS[labels_BL]
    expected_BLS = full_BLV.gather(-1, members_BLS.clamp(min=0))
    expected_BLS = expected_BLS.masked_fill(members_BLS < 0, -torch.inf)
    torch.testing.assert_close(logits_BLS, expected_BLS, rtol=1e-5, atol=1e-6)


def test_first_loss_is_that_of_uniform_members():
    codes_BL, labels_BL, classes_B = make_inputs(2)
    model = FineModel(CONFIG, CLUSTERS)
    loss = model.loss(labels_BL, classes_B, codes_BL)
    expected = CLUSTERS.sizes_K[labels_BL].double().log().mean()
    assert float(loss.detach()) == pytest.approx(float(expected), rel=1e-5)


def test_training_reaches_every_weight_of_what_is_present():
    codes_BL, labels_BL, classes_B = make_inputs(2)
    model = make_model()
    model.loss(labels_BL, classes_B, codes_BL).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and bool(parameter.grad.isfinite().all()), name
        assert bool(parameter.grad.any()), name


@pytest.mark.parametrize("softmax", ["members", "full"])
def test_choices_and_codes_are_inverse(softmax):
    codes_V = torch.arange(len(LABELS_V))
    model = FineModel(CONFIG, CLUSTERS, softmax)
    assert torch.equal(model.codes(LABELS_V, model.choices(codes_V)), codes_V)
    limit_V = len(LABELS_V) if softmax == "full" else CLUSTERS.sizes_K[LABELS_V]
    assert bool((model.choices(codes_V) < limit_V).all())


def test_clusters_come_from_the_argument_not_from_the_weights():
    model = make_model()
    assert all(key.startswith(("backbone.", "head.")) for key in model.state_dict())
    other = FineModel(CONFIG, CLUSTERS).eval()
    other.load_state_dict(model.state_dict())
    _, labels_BL, classes_B = make_inputs(1)
    assert torch.equal(other(labels_BL, classes_B), model(labels_BL, classes_B))


def test_one_member_each_leaves_nothing_to_choose():
    clusters = clustering.identity(5)
    model = make_model(clusters)
    labels_BL = torch.arange(CONFIG.length)[None] % 5
    logits_BLS = model(labels_BL, torch.tensor([0]))
    assert logits_BLS.shape == (1, CONFIG.length, 1)
    loss = F.cross_entropy(logits_BLS.mT, model.choices(labels_BL))
    assert math.isclose(float(loss.detach()), 0)
