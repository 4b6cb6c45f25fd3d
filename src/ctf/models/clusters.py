"""Codebook -> clusters of codes that look alike: the coarse labels, and how redundant codes are.

Section 3.1 and Fig. 1b of the paper (arXiv 2503.16194). It leaves open how k-means is run; the
choices here are: the vectors as the quantiser compares them (of length 1), 10 restarts of which
the one of lowest inertia is kept, no empty cluster, and equal vectors always in one cluster.

Shapes: B batch, C code dimension, K clusters, L codes of an image, S members of the largest
cluster, U distinct code vectors, V codebook size.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ctf.common.errors import UserError

BALANCING_ROUNDS = 10

Method = Literal["kmeans", "identity", "random", "average", "balanced"]


@dataclasses.dataclass(frozen=True)
class ClustersConfig:
    """How the codebook is clustered. "random" has the sizes of "kmeans": the paper's control.

    "average" is average linkage, as MASC has it; "balanced" is k-means with clusters of equal
    sizes, as IAR has it. "identity" gives each code a cluster of its own, whatever `count`: the
    full-vocabulary baseline.
    """

    method: Method = "kmeans"
    count: int = 512
    restarts: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("count", "restarts"):
            if getattr(self, name) < 1:
                raise UserError(f"clusters: {name} is {getattr(self, name)}, expected 1 or more")


@dataclasses.dataclass(frozen=True, eq=False)
class Clusters:
    """A partition of the codes; built by `from_labels`, so that its parts agree.

    labels_V: the cluster of each code, int64.
    members_KS: the codes of each cluster, ascending, then -1 where it is smaller than the largest.
    """

    labels_V: Tensor
    members_KS: Tensor

    @classmethod
    def from_labels(cls, labels_V: Tensor) -> Clusters:
        """Raises ValueError unless every label from 0 to the largest is there."""
        if labels_V.ndim != 1 or labels_V.dtype != torch.int64 or not len(labels_V):
            raise ValueError("labels are not a row of int64")
        if int(labels_V.min()) < 0:
            raise ValueError(f"label {int(labels_V.min())} is negative")
        if int(labels_V.max()) >= len(labels_V):
            raise ValueError(f"label {int(labels_V.max())} is above the number of codes")
        sizes_K = labels_V.bincount()
        if int(sizes_K.min()) == 0:
            raise ValueError(f"cluster {int(sizes_K.argmin())} is empty")
        members_KS = labels_V.new_full((len(sizes_K), int(sizes_K.max())), -1)
        codes_V = torch.arange(len(labels_V), device=labels_V.device)
        members_KS[labels_V, _slots(labels_V, sizes_K)] = codes_V
        return cls(labels_V, members_KS)

    @property
    def count(self) -> int:
        """K."""
        return len(self.members_KS)

    @property
    def codebook_size(self) -> int:
        """V."""
        return len(self.labels_V)

    @property
    def largest(self) -> int:
        """S."""
        return self.members_KS.shape[1]

    @functools.cached_property
    def sizes_K(self) -> Tensor:
        """How many members each cluster has, int64."""
        return (self.members_KS >= 0).sum(1)

    @functools.cached_property
    def slots_V(self) -> Tensor:
        """Where each code v stands in its cluster: members_KS[labels_V[v], slots_V[v]] = v."""
        return _slots(self.labels_V, self.sizes_K)

    def to(self, device: torch.device) -> Clusters:
        return Clusters(self.labels_V.to(device), self.members_KS.to(device))


def fingerprint(clusters: Clusters) -> str:
    """What names a partition to the models trained for it: the SHA-256 of its labels."""
    return hashlib.sha256(clusters.labels_V.cpu().numpy().astype("<i8").tobytes()).hexdigest()


def fit(codebook_VC: Tensor, config: ClustersConfig) -> Clusters:
    """The clusters of a codebook by the method of `config`.

    Raises:
        UserError: see `fit_kmeans`.
    """
    if config.method == "identity":
        return identity(len(codebook_VC))
    if config.method == "average":
        return fit_average(codebook_VC, config.count)
    if config.method == "balanced":
        return fit_balanced(codebook_VC, config.count, seed=config.seed, restarts=config.restarts)
    clusters = fit_kmeans(codebook_VC, config.count, seed=config.seed, restarts=config.restarts)
    return random_like(clusters, config.seed) if config.method == "random" else clusters


def fit_kmeans(codebook_VC: Tensor, count: int, *, seed: int = 0, restarts: int = 10) -> Clusters:
    """k-means over the code vectors: the restart of lowest inertia, no empty cluster.

    Equal vectors are one point with their number as its weight, which has the same optimum and
    keeps them together.

    Raises:
        UserError: `count` is below 1, or above the number of codes or of distinct code vectors.
    """
    points_UC, weight_U, point_V = _distinct(codebook_VC, count)
    # Only needed here, and slow to import.
    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits

    # One thread: sums of several come in another order each time, and round differently.
    with threadpool_limits(limits=1):
        kmeans = KMeans(count, n_init=restarts, random_state=seed)
        kmeans.fit(points_UC, sample_weight=weight_U)
    labels_U = fill_empty(kmeans.labels_, points_UC, kmeans.cluster_centers_)
    return Clusters.from_labels(torch.from_numpy(labels_U[point_V]))


def _distinct(codebook_VC: Tensor, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The distinct code vectors (U, C), how many codes have each (U,), which one a code has (V,).

    Raises:
        UserError: see `fit_kmeans`.
    """
    # In double precision: scikit-learn's distances are differences of large sums.
    codebook = codebook_VC.detach().double().cpu().numpy()
    if not 1 <= count <= len(codebook):
        raise UserError(f"got {count} clusters, expected 1 to {len(codebook)}: the number of codes")
    _, first_U, point_V, weight_U = np.unique(
        codebook, axis=0, return_index=True, return_inverse=True, return_counts=True
    )
    if count > len(first_U):
        raise UserError(
            f"got {count} clusters, but only {len(first_U)} of the {len(codebook)} code vectors "
            f"are distinct; take {len(first_U)} clusters or fewer"
        )
    # In the order of the codebook rather than sorted: what scikit-learn would be given otherwise.
    order_U = first_U.argsort()
    return codebook[first_U[order_U]], weight_U[order_U], order_U.argsort()[point_V.reshape(-1)]


