"""Distances of feature sets: parity with torchmetrics and prdc, closed forms, invariants."""

from collections.abc import Iterable
from contextlib import redirect_stdout
from functools import reduce
from itertools import permutations, product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from prdc import compute_prdc
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from ctf.common.errors import UserError
from ctf.evaluation import distances
from ctf.evaluation.distances import FeatureStatistics, Gaussian, frechet_distance
from ctf.evaluation.intervals import Estimate, RandomGroups

seeds = st.integers(0, 2**32 - 1)
oracle_warns = pytest.mark.filterwarnings("ignore::UserWarning:torchmetrics")


def features(count: int, dim: int, seed: int, scale: float = 1.0, mean: float = 0.0) -> np.ndarray:
    """Like those of a network: some of them large, some of them seldom above 0."""
    rng = np.random.default_rng(seed)
    scales_D = np.exp(-np.arange(dim) / max(1, dim / 4))
    return np.maximum(rng.normal(mean, scale, (count, dim)), -0.5) * scales_D


def statistics_of(rows_ND: np.ndarray) -> FeatureStatistics:
    statistics = FeatureStatistics(rows_ND.shape[1])
    statistics.add(rows_ND)
    return statistics


def gaussian(rows_ND: np.ndarray) -> Gaussian:
    return statistics_of(rows_ND).gaussian


def random_groups(rows_ND: np.ndarray, seed: int) -> list[FeatureStatistics]:
    groups_N = RandomGroups(np.random.default_rng(seed)).assign(len(rows_ND))
    return [statistics_of(rows_ND[groups_N == group]) for group in range(10)]


def by_svd(a_ND: np.ndarray, b_MD: np.ndarray) -> float:
    """The distance from the features themselves: tr (S1 S2)^(1/2) is the nuclear norm of A B^T."""
    shift_D = a_ND.mean(axis=0) - b_MD.mean(axis=0)
    a, b = ((x - x.mean(axis=0)) / np.sqrt(len(x) - 1) for x in (a_ND, b_MD))
    nuclear = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    return float(shift_D @ shift_D + (a**2).sum() + (b**2).sum() - 2 * nuclear)


