"""Embeddings and output layers that know the codebook. This project's addition to the paper.

To a transformer a code is a bare number: its embedding and its output row start from nothing, and
learn only when that code comes up. But a code is a point in the codebook, a cluster has a centre,
and near points mean nearly the same. So each row here is the sum of a free one and of a function of
the known point, which all rows learn together:

    row_r = free_r + f(x_r)

f is linear. For the fine model's output layer it is a network with one hidden layer, and the free
rows count a tenth: few tokens choose each code, so its own row mostly learns noise. The sum is a
parametrization of the weight of a plain layer, and `fold` turns it back into a plain weight: a
trained model has no trace of it.

Shapes: R rows (codes or clusters), F features of a point, H hidden width, D width, C code
dimension, V codes, K clusters.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ctf.models.clusters import Clusters, centers
from ctf.models.coarse import CoarseModel
from ctf.models.fine import FineModel
from ctf.models.transformer import INITIAL_STD

HIDDEN = 64
FREE = 0.1  # of free rows beside a network
_FREE, _LEARNED = ".parametrizations.weight.original", ".parametrizations.weight.0."


class PointRows(nn.Module):
    """Free rows plus a learned function of known points, computed in float32.

    Args:
        points_RF: The points, standardized.
        width: D.
        hidden: H; 0 for a linear function.
        std: Standard deviation of the function's values at first; 0 starts with the free rows.
    """

    points_RF: Tensor

    def __init__(self, points_RF: Tensor, width: int, *, hidden: int, std: float) -> None:
        super().__init__()
        features = points_RF.shape[1]
        self.register_buffer("points_RF", points_RF.clone())  # a state shares no memory
        if hidden:
            self.inner = nn.Linear(features, hidden)
            nn.init.normal_(self.inner.weight, std=2 * features**-0.5)
            nn.init.normal_(self.inner.bias)
        self.outer = nn.Linear(hidden or features, width, bias=False)
        nn.init.normal_(self.outer.weight, std=std if hidden else std * features**-0.5)

    def forward(self, free_RD: Tensor) -> Tensor:
        """The rows: (R, D)."""
        # Under autocast too: rows are weights, and keep the precision of weights.
        with torch.autocast(free_RD.device.type, enabled=False):
            return _rows(free_RD, dict(self.named_parameters()), self.points_RF)

    def right_inverse(self, rows_RD: Tensor) -> Tensor:
        """The free rows that stand for the weights of a model where the function is zero."""
        return rows_RD / FREE if hasattr(self, "inner") else rows_RD


def _rows(free_RD: Tensor, function: Mapping[str, Tensor], points_RF: Tensor) -> Tensor:
    x_RH = points_RF
    if "inner.weight" in function:
        x_RH = F.gelu(F.linear(x_RH, function["inner.weight"], function["inner.bias"]))
        # Adam moves each weight alike, and so rows by the sum over H: without this, too far.
        x_RH = x_RH * x_RH.shape[1] ** -0.5
        free_RD = FREE * free_RD
    return free_RD + x_RH @ function["outer.weight"].T


def use_points(
    model: CoarseModel | FineModel, codebook_VC: Tensor, clusters: Clusters, *, warm: bool = False
) -> None:
    """Let the embedding and the output layer of a model know the codebook.

    A label's point is the centre of its cluster; with identity clusters, the code itself. A code's
    point in the fine model's output layer is its vector, and its difference from the centre.

    Args:
        model: With the weights that it starts from.
        codebook_VC: As the quantizer compares the vectors.
        clusters: Those of the model.
        warm: Whether these weights are trained; the first outputs are then left as they are.
    """
    centers_KC = centers(codebook_VC, clusters).float()
    codebook_VC = codebook_VC.detach().float()
    width = model.config.width
    points_KC = standardize(centers_KC)
    std = 0.0 if warm else INITIAL_STD
    embedding, hidden = PointRows(points_KC, width, hidden=0, std=std), 0
    if isinstance(model, FineModel):
        residuals_VC = codebook_VC - centers_KC[clusters.labels_V]
        features_VF = torch.cat([standardize(residuals_VC), standardize(codebook_VC)], dim=1)
        points_KC = torch.empty_like(features_VF)
        points_KC[model.rows_V] = features_VF
        hidden = HIDDEN
    head = PointRows(points_KC, width, hidden=hidden, std=0.0)
    parametrize.register_parametrization(model.backbone.label_embedding, "weight", embedding)
    parametrize.register_parametrization(model.head, "weight", head)


def standardize(points_RF: Tensor) -> Tensor:
    """Points with mean zero and, over all entries, variance one: distances keep their ratios."""
    points_RF = points_RF - points_RF.mean(0)
    return points_RF / points_RF.square().mean().sqrt().clamp(min=torch.finfo(torch.float32).tiny)


def fold(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of the plain model, from that of a model that may use points."""
    folded = {name: tensor for name, tensor in state.items() if ".parametrizations." not in name}
    for name, free_RD in state.items():
        if name.endswith(_FREE):
            layer = name.removesuffix(_FREE)
            prefix = layer + _LEARNED
            own = {k.removeprefix(prefix): t for k, t in state.items() if k.startswith(prefix)}
            folded[f"{layer}.weight"] = _rows(free_RD, own, own["points_RF"])
    return folded