def fit_average(codebook_VC: Tensor, count: int) -> Clusters:
    """Average linkage (MASC, arXiv 2510.04220): again and again those two clusters are joined whose
    vectors are nearest on average, until `count` are left.

    It takes the distances of all pairs: 8 V ** 2 bytes, 2 GB for 16384 codes.

    Raises:
        UserError: see `fit_kmeans`.
    """
    points_UC, _, point_V = _distinct(codebook_VC, count)
    left = len(points_UC) - count  # joins to make
    root_N = np.arange(len(points_UC) + left)
    if left:
        # Only needed here, and slow to import.
        from scipy.cluster.hierarchy import linkage

        # Join i makes cluster U + i of two earlier ones.
        joins = linkage(points_UC, "average")[:left, :2].astype(np.int64)
        root_N[joins] = len(points_UC) + np.arange(left)[:, None]
    for node in reversed(range(len(root_N))):  # the latest first, whose roots are known then
        root_N[node] = root_N[root_N[node]]
    _, labels_U = np.unique(root_N[: len(points_UC)], return_inverse=True)
    return Clusters.from_labels(torch.from_numpy(labels_U.reshape(-1)[point_V].astype(np.int64)))


def fit_balanced(codebook_VC: Tensor, count: int, *, seed: int = 0, restarts: int = 10) -> Clusters:
    """k-means with clusters of equal sizes, or sizes that differ by one (IAR, arXiv 2501.00880).

    It starts with the clusters of `fit_kmeans`. Equal vectors may be parted where a cluster is
    full. Of all rounds that of lowest inertia is kept.

    Raises:
        UserError: see `fit_kmeans`.
    """
    clusters = fit_kmeans(codebook_VC, count, seed=seed, restarts=restarts)
    codebook_VC = codebook_VC.detach().double().cpu()
    smallest, larger = divmod(len(codebook_VC), count)
    room_K = np.array([smallest + 1] * larger + [smallest] * (count - larger))
    found: list[tuple[float, Clusters]] = []
    for _ in range(BALANCING_ROUNDS):
        means_KC = codebook_VC.new_zeros(count, codebook_VC.shape[1])
        means_KC.index_add_(0, clusters.labels_V, codebook_VC)
        means_KC /= clusters.sizes_K[:, None]
        labels_V = assign_balanced(torch.cdist(codebook_VC, means_KC).numpy(), room_K)
        clusters = Clusters.from_labels(torch.from_numpy(labels_V))
        found.append((inertia(codebook_VC, clusters), clusters))
    return min(found, key=lambda pair: pair[0])[1]