class Identity(torch.nn.Module):
    """Takes the place of a network whose outputs are given."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


# Mean and covariance


def merged_in_pairs(parts: list[FeatureStatistics]) -> FeatureStatistics:
    return reduce(lambda a, b: FeatureStatistics.merge([a, b]), parts)


@given(seeds, st.integers(2, 40), st.lists(st.integers(0, 12), max_size=6), st.integers(1, 8))
def test_statistics_do_not_depend_on_batches_or_order(
    seed: int, count: int, batches: list[int], dim: int
) -> None:
    rows = features(count, dim, seed)
    parts = np.split(rows, np.minimum(np.cumsum(batches, dtype=int), count))
    split, reversed_ = FeatureStatistics(dim), FeatureStatistics(dim)
    for part in parts:
        split.add(torch.from_numpy(part))
    for part in reversed(parts):
        reversed_.add(part)
    merged = FeatureStatistics.merge([statistics_of(part) for part in parts])
    tree = merged_in_pairs([statistics_of(part) for part in parts])
    for got in (split, reversed_, merged, tree):
        assert got.count == count
        np.testing.assert_allclose(got.gaussian.mean_D, rows.mean(axis=0), atol=1e-12)
        covariance = np.cov(rows, rowvar=False).reshape(dim, dim)
        np.testing.assert_allclose(got.gaussian.covariance_DD, covariance, atol=1e-12)


def test_a_large_mean_costs_no_precision() -> None:
    """Sums of squares would lose everything here: 1e16 compared to a variance of 1."""
    rows = np.random.default_rng(0).normal(size=(1000, 6))
    shifted = FeatureStatistics(6)
    for part in np.split(rows + 1e8, 10):
        shifted.add(part)
    expected = np.cov(rows, rowvar=False)
    np.testing.assert_allclose(shifted.gaussian.covariance_DD, expected, atol=1e-7)
    np.testing.assert_allclose(
        FeatureStatistics.merge(random_groups(rows + 1e8, 0)).gaussian.covariance_DD,
        expected,
        atol=1e-7,
    )


# FID


@oracle_warns
@pytest.mark.parametrize("count, others, dim", [(300, 400, 64), (900, 700, 128), (60, 500, 20)])
def test_frechet_distance_equals_torchmetrics(count: int, others: int, dim: int) -> None:
    a, b = features(count, dim, 0, 1.2), features(others, dim, 1)
    oracle = FrechetInceptionDistance(feature=Identity(dim))
    oracle.update(torch.from_numpy(b), real=True)
    oracle.update(torch.from_numpy(a), real=False)
    got = frechet_distance(gaussian(a), gaussian(b))
    assert got == pytest.approx(float(oracle.compute()), rel=1e-6)
    a32, b32 = torch.from_numpy(a).float(), b.astype(np.float32)
    assert frechet_distance(gaussian(a32), gaussian(b32)) == pytest.approx(got, rel=1e-5)


@given(seeds, st.integers(1, 12))
def test_frechet_distance_of_diagonal_covariances(seed: int, dim: int) -> None:
    rng = np.random.default_rng(seed)
    means, deviations = rng.normal(size=(2, dim)), rng.uniform(0, 3, (2, dim))
    a, b = (Gaussian(m, np.diag(s**2)) for m, s in zip(means, deviations, strict=True))
    expected = ((means[0] - means[1]) ** 2).sum() + ((deviations[0] - deviations[1]) ** 2).sum()
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_to_a_point_and_of_two_points() -> None:
    point = Gaussian(np.ones(3), np.zeros((3, 3)))
    wide = Gaussian(np.zeros(3), np.diag([1.0, 4.0, 9.0]))
    assert frechet_distance(point, wide) == pytest.approx(3 + 14)
    assert frechet_distance(wide, point) == pytest.approx(3 + 14)
    assert frechet_distance(point, point) == 0


@pytest.mark.parametrize(
    "count, others, rel",
    # The number of images bounds the rank, and so tells which eigenvalues are rounding errors; with
    # many images, features that never fire leave some that cannot be told apart.
    [
        (2, 2, 1e-12),
        (2, 500, 1e-12),
        (500, 2, 1e-12),
        (40, 90, 1e-12),
        (99, 300, 1e-6),
        (300, 100, 1e-6),
    ],
)
def test_frechet_distance_of_singular_covariances(count: int, others: int, rel: float) -> None:
    a, b = features(count, 100, 0, 1.1), features(others, 100, 1)
    a[:, 50:60] = b[:, 70:75] = 0  # features that never fire
    expected = by_svd(a, b)
    assert frechet_distance(gaussian(a), gaussian(b)) == pytest.approx(expected, rel=rel)
    # For stored statistics the number of images is unknown.
    unknown = (Gaussian(g.mean_D, g.covariance_DD) for g in (gaussian(a), gaussian(b)))
    assert frechet_distance(*unknown) == pytest.approx(expected, rel=1e-6)


@given(seeds, st.integers(2, 40), st.integers(2, 40), st.integers(1, 20))
def test_frechet_distance_is_symmetric_rotated_and_never_negative(
    seed: int, count: int, others: int, dim: int
) -> None:
    a, b = features(count, dim, seed, 1.5, 0.2), features(others, dim, seed + 1)
    got = frechet_distance(gaussian(a), gaussian(b))
    assert got >= 0
    assert frechet_distance(gaussian(b), gaussian(a)) == pytest.approx(got, rel=1e-5, abs=1e-6)
    assert frechet_distance(gaussian(a), gaussian(a)) == pytest.approx(0, abs=1e-6)
    rotation, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(dim, dim)))
    rotated = frechet_distance(gaussian(a @ rotation + 3), gaussian(b @ rotation + 3))
    assert rotated == pytest.approx(got, rel=1e-5, abs=1e-6)
    assert frechet_distance(gaussian(7 * a), gaussian(7 * b)) == pytest.approx(
        49 * got, rel=1e-5, abs=1e-5
    )


def repeated(count: int, dim: int, scale: float, mean: float) -> list[Estimate]:
    reference = gaussian(np.random.default_rng(99).normal(size=(5000, dim)))
    return [
        distances.frechet_distance_estimate(
            random_groups(np.random.default_rng(i).normal(mean, scale, (count, dim)), i), reference
        )
        for i in range(200)
    ]


@pytest.mark.parametrize("count, dim", [(400, 10), (150, 30), (30, 40)])
def test_frechet_distance_interval_is_as_wide_as_the_distance_varies(count: int, dim: int) -> None:
    """Also with fewer images than features. What it covers is the mean at that number of images."""
    estimates = repeated(count, dim, 1.3, 0.3)
    values = np.array([e.value for e in estimates])
    error = np.mean([e.standard_error**2 for e in estimates]) ** 0.5
    assert 0.85 < error / values.std(ddof=1) < 1.25
    assert 0.92 <= np.mean([e.low <= values.mean() <= e.high for e in estimates]) <= 0.995


def test_frechet_distance_interval_of_equal_distributions_is_conservative() -> None:
    estimates = repeated(400, 10, 1.0, 0.0)
    values = np.array([e.value for e in estimates])
    error = np.mean([e.standard_error**2 for e in estimates]) ** 0.5
    assert 1 < error / values.std(ddof=1) < 1.6
    assert all(e.low >= 0 for e in estimates)


def test_estimate_is_the_distance_of_all_images() -> None:
    a, reference = features(105, 12, 0, 1.2), gaussian(features(300, 12, 1))
    got = distances.frechet_distance_estimate(random_groups(a, 3), reference)
    assert got.value == pytest.approx(frechet_distance(gaussian(a), reference), rel=1e-9)
    assert got.count == 105 and 0 <= got.low < got.value < got.high


def test_frechet_distance_rejects_invalid_features() -> None:
    a, b = statistics_of(features(9, 4, 0)), gaussian(features(9, 5, 1))
    with pytest.raises(UserError, match="got 4 features per image, but the reference has 5"):
        frechet_distance(a.gaussian, b)
    with pytest.raises(UserError, match="got 1 images, too few for FID: each set needs 2"):
        _ = statistics_of(features(1, 4, 0)).gaussian
    with pytest.raises(UserError, match="got 9 images; an interval over 10 groups"):
        distances.frechet_distance_estimate(random_groups(features(9, 5, 0), 0), b)
    with pytest.raises(UserError, match=r"shape \(4,\) and a covariance of shape \(4,\)"):
        Gaussian(np.zeros(4), np.zeros(4))
    with pytest.raises(UserError, match="not finite"):
        Gaussian(np.zeros(2), np.full((2, 2), np.nan))
    with pytest.raises(UserError, match="of 1 of 9 images are not finite"):
        rows = features(9, 4, 0).astype(np.float32)
        rows[3, 1] = np.inf
        a.add(rows)
    assert a.count == 9  # the bad batch left nothing behind
    with pytest.raises(ValueError, match=r"\(9, 5\), expected \(N, 4\)"):
        a.add(features(9, 5, 0))


# KID


@oracle_warns
def test_kernel_distance_equals_torchmetrics() -> None:
    a, b = features(120, 30, 0, 1.2), features(120, 30, 1)
    oracle = KernelInceptionDistance(feature=Identity(30), subsets=1, subset_size=120)
    oracle.update(torch.from_numpy(b), real=True)
    oracle.update(torch.from_numpy(a), real=False)
    got = distances.kernel_distance(a, b, np.random.default_rng(0))
    assert got.value == pytest.approx(float(oracle.compute()[0]), rel=1e-6)
    for count in (2, 7):  # the groups don't change the value
        other = distances.kernel_distance(a, torch.from_numpy(b), np.random.default_rng(1), count)
        assert other.value == pytest.approx(got.value, rel=1e-9)


@settings(max_examples=30)
@given(seeds, st.integers(4, 12), st.integers(2, 12), st.integers(1, 6))
def test_kernel_distance_is_the_mean_over_pairs(seed: int, n: int, m: int, dim: int) -> None:
    a, b = features(n, dim, seed), features(m, dim, seed + 1, 2.0)

    def mean(pairs: Iterable[tuple[np.ndarray, np.ndarray]]) -> float:
        return float(np.mean([(x @ y / dim + 1) ** 3 for x, y in pairs]))

    expected = mean(permutations(a, 2)) + mean(permutations(b, 2)) - 2 * mean(product(a, b))
    got = distances.kernel_distance(a, b, np.random.default_rng(seed), 2)
    assert got.value == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_kernel_distance_interval_is_as_wide_as_the_distance_varies() -> None:
    reference = np.random.default_rng(99).normal(size=(500, 10))
    estimates = [
        distances.kernel_distance(
            np.random.default_rng(i).normal(0.3, 1.2, (150, 10)),
            reference,
            np.random.default_rng(i),
        )
        for i in range(200)
    ]
    values = np.array([e.value for e in estimates])
    error = np.mean([e.standard_error**2 for e in estimates]) ** 0.5
    assert error == pytest.approx(values.std(ddof=1), rel=0.15)
    assert 0.92 <= np.mean([e.low <= values.mean() <= e.high for e in estimates]) <= 0.99


def test_kernel_distance_rejects_too_few_images_and_other_features() -> None:
    rng, a = np.random.default_rng(0), features(20, 4, 0)
    with pytest.raises(UserError, match="got 8 images; an interval over 10 groups needs 10"):
        distances.kernel_distance(a[:8], a, rng)
    with pytest.raises(UserError, match="got 1 images, too few for KID: each set needs 2"):
        distances.kernel_distance(a, a[:1], rng)
    with pytest.raises(UserError, match="got 4 features per image, but the reference has 3"):
        distances.kernel_distance(a, a[:, :3], rng)


# Precision, recall, density, coverage


def oracle_scores(a: np.ndarray, b: np.ndarray, k: int) -> dict[str, float]:
    with redirect_stdout(None):
        return {key: float(value) for key, value in compute_prdc(b, a, k).items()}


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("count, others, dim", [(300, 250, 16), (40, 400, 64)])
def test_manifold_scores_equal_prdc(
    count: int, others: int, dim: int, dtype: type, k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distances, "BLOCK", 7000)  # several blocks, the last one smaller
    a = features(count, dim, 0, 0.9, 0.15).astype(dtype)
    b = features(others, dim, 1).astype(dtype)
    got = distances.manifold_scores(a, torch.from_numpy(b), k, k)
    assert vars(got) == pytest.approx(oracle_scores(a, b, k), rel=1e-9)
    assert 0 < got.recall < 1 and 0 < got.coverage < 1


def test_each_pair_of_scores_has_its_own_k() -> None:
    a, b = features(200, 16, 0, 0.9, 0.15), features(150, 16, 1)
    got = vars(distances.manifold_scores(a, b))
    three, five = oracle_scores(a, b, 3), oracle_scores(a, b, 5)
    assert got == pytest.approx({**five, **{x: three[x] for x in ("precision", "recall")}})


@settings(max_examples=40)
@given(seeds, st.integers(7, 30), st.integers(7, 30), st.integers(1, 3), st.integers(1, 5))
def test_ties_and_copies_count_as_in_exact_arithmetic(
    seed: int, count: int, others: int, dim: int, k: int
) -> None:
    """On a small grid nearly all distances are tied; prdc's are exact there."""
    rng = np.random.default_rng(seed)
    a, b = (rng.integers(0, 3, (n, dim)).astype(np.float64) for n in (count, others))
    expected = oracle_scores(a, b, k)
    assert vars(distances.manifold_scores(a, b, k, k)) == pytest.approx(expected)
    moved = vars(distances.manifold_scores(a / 3 + 1000, b / 3 + 1000, k, k))
    assert moved == pytest.approx(expected)


