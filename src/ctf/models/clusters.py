"""Clusters of similar codes: a code's cluster is its coarse label (the paper's section 3.1).

The paper (arXiv 2503.16194) leaves open how k-means is run. Here it clusters the vectors as the
quantizer compares them (of length 1), keeps the best of 10 restarts, leaves no cluster empty, and
puts equal vectors in one cluster.

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
    """How to cluster a codebook.

    Args:
        method: "kmeans" is the paper's. "random" has clusters of the same sizes with random
            members: the paper's control. "average" is average linkage (MASC), "balanced" is
            k-means with clusters of equal sizes (IAR). "identity" gives each code a cluster of its
            own, whatever `count`: the full-vocabulary baseline.
        count: K.
        restarts: Runs of k-means, of which the one of lowest inertia is kept.
        seed: Of k-means, or of the random clusters.

    Raises:
        UserError: A value is out of range.
    """

    method: Method = "kmeans"
    count: int = 512
    restarts: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("count", "restarts"):
            if getattr(self, name) < 1:
                raise UserError(f"clusters.{name}: got {getattr(self, name)}, expected 1 or more")


@dataclasses.dataclass(frozen=True, eq=False)
class Clusters:
    """A partition of the codes, built by `from_labels`.

    Attributes:
        labels_V: The cluster of each code, int64.
        members_KS: The codes of each cluster, ascending, then -1 up to the size of the largest.
    """

    labels_V: Tensor
    members_KS: Tensor

    @classmethod
    def from_labels(cls, labels_V: Tensor) -> Clusters:
        """The clusters with these labels.

        Raises:
            ValueError: The labels are no int64 vector, or do not cover 0 to the largest of them.
        """
        if labels_V.ndim != 1 or labels_V.dtype != torch.int64 or not len(labels_V):
            raise ValueError("labels are not an int64 vector")
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
        """Number of clusters, K."""
        return len(self.members_KS)

    @property
    def codebook_size(self) -> int:
        """Number of codes, V."""
        return len(self.labels_V)

    @property
    def largest(self) -> int:
        """Size of the largest cluster, S."""
        return self.members_KS.shape[1]

    @functools.cached_property
    def sizes_K(self) -> Tensor:
        """Size of each cluster, int64."""
        return (self.members_KS >= 0).sum(1)

    @functools.cached_property
    def slots_V(self) -> Tensor:
        """Index of each code v among the members of its cluster: members_KS[label, slot] = v."""
        return _slots(self.labels_V, self.sizes_K)

    def to(self, device: torch.device) -> Clusters:
        """The same clusters on another device."""
        return Clusters(self.labels_V.to(device), self.members_KS.to(device))


def fingerprint(clusters: Clusters) -> str:
    """SHA-256 of the labels, by which a model names the clusters that it was trained for."""
    return hashlib.sha256(clusters.labels_V.cpu().numpy().astype("<i8").tobytes()).hexdigest()


def fit(codebook_VC: Tensor, config: ClustersConfig) -> Clusters:
    """Cluster a codebook by the method of `config`.

    Raises:
        UserError: As for `fit_kmeans`.
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
    """k-means over the code vectors: the restart of lowest inertia, without empty clusters.

    Equal vectors are one point whose weight is their number: the optimum is the same, and they
    stay together.

    Raises:
        UserError: `count` is below 1, or above the number of codes or of distinct code vectors.
    """
    points_UC, weight_U, point_V = _distinct(codebook_VC, count)
    # Imported here, since it is slow.
    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits

    # One thread: several add up in another order each time, and round differently.
    with threadpool_limits(limits=1):
        kmeans = KMeans(count, n_init=restarts, random_state=seed)
        kmeans.fit(points_UC, sample_weight=weight_U)
    labels_U = fill_empty(kmeans.labels_, points_UC, kmeans.cluster_centers_)
    return Clusters.from_labels(torch.from_numpy(labels_U[point_V]))


