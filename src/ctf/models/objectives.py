"""Training objectives: what the coarse and the fine model learn from the codes of images.

Each is a function of the clusters that returns `(model, codes_BL, classes_B) -> loss`, a scalar in
nats a token. A code determines its label, so the losses of the coarse and the fine model add up to
the negative log-likelihood of the codes, which compares with the loss of the full-vocabulary
baseline.

Shapes: B batch, L tokens of an image, T tokens of a batch, V codes, K clusters, S members of the
largest cluster.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ctf.models.clusters import Clusters
from ctf.models.coarse import CoarseModel
from ctf.models.fine import FineModel

IGNORED = -100  # a target without a loss

Objective = Callable[[Any, Tensor, Tensor], Tensor]


def coarse_objective(clusters: Clusters) -> Objective:
    """Predict each label from the class and the labels before it (the paper's section 3.2)."""
    labels = _labels(clusters)

    def loss(model: CoarseModel, codes_BL: Tensor, classes_B: Tensor) -> Tensor:
        return model.loss(labels(codes_BL), classes_B)

    return loss


def fine_objective(clusters: Clusters) -> Objective:
    """Predict each code from the class and all true labels (the paper's section 3.2)."""
    labels = _labels(clusters)

    def loss(model: FineModel, codes_BL: Tensor, classes_B: Tensor) -> Tensor:
        return model.loss(labels(codes_BL), classes_B, codes_BL)

    return loss


def corrupted_objective(clusters: Clusters, share: float) -> Objective:
    """Fine objective with wrong labels, for robustness to mistakes of the coarse model.

    Each label is replaced, with probability `share`, by that of another token of the batch. The
    true code is no member of such a label's cluster, so the token has no loss; with softmax "full"
    every token has one. Random numbers come from torch's global generator.
    """
    labels = _labels(clusters)

    def loss(model: FineModel, codes_BL: Tensor, classes_B: Tensor) -> Tensor:
        labels_BL = labels(codes_BL)
        wrong_BL = torch.rand(labels_BL.shape, device=labels_BL.device) < share
        order_T = torch.randperm(labels_BL.numel(), device=labels_BL.device)
        others_BL = labels_BL.flatten()[order_T].view_as(labels_BL)
        labels_BL = torch.where(wrong_BL, others_BL, labels_BL)
        if model.softmax == "full":
            return model.loss(labels_BL, classes_B, codes_BL)
        logits_TS = model(labels_BL, classes_B).flatten(0, 1)
        targets_T = model.choices(codes_BL).masked_fill(wrong_BL, IGNORED).flatten()
        total = F.cross_entropy(logits_TS, targets_T, ignore_index=IGNORED, reduction="sum")
        return total / (~wrong_BL).sum().clamp(min=1)

    return loss


def grouped_objective(groups: Clusters, weight: float) -> Objective:
    """Full-vocabulary objective with the cluster loss of IAR (arXiv 2501.00880).

    To the cross-entropy of each code it adds `weight` times that of the code's group, whose
    probability is the sum of its members'.
    """
    labels, members = _labels(groups), _table(groups.members_KS)

    def loss(model: CoarseModel, codes_BL: Tensor, classes_B: Tensor) -> Tensor:
        logits_BLV: Tensor = model(codes_BL, classes_B)
        logp_TV = logits_BLV.flatten(0, 1).log_softmax(-1)
        logp_code_T = logp_TV.gather(1, codes_BL.view(-1, 1))[:, 0]
        members_TS = members(labels(codes_BL).flatten())
        logp_TS = logp_TV.gather(1, members_TS.clamp(min=0))
        logp_group_T = logp_TS.masked_fill(members_TS < 0, -torch.inf).logsumexp(-1)
        return -(logp_code_T + weight * logp_group_T).mean()

    return loss


def _labels(clusters: Clusters) -> Callable[[Tensor], Tensor]:
    return _table(clusters.labels_V)


def _table(values: Tensor) -> Callable[[Tensor], Tensor]:
    """A look-up in a table, which is copied to each device once: at every step it would stall."""
    on_device = functools.cache(values.to)
    return lambda indices: on_device(indices.device)[indices]