@given(seeds, st.integers(1, 5))
def test_a_set_covers_itself(seed: int, k: int) -> None:
    a = features(60, 5, seed, mean=50)
    got = distances.manifold_scores(a.copy(), a[::-1], k, k)
    assert vars(got) == pytest.approx(dict(precision=1, recall=1, density=1, coverage=1))


def test_a_large_mean_does_not_change_manifold_scores() -> None:
    a, b = features(200, 16, 0, 0.9, 0.15), features(150, 16, 1)
    assert distances.manifold_scores(a + 1e6, b + 1e6) == distances.manifold_scores(a, b)


def test_manifold_scores_of_disjoint_and_of_collapsed_sets() -> None:
    a, b = features(50, 6, 0), features(60, 6, 1)
    far = distances.manifold_scores(a + 100, b)
    assert vars(far) == dict(precision=0, recall=0, density=0, coverage=0)
    # One good image repeated: precise, but it covers next to nothing.
    collapsed = distances.manifold_scores(np.tile(b[:1], (50, 1)), b)
    assert collapsed.precision == 1 and collapsed.recall == 0 and collapsed.coverage < 0.5


def test_manifold_scores_need_more_images_than_neighbours() -> None:
    a = features(30, 4, 0)
    with pytest.raises(UserError, match="got 3 images, too few for recall: each set needs 4"):
        distances.manifold_scores(a[:3], a)
    with pytest.raises(
        UserError,
        match="got 5 images, too few for precision, density and coverage: each set needs 6",
    ):
        distances.manifold_scores(a, a[:5])
    assert distances.manifold_scores(a[:4], a[:6]).precision == 1