def _distinct(codebook_VC: Tensor, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Distinct code vectors (U, C), the number of codes with each (U,), and each code's one (V,).

    Raises:
        UserError: As for `fit_kmeans`.
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
    # In the order of the codebook, as scikit-learn would get them without duplicates.
    order_U = first_U.argsort()
    return codebook[first_U[order_U]], weight_U[order_U], order_U.argsort()[point_V.reshape(-1)]


def fit_average(codebook_VC: Tensor, count: int) -> Clusters:
    """Average linkage, as MASC (arXiv 2510.04220).

    Joins the two clusters whose vectors are nearest on average until `count` are left. Needs the
    distances of all pairs: 8 V ** 2 bytes, 2 GB for 16384 codes.

    Raises:
        UserError: As for `fit_kmeans`.
    """
    points_UC, _, point_V = _distinct(codebook_VC, count)
    joins = len(points_UC) - count
    root_N = np.arange(len(points_UC) + joins)
    if joins:
        # Imported here, since it is slow.
        from scipy.cluster.hierarchy import linkage

        # Join i makes cluster U + i of two earlier ones.
        pairs = linkage(points_UC, "average")[:joins, :2].astype(np.int64)
        root_N[pairs] = len(points_UC) + np.arange(joins)[:, None]
    for node in reversed(range(len(root_N))):  # from the last join, which is its own root
        root_N[node] = root_N[root_N[node]]
    _, labels_U = np.unique(root_N[: len(points_UC)], return_inverse=True)
    return Clusters.from_labels(torch.from_numpy(labels_U.reshape(-1)[point_V].astype(np.int64)))


def fit_balanced(codebook_VC: Tensor, count: int, *, seed: int = 0, restarts: int = 10) -> Clusters:
    """k-means with clusters of equal sizes, or sizes that differ by one (IAR, arXiv 2501.00880).

    Starts from the clusters of `fit_kmeans` and keeps the round of lowest inertia. Equal vectors
    may be separated where a cluster is full.

    Raises:
        UserError: As for `fit_kmeans`.
    """
    clusters = fit_kmeans(codebook_VC, count, seed=seed, restarts=restarts)
    codebook_VC = codebook_VC.detach().double().cpu()
    smallest, larger = divmod(len(codebook_VC), count)
    room_K = np.array([smallest + 1] * larger + [smallest] * (count - larger))
    rounds: list[tuple[float, Clusters]] = []
    for _ in range(BALANCING_ROUNDS):
        distance_VK = torch.cdist(codebook_VC, centers(codebook_VC, clusters))
        labels_V = assign_balanced(distance_VK.numpy(), room_K)
        clusters = Clusters.from_labels(torch.from_numpy(labels_V))
        rounds.append((inertia(codebook_VC, clusters), clusters))
    return min(rounds, key=lambda pair: pair[0])[1]


def assign_balanced(distance_VK: np.ndarray, room_K: np.ndarray) -> np.ndarray:
    """Assign each code to a near cluster, where cluster k has room for room_K[k]: (V,), int64.

    Each code proposes to its clusters from the nearest on, and a full cluster keeps the nearest
    codes (stable matching, Gale and Shapley, 1962). In the end no code and cluster are nearer to
    each other than both are to their match. `room_K` adds up to V.
    """
    order_VK = distance_VK.argsort(1, kind="stable")
    proposals_V = np.zeros(len(order_VK), np.int64)
    labels_V = order_VK[:, 0].copy()
    while True:
        own_V = np.take_along_axis(distance_VK, labels_V[:, None], 1)[:, 0]
        sorted_V = np.lexsort((own_V, labels_V))
        sizes_K = np.bincount(labels_V, minlength=len(room_K))
        ranks_V = np.arange(len(labels_V)) - (sizes_K.cumsum() - sizes_K)[labels_V[sorted_V]]
        rejected = sorted_V[ranks_V >= room_K[labels_V[sorted_V]]]
        if not len(rejected):
            return labels_V
        proposals_V[rejected] += 1
        labels_V[rejected] = order_VK[rejected, proposals_V[rejected]]


def fill_empty(labels_U: np.ndarray, points_UC: np.ndarray, centers_KC: np.ndarray) -> np.ndarray:
    """Give each empty cluster the point farthest from its centre, of clusters with several: (U,).

    k-means can leave clusters empty where the distances of points are below its precision.
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
    """Clusters of the same sizes with random members."""
    generator = torch.Generator().manual_seed(seed)
    permutation = torch.randperm(clusters.codebook_size, generator=generator)
    return Clusters.from_labels(clusters.labels_V[permutation])


def inertia(codebook_VC: Tensor, clusters: Clusters) -> float:
    """Sum of the squared distances of all code vectors to the mean of their cluster."""
    codebook_VC = codebook_VC.detach().double().cpu()
    means_VC = centers(codebook_VC, clusters)[clusters.labels_V]
    return float((codebook_VC - means_VC).square().sum())


def centers(codebook_VC: Tensor, clusters: Clusters) -> Tensor:
    """Mean vector of each cluster's members: (K, C)."""
    codebook_VC = codebook_VC.detach()
    sums_KC = codebook_VC.new_zeros(clusters.count, codebook_VC.shape[1])
    return sums_KC.index_add_(0, clusters.labels_V, codebook_VC) / clusters.sizes_K[:, None]


def central_members(codebook_VC: Tensor, clusters: Clusters) -> Tensor:
    """The member of each cluster that is nearest to its centre: (K,), int64."""
    centers_KC = centers(codebook_VC, clusters)
    distance_V = (codebook_VC.detach() - centers_KC[clusters.labels_V]).square().sum(1)
    distance_KS = distance_V[clusters.members_KS.clamp(min=0)]
    distance_KS = distance_KS.masked_fill(clusters.members_KS < 0, torch.inf)
    return clusters.members_KS.gather(1, distance_KS.argmin(1, keepdim=True))[:, 0]


def _slots(labels_V: Tensor, sizes_K: Tensor) -> Tensor:
    order_V = labels_V.argsort(stable=True)
    first_K = sizes_K.cumsum(0) - sizes_K  # start of each cluster in `order_V`
    slots_V = torch.empty_like(labels_V)
    positions_V = torch.arange(len(labels_V), device=labels_V.device)
    slots_V[order_V] = positions_V - first_K[labels_V[order_V]]
    return slots_V


def swap(codes_BL: Tensor, clusters: Clusters, generator: torch.Generator) -> Tensor:
    """Replace each code by a random member of its cluster: (B, L), int64 (the paper's Fig. 1b)."""
    labels_BL = clusters.labels_V[codes_BL]
    random_BL = torch.randint(2**62, codes_BL.shape, generator=generator)
    return clusters.members_KS[labels_BL, random_BL % clusters.sizes_K[labels_BL]]
