"""A coarse model that starts from a full-vocabulary one, such as a released LlamaGen.

The backbone is copied. The embedding of a cluster is the mean of its members'. The output row of a
cluster has to give what its members' rows give together, log sum_v exp(w_v . h), which no mean of
rows does: with n equal members it is log n above it. Output layers have no bias to add that to. So
the rows are fitted: the linear map from the new backbone's vectors to those sums of the old model,
by least squares over some pictures. With a cluster for each code everything is a copy.

Shapes: B batch, L codes of an image, D width, V codes, K clusters, T tokens.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ctf.common import rng, storage
from ctf.common.errors import UserError
from ctf.common.weights import load_strict
from ctf.data.tokens import Tokens
from ctf.models.clusters import Clusters
from ctf.models.coarse import CoarseModel
from ctf.pipelines.folder import CLUSTERS, load_clusters, load_coarse, load_settings

TOKENS_PER_WIDTH = 64  # of the least squares: this many equations for each unknown of a row
RIDGE = 1e-4  # in units of the mean square of a vector's entries
SLICE = 1024  # tokens whose V logits are in memory at a time
BATCH = 32  # pictures


@dataclasses.dataclass(frozen=True)
class Source:
    """A full-vocabulary model and what it was trained for."""

    model: CoarseModel
    class_names: tuple[str, ...]
    hash: str  # of its weights


def open_source(folder: Path, tokenizer_hash: str) -> Source:
    """The coarse model of the full-vocabulary pipeline or run in `folder`.

    Raises:
        UserError: there is none, it has clusters of several codes, or another tokenizer.
    """
    if storage.hash_file(_weights(folder / "tokenizer")) != tokenizer_hash:
        raise UserError(
            f"{folder}: has another tokenizer than the run, so its codes mean something else; "
            "start from a pipeline of the same tokenizer"
        )
    parts = load_clusters(folder / "clusters" / CLUSTERS)
    if parts.largest > 1:
        raise UserError(
            f"{folder}: predicts {parts.count} clusters; expected a full-vocabulary model: "
            "a converted LlamaGen, or one made by ctf train baseline"
        )
    model = load_coarse(folder / "coarse", parts, torch.device("cpu"))
    names = load_settings(folder).class_names
    return Source(model, names, storage.hash_file(_weights(folder / "coarse")))


def _weights(folder: Path) -> Path:
    path = folder / "model.safetensors"
    if not path.is_file():
        raise UserError(f"{path}: not found; expected a full-vocabulary pipeline")
    return path


@torch.no_grad()
def weights(
    source: Source, parts: Clusters, tokens: Tokens, model: CoarseModel, device: torch.device
) -> dict[str, Tensor]:
    """The first weights of `model`, which has the source's shape but for its labels and classes.

    A class begins as the source's class of the same name, a new one as "no class".

    Args:
        tokens: of the pictures that the output rows are fitted to.
    """
    old = source.model.to(device)
    first = old.state_dict()
    classes_CD = first["backbone.class_embedding.weight"]
    rows = {name: row for row, name in enumerate(source.class_names)}
    chosen = [rows.get(name, old.no_class) for name in tokens.manifest.class_names]
    chosen_C = torch.tensor([*chosen, old.no_class], device=device)
    first["backbone.class_embedding.weight"] = classes_CD[chosen_C]
    if parts.largest == 1:
        return first
    labels_V = parts.labels_V.to(device)
    codes_VD = first["backbone.label_embedding.weight"]
    sums_KD = codes_VD.new_zeros(parts.count, codes_VD.shape[1])
    sums_KD.index_add_(0, labels_V, codes_VD)
    first["backbone.label_embedding.weight"] = sums_KD / parts.sizes_K.to(device)[:, None]
    first["head.weight"] = codes_VD.new_zeros(parts.count, codes_VD.shape[1])
    new = copy.deepcopy(model).to(device).eval()
    load_strict(new, first, "the model to start from")
    first["head.weight"] = _fit_head(new, labels_V, old, chosen_C, tokens)
    return first


def _fit_head(
    model: CoarseModel,
    labels_V: Tensor,
    old: CoarseModel,
    chosen_C: Tensor,
    tokens: Tokens,
) -> Tensor:
    """Rows (K, D) with which `model` predicts the sums of the old model's probabilities."""
    width = model.config.width
    # In double precision, and on the CPU, since not every device has it.
    squares_DD = torch.zeros(width, width, dtype=torch.float64)
    products_DK = torch.zeros(width, model.vocab_size, dtype=torch.float64)
    seen = 0
    for codes_BL, classes_B in _pictures(tokens, TOKENS_PER_WIDTH * width):
        codes_BL, classes_B = codes_BL.to(labels_V.device), classes_B.to(labels_V.device)
        known_B = chosen_C[classes_B]
        labels_BL = labels_V[codes_BL]
        new_TD = model.backbone(labels_BL[:, :-1], classes_B, causal=True).flatten(0, 1)
        old_TD = old.backbone(codes_BL[:, :-1], known_B, causal=True).flatten(0, 1)
        for new, was in zip(new_TD.split(SLICE), old_TD.split(SLICE), strict=True):
            wanted_TK = _log_sums(old.head(was), labels_V, model.vocab_size)
            new = new.double().cpu()
            squares_DD += new.T @ new
            products_DK += new.T @ wanted_TK.double().cpu()
            seen += len(new)
    squares_DD, products_DK = squares_DD / seen, products_DK / seen
    ridge = RIDGE * squares_DD.diagonal().mean()
    squares_DD += ridge * torch.eye(width, dtype=torch.float64)
    return torch.linalg.solve(squares_DD, products_DK).T.to(model.head.weight)


def _log_sums(logits_TV: Tensor, labels_V: Tensor, count: int) -> Tensor:
    """Log of each cluster's probability, less their mean, which a softmax takes no notice of."""
    powers_TV = (logits_TV - logits_TV.amax(-1, keepdim=True)).exp()
    sums_TK = powers_TV.new_zeros(len(powers_TV), count).index_add_(1, labels_V, powers_TV)
    logs_TK = sums_TK.clamp(min=torch.finfo(sums_TK.dtype).tiny).log()
    return logs_TK - logs_TK.mean(-1, keepdim=True)


def _pictures(tokens: Tokens, wanted: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Codes and classes of as many random pictures as have that many tokens, or of all."""
    count = min(len(tokens), -(-wanted // tokens.manifest.length))
    order = rng.generator(0).permutation(len(tokens))[:count]
    for start in range(0, count, BATCH):
        indices_B = np.sort(order[start : start + BATCH])
        yield tokens.codes(indices_B), torch.from_numpy(tokens.classes_N[indices_B])