def assign_balanced(distance_VK: np.ndarray, room_K: np.ndarray) -> np.ndarray:
    """A cluster for each code, as near as can be where each has room for so many: (V,), int64.

    Each code asks its clusters from the nearest on, and a full one keeps the nearest codes (stable
    assignment, Gale and Shapley, 1962). Afterwards no code and cluster are nearer to each other
    than both to what they have got. The rooms have to be V together.
    """
    order_VK = distance_VK.argsort(1, kind="stable")
    asked_V = np.zeros(len(order_VK), np.int64)
    labels_V = order_VK[:, 0].copy()
    while True:
        own_V = np.take_along_axis(distance_VK, labels_V[:, None], 1)[:, 0]
        sorted_V = np.lexsort((own_V, labels_V))
        sizes_K = np.bincount(labels_V, minlength=len(room_K))
        places_V = np.arange(len(labels_V)) - (sizes_K.cumsum() - sizes_K)[labels_V[sorted_V]]
        refused = sorted_V[places_V >= room_K[labels_V[sorted_V]]]
        if not len(refused):
            return labels_V
        asked_V[refused] += 1
        labels_V[refused] = order_VK[refused, asked_V[refused]]


def fill_empty(labels_U: np.ndarray, points_UC: np.ndarray, centers_KC: np.ndarray) -> np.ndarray:
    """Gives each empty cluster, in turn, the point farthest from its centre that has company.

    k-means can leave clusters empty where points are nearer to each other than it can tell.

    Returns:
        (U,), int64; the given labels where no cluster is empty.
    """
    labels_U = labels_U.astype(np.int64)
    distance_U = ((points_UC - centers_KC[labels_U]) ** 2).sum(1)
    sizes_K = np.bincount(labels_U, minlength=len(centers_KC))
    for empty in np.flatnonzero(sizes_K == 0):
        moved = np.where(sizes_K[labels_U] > 1, distance_U, -1.0).argmax()
        sizes_K[labels_U[moved]] -= 1
        sizes_K[empty] += 1
        labels_U[moved] = empty
    return labels_U


def identity(codebook_size: int) -> Clusters:
    """Each code in a cluster of its own: K = V."""
    return Clusters.from_labels(torch.arange(codebook_size))


def random_like(clusters: Clusters, seed: int) -> Clusters:
    """Clusters of the same sizes, whose members are drawn at random."""
    generator = torch.Generator().manual_seed(seed)
    permutation = torch.randperm(clusters.codebook_size, generator=generator)
    return Clusters.from_labels(clusters.labels_V[permutation])


def inertia(codebook_VC: Tensor, clusters: Clusters) -> float:
    """Sum of the squared distances of all code vectors to the mean of their cluster."""
    codebook_VC = codebook_VC.detach().double().cpu()
    means_KC = codebook_VC.new_zeros(clusters.count, codebook_VC.shape[1])
    means_KC.index_add_(0, clusters.labels_V, codebook_VC)
    means_KC /= clusters.sizes_K[:, None]
    return float((codebook_VC - means_KC[clusters.labels_V]).square().sum())


def _slots(labels_V: Tensor, sizes_K: Tensor) -> Tensor:
    order_V = labels_V.argsort(stable=True)
    first_K = sizes_K.cumsum(0) - sizes_K  # where each cluster begins in `order_V`
    slots_V = torch.empty_like(labels_V)
    places_V = torch.arange(len(labels_V), device=labels_V.device)
    slots_V[order_V] = places_V - first_K[labels_V[order_V]]
    return slots_V


def swap(codes_BL: Tensor, clusters: Clusters, generator: torch.Generator) -> Tensor:
    """Each code replaced by a member of its cluster, all of them equally likely: (B, L), int64."""
    labels_BL = clusters.labels_V[codes_BL]
    drawn_BL = torch.randint(2**62, codes_BL.shape, generator=generator)
    return clusters.members_KS[labels_BL, drawn_BL % clusters.sizes_K[labels_BL]]