# Reservoir


@given(st.integers(0, 80), st.lists(st.integers(0, 30), max_size=6), st.integers(1, 40))
def test_reservoir_does_not_depend_on_the_batches(
    count: int, batches: list[int], size: int
) -> None:
    rows = np.arange(count, dtype=np.float32)[:, None]
    whole, split = (distances.Reservoir(size, 1, np.random.default_rng(2)) for _ in range(2))
    whole.add(rows)
    for part in np.split(rows, np.minimum(np.cumsum(batches, dtype=int), count)):
        split.add(torch.from_numpy(part))
    assert whole.count == split.count == count
    np.testing.assert_array_equal(whole.rows_ND, split.rows_ND)
    assert len(set(whole.rows_ND[:, 0])) == len(whole.rows_ND) == min(size, count)
    if count <= size:
        np.testing.assert_array_equal(whole.rows_ND, rows)


def test_reservoir_keeps_each_row_with_equal_probability() -> None:
    kept, trials = np.zeros(5), 4000
    for seed in range(trials):
        reservoir = distances.Reservoir(2, 1, np.random.default_rng(seed))
        reservoir.add(np.arange(5)[:, None])
        kept[reservoir.rows_ND[:, 0].astype(int)] += 1
    # 2 of 5, +- 4 standard deviations
    assert np.abs(kept / trials - 0.4).max() < 4 * (0.4 * 0.6 / trials) ** 0.5
