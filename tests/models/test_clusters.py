"""Clusters: parity with scikit-learn, the invariants of a partition, and files."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import scipy.cluster.hierarchy
import sklearn.cluster
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from sklearn.cluster import KMeans
from threadpoolctl import threadpool_info, threadpool_limits
from torch import Tensor

from ctf.common.errors import UserError
from ctf.models import clusters
from ctf.models.clusters import Clusters, ClustersConfig

KMEANS = ClustersConfig(count=8, restarts=2)


def codebook(codes: int = 200, seed: int = 0) -> Tensor:
    vectors_VC = torch.randn(codes, 8, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(vectors_VC, dim=-1)


# --- the partition ---------------------------------------------------------------------------


def labels_without_gaps(labels: list[int]) -> Tensor:
    return torch.from_numpy(np.unique(labels, return_inverse=True)[1].astype(np.int64))


partitions = st.lists(st.integers(0, 9), min_size=1, max_size=60).map(labels_without_gaps)


@given(partitions)
def test_members_and_slots_are_the_inverse_of_labels(labels_V: Tensor) -> None:
    made = Clusters.from_labels(labels_V)
    everything = torch.arange(len(labels_V))
    assert torch.equal(made.members_KS[made.labels_V, made.slots_V], everything)
    real = made.members_KS[made.members_KS >= 0]
    assert torch.equal(real.sort().values, everything)
    assert (made.codebook_size, made.count) == (len(labels_V), int(labels_V.max()) + 1)
    assert made.largest == int(made.sizes_K.max())
    for members, size in zip(made.members_KS.tolist(), made.sizes_K.tolist(), strict=True):
        assert size >= 1
        assert members[:size] == sorted(members[:size])
        assert members[size:] == [-1] * (made.largest - size)


@given(partitions, st.integers(0, 2**32))
def test_random_clusters_have_the_same_sizes(labels_V: Tensor, seed: int) -> None:
    made = Clusters.from_labels(labels_V)
    control = clusters.random_like(made, seed)
    assert torch.equal(control.sizes_K, made.sizes_K)
    assert torch.equal(control.labels_V, clusters.random_like(made, seed).labels_V)


def test_random_clusters_depend_on_the_seed() -> None:
    made = Clusters.from_labels(torch.arange(200) % 20)
    first, second = clusters.random_like(made, 0), clusters.random_like(made, 1)
    assert not torch.equal(first.labels_V, second.labels_V)
    assert not torch.equal(first.labels_V, made.labels_V)


def test_identity() -> None:
    made = clusters.identity(5)
    assert made.labels_V.tolist() == [0, 1, 2, 3, 4]
    assert made.members_KS.tolist() == [[0], [1], [2], [3], [4]]
    assert made.slots_V.tolist() == [0] * 5


@pytest.mark.parametrize(
    ("labels", "reason"),
    [
        (torch.tensor([0, 2, 2]), "cluster 1 is empty"),
        (torch.tensor([0, -1]), "label -1 is negative"),
        (torch.tensor([0, 2]), "label 2 is above"),
        (torch.tensor([0.0, 1.0]), "not an int64 vector"),
        (torch.tensor([[0, 1]]), "not an int64 vector"),
        (torch.tensor([], dtype=torch.int64), "not an int64 vector"),
    ],
)
def test_labels_that_are_no_partition(labels: Tensor, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Clusters.from_labels(labels)


# --- k-means ---------------------------------------------------------------------------------


def test_kmeans_is_scikit_learns() -> None:
    vectors_VC = codebook().double()
    made = clusters.fit_kmeans(vectors_VC, 16, seed=3, restarts=4)
    reference = KMeans(16, n_init=4, random_state=3).fit(vectors_VC.numpy())
    pairs = set(zip(made.labels_V.tolist(), reference.labels_.tolist(), strict=True))
    assert len(pairs) == 16  # one to one: the same partition
    assert clusters.inertia(vectors_VC, made) == pytest.approx(reference.inertia_, rel=1e-9)


def test_more_restarts_do_not_raise_the_inertia() -> None:
    vectors_VC = codebook()
    one, ten = (
        clusters.inertia(vectors_VC, clusters.fit_kmeans(vectors_VC, 16, restarts=n))
        for n in (1, 10)
    )
    assert ten < one


def test_inertia_of_four_points() -> None:
    vectors_VC = torch.tensor([[0.0, 0.0], [2.0, 0.0], [5.0, 1.0], [5.0, 1.0]])
    assert clusters.inertia(vectors_VC, Clusters.from_labels(torch.tensor([0, 0, 1, 1]))) == 2.0


def test_kmeans_does_not_depend_on_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    # Rounding that moves a label is too rare to wait for, so the cause is looked at, too.
    threads: list[int] = []

    class Watched(KMeans):
        def fit(self, *args: Any, **settings: Any) -> KMeans:
            threads.extend(pool["num_threads"] for pool in threadpool_info())
            return super().fit(*args, **settings)

    monkeypatch.setattr(sklearn.cluster, "KMeans", Watched)
    labels = []
    for limit in (1, 2):
        with threadpool_limits(limits=limit):
            labels.append(clusters.fit_kmeans(codebook(1000), 50, restarts=2).labels_V)
    assert torch.equal(*labels)
    assert set(threads) == {1}


@given(st.integers(1, 12), st.lists(st.integers(0, 11), min_size=12, max_size=40))
@settings(max_examples=25)
def test_equal_vectors_share_a_cluster_and_none_is_empty(count: int, copies: list[int]) -> None:
    vectors_VC = codebook(12)[copies]
    distinct = len(set(copies))
    made = clusters.fit_kmeans(vectors_VC, min(count, distinct), restarts=2)
    assert made.count == min(count, distinct)
    cluster_of = dict(zip(copies, made.labels_V.tolist(), strict=True))
    assert made.labels_V.tolist() == [cluster_of[copy] for copy in copies]


def test_copies_weigh_as_much_as_they_are() -> None:
    points = codebook(60).double()
    copies = torch.cat([torch.arange(60), torch.arange(5).repeat(40)])
    made = clusters.fit_kmeans(points[copies], 8, restarts=2)
    weights = copies.bincount().numpy()
    weighted = KMeans(8, n_init=2, random_state=0).fit(points.numpy(), sample_weight=weights)
    assert made.labels_V[:60].tolist() == weighted.labels_.tolist()
    assert clusters.inertia(points[copies], made) == pytest.approx(weighted.inertia_, rel=1e-9)


def test_empty_clusters_are_filled_with_the_farthest_points_that_have_company() -> None:
    points_UC = np.array([[0.0], [1.0], [3.0], [99.0]])
    centers_KC = np.array([[0.0], [50.0], [-1.0], [-2.0]])
    # Cluster 1 has one point only, which must not be taken although it is the farthest of all.
    labels_U = clusters.fill_empty(np.array([0, 0, 0, 1], np.int32), points_UC, centers_KC)
    assert labels_U.tolist() == [0, 3, 2, 1]


@pytest.mark.filterwarnings("ignore:Number of distinct clusters")
@pytest.mark.parametrize("count", [12, 13])
def test_vectors_too_near_to_tell_apart_still_fill_their_clusters(count: int) -> None:
    near = 1 + torch.arange(12, dtype=torch.float64)[:, None].expand(12, 8) * 1e-10
    vectors_VC = torch.cat([near, -torch.ones(1, 8, dtype=torch.float64)])
    labels = KMeans(count, n_init=1, random_state=0).fit(vectors_VC.numpy()).labels_
    assert len(set(labels.tolist())) < count  # left to itself, scikit-learn fails here
    assert clusters.fit_kmeans(vectors_VC, count, restarts=1).count == count


def test_user_errors_of_kmeans() -> None:
    vectors_VC = codebook(10)
    with pytest.raises(UserError, match=r"got 11 clusters, expected 1 to 10"):
        clusters.fit_kmeans(vectors_VC, 11)
    with pytest.raises(UserError, match=r"got 0 clusters"):
        clusters.fit_kmeans(vectors_VC, 0)
    with pytest.raises(UserError, match=r"only 3 of the 10 code vectors.*\n?.*take 3 clusters"):
        clusters.fit_kmeans(vectors_VC[[0, 1, 2, 2, 2, 2, 2, 2, 2, 2]], 4)
    with pytest.raises(UserError, match="count: got 0, expected 1 or more"):
        ClustersConfig(count=0)
    with pytest.raises(UserError, match="restarts: got 0, expected 1 or more"):
        ClustersConfig(restarts=0)


def test_methods() -> None:
    vectors_VC = codebook(64)
    kmeans = clusters.fit(vectors_VC, KMEANS)
    control = clusters.fit(vectors_VC, dataclasses.replace(KMEANS, method="random"))
    baseline = clusters.fit(vectors_VC, dataclasses.replace(KMEANS, method="identity"))
    assert torch.equal(control.sizes_K, kmeans.sizes_K)
    assert clusters.inertia(vectors_VC, control) > 1.2 * clusters.inertia(vectors_VC, kmeans)
    assert baseline.count == 64
    assert clusters.inertia(vectors_VC, baseline) == 0


# --- swaps -----------------------------------------------------------------------------------


@given(partitions, st.integers(0, 2**32))
def test_a_swap_keeps_the_label(labels_V: Tensor, seed: int) -> None:
    made = Clusters.from_labels(labels_V)
    generator = torch.Generator().manual_seed(seed)
    given_BL = torch.randint(len(labels_V), (3, 7), generator=generator)
    swapped_BL = clusters.swap(given_BL, made, generator)
    assert swapped_BL.dtype == torch.int64
    assert torch.equal(labels_V[swapped_BL], labels_V[given_BL])


def test_a_swap_chooses_all_members_equally_often() -> None:
    made = Clusters.from_labels(torch.tensor([0, 1, 0, 1, 1, 0, 1, 1, 2]))
    codes = torch.tensor([0, 4, 8]).expand(20_000, 3)
    swapped = clusters.swap(codes, made, torch.Generator().manual_seed(0))
    for column in range(3):
        counts = swapped[:, column].bincount(minlength=9)
        members = made.members_KS[column][: made.sizes_K[column]]
        assert int(counts[members].sum()) == 20_000
        if len(members) > 1:
            assert chisquare(counts[members].numpy()).pvalue > 0.01


# --- other clusterings -----------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 7, 50, 200])
def test_average_linkage_is_that_of_scipy(count: int) -> None:
    vectors_VC = codebook()
    labels_V = clusters.fit_average(vectors_VC, count).labels_V.numpy()
    tree = scipy.cluster.hierarchy.linkage(vectors_VC.double().numpy(), "average")
    other_V = scipy.cluster.hierarchy.fcluster(tree, count, "maxclust")
    assert len(np.unique(other_V)) == count
    # The same partition: each pair of labels that occurs is the only one of either label.
    assert len(np.unique(np.stack([labels_V, other_V]), axis=1)[0]) == count


def test_average_linkage_keeps_equal_vectors_together() -> None:
    vectors_VC = codebook(40).repeat(3, 1)
    labels_V = clusters.fit_average(vectors_VC, 30).labels_V
    assert torch.equal(labels_V, labels_V[:40].repeat(3))
    with pytest.raises(UserError, match="only 40 of the 120"):
        clusters.fit_average(vectors_VC, 41)


@pytest.mark.parametrize("count", [1, 6, 8, 64, 200])
def test_balanced_clusters_have_equal_sizes(count: int) -> None:
    vectors_VC = codebook()
    balanced = clusters.fit_balanced(vectors_VC, count, restarts=2)
    assert balanced.count == count
    assert int(balanced.sizes_K.max()) - int(balanced.sizes_K.min()) <= (200 % count > 0)
    if 1 < count < 200:
        control = clusters.random_like(balanced, 0)
        least = clusters.inertia(vectors_VC, clusters.fit_kmeans(vectors_VC, count, restarts=2))
        mine = clusters.inertia(vectors_VC, balanced)
        assert least <= mine < 0.9 * clusters.inertia(vectors_VC, control)


@given(st.integers(0, 2**32 - 1), st.integers(1, 6))
def test_a_balanced_assignment_is_stable(seed: int, count: int) -> None:
    random = np.random.default_rng(seed)
    distance_VK = random.random((24, count))
    room_K = random.multinomial(24, np.full(count, 1 / count))
    labels_V = clusters.assign_balanced(distance_VK, room_K)
    assert np.array_equal(np.bincount(labels_V, minlength=count), room_K)
    own_V = distance_VK[np.arange(24), labels_V]
    worst_K = [own_V[labels_V == k].max(initial=-1) for k in range(count)]
    # No code and cluster would both rather have each other.
    for v, k in np.argwhere(distance_VK < own_V[:, None]):
        assert distance_VK[v, k] >= worst_K[k]


def test_methods_by_name() -> None:
    vectors_VC = codebook()
    for method, direct in (
        ("average", clusters.fit_average(vectors_VC, 8)),
        ("balanced", clusters.fit_balanced(vectors_VC, 8, seed=3, restarts=2)),
    ):
        config = ClustersConfig(method=method, count=8, restarts=2, seed=3)  # type: ignore[arg-type]
        assert torch.equal(clusters.fit(vectors_VC, config).labels_V, direct.labels_V)


def test_central_members_are_the_nearest_to_the_mean_of_their_cluster() -> None:
    codebook_VC = torch.tensor([[0.0], [10.0], [1.0], [5.0], [12.0], [11.5]])
    labels_V = torch.tensor([0, 1, 0, 0, 1, 1])  # means 2 and 11.17
    central_K = clusters.central_members(codebook_VC, Clusters.from_labels(labels_V))
    assert central_K.tolist() == [2, 5]
