"""Drafts of a run's coarse labels: see `ctf.models.drafts`."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from torch import Tensor

from ctf.data.tokens import Tokens
from ctf.models import drafts
from ctf.models.clusters import Clusters
from ctf.models.drafts import Drafts

IMAGES, AT_A_TIME = 30_000, 1000  # whose labels are counted: evenly spaced, so of all classes


def fit_drafts(tokens: Tokens, clusters: Clusters) -> Drafts | None:
    """Count the labels of training images; None if there are too many clusters for tables."""
    if clusters.count > drafts.MAX_LABELS:
        return None
    grid = math.isqrt(tokens.manifest.length)
    return drafts.fit(_labels(tokens, clusters), grid, clusters.count)


def _labels(tokens: Tokens, clusters: Clusters) -> Iterator[Tensor]:
    count = min(len(tokens), IMAGES)
    indices = np.arange(count) * len(tokens) // count
    for first in range(0, count, AT_A_TIME):
        yield clusters.labels_V.cpu()[tokens.codes(indices[first : first + AT_A_TIME])]
