"""A transformer that starts from a trained one.

From a model with the same clusters, everything is copied; class embeddings go by the names of the
classes, and a new class starts as "no class".

A coarse model can also start from a full-vocabulary one, such as a released LlamaGen. The backbone
is copied. The embedding of a cluster is the mean of its members' embeddings. The output row of a
cluster should give its members' joint log-probability, log sum_v exp(w_v . h). A mean of rows
doesn't: for n equal members it is log n too low, and output layers have no bias. So the rows are
fitted by least squares on some images, as a linear map from the new backbone's hidden vectors to
the old model's log-sums.

Shapes: B batch, C classes, L codes of an image, D width, V codes, K clusters, T tokens.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ctf.common import rng, storage
from ctf.common.errors import UserError
from ctf.common.weights import load_strict
from ctf.data.tokens import Tokens
from ctf.models.clusters import Clusters, fingerprint
from ctf.models.coarse import CoarseModel
from ctf.models.fine import FineModel
from ctf.pipelines.folder import (
    CLUSTERS,
    find_pipeline,
    load_clusters,
    load_coarse,
    load_fine,
    load_settings,
)
from ctf.training.recipes import Kind

TOKENS_PER_WIDTH = 64  # equations of the least squares for each unknown of a row
RIDGE = 1e-4  # relative to the mean square of a vector's entries
SLICE = 1024  # tokens whose V logits are in memory at a time
BATCH = 32  # images
CLASSES, LABELS = "backbone.class_embedding.weight", "backbone.label_embedding.weight"


@dataclasses.dataclass(frozen=True)
class Source:
    """A model to start from: a full-vocabulary one, or one with the clusters of the new model."""

    model: CoarseModel | FineModel
    class_names: tuple[str, ...]
    hash: str  # of its weights
    same_clusters: bool = False
    name: str = ""  # of the pipeline, for people


def open_source(
    name: str | Path, kind: Kind, clusters: Clusters, tokenizer_hashes: Sequence[str]
) -> Source:
    """Load the coarse or the fine model of a pipeline or run.

    Args:
        name: As `find_pipeline` takes it.
        kind: Which of the two.
        clusters: Those of the new model.
        tokenizer_hashes: Of tokenizers whose codes mean the same as those of the new model.

    Raises:
        UserError: There is none, it has other clusters of several codes, or another tokenizer.
    """
    own = open_clusters(name, tokenizer_hashes)
    folder = find_pipeline(name)
    same = fingerprint(own) == fingerprint(clusters)
    if own.largest > 1 and not same:
        raise UserError(
            f"{name} predicts {own.count} clusters, which are not those of the run; expected the "
            "same clusters (ctf clusters fit --from), or a full-vocabulary model"
        )
    if kind == "fine" and own.largest == 1:
        raise UserError(f"{name} is a full-vocabulary pipeline, without a fine model to start from")
    weights = _find_weights(folder / kind)
    load = load_coarse if kind == "coarse" else load_fine
    model = load(folder / kind, own, torch.device("cpu"))
    names = load_settings(folder).class_names
    return Source(model, names, storage.hash_file(weights), same, short_name(name))


def open_clusters(name: str | Path, tokenizer_hashes: Sequence[str]) -> Clusters:
    """Load the clusters of a pipeline or run.

    Raises:
        UserError: There are none, or its tokenizer is none of these.
    """
    folder = find_pipeline(name)
    if storage.hash_file(_find_weights(folder / "tokenizer")) not in tokenizer_hashes:
        raise UserError(
            f"{name} has another tokenizer than the run, so its codes mean something else; "
            "start from a pipeline with the same tokenizer"
        )
    return load_clusters(folder / "clusters" / CLUSTERS)


def short_name(name: str | Path) -> str:
    """Return a pipeline's name for people: without the path, if it is a folder."""
    return Path(name).resolve().name if Path(name).is_dir() else str(name)


def _find_weights(folder: Path) -> Path:
    path = folder / "model.safetensors"
    if not path.is_file():
        raise UserError(f"{path}: not found; expected a pipeline whose training is finished")
    return path


