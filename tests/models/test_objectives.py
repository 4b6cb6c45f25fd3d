"""Training objectives against their definitions."""

from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ctf.models.clusters import Clusters
from ctf.models.coarse import CoarseModel
from ctf.models.fine import FineModel
from ctf.models.objectives import (
    coarse_objective,
    corrupted_objective,
    fine_objective,
    grouped_objective,
)
from ctf.models.transformer import TransformerConfig

CODES = 40
SHAPE = TransformerConfig(
    width=32, layers=2, heads=2, grid=4, classes=3, dropout=0.0, ffn_multiple=16
)
# Code v is member v // 8 of cluster v % 8; cluster 7 has one member less and cluster 0 one more.
LABELS_V = torch.arange(CODES) % 8
LABELS_V[-1] = 0
CLUSTERS = Clusters.from_labels(LABELS_V)


@pytest.mark.parametrize("kind", ["coarse", "fine"])
def test_objectives_by_hand(kind: str) -> None:
    codes_BL, classes_B = torch.arange(32).view(2, 16), torch.tensor([0, 2])
    labels_BL = LABELS_V[codes_BL]
    model, objective, targets_BL = {
        "coarse": (CoarseModel(SHAPE, 8), coarse_objective(CLUSTERS), labels_BL),
        "fine": (FineModel(SHAPE, CLUSTERS), fine_objective(CLUSTERS), CLUSTERS.slots_V[codes_BL]),
    }[kind]
    torch.nn.init.normal_(model.head.weight)
    loss = objective(model, codes_BL, classes_B).detach()
    logp_BLK = model(labels_BL, classes_B).log_softmax(-1).detach()
    losses = [-float(logp_BLK[b, i, targets_BL[b, i]]) for b in range(2) for i in range(16)]
    assert float(loss) == pytest.approx(sum(losses) / len(losses), rel=1e-4)


def test_the_full_softmax_by_hand() -> None:
    torch.manual_seed(0)
    model = FineModel(SHAPE, CLUSTERS, "full")
    torch.nn.init.normal_(model.head.weight)
    codes_BL, classes_B = torch.arange(32).view(2, 16), torch.tensor([0, 2])
    loss = fine_objective(CLUSTERS)(model, codes_BL, classes_B)
    logits_BLV = model(LABELS_V[codes_BL], classes_B)
    expected = F.cross_entropy(logits_BLV.flatten(0, 1), codes_BL.flatten())
    torch.testing.assert_close(loss, expected)
    found, expected_grad = (torch.autograd.grad(x, model.head.weight)[0] for x in (loss, expected))
    torch.testing.assert_close(found, expected_grad)


def test_loss_of_groups_is_that_of_summed_probabilities() -> None:
    """IAR's: beside the code's own cross-entropy, that of its group."""
    torch.manual_seed(0)
    model = CoarseModel(SHAPE, CODES)
    torch.nn.init.normal_(model.head.weight)
    codes_BL, classes_B = torch.randint(CODES, (3, 16)), torch.arange(3)
    p_BLV = model(codes_BL, classes_B).softmax(-1)
    own_BL = p_BLV.gather(-1, codes_BL[..., None])[..., 0]
    same_BLV = LABELS_V[codes_BL][..., None] == LABELS_V
    group_BL = (p_BLV * same_BLV).sum(-1)
    for weight in (0.0, 0.7):
        loss = grouped_objective(CLUSTERS, weight)(model, codes_BL, classes_B)
        torch.testing.assert_close(loss, -(own_BL.log() + weight * group_BL.log()).mean())


@pytest.mark.parametrize("softmax", ["members", "full"])
def test_wrong_labels(softmax: Literal["members", "full"]) -> None:
    """Without any, nothing changes. Otherwise a share of the labels is that of other tokens, and
    only tokens whose label can be right have a loss.
    """
    torch.manual_seed(0)
    model = FineModel(SHAPE, CLUSTERS, softmax)
    torch.nn.init.normal_(model.head.weight)
    codes_BL, classes_B = torch.randint(CODES, (64, 16)), torch.zeros(64, dtype=torch.int64)
    labels_BL = LABELS_V[codes_BL]
    seen: list[Tensor] = []
    model.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    plain = fine_objective(CLUSTERS)(model, codes_BL, classes_B)
    torch.testing.assert_close(
        corrupted_objective(CLUSTERS, 0.0)(model, codes_BL, classes_B), plain
    )
    loss = corrupted_objective(CLUSTERS, 0.3)(model, codes_BL, classes_B)
    wrong_BL = seen[-1] != labels_BL
    # A label of another token is the same now and then: 1 of 8.
    assert abs(float(wrong_BL.float().mean()) - 0.3 * 7 / 8) < 0.05
    counted_BL = ~wrong_BL if softmax == "members" else torch.ones_like(wrong_BL)
    logits_BLS = model(seen[-1], classes_B)[counted_BL]
    # A token that found its own label back by chance has no loss either.
    expected = F.cross_entropy(logits_BLS, model.choices(codes_BL)[counted_BL])
    torch.testing.assert_close(loss, expected, rtol=0.05, atol=0)