@torch.no_grad()
def first_weights(
    source: Source,
    clusters: Clusters,
    tokens: Tokens,
    model: CoarseModel | FineModel,
    device: torch.device,
) -> dict[str, Tensor]:
    """Return the weights that `model` starts with, a model with the source's shape.

    A class starts as the source's class of the same name, a new one as "no class". The output rows
    are fitted on some of the images that `tokens` has.
    """
    old = source.model.to(device)
    first = old.state_dict()
    rows = {name: row for row, name in enumerate(source.class_names)}
    names = tokens.manifest.class_names
    rows_C = torch.tensor(
        [*(rows.get(name, old.no_class) for name in names), old.no_class], device=device
    )
    first[CLASSES] = first[CLASSES][rows_C]
    if source.same_clusters or clusters.largest == 1:
        return first
    assert isinstance(old, CoarseModel) and isinstance(model, CoarseModel)
    labels_V, sizes_K = clusters.labels_V.to(device), clusters.sizes_K.to(device)
    codes_VD = first[LABELS]
    sums_KD = codes_VD.new_zeros(clusters.count, codes_VD.shape[1])
    sums_KD.index_add_(0, labels_V, codes_VD)
    first[LABELS] = sums_KD / sizes_K[:, None]
    first["head.weight"] = codes_VD.new_zeros(clusters.count, codes_VD.shape[1])
    new = copy.deepcopy(model).to(device).eval()
    load_strict(new, first, "the model to start from")
    first["head.weight"] = _fit_head(new, labels_V, old, rows_C, tokens)
    return first


def _fit_head(
    new: CoarseModel, labels_V: Tensor, old: CoarseModel, rows_C: Tensor, tokens: Tokens
) -> Tensor:
    """Return the output rows (K, D) that make `new` predict the old model's log-sums."""
    width, device = new.config.width, labels_V.device
    # In double precision, on the CPU, since not every device has it.
    squares_DD = torch.zeros(width, width, dtype=torch.float64)
    products_DK = torch.zeros(width, new.vocab_size, dtype=torch.float64)
    count = 0
    for codes_BL, classes_B in _batches(tokens, TOKENS_PER_WIDTH * width):
        codes_BL, classes_B = codes_BL.to(device), classes_B.to(device)
        labels_BL = labels_V[codes_BL]
        new_TD = new.backbone(labels_BL[:, :-1], classes_B, causal=True).flatten(0, 1)
        old_TD = old.backbone(codes_BL[:, :-1], rows_C[classes_B], causal=True).flatten(0, 1)
        for x_TD, old_x_TD in zip(new_TD.split(SLICE), old_TD.split(SLICE), strict=True):
            y_TK = _log_sums(old.head(old_x_TD), labels_V, new.vocab_size)
            x_TD = x_TD.double().cpu()
            squares_DD += x_TD.T @ x_TD
            products_DK += x_TD.T @ y_TK.double().cpu()
            count += len(x_TD)
    squares_DD, products_DK = squares_DD / count, products_DK / count
    ridge = RIDGE * squares_DD.diagonal().mean()
    squares_DD += ridge * torch.eye(width, dtype=torch.float64)
    rows_KD: Tensor = torch.linalg.solve(squares_DD, products_DK).T
    return rows_KD.to(new.head.weight)


def _log_sums(logits_TV: Tensor, labels_V: Tensor, clusters: int) -> Tensor:
    """Return the log-probability of each cluster, less its mean, which a softmax ignores."""
    powers_TV = (logits_TV - logits_TV.amax(-1, keepdim=True)).exp()
    sums_TK = powers_TV.new_zeros(len(powers_TV), clusters).index_add_(1, labels_V, powers_TV)
    logs_TK = sums_TK.clamp(min=torch.finfo(sums_TK.dtype).tiny).log()
    return logs_TK - logs_TK.mean(-1, keepdim=True)


def _batches(tokens: Tokens, count: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield codes and classes of random images that have `count` tokens together, or of all."""
    images = min(len(tokens), -(-count // tokens.manifest.length))
    order = rng.generator(0).permutation(len(tokens))[:images]
    for start in range(0, images, BATCH):
        indices_B = np.sort(order[start : start + BATCH])
        yield tokens.codes(indices_B), torch.from_numpy(tokens.classes_N[indices_B])
